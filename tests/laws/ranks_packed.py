"""The packed runs that test_ranks_packed.py compares: the same global batch of segments over 1, 2 or 4 processes. Also the
program that torchrun starts on each of several."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from siftune import MaxLoss, attach
from siftune.online.base import OnlineMethod
from siftune.online.simple import Random
from siftune.online.uds import UDS
from tests.laws.test_packed_laws import LENGTHS, packed_trainer, sft
from tests.laws.test_resume import Stop
from tests.packed import Row, rows_of
from tests.trainers import losses, weights

STEPS = 3
CANDIDATES = 8
"""Rows of a global micro-batch, whatever the number of processes."""
LINES = 4
"""Lines of a global micro-batch of TRL's packing."""

SCENARIOS: dict[str, tuple[str, Callable[[], OnlineMethod]]] = {
    "uds": ("trl", lambda: UDS(keep="1/4")),
    "maxloss-step": ("flattening", lambda: MaxLoss(keep="1/4", window="step")),
    "tokens-step": ("unsloth", lambda: MaxLoss(keep="all", keep_tokens=40, window="step")),
    "random-step": ("swift", lambda: Random(keep="3/8", window="step")),
    "block-mask": ("block-mask", lambda: UDS(keep="1/4", window="step", memory=9)),
    "trl-padding-free": ("padding_free", lambda: MaxLoss(keep="1/4", window="step")),
    "trl-packing": ("packing", lambda: UDS(keep="1/4")),
}
"""Layout or option of TRL, and selector, by name."""


def scenario_rows() -> list[Row]:
    """Rows of unequal length, some without a label token."""
    rows = rows_of(LENGTHS * 4, seed=1)
    for row in rows[::7]:
        row["labels"] = [-100] * len(row["labels"])
    return rows


def build(folder: Path, name: str, world: int, **more: Any) -> Any:
    """A trainer with the scenario's selector attached."""
    kind, selector = SCENARIOS[name]
    settings = {
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": 0.05,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": (LINES if kind == "packing" else CANDIDATES) // world,
        **({"ddp_backend": "gloo"} if world > 1 else {}),
        **more,
    }
    if kind in ("packing", "padding_free"):
        live = sft(folder, **{kind: True}, bf16=False, **settings)
    else:
        live = packed_trainer(folder, kind, rows=scenario_rows(), **settings)
    attach(live, selector(), quiet=True)
    return live


def run(folder: Path, name: str, world: int) -> list[float]:
    """One scenario from start to end: its losses; the trained weights are saved."""
    live = build(folder / name, name, world)
    live.train()
    if live.is_world_process_zero():
        torch.save(weights(live), folder / f"{name}.pt")
    return losses(live)


def interrupted(folder: Path, name: str, world: int) -> None:
    """A run that dies after step 2, whose checkpoint is saved."""
    live = build(folder, name, world, save_strategy="steps", save_steps=2)
    live.add_callback(Stop(2))
    with pytest.raises(KeyboardInterrupt):
        live.train()


def resumed(folder: Path, name: str, world: int) -> list[float]:
    """The rest of it; the losses of all its steps."""
    live = build(folder, name, world)
    live.train(resume_from_checkpoint=True)
    return losses(live)


def main(folder: Path, rank: int, world: int) -> None:
    """Every scenario on `world` processes, and on two a run that one process ends."""
    result = {name: run(folder / str(world), name, world) for name in SCENARIOS}
    if rank == 0:
        (folder / str(world) / "losses.json").write_text(json.dumps(result))
    if world == 2:
        interrupted(folder / "two-then-one", "uds", world)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), torch.distributed.get_rank(), torch.distributed.get_world_size())
