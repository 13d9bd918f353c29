"""The ledger's `train_loss`: the mean loss of a row in the training forward, equal to the definition."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import siftune
from siftune.hook import ledger as ledgers
from siftune.hook.training_loss import LabelTokens
from tests.tiny import tiny_model
from tests.trainers import ledger, loss_by_hand, rows, trainer, weights


def _first_step(folder: Path, *, method: Any = None, **more: Any) -> list[dict[str, Any]]:
    live = trainer(folder, max_steps=1, **more)
    siftune.attach(live, method or siftune.Regular(), quiet=True)
    live.train()
    return ledger(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_of_a_row_is_that_of_the_row_alone(tmp_path: Path, family: str) -> None:
    lines = _first_step(tmp_path, family=family, gradient_accumulation_steps=2)
    assert len(lines) == 16
    model, data = tiny_model(family, layers=2, width=16), rows()
    if family == "llama":  # gpt2 trains with dropout
        for line in lines:
            assert line["train_loss"] == pytest.approx(loss_by_hand(model, [data[line["row"]]]), rel=1e-4)
    assert all(line["train_loss"] > 0 for line in lines)


def test_only_trained_rows_have_one_and_it_is_the_score_of_maxloss(tmp_path: Path) -> None:
    lines = _first_step(tmp_path, method=siftune.MaxLoss(keep=3))
    assert [line["train_loss"] is not None for line in lines] == [line["kept"] for line in lines]
    for line in lines:
        if line["kept"]:
            assert line["train_loss"] == pytest.approx(line["total"], rel=1e-5)


def test_a_row_without_label_tokens_has_none(tmp_path: Path) -> None:
    from datasets import Dataset

    lines = _first_step(tmp_path, data=Dataset.from_list(rows(answers=False)))
    assert {line["row"] % 5 == 0 for line in lines if line["train_loss"] is None} == {True}


def test_logging_the_losses_changes_nothing_that_is_trained(tmp_path: Path) -> None:
    plain, logged = trainer(tmp_path / "plain", max_steps=3), trainer(tmp_path / "logged", max_steps=3)
    siftune.attach(logged, siftune.Regular(), quiet=True)
    plain.train()
    logged.train()
    before, after = weights(plain), weights(logged)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not logged.model._forward_hooks


def test_a_model_is_run_once_for_each_micro_batch(tmp_path: Path) -> None:
    live = trainer(tmp_path, max_steps=2)
    siftune.attach(live, siftune.Regular(), quiet=True)
    forwards: list[int] = []
    live.model.register_forward_hook(lambda *_: forwards.append(1))
    live.train()
    assert len(forwards) == 2


def test_the_trainers_loss_is_still_known_as_its_own_when_training_begins(tmp_path: Path) -> None:
    live = trainer(tmp_path, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    module, signature = live.compute_loss.__module__, inspect.signature(live.compute_loss)
    siftune.attach(live, siftune.MaxLoss(keep="1/16", window="step"), quiet=True)
    assert live.compute_loss.__module__ == module
    assert inspect.signature(live.compute_loss) == signature
    live.train()  # one row for four micro-batches: three are fully masked, which only the library's own loss permits
    assert [line["train_loss"] is not None for line in ledger(tmp_path)] == [line["kept"] for line in ledger(tmp_path)]
    siftune.detach(live)
    assert "compute_loss" not in vars(live)


def test_losses_are_read_where_a_part_ends_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_BUFFERED_LINES", 8)
    live = trainer(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, eval_data=trainer(tmp_path).train_dataset
    )
    siftune.attach(live, siftune.Regular(), quiet=True)
    live.train()
    lines = ledger(tmp_path)
    assert len({line["step"] for line in lines}) == 4
    assert all(line["train_loss"] is not None for line in lines)
    parts = sorted(path.name for path in (tmp_path / "siftune" / "selection").iterdir())
    assert parts == [f"part-{step}.parquet" for step in range(1, 5)]


def test_packed_rows_have_their_own_loss_by_logits_and_by_the_log_probabilities_of_a_fused_head() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (1, 9), generator=generator)
    labels[0, [0, 4]] = -100
    batch = {
        "input_ids": labels.clamp(min=0),
        "labels": labels,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
    }
    logits = torch.randn(1, 9, 7, generator=generator)
    log = logits.double().log_softmax(-1)
    expected = [
        float(torch.stack([-log[0, t - 1, labels[0, t]] for t in columns]).mean())
        for columns in ((1, 2, 3), (5, 6, 7, 8))
    ]
    tokens = LabelTokens.of(batch)
    by_logits = tokens.row_losses(SimpleNamespace(logits=logits))
    assert by_logits is not None
    assert by_logits.tolist() == pytest.approx(expected, rel=1e-5)
    fused = log[:, :-1].gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0].masked_fill(labels[:, 1:] < 0, 0)
    by_fused = tokens.row_losses(SimpleNamespace(log_probs=fused, logits=None))
    assert by_fused is not None
    assert by_fused.tolist() == pytest.approx(expected, rel=1e-5)
    assert tokens.row_losses(SimpleNamespace(logits=None)) is None
