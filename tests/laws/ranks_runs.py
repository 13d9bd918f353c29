"""The runs that test_ranks.py compares: the same global batch over 1, 2 or 4 processes. Also the program that torchrun
starts on each of several; every scenario runs in one launch, because each process imports for seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from siftune import UserError, attach, registry
from siftune.online.base import OnlineMethod
from siftune.online.simple import Random
from tests.laws.test_resume import Stop
from tests.online_methods import needs
from tests.tiny import tiny_model
from tests.trainers import Drifting, ledger, losses, rows, trainer, weights

GLOBAL = 8
"""Candidates of a global micro-batch, whatever the number of processes."""
STEPS = 4


def method(name: str, world: int) -> OnlineMethod:
    """A fresh selector by the scenario's name."""
    if name == "counted":  # a number is per process and micro-batch
        return Drifting(keep=4 // world, scope="global")
    options: dict[str, Any] = {
        "uds": {"keep": "1/4"},
        "uds-sparse": {"keep": "1/4", "window": "step", "memory": 9, "memory_policy": "reservoir"},
        "random": {"keep": "3/8", "window": "step"},
        "maxgrad": {"keep": "1/2", "start_step": 1},
        "rho-loss": {"keep": "1/8"},
    }[name]
    kind = name.partition("-sparse")[0]
    loaded: OnlineMethod = registry.find("online", kind).load()(**options, **needs(kind))
    return loaded


def made(folder: Path, name: str, world: int, **more: Any) -> Any:
    """A trainer with the scenario's selector; rows of unequal length, some without an answer."""
    settings = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.05, "gradient_accumulation_steps": 2}
    live = trainer(
        folder,
        model=tiny_model(layers=2, width=16),
        data=Dataset.from_list(rows(96, answers=False)),
        per_device_train_batch_size=GLOBAL // world,
        **{**settings, **({"ddp_backend": "gloo"} if world > 1 else {}), **more},
    )
    attach(live, method(name, world), quiet=True)
    return live


SAME = {
    1: ["uds", "uds-sparse", "random", "counted", "maxgrad", "rho-loss"],
    2: ["uds", "uds-sparse", "random", "counted", "maxgrad", "rho-loss"],
    4: ["uds", "uds-sparse", "random", "counted"],
}
"""Scenarios that each number of processes runs."""


def run(folder: Path, name: str, world: int) -> dict[str, Any]:
    """One scenario from start to end: what was logged, and the trained weights."""
    live = made(folder / name, name, world)
    live.train()
    logged = [
        {key: value for key, value in line.items() if key.startswith("sift/") and "second" not in key}
        for line in live.state.log_history
        if "loss" in line
    ]
    for line in logged:
        line.pop("sift/scoring_share", None)
    if live.is_world_process_zero():
        torch.save(weights(live), folder / f"{name}.pt")
    return {"losses": losses(live), "logged": logged}


def interrupted(folder: Path, name: str, world: int) -> None:
    """A run that dies after step 2, whose checkpoint is saved."""
    live = made(folder, name, world, save_strategy="steps", save_steps=2)
    live.add_callback(Stop(2))
    with pytest.raises(KeyboardInterrupt):
        live.train()


def resumed(folder: Path, name: str, world: int) -> list[float]:
    """The rest of it; the losses of all its steps."""
    live = made(folder, name, world)
    live.train(resume_from_checkpoint=True)
    return losses(live)


def equal_on_ranks(value: float) -> bool:
    found = [torch.zeros(1, dtype=torch.float64) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, torch.tensor([value], dtype=torch.float64))
    return len({float(one) for one in found}) == 1


def alone(folder: Path) -> None:
    """scope="local": ranks choose alone, weights stay equal, one ledger, one state per rank."""
    live = trainer(folder, gradient_accumulation_steps=2, per_device_train_batch_size=4, ddp_backend="gloo",
                   save_strategy="steps", save_steps=2)  # fmt: skip
    attach(live, Drifting(keep="1/2", scope="local"), quiet=True)
    live.train()
    torch.distributed.barrier()
    assert equal_on_ranks(sum(float(value.double().sum()) for value in weights(live).values()))
    if live.is_world_process_zero():
        lines = ledger(folder)
        assert {line["rank"] for line in lines} == {0, 1}
        assert sorted(line["row"] for line in lines) == list(range(len(rows())))
        state = folder / "checkpoint-2" / "siftune"
        assert {path.name for path in state.iterdir()} == {
            "COMPLETE", "selector.json", "selector.safetensors", "selector-rank1.json", "selector-rank1.safetensors",
        }  # fmt: skip


def apart(folder: Path, rank: int) -> None:
    """Selectors that differ between ranks are noticed at the first step, on every rank."""
    live = trainer(folder, max_steps=2, per_device_train_batch_size=4, ddp_backend="gloo")
    attach(live, Random(keep="1/2", seed=rank), quiet=True)
    with pytest.raises(RuntimeError, match="rank 1 kept different rows or remember different ones than rank 0"):
        live.train()


def ends_unevenly(folder: Path) -> None:
    """A last batch that is short does not leave a rank waiting; nor does iterable data that runs out."""
    live = trainer(folder / "short", data=Dataset.from_list(rows(21)), gradient_accumulation_steps=4,
                   per_device_train_batch_size=2, ddp_backend="gloo")  # fmt: skip
    attach(live, Drifting(keep="1/4", scope="global"), quiet=True)
    live.train()
    from datasets import IterableDataset

    data = IterableDataset.from_generator(lambda: iter(rows(21)))
    live = trainer(folder / "stream", data=data, max_steps=5, per_device_train_batch_size=4, ddp_backend="gloo",
                   accelerator_config={"dispatch_batches": False})  # fmt: skip
    attach(live, Random(keep="1/4", window="step"), quiet=True)
    live.train()
    assert live.state.global_step == 5


def main(folder: Path, rank: int, world: int) -> None:
    """Everything that needs `world` processes."""
    told = {name: run(folder / str(world), name, world) for name in SAME[world]}
    if rank == 0:
        (folder / str(world) / "told.json").write_text(json.dumps(told))
    if world != 2:
        return
    live = trainer(folder / "refused", per_device_train_batch_size=4, ddp_backend="gloo")
    with pytest.raises(UserError, match='are in different memories; pass scope="local"'):
        attach(live, registry.find("online", "greats").load()(keep=2, **needs("greats")))
    alone(folder / "alone")
    ends_unevenly(folder / "ends")
    interrupted(folder / "two-then-one", "uds", world)
    if (lost := resumed(folder / "one-then-two", "uds", world)) and rank == 0:
        (folder / "one-then-two" / "losses.json").write_text(json.dumps(lost))
    apart(folder / "apart", rank)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), torch.distributed.get_rank(), torch.distributed.get_world_size())
