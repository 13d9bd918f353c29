"""Gradient methods under the hook: the trainer does not notice them, the learning rate reaches them, memory is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from siftune import Greats, MaxGrad, attach
from siftune.online.greats import _GradientCache
from siftune.online.per_example.backward import PerExampleGradients
from tests.laws.test_attach_laws import lora
from tests.reference_gradients import naive_gradients, naive_greedy, naive_norms
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model
from tests.trainers import ledger, losses, rows, trainer, weights

VALIDATION = tiny_batch([9, 14, 5], seed=91)


@pytest.mark.parametrize("setting", ["accumulation", "checkpointing", "lora dropout"])
def test_keep_all_is_the_plain_trainer(tmp_path: Path, setting: str) -> None:
    """Bit for bit: scoring leaves gradients, random numbers, flags and checkpointing alone."""
    more: dict[str, Any] = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "max_steps": 3}
    if setting == "checkpointing":
        more["gradient_checkpointing"] = True
    runs = []
    for name in ("plain", "maxgrad", "greats"):
        model = lora(tiny_model(layers=2, width=16), dropout=0.3) if setting == "lora dropout" else None
        live = trainer(tmp_path / name, model=model, **more)
        torch.manual_seed(3)
        if name == "maxgrad":
            attach(live, MaxGrad(keep="all"), quiet=True)
        if name == "greats":
            attach(live, Greats(keep="all", validation=VALIDATION), quiet=True)
        live.train()
        runs.append((losses(live), weights(live)))
    for found in runs[1:]:
        assert found[0] == runs[0][0]
        assert all(torch.equal(value, found[1][name]) for name, value in runs[0][1].items())


def first_rows(folder: Path) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The first micro-batch's candidates, padded, and which of them were kept."""
    lines = [line for line in ledger(folder) if line["step"] == 1 and line["micro"] == 0]
    data = rows()
    some = [data[line["row"]] for line in lines]
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in some], batch_first=True, padding_value=-100 if name == "labels" else 0
        )
        for name in ("input_ids", "attention_mask", "labels")
    }
    return batch, [index for index, line in enumerate(lines) if line["kept"]]


@pytest.mark.parametrize("multiple", [None, 16])
def test_maxgrad_keeps_what_the_definition_keeps(tmp_path: Path, multiple: int | None) -> None:
    live = trainer(tmp_path, data=Dataset.from_list(rows()), max_steps=1, multiple=multiple)
    attach(live, MaxGrad(keep=3), quiet=True)
    live.train()
    batch, kept = first_rows(tmp_path)
    norms = torch.tensor(naive_norms(tiny_model(layers=2, width=16), batch))
    assert kept == norms.topk(3).indices.sort().values.tolist()


def test_greats_gets_the_step_s_own_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[float] = []
    original = Greats.new_step

    def listen(method: Greats, *, learning_rate: float | None = None) -> None:
        handed.append(learning_rate)  # type: ignore[arg-type]
        original(method, learning_rate=learning_rate)

    monkeypatch.setattr(Greats, "new_step", listen)
    live = trainer(
        tmp_path, data=Dataset.from_list(rows()), max_steps=4, learning_rate=0.4, lr_scheduler_type="linear",
        warmup_steps=2,
    )  # fmt: skip
    attach(live, Greats(keep=3, validation=VALIDATION), quiet=True)
    live.train()
    assert handed == pytest.approx([0.0, 0.2, 0.4, 0.2])
    batch, kept = first_rows(tmp_path)
    model = tiny_model(layers=2, width=16)
    wanted, _ = naive_greedy(naive_gradients(model, batch), naive_gradients(model, VALIDATION), 1e-12, 3)  # type: ignore[arg-type]
    assert kept == sorted(wanted)


def test_no_more_gradients_are_held_than_allowed() -> None:
    """Held beyond `hold_mb` is at most the two groups that are compared."""
    model, batch = tiny_model(layers=1, width=16), tiny_batch([20] * 6)
    gradients = PerExampleGradients()
    groups = gradients.plan(model, batch, 20)
    assert len(groups) == 6
    size = sum(part.bytes for part in gradients.compute(model, batch, *groups[0]))
    cache = _GradientCache(gradients, model, batch, groups, int(2.5 * size))
    for index in range(6):
        cache.get(index)
    assert list(cache._cached) == [0, 1]
    cache.drop(0)
    cache.get(5)
    assert list(cache._cached) == [1, 5]


def test_scoring_in_groups_holds_less() -> None:
    """The largest live graph is a group's, not the batch's."""
    model, batch = tiny_model(layers=2), tiny_batch([60] * 16)
    seen: list[int] = []
    original = type(model).forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        seen.append(more["input_ids"].numel())
        assert "labels" not in more
        assert more["use_cache"] is False
        return original(self, *args, **more)

    type(model).forward = forward  # type: ignore[method-assign]
    try:
        MaxGrad(keep=1, score_tokens=130).score(model, batch)
    finally:
        type(model).forward = original  # type: ignore[method-assign]
    assert max(seen) == 120
    assert len(seen) == 8 + 1, "eight groups of two rows, and one row to check by"
