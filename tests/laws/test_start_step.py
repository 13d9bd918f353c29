"""`start_step` counts optimiser steps, and a plain loop keeps the same rows as the trainer hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from siftune.hook.attach import attach
from siftune.online.base import OnlineMethod
from siftune.online.greats import Greats
from siftune.online.simple import Random
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model
from tests.trainers import ledger, rows, trainer

RATE, BATCH, STEPS = 0.05, 8, 4


def selector(name: str) -> OnlineMethod:
    if name == "random":
        return Random(keep=3, start_step=2, seed=4)
    return Greats(
        keep=3,
        start_step=2,
        validation=[tiny_batch([9, 14], seed=91), tiny_batch([8, 20], seed=92)],
        learning_rate=RATE,
    )


@pytest.mark.parametrize("name", ["random", "greats"])
def test_the_loop_and_the_hook_keep_the_same_rows(name: str, tmp_path: Path) -> None:
    live = trainer(
        tmp_path, data=Dataset.from_list(rows()), max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant",
        optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
    )  # fmt: skip
    model: Any = tiny_model(layers=2, width=16)
    model.load_state_dict(live.model.state_dict())
    batches: list[Any] = []
    original = live.get_batch_samples

    def recorded(*args: Any, **kwargs: Any) -> Any:
        candidates, count = original(*args, **kwargs)
        if len(candidates[0]["input_ids"]) == BATCH and len(_distinct(batches)) <= STEPS:
            batches.append({key: value.clone() for key, value in candidates[0].items()})
        return candidates, count

    live.get_batch_samples = recorded
    attach(live, selector(name), quiet=True)
    live.train()
    lines = ledger(tmp_path)
    hook = [[index for index, line in enumerate(step) if line["kept"]] for step in _by_step(lines)]
    assert [len(kept) for kept in hook] == [BATCH, BATCH, 3, 3]

    optimizer, mine, loop = torch.optim.SGD(model.parameters(), lr=RATE), selector(name), []
    for batch in _distinct(batches)[:STEPS]:
        kept = mine.select(model, batch)
        loop.append(kept.indices.tolist())
        model.train()
        model(**kept.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop == hook
    assert mine.state_dict() == live.siftune_attachment.selector.state_dict()  # type: ignore[attr-defined]


def _by_step(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[line for line in lines if line["step"] == step] for step in sorted({line["step"] for line in lines})]


def _distinct(batches: list[Any]) -> list[Any]:
    """The candidates of each step once: where all rows are kept the trainer's own method sees them twice."""
    distinct: list[Any] = []
    for batch in batches:
        if not distinct or not torch.equal(batch["input_ids"], distinct[-1]["input_ids"]):
            distinct.append(batch)
    return distinct
