"""Documented commands run: every `siftune` line in a bash block of the README and of every page, in order, on a small pool.

A line marked `# needs a ...` (a hub model, a server, a cluster, your files) or `# takes minutes` is only read by the real
command line; the tutorial has a test of its own. The README's Python blocks that load a pool run.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from siftune.cli.main import main
from siftune.demo import corpus
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
READ_ONLY = re.compile(r"#.*\b(needs|takes minutes)\b")
RECIPE = "model: ./model\ntrain: selected.jsonl\nsft: {max_steps: 2, per_device_train_batch_size: 8, max_length: 64}\n"
POOL_ROWS = 600


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[tuple[list[str], bool]]:
    """The words after `siftune` of every command of a page, and whether it can run without the hub."""
    found = []
    for block in blocks(page, "(?:bash|sh|console|shell)"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ").strip()
            if line.startswith("siftune ") and "..." not in line and "…" not in line:
                found.append((shlex.split(line, comments=True)[1:], READ_ONLY.search(line) is None))
    return found


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if commands(page)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages take it for granted: a pool, seeds, chosen and held-out rows, recipe.yaml and ./model."""
    folder = tmp_path_factory.mktemp("made")
    corpus.write(folder, count=POOL_ROWS, per_domain=5, held=40, seed=1)
    rows = (folder / "pool.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "selected.jsonl").write_text("".join(rows[:60]), encoding="utf-8")
    for name in ("held-out", "m", "c", "queries"):
        shutil.copyfile(folder / "held_out.jsonl", folder / f"{name}.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE)
    save_tiny(folder / "model")
    return folder


@pytest.fixture
def prepared(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, with examples/, to work in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr("siftune.records.SHARD_ROWS", POOL_ROWS // 2)  # so that a small pool has two parts
    monkeypatch.chdir(tmp_path)
    return tmp_path


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's words are read and then nothing is done."""

    class UnderstoodError(BaseException):
        pass

    def stop(*_: object, **__: object) -> None:
        raise UnderstoodError

    targets = (
        "siftune.runs.select.select",
        "siftune.runs.select.recut",
        "siftune.runs.plan.plan",
        "siftune.demo.story.run",
    )
    others = ("siftune.runs.loop.loop", "siftune.sft.recipe.Recipe.read", "siftune.runs.evaluate.Job.__init__")
    others += (
        "siftune.reports.run_ledger.open_ledger",
        "siftune.reports.report.write",
        "siftune.study.spec.read_study",
        "siftune.integrations.launch.launch",
    )
    for target in (*targets, *others):
        monkeypatch.setattr(target, stop)
    try:
        code = main(words)
    except UnderstoodError:
        return
    assert code == 0, f"siftune {shlex.join(words)}: {capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(
    page: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, runs in commands(page):
        if runs and page.stem != "tutorial":  # test_tutorial runs those
            code = main(words)
            assert code == 0, f"siftune {shlex.join(words)}: {capsys.readouterr().err}"
        else:
            with monkeypatch.context() as patched:
                understood(words, patched, capsys)


def test_most_commands_really_run() -> None:
    # `siftune run` starts another framework's command; tests/integration/test_run_command.py runs it.
    runs = [runs for page in PAGES for words, runs in commands(page) if words[0] != "run"]
    assert len(runs) > 50
    assert sum(runs) > 0.6 * len(runs)


@pytest.mark.slow
def test_the_readmes_python_runs_on_a_pool(prepared: Path) -> None:
    found = [block for block in blocks(ROOT / "README.md", "python") if "load_pool(" in block]
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), {})
    assert (prepared / "selected.jsonl").is_file()


def test_shipped_yaml_in_pages_is_read() -> None:
    import yaml

    from siftune.cli.common import own_options
    from siftune.cli.select import select_command

    for block in blocks(ROOT / "docs" / "cli.md", "yaml"):
        config = yaml.safe_load(block)
        known = {option.name for option in select_command("daar", own_options("daar")).options} | {"method"}
        assert {key.replace("-", "_") for key in config} <= known
