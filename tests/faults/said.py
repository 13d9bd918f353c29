"""Commands run in this process, what they said, and the counts that `scripts/reliability.py` gathers."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from siftune.cli.main import main


class Said(NamedTuple):
    """A command's exit code and both streams."""

    code: int
    out: str
    err: str


def siftune(words: Sequence[str | Path]) -> Said:
    """`siftune WORDS...`, here; it never raises."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Said(code, out.getvalue(), err.getvalue())


def refused(said: Said) -> str:
    """The one sentence of a command that refused its input."""
    lines = [line for line in said.err.splitlines() if not line.startswith("siftune: note: ")]
    assert said.code == 2, said
    assert len(lines) == 1, said.err
    assert lines[0].startswith("siftune: ")
    assert "Traceback" not in said.err
    lines[0].encode()
    return lines[0]


def count(what: str, number: int = 1) -> None:
    """Add to the counts of a run of the suite; nothing happens without the file that gathers them."""
    if path := os.environ.get("SIFTUNE_FAULT_COUNTS"):
        with open(path, "a", encoding="utf-8") as counts:
            counts.write(json.dumps([what, number]) + "\n")


def add_up(run: Path) -> dict[str, int]:
    """Check that every row of a finished run is accounted for exactly once; returns the counts."""
    rows = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["rows"]
    table = pq.read_table(run / "rows.parquet", columns=["row", "kept", "score", "reason"]).to_pydict()
    assert table["row"] == list(range(rows["read"]))
    kept, scored, silent = sum(table["kept"]), 0, 0
    for is_kept, score, reason in zip(table["kept"], table["score"], table["reason"], strict=True):
        assert (score is None) == (reason is not None), "a row has a score or a reason"
        assert not (is_kept and score is None)
        scored, silent = scored + (score is not None), silent + (reason is not None)
    assert kept == rows["kept"]
    assert silent == sum(rows["reasons"].values())
    assert scored + silent == rows["read"]
    with open(run / "selected.jsonl", "rb") as chosen:
        assert sum(1 for _ in chosen) == kept
    return {"rows": rows["read"], "kept": kept, "silent": silent}


def no_torn_files(*folders: Path, killed: bool = False) -> None:
    """Everything that can be read is whole: JSON parses, safetensors and Parquet open. No temporaries are left, except
    right after a kill; a trainer's own checkpoints count once they are complete, and are not looked at."""
    from safetensors import safe_open

    for folder in folders:
        for path in sorted(folder.rglob("*")):
            temporary = any(part.endswith("-tmp") for part in path.parts)
            assert killed or not temporary, path
            if temporary or "checkpoints" in path.parts:
                continue
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np") as opened:
                    list(opened.keys())
            elif path.suffix == ".parquet":
                pq.read_metadata(path)
