"""The tutorial, from top to bottom in an empty folder, as a reader goes through it: Python, YAML files, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from siftune.cli.main import main
from tests.docs.test_readme import READ_ONLY, ROOT

PAGE = ROOT / "docs" / "tutorial.md"


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for needed in ("trl", "peft", "plotly", "openTSNE"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ran: list[str] = []
    names: dict[str, object] = {}
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), names)
        elif language == "yaml":
            (tmp_path / block.split("\n")[0].removeprefix("# ")).write_text(block)
        else:
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "siftune", line
                if READ_ONLY.search(line):
                    continue
                assert main(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"
                ran.append(words[1])
    assert {"plan", "select", "keep", "report", "train", "compare"} <= set(ran)
    assert len((tmp_path / "selected.jsonl").read_text().splitlines()) == 400  # as the page says
    assert len((tmp_path / "ten-percent.jsonl").read_text().splitlines()) == 200
    for run in ("first", "sifted"):
        assert (tmp_path / "runs" / run / "report.html").is_file()
    import pyarrow.parquet as pq

    ledger = pq.read_table(tmp_path / "runs" / "sifted" / "siftune" / "selection.parquet")
    assert ledger["kept"].to_pylist().count(True) == 6 * 8
    assert ledger.num_rows == 6 * 32
