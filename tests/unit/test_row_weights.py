"""A row's `weight` in training: the loss that it gives, the rows that it leaves out, and where it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from siftune.data.bad_row import BadRow
from siftune.errors import UserError
from siftune.sft.recipe import Recipe
from siftune.sft.row_weights import check_weights, weight_of, weighted_loss
from siftune.sft.trainer import prepare
from tests.tiny import save_tiny

pytest.importorskip("trl")


def test_a_weight_is_a_number_of_0_or_more() -> None:
    assert [weight_of(value) for value in (None, "", 1, True, "0.5", 2.5)] == [1.0, 1.0, 1.0, 1.0, 0.5, 2.5]
    for value in ("heavy", -1, float("nan"), [1]):
        with pytest.raises(BadRow, match=r"wrong type: weight is .*, not a number of 0 or more"):
            weight_of(value)
    with pytest.raises(BadRow, match="weight is 0"):
        weight_of(0)


def test_the_weighted_loss_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 7, generator=generator), torch.tensor([[-100, 1, 2, -100], [-100, -100, 3, 4]])
    weight = torch.tensor([2.0, 0.5])
    log = logits.double().log_softmax(-1)
    total = sum(
        float(weight[b]) * -float(log[b, t - 1, labels[b, t]])
        for b in range(2)
        for t in range(1, 4)
        if labels[b, t] >= 0
    )
    assert float(weighted_loss(logits, labels, weight, None)) == pytest.approx(total / 4, rel=1e-5)
    assert float(weighted_loss(logits, labels, weight, 8)) == pytest.approx(total / 8, rel=1e-5)


def _recipe(folder: Path, weights: list[Any], **more: Any) -> Recipe:
    rows = [{"prompt": f"What is {n}?", "completion": "ab" * (n + 1), "weight": w} for n, w in enumerate(weights)]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_tiny(folder / "model", layers=1, width=16)
    sft = {"per_device_train_batch_size": 4, "max_steps": 1, "report_to": "none", "use_cpu": True, "max_length": 64}
    return Recipe.read(
        {
            "model": str(model),
            "train": str(folder / "pool.jsonl"),
            "text": "prompt",
            "sft": sft | more.pop("sft", {}),
            **more,
        }
    )


def _loss(folder: Path, weights: list[Any]) -> float:
    folder.mkdir()
    trainer = prepare(_recipe(folder, weights), cache=folder / "cache").trainer(folder / "out")
    loader = iter(trainer.get_train_dataloader())
    batches, count = trainer.get_batch_samples(loader, 1, torch.device("cpu"))
    trainer.model.train()
    return float(trainer.compute_loss(trainer.model, dict(batches[0]), num_items_in_batch=count).detach())


def test_training_scales_a_rows_loss_by_its_weight(tmp_path: Path) -> None:
    plain = _loss(tmp_path / "plain", [1, 1, 1])
    assert _loss(tmp_path / "twice", [2, 2, 2]) == pytest.approx(2 * plain, rel=1e-4)
    mixed = [_loss(tmp_path / f"m{n}", [3 if n == row else 1 for row in range(3)]) for n in range(3)]
    assert sum(mixed) == pytest.approx(3 * plain + 2 * plain, rel=1e-4)
    assert len({round(loss, 5) for loss in mixed}) == 3


def test_rows_of_weight_0_and_of_no_weight_are_left_out_with_a_reason(tmp_path: Path) -> None:
    rows = prepare(_recipe(tmp_path, [1, 0, "heavy", "1.0"]), cache=tmp_path / "cache").rows
    assert dict(rows.reasons) == {
        1: "not to imitate: weight is 0",
        2: "wrong type: weight is heavy, not a number of 0 or more",
    }
    assert not rows.has_weights
    assert rows.dataset.column_names == ["input_ids", "labels"]


def test_weights_that_cannot_be_honoured_are_refused(tmp_path: Path) -> None:
    prepared = prepare(_recipe(tmp_path, [1, 2], online={"method": "maxloss", "keep": 1}), cache=tmp_path / "cache")
    with pytest.raises(UserError, match="online selection trains kept rows alike; remove the column weight"):
        prepared.trainer(tmp_path / "out")
    with pytest.raises(UserError, match="packing joins rows into one line; set packing: false"):
        check_weights(SimpleNamespace(packing=True), online=False)
