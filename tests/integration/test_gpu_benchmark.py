"""benchmarks/gpu.py, which no machine of the tests can run in full: its sections at a tiny size, its clock, its page."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("datasets", "jsonargparse", "rich", "trl", "gguf", "plotly", "matplotlib")
"""What a bare training machine lacks."""


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("gpu", monkeypatch)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("run", monkeypatch)


def rehearse(out: Path, *sections: str, path: Path | None = None) -> list[dict[str, Any]]:
    """The results of some sections at a tiny size, `path` first on the interpreter's path."""
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--rehearse", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, [path, ROOT])))}
    done = subprocess.run([*words, "--only", *sections], env=env, capture_output=True, text=True, check=False)
    logs = "".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in out.glob("*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr + logs
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_packages(folder: Path) -> Path:
    """A folder whose sitecustomize hides the packages that a bare training machine lacks."""
    (folder / "sitecustomize.py").write_text(
        "import importlib.machinery as machinery\n"
        "original = machinery.PathFinder.find_spec\n"
        "def find_spec(cls, name, path=None, target=None):\n"
        f"    return None if name.split('.')[0] in {ABSENT!r} else original(name, path, target)\n"
        "machinery.PathFinder.find_spec = classmethod(find_spec)\n"
    )
    return folder


def status(results: list[dict[str, Any]]) -> dict[str, str]:
    return {line["section"]: line["status"] for line in results if line["what"] == "section"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_section_runs_on_a_bare_training_machine(tmp_path: Path) -> None:
    sections = ("right", "uds", "step", "daar", "norms", "study")
    results = rehearse(tmp_path / "out", *sections, path=without_packages(tmp_path))
    assert status(results) == {**dict.fromkeys(sections, "ok"), "study": "skipped"}
    by_section = {name: [line for line in results if line["section"] == name] for name in sections}
    assert all(len(lines) > 1 for name, lines in by_section.items() if name != "study")
    assert {line["outcome"] for line in by_section["right"] if line["what"] == "test"} == {"passed"}
    assert {line["norms"] for line in by_section["uds"] if line["what"] == "scores"} == {
        "exact, eigenvalues", "exact, polar", "fast",
    }  # fmt: skip
    assert [line["checkpointing"] for line in by_section["step"] if line["what"] == "step"] == [False, True]
    assert all(line["error"] < 1e-6 for line in by_section["norms"] if line.get("way") in ("eigenvalues", "polar"))
    assert "datasets, jsonargparse, rich, trl" in (tmp_path / "out" / "study.md").read_text()
    assert "embedded demo corpus" in (tmp_path / "out" / "daar.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_study_runs(tmp_path: Path) -> None:
    results = rehearse(tmp_path, "study")
    assert status(results) == {"study": "ok"}
    assert sorted(line["run"] for line in results if line["what"] == "run") == ["full-random-seed0", "full-uds-seed0"]
    assert "| uds |" in (tmp_path / "study.md").read_text()


class TestTheClock:
    """Sections that print a figure and then do something else."""

    def run(self, gpu: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, then: str, box: float) -> tuple[str, Path]:
        line = json.dumps({"section": "uds", "what": "scores", "seconds": 1})
        (folder / "gpu_sections.py").write_text(f"import sys, time\nprint({line!r}, flush=True)\n{then}\n")
        monkeypatch.setattr(gpu, "HERE", folder)
        out = folder / "out"
        return gpu.run_section("uds", box, [], gpu.Results(out, anew=True)), out

    @pytest.mark.parametrize(
        ("then", "box", "expected", "note"),
        [
            ("print('| a |')", 60, "ok", ""),
            ("raise ValueError('out of memory')", 60, "failed", "exit status 1: ValueError: out of memory"),
            ("sys.exit(77)", 60, "skipped", ""),
            ("time.sleep(60)", 2, "out of time", "Out of time after 2 s"),
        ],
    )
    def test_a_section_ends_and_its_lines_count(
        self, then: str, box: float, expected: str, note: str, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started = time.monotonic()
        outcome, out = self.run(gpu, tmp_path, monkeypatch, then, box)
        assert outcome == expected
        assert time.monotonic() - started < 40
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [line["what"] for line in lines] == ["scores", "section"]
        assert lines[1]["status"] == expected
        assert note in (out / "uds.md").read_text()

    def test_what_a_section_started_ends_with_it(
        self, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started = "import subprocess; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
        outcome, _ = self.run(gpu, tmp_path, monkeypatch, started, 2)
        assert outcome == "out of time", "the child kept the pipe open"

    def test_the_sections_fit_into_nine_minutes(self, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert gpu.TOTAL < 540
        assert sum(section.box for name, section in gpu.SECTIONS.items() if name != "study") < gpu.TOTAL
        assert list(module("gpu_sections", monkeypatch).SECTIONS) == list(gpu.SECTIONS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--rehearse"),
        (["--device", "cpu", "--rehearse", "--rows", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_runs_that_cannot_work_are_refused(
    words: list[str], message: str, gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert message in capsys.readouterr().err


def test_a_folder_holds_results_of_one_kind(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"device": "cuda", "rehearsal": false}')
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--rehearse", "--out", str(tmp_path)])
    assert "another --out" in capsys.readouterr().err


class TestThePage:
    def results(self, folder: Path, **facts: Any) -> Path:
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"device": "cuda", "rehearsal": False} | facts))
        lines = [
            {"section": "uds", "what": "scores", "seconds": 1},
            {"section": "uds", "what": "section", "status": "ok"},
            {"section": "step", "what": "section", "status": "failed"},
        ]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        shown = "Some CPU; 16 cores; Some GPU; torch 9.9; 2026-12-01\n\n| norms | share |\n|---|---|\n| fast | 1.7% |\n"
        (folder / "uds.md").write_text(shown)
        (folder / "step.md").write_text("Failed with exit status 1: no message\n")
        return folder

    def test_figures_are_taken_in(self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        page = tmp_path / "benchmarks.md"
        page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
        monkeypatch.setattr(run, "PAGE", page)
        before = run.sections(page.read_text())
        monkeypatch.setattr(sys, "argv", ["run.py", "--take", str(self.results(tmp_path / "results"))])
        run.main()
        text = page.read_text()
        assert "Some GPU; torch 9.9; 2026-12-01" in text
        assert "| fast | 1.7% |" in text
        after = run.sections(text)
        assert set(after) == set(before) | {"gpu-uds"}, "a section that measured nothing is not taken"
        assert all(after[name] == before[name] for name in before if name != "gpu-uds")
        assert "python benchmarks/gpu.py --only step`\n\nNot measured (needs a CUDA GPU)" in text

    def test_a_rehearsal_is_refused(self, run: Any, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="rehearsal on cpu"):
            run.take(self.results(tmp_path / "results", device="cpu", rehearsal=True))
        with pytest.raises(SystemExit, match=r"no run\.json"):
            run.take(tmp_path)

    def test_the_page_is_as_its_script_writes_it(
        self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = (ROOT / "docs" / "benchmarks.md").read_text()
        monkeypatch.setattr(run, "PAGE", tmp_path / "page.md")
        run.write(run.sections(text))
        assert (tmp_path / "page.md").read_text() == text


def test_the_versions_to_bring_along_are_those_of_the_constraints(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    lines = (ROOT / "benchmarks" / "gpu-requirements.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert all(line in pins for line in listed)
    names = {line.split("==")[0].lower() for line in listed}
    assert {"datasets", "jsonargparse", "rich", "trl", "pytest"} <= names
