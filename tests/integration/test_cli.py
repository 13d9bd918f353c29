"""The command line: every mistake is one sentence with exit code 2, help is quick, options come from the dataclasses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from siftune import registry
from siftune.cli.compare import CompareOptions
from siftune.cli.main import COMMANDS, main
from siftune.cli.parser import Command
from siftune.errors import MissingExtra, UserError
from siftune.runs.cut import Budget
from siftune.runs.options import Cutting, Everywhere, SelectOptions, options_of, pairs

ROW = {"instruction": "add 1 and 2", "input": "", "output": "3"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{**ROW, "instruction": f"add 1 and {index}"} for index in range(50)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    read = capsys.readouterr()
    return code, read.out, read.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["selct"], ["selct", "did you mean select"]),
        (["select"], ["needs a method", "random, daar"]),
        (["select", "randm", "pool.jsonl"], ["randm", "did you mean random"]),
        (["select", "random"], ["no pool"]),
        (["select", "random", "pool.jsonl", "--kep", "3"], ["--kep", "did you mean --keep"]),
        (["select", "random", "pool.jsonl", "--keep"], ["--keep needs a value"]),
        (["select", "random", "pool.jsonl", "--keep", "0"], ["keep=0"]),
        (["select", "random", "pool.jsonl", "--keep", "51"], ["51", "50 usable rows"]),
        (["select", "random", "pool.jsonl", "--keep", "0.5%"], ["less than one row"]),
        (["select", "random", "pool.jsonl", "--keep", "150%"], ["150%"]),
        (["select", "random", "pool.jsonl", "--keep", "x"], ["'x'", "cannot parse keep"]),
        (["select", "random", "pool.jsonl", "--keep", "3", "--tokens", "9"], ["--keep and --tokens", "two budgets"]),
        (["select", "random", "pool.jsonl", "--tokens", "0"], ["--tokens must be >= 1, got 0"]),
        (["select", "random", "pool.jsonl", "--quota", "a=5%"], ["--quota", "domains"]),
        (["select", "random", "pool.jsonl", "--quota", "a"], ["--quota", "name=value"]),
        (["select", "random", "pool.jsonl", "--target-mix", "a=x"], ["--target-mix"]),
        (["select", "random", "pool.jsonl", "--seed", "two"], ["--seed two", "whole number"]),
        (["select", "random", "pool.jsonl", "--on-bad-row", "stop"], ["--on-bad-row stop", "error, skip"]),
        (["select", "random", "pool.jsonl", "--json=1"], ["--json is a switch and has no value, got '1'"]),
        (["select", "random", "--keep", "--json"], ["--keep needs a value (a whole number"]),
        (["select", "random", "--pool", "pool.jsonl"], ["has no option --pool"]),
        (["select", "random", "pool.jsonl", "--out.x=3"], ["has no option --out.x", "did you mean --out"]),
        (["select", "random", "pool.jsonl", "--json.x"], ["has no option --json.x", "did you mean --json"]),
        (["select", "random", "pool.jsonl", "--see", "3"], ["has no option --see", "did you mean --seed"]),
        (["select", "--keep", "3"], ["needs a method"]),
        (["train", "recipe.yaml", "--set", "--quiet"], ["--set (nothing) is not KEY=VALUE"]),
        (["compare", "study.yaml", "--set", "rows"], ["--set rows is not KEY=VALUE"]),
        (["select", "random", "pool.jsonl", "--out", "a.xlsx"], ["a.xlsx", ".jsonl"]),
        (["select", "random", "pool.jsonl", "--out", "."], ["--out .", "folder"]),
        (["select", "random", "pool.jsonl", "--shards", "3/2"], ["3/2"]),
        (["select", "random", "absent.jsonl"], ["absent.jsonl"]),
        (["select", "random", "pool.jsonl", "--config", "absent.yaml"], ["absent.yaml"]),
        (["select", "random", "pool.jsonl", "--run", "pool.jsonl"], ["pool.jsonl"]),
        (["keep", "nowhere", "--out", "a.jsonl"], ["nowhere", "manifest.json"]),
        (["keep", "nowhere"], ["--out"]),
        (["keep", "--out", "a.jsonl"], ["run folder"]),
        (["keep", "a", "b", "--out", "a.jsonl"], ["one argument run, got a and b"]),
        (["methods", "extra"], ["extra"]),
        (["demo", "--rows", "3"], ["--rows must be >= 100, got 3"]),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], named: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("siftune: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in named:
        assert part in err
    assert not (here / "siftune-runs").exists(), "a refused command leaves nothing"


def test_a_bad_row_is_named_before_anything_is_loaded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.jsonl").write_text(json.dumps(ROW) + "\n{oops\n" + json.dumps({**ROW, "output": ""}) + "\n")
    code, _, err = said(capsys, "select", "random", "bad.jsonl", "--keep", "1")
    assert code == 2
    for part in ("bad.jsonl", "line 2", "unparsable", "empty answer", "--on-bad-row skip"):
        assert part in err
    code, out, _ = said(capsys, "select", "random", "bad.jsonl", "--keep", "1", "--on-bad-row", "skip", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == {
        "read": 3,
        "usable": 1,
        "duplicates": 0,
        "reasons": {"empty answer": 1, "unparsable line": 1},
        "kept": 1,
    }


def test_select_quiet_prints_the_path_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "select", "random", "--keep", "10%", "pool.jsonl", "--quiet", "--out", "a/b.jsonl")
    assert (code, out, err) == (0, "a/b.jsonl\n", "")
    assert len((here / "a/b.jsonl").read_text().splitlines()) == 5


def test_select_tells_a_person_what_happened(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "select", "random", "pool.jsonl", "--run", "r")
    assert code == 0
    for part in ("kept 10 of 50 rows (20.0 %)", "r/selected.jsonl", "score", "peak memory", "siftune keep r"):
        assert part in out
    assert "\x1b[" not in out, "no colour codes in a pipe"


def test_dry_run_computes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "select", "random", "pool.jsonl", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["rows"]["usable"] == 50
    assert not (here / "siftune-runs").exists()


def test_configuration_files_are_strict_and_the_command_line_wins(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "a.yaml").write_text("method: random\npool: pool.jsonl\nkeep: 1/10\non-bad-row: skip\n")
    code, out, _ = said(capsys, "select", "--config", "a.yaml", "--json", "--keep", "7")
    assert code == 0
    assert json.loads(out)["rows"]["kept"] == 7
    assert json.loads(out)["config"]["on_bad_row"] == "skip"
    (here / "b.yaml").write_text("method: random\nkeeep: 3\n")
    code, _, err = said(capsys, "select", "random", "pool.jsonl", "--config", "b.yaml")
    assert code == 2
    assert "keeep" in err
    assert "did you mean keep" in err
    (here / "c.yaml").write_text("keep: [1, 2]\n")
    assert said(capsys, "select", "random", "pool.jsonl", "--config", "c.yaml")[0] == 2
    (here / "d.yaml").write_text("- keep\n")
    assert said(capsys, "select", "random", "pool.jsonl", "--config", "d.yaml")[0] == 2
    (here / "e.yaml").write_text("!!python/object/apply:os.system ['touch owned']\n")
    assert said(capsys, "select", "random", "pool.jsonl", "--config", "e.yaml")[0] == 2
    assert not (here / "owned").exists()


def test_a_run_folders_own_configuration_repeats_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["select", "random", "pool.jsonl", "--keep", "0.3", "--seed", "4", "--quiet"]
    first = said(capsys, *words)[1].strip()
    again = said(capsys, "select", "--config", str(Path(first).parent / "config.yaml"), "--json")[1]
    assert json.loads(again)["out"] == first, "the same options find the same run"
    assert {stage["status"] for stage in json.loads(again)["stages"]} == {"reused"}


def test_a_fault_of_ours_is_exit_1_with_a_hint(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(words: list[str]) -> int:
        raise RuntimeError("wires\ncrossed")

    monkeypatch.setattr("siftune.cli.methods.run", broken)
    code, _, err = said(capsys, "methods")
    assert code == 1
    assert "RuntimeError" in err
    assert "wires crossed" in err
    assert "hint:" in err


def test_methods_lists_the_whole_registry(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "methods", "--json")
    assert code == 0
    assert [(line["side"], line["name"]) for line in json.loads(out)] == [
        (entry.side, entry.name) for entry in registry.methods()
    ]
    _, table, _ = said(capsys, "methods")
    for entry in registry.methods():
        assert entry.name in table


def test_help_and_methods_load_no_torch() -> None:
    for words in (["--help"], ["methods"], ["select", "--help"], ["version"], ["keep", "--help"]):
        check = (
            "import sys; from siftune.cli.main import main; code = main(sys.argv[1:]); "
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
        )
        ran = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout


def test_help_shows_every_option_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["select", "random", "--help"], ["keep", "--help"], ["demo", "--help"], ["plan", "--help"]):
        code, out, _ = said(capsys, *words)
        assert code == 0
        assert "examples:" in out
        assert "None" not in out.replace("None:", "")
    _, out, _ = said(capsys, "select", "daar", "--help")
    for option in (*options_of(SelectOptions), *options_of(registry.find("offline", "daar").load(), skip=("seed",))):
        assert option.help, f"{option.name} has no docstring"
        if option.name != "pool":
            assert option.flag in out


def test_python_dash_m_is_the_same(here: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "siftune", "nope"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("siftune: ")


def test_options_take_words_anywhere_and_pairs() -> None:
    command = Command("x", "x", "x", options_of(SelectOptions), "pool")
    read = command.read(["a", "--quota", "math=50%,*=3", "b", "--target-mix=m=0.5,n=2", "--", "--c"])
    assert read["pool"] == ["a", "b", "--c"]
    assert read["quota"] == {"math": "50%", "*": "3"}
    assert read["target_mix"] == {"m": 0.5, "n": 2.0}
    assert pairs({"a": 1}) == {"a": 1}
    with pytest.raises(UserError, match="name=value"):
        pairs("a=,b")


def test_every_option_of_everywhere_is_on_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in set(COMMANDS) - {"run"}:  # the options of siftune run are its method's
        _, out, _ = said(capsys, name, "--help")
        for option in options_of(Everywhere):
            assert option.flag in out or (name, option.name) in (
                ("keep", "run"),
                ("report", "run"),
                ("ledger", "run"),
            ), (
                name,
                option.flag,
            )


def test_a_repeated_setting_adds_to_the_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("set: {a: '0', c: '3'}\n")
    command = Command("x", "x", "x", options_of(CompareOptions), "study", fixed=())
    read = command.read(["--set", "a=[1, b=2]", "s", f"--config={tmp_path}/a.yaml", "--set=b=1e-4"])
    assert read["set"] == {"a": "[1, b=2]", "b": "1e-4", "c": "3"}
    assert read["study"] == "s"


@pytest.mark.parametrize("words", [["--seed", "3", "--config", "a.yaml"], ["--config=a.yaml", "--seed=3"]])
def test_the_command_line_wins_on_either_side_of_the_configuration(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("seed: 7\nrun: r\npool: [p.jsonl]\n")
    read = Command("x", "x", "x", options_of(SelectOptions), "pool").read(words)
    assert (read["seed"], read["run"], read["pool"]) == (3, "r", ["p.jsonl"])


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ({}, {"fraction": 0.2}),
        ({"keep": 8}, {"count": 8}),
        ({"keep": "1/8"}, {"fraction": 0.125}),
        ({"tokens": 5}, {"tokens": 5}),
        ({"quota": {"a": "1%"}}, {"quota": {"a": "1%"}}),
        ({"target_mix": {"a": 1.0}}, {"fraction": 0.2, "target_mix": {"a": 1.0}}),
    ],
)
def test_budgets(said: dict[str, object], rule: dict[str, object]) -> None:
    assert Budget.read(Cutting(**said)).rule == rule  # type: ignore[arg-type]


def test_a_finished_selection_leaves_its_page_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    assert said(capsys, "select", "length", "pool.jsonl", "--run", "r")[0] == 0
    page = here / "r" / "report.html"
    assert "<html" in page.read_text()[:200]
    page.unlink()
    code, out, _ = said(capsys, "select", "length", "pool.jsonl", "--run", "r")
    assert code == 0
    assert "r/report.html   the page of this run" in out
    assert page.is_file()


def test_a_page_that_cannot_be_made_does_not_fail_the_run(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> Path:
        raise MissingExtra("plotly", extra="report", needed_for="siftune report")

    monkeypatch.setattr("siftune.reports.report.write", missing)
    code, out, _ = said(capsys, "select", "length", "pool.jsonl", "--run", "r")
    assert code == 0
    assert "siftune report r   the page of this run (siftune report needs plotly" in " ".join(out.split(" "))
    assert "pip install 'siftune[report]'" in out
    assert (here / "r" / "selected.jsonl").is_file()
