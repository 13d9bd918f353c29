"""A stub of what Unsloth does to a trainer: it replaces `Trainer.get_batch_samples` on the class, wraps `train` on the instance,
and turns padding-free on by itself, with `packed_seq_lengths` in every batch. Unsloth itself does not run without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import Trainer

import siftune
from siftune.integrations.every_trainer import install
from siftune.integrations.request import Request
from siftune.online.maxloss import MaxLoss
from tests.tiny import tiny_model
from tests.trainers import kept_rows, loss_by_hand, losses, rows, trainer


class PaddingFree:
    """Rows one after another in one line, as trl's padding-free collator with Unsloth's metadata gives them."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(example["input_ids"]) for example in examples]
        labels = [label for example in examples for label in [-100, *example["labels"][1:]]]
        positions = [position for length in lengths for position in range(length)]
        return {
            "input_ids": torch.tensor([[token for example in examples for token in example["input_ids"]]]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32),
        }


def unsloth_trainer(folder: Path, **more: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer as Unsloth leaves one, and the micro-batches that it trained on."""
    trained: list[dict[str, Any]] = []

    class Base(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(*args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            trained.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def get_batch_samples(self: Any, epoch_iterator: Iterator[Any], num_batches: int, device: Any = None) -> Any:
        """Unsloth's count: the shifted labels, without those that cross into the next row."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        count = sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in batches)
        return batches, torch.tensor(count) if batches else None

    Base.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
    live = trainer(folder, cls=Base, model=tiny_model("llama", layers=2, width=16), **more)
    live.data_collator = PaddingFree()
    live.args.padding_free = True  # as Unsloth sets it where the user did not
    live.args.remove_unused_columns = False
    live.train = MethodType(Base.train, live)
    return live, trained


@pytest.mark.parametrize("how", ["attach", "run"])
def test_segments_are_chosen_and_packed_seq_lengths_is_rewritten(tmp_path: Path, how: str) -> None:
    live, trained = unsloth_trainer(tmp_path, max_steps=2)
    if how == "attach":
        siftune.attach(live, MaxLoss(keep="1/4"))
    else:
        install(Request(selector={"method": "maxloss", "keep": "1/4"}), type(live))
        live.train = MethodType(type(live).train, live)
    live.train()
    for batch in trained:
        lengths = batch["packed_seq_lengths"].tolist()
        assert len(lengths) == 2
        assert sum(lengths) == batch["input_ids"].shape[1]
        starts = [0, lengths[0]]
        assert [int(batch["position_ids"][0, start]) for start in starts] == [0, 0]
        assert [int(batch["labels"][0, start]) for start in starts] == [-100, -100]
        assert batch["packed_seq_lengths"].dtype == torch.int32


def test_the_logged_loss_is_the_models_own_on_the_kept_rows(tmp_path: Path) -> None:
    live, _ = unsloth_trainer(tmp_path, max_steps=1)
    siftune.attach(live, MaxLoss(keep="1/4"))
    live.train()
    data = rows()
    chosen = [data[row] for row in kept_rows(tmp_path, 1)]
    fresh = tiny_model("llama", layers=2, width=16)
    assert losses(live)[0] == pytest.approx(loss_by_hand(fresh, chosen), rel=1e-3)
