"""A million distinct rows through the whole of `siftune select daar` with a tiny model: memory, time, every row once.

SIFTUNE_SOAK_ROWS sets another number. The memory bar is what the run's peak lies above that of the same command on a
pool of 5,000 rows: libraries, model and one shard are in both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.faults.inputs import write_inputs, write_pool
from tests.faults.said import count
from tests.tiny import save_tiny

ROWS = int(os.environ.get("SIFTUNE_SOAK_ROWS", "1000000"))
FEW = 5000


def selected(folder: Path, rows: int) -> tuple[int, float]:
    """Peak megabytes and seconds of a selection from a pool of that many rows, in a process of its own."""
    pool = write_pool(folder / f"{rows}.jsonl", rows)
    run = folder / f"run-{rows}"
    words = ["select", "daar", pool, "--model", folder / "thin", "--seeds", folder / "seeds.jsonl", "--layer", "1"]
    words += ["--keep", "20%", "--probe-rows", "2000", "--quiet", "--run", run, "--cache", folder / f"cache-{rows}"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "siftune", *map(str, words)], check=True)
    seconds = time.perf_counter() - started
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["rows"]["read"] == rows
    assert manifest["rows"]["kept"] == rows // 5
    with open(run / "selected.jsonl", "rb") as chosen:
        assert sum(1 for _ in chosen) == rows // 5
    assert pq.read_metadata(run / "rows.parquet").num_rows == rows
    return int(manifest["peak_memory_mb"]), seconds


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_a_million_rows_are_scored_in_two_gigabytes(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path, 20)
    save_tiny(folder / "thin", layers=1, width=16)
    few, _ = selected(folder, FEW)
    many, seconds = selected(folder, ROWS)
    print(f"{ROWS:,} rows: {many - few} MB above {FEW:,} rows ({many} MB in all), {seconds:.0f} s")
    assert many - few < 2000
    count("rows scored in one selection", ROWS)
    count("megabytes above the same command on 5,000 rows", many - few)
    count("seconds of that selection", round(seconds))
