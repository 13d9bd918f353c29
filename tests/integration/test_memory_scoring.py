"""Scoring memory does not grow with the pool: each size in a process of its own, peak above the loaded model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scoring_memory.py"
BYTES_A_ROW = 100
"""The scores, the reasons, and the pool's own 32 bytes per row, doubled while arrays grow."""


def above_model(rows: int, folder: Path, *, width: int) -> float:
    """Megabytes at the peak, above the model."""
    folder.mkdir()
    command = [sys.executable, str(SCRIPT), "--rows", str(rows), "--folder", str(folder), "--width", str(width)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600).stdout
    return float(json.loads(said)["above_model_mb"])


@pytest.mark.slow
def test_ten_times_the_rows_take_no_more_memory(tmp_path: Path) -> None:
    # Rows kept as Python objects, or their texts and token ids, would take above 60 MB more.
    few = above_model(10_000, tmp_path / "few", width=16)
    many = above_model(100_000, tmp_path / "many", width=16)
    assert many - few < 24 + 90_000 * BYTES_A_ROW / 2**20


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_million_rows_in_two_gigabytes(tmp_path: Path) -> None:
    assert above_model(1_000_000, tmp_path / "million", width=16) < 2048
