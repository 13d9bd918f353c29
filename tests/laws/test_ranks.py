"""1, 2 and 4 processes with the same global batch keep the same rows and train to the same weights (gloo, CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.ranks_runs import SAME, STEPS, interrupted, resumed, run
from tests.trainers import ledger

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def launch(folder: Path, world: int, program: str) -> subprocess.CompletedProcess[str]:
    """A test program on `world` processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / program), str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario on one process, then on two and on four."""
    folder = tmp_path_factory.mktemp("ranks")
    told = {name: run(folder / "1", name, 1) for name in SAME[1]}
    (folder / "1" / "told.json").write_text(json.dumps(told))
    interrupted(folder / "one-then-two", "uds", 1)
    launch(folder, 2, "laws/ranks_runs.py")
    launch(folder, 4, "laws/ranks_runs.py")
    return folder


def by_step(folder: Path) -> list[list[tuple[Any, ...]]]:
    """(row, micro, kept, reason) of each step's candidates, in the order of rows: ranks come one after the other."""
    lines = ledger(folder)
    return [
        sorted((line["row"], line["micro"], line["kept"], line["reason"]) for line in lines if line["step"] == step)
        for step in range(1, STEPS + 1)
    ]


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in (2, 4) for name in SAME[world]])
def test_processes_keep_the_rows_and_reach_the_weights_of_one(folder: Path, world: int, name: str) -> None:
    one, many = (json.loads((folder / str(n) / "told.json").read_text())[name] for n in (1, world))
    assert by_step(folder / str(world) / name) == by_step(folder / "1" / name)
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for ours, theirs in zip(many["logged"], one["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    trained = torch.load(folder / "1" / f"{name}.pt")
    for key, value in torch.load(folder / str(world) / f"{name}.pt").items():
        torch.testing.assert_close(value, trained[key], rtol=1e-3, atol=1e-5)


def test_the_scores_are_those_of_one_process(folder: Path) -> None:
    def scores(world: int) -> list[tuple[Any, ...]]:
        lines = ledger(folder / str(world) / "uds")
        return sorted((line["step"], line["row"], line["intra"] or 0, line["inter"] or 0) for line in lines)

    for ours, theirs in zip(scores(4), scores(1), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    whole = json.loads((folder / "1" / "told.json").read_text())["uds"]["losses"]
    state = folder / "two-then-one" / "checkpoint-2" / "siftune"
    assert {path.name for path in state.iterdir()} == {"COMPLETE", "selector.json", "selector.safetensors"}
    assert resumed(folder / "two-then-one", "uds", 1) == pytest.approx(whole, rel=1e-4)
    assert json.loads((folder / "one-then-two" / "losses.json").read_text()) == pytest.approx(whole, rel=1e-4)
    for name in ("two-then-one", "one-then-two"):
        assert by_step(folder / name) == by_step(folder / "1" / "uds")
