"""1, 2 and 4 processes with the same global batch of segments keep the same ones and train to the same weights (gloo, CPU)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.ranks_packed import SCENARIOS, STEPS, resumed, run
from tests.laws.test_ranks import launch
from tests.trainers import ledger

pytest.importorskip("trl")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario on one process."""
    folder = tmp_path_factory.mktemp("ranks-packed")
    result = {name: run(folder / "1", name, 1) for name in SCENARIOS}
    (folder / "1" / "losses.json").write_text(json.dumps(result))
    return folder


def results_of(folder: Path, world: int) -> Path:
    """The runs on `world` processes, launched at first use: each process imports for seconds."""
    if not (folder / str(world) / "losses.json").is_file():
        launch(folder, world, "laws/ranks_packed.py")
    return folder / str(world)


def by_step(folder: Path) -> list[list[tuple[Any, ...]]]:
    """(token id, row, micro, kept, reason) of each step's candidates, sorted: ranks come one after the other."""
    lines = ledger(folder)
    return [
        sorted(
            (line["token_id"], line["row"], line["micro"], line["kept"], line["reason"] or "")
            for line in lines
            if line["step"] == step
        )
        for step in range(1, STEPS + 1)
    ]


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in (2, 4) for name in SCENARIOS])
def test_processes_keep_the_segments_and_reach_the_weights_of_one(folder: Path, world: int, name: str) -> None:
    results = results_of(folder, world)
    one, many = (json.loads((path / "losses.json").read_text())[name] for path in (folder / "1", results))
    kept = by_step(folder / "1" / name)
    assert all(0 < sum(line[3] for line in step) < len(step) for step in kept)
    assert by_step(results / name) == kept
    assert many == pytest.approx(one, rel=1e-4)
    trained = torch.load(folder / "1" / f"{name}.pt")
    for key, value in torch.load(results / f"{name}.pt").items():
        torch.testing.assert_close(value, trained[key], rtol=1e-3, atol=1e-5)


def test_segments_are_numbered_on_the_process_that_read_them(folder: Path) -> None:
    lines = [line for line in ledger(results_of(folder, 4) / "uds") if line["step"] == 1 and line["micro"] == 0]
    assert sorted((line["rank"], line["segment"]) for line in lines) == [
        (rank, at) for rank in range(4) for at in (0, 1)
    ]


def test_a_packed_run_resumes_with_another_number_of_processes(folder: Path) -> None:
    results_of(folder, 2)
    complete = json.loads((folder / "1" / "losses.json").read_text())["uds"]
    assert resumed(folder / "two-then-one", "uds", 1) == pytest.approx(complete, rel=1e-4)
    assert by_step(folder / "two-then-one") == by_step(folder / "1" / "uds")
