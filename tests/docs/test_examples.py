"""The example scripts run, as a reader would run them, and select what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), layers=2, width=16)


def run(script: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_trl_with_and_without_the_added_line(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    common = ("--model", str(model), "--steps", "2", "--candidates", "16")
    said = run("sft_trl.py", *common, "--keep", "1/8", "--out", "sifted", folder=tmp_path)
    assert "scores 16 candidates per step and trains on 2" in said
    table = pq.read_table(tmp_path / "sifted" / "siftune" / "selection.parquet")
    assert table["kept"].to_pylist().count(True) == 4
    run("sft_trl.py", *common, "--keep", "all", "--out", "plain", folder=tmp_path)
    assert not (tmp_path / "plain" / "siftune").exists()


@pytest.mark.parametrize("script", ["loop_torch.py", "loop_accelerate.py"])
def test_loops(script: str, model: Path, tmp_path: Path) -> None:
    said = run(script, "--model", str(model), "--steps", "3", "--candidates", "16", folder=tmp_path)
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", said)]
    assert len(losses) == 3
    assert "of 16" in said


@pytest.mark.slow
def test_trl_on_a_real_pool_with_a_real_model(shared: Path, tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pool = str(shared / "data" / "pools" / "code_heldout.jsonl.gz")
    common = ("--model", str(tiny_base), "--pool", pool, "--steps", "3", "--candidates", "16")
    said = run("sft_trl.py", *common, "--keep", "1/8", "--out", "sifted", folder=tmp_path)
    assert len(re.findall(r"'train_loss'", said)) == 1
    table = pq.read_table(tmp_path / "sifted" / "siftune" / "selection.parquet")
    assert table["kept"].to_pylist().count(True) == 6
    assert table["total"].null_count == 0
    assert table["row"].null_count == 0
