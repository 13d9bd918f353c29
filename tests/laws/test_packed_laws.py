"""Laws of packed batches in a live trainer: a sifted step is the trainer's step on the kept segments packed alone; keep =
all changes nothing; two processes train what one would; TRL's own packing and padding-free runs resume bit for bit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from siftune import MaxLoss, UserError, attach
from siftune.online.base import OnlineMethod
from siftune.online.simple import Random, Regular
from siftune.online.token_id import token_ids
from siftune.online.uds import UDS
from tests.packed import LAYOUTS, Row, pack, padded, rows_of
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import arguments, ledger, loss_by_hand, losses, weights

LENGTHS = [9, 4, 12, 6, 5, 11, 3, 8] * 3


def packed_trainer(
    folder: Path, kind: str, *, rows: list[Row] | None = None, model: Any = None, width: int | None = None, **more: Any
) -> Trainer:
    """A plain trainer whose collator packs eight rows a micro-batch."""
    rows = rows_of(LENGTHS, seed=1) if rows is None else rows
    return Trainer(
        model=tiny_model("llama", layers=2, width=16) if model is None else model,
        args=TrainingArguments(**arguments(folder, **{"max_steps": 3, "remove_unused_columns": False, **more})),
        train_dataset=Dataset.from_list(rows),
        data_collator=lambda several: pack(several, kind, width=width),
        processing_class=tiny_tokenizer(),
    )


class OnSteps:
    """Gradients as the optimiser sees them, step by step."""

    def __init__(self, live: Trainer) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        live.create_optimizer()
        step = live.optimizer.step

        def seen(*args: Any, **kwargs: Any) -> Any:
            named = live.model.named_parameters()
            self.gradients.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})
            return step(*args, **kwargs)

        live.optimizer.step = seen  # type: ignore[method-assign]


READS_ACROSS = ("neat", "axolotl")
"""Layouts whose row numbers this model takes for a padding mask, so that a row's loss depends on its neighbours."""


@pytest.mark.parametrize(
    ("kind", "window"),
    [*((kind, "micro") for kind in LAYOUTS), *((kind, "step") for kind in LAYOUTS if kind not in READS_ACROSS)],
)
def test_a_sifted_step_is_the_plain_step_on_the_kept_segments(tmp_path: Path, kind: str, window: str) -> None:
    more = {"max_steps": 1, "gradient_accumulation_steps": 2 if window == "step" else 1, "max_grad_norm": 0.0}
    width = 24 if kind in READS_ACROSS else None
    live = packed_trainer(tmp_path / "sifted", kind, width=width, **more)
    attach(live, MaxLoss(keep=3, window=window), quiet=True)
    ours = OnSteps(live)
    live.train()
    rows = rows_of(LENGTHS, seed=1)
    kept = [rows[line["row"]] for line in ledger(tmp_path / "sifted") if line["kept"]]
    assert len(kept) == 3 * more["gradient_accumulation_steps"]
    plain = packed_trainer(tmp_path / "plain", kind, rows=kept, width=width, max_steps=1, max_grad_norm=0.0)
    plain.data_collator = lambda several: pack(kept, kind, width=width)  # not in the sampler's order
    theirs = OnSteps(plain)
    plain.train()
    assert losses(live) == pytest.approx(losses(plain), abs=1e-6)
    for name, gradient in theirs.gradients[0].items():
        torch.testing.assert_close(ours.gradients[0][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["trl", "block-mask"])
def test_the_loss_is_that_of_the_kept_rows_by_the_naive_definition(tmp_path: Path, kind: str) -> None:
    live = packed_trainer(tmp_path, kind, max_steps=1)
    attach(live, UDS(keep="1/4"), quiet=True)
    before = tiny_model("llama", layers=2, width=16)
    live.train()
    rows = rows_of(LENGTHS, seed=1)
    kept = [rows[line["row"]] for line in ledger(tmp_path) if line["kept"]]
    assert len(kept) == 2
    assert losses(live)[0] == pytest.approx(loss_by_hand(before, kept), abs=1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_keep_all_returns_every_batch_untouched(tmp_path: Path, kind: str) -> None:
    plain, sifted = (packed_trainer(tmp_path / name, kind) for name in ("plain", "sifted"))
    seen: list[Any] = []
    collate = sifted.data_collator
    sifted.data_collator = lambda several: seen.append(collate(several)) or seen[-1]  # type: ignore[func-returns-value]
    plain.train()
    attach(sifted, Regular(), quiet=True)
    sifted.train()
    assert losses(sifted) == losses(plain)
    assert all(torch.equal(value, weights(sifted)[name]) for name, value in weights(plain).items())


def test_the_ledger_names_segments_and_rows(tmp_path: Path) -> None:
    live = packed_trainer(tmp_path, "trl", max_steps=2)
    attach(live, Random(keep=2), quiet=True)
    live.train()
    lines = ledger(tmp_path)
    assert [line["segment"] for line in lines] == [*range(8), *range(8)]
    assert len({line["row"] for line in lines}) == 16
    assert sum(line["kept"] for line in lines) == 4


def test_a_packed_data_sets_segments_have_its_rows(tmp_path: Path) -> None:
    lines = [rows_of(lengths, seed=seed) for seed, lengths in enumerate([[5, 4, 3], [6, 6], [7, 2, 2, 1], [12]])]
    data = [
        {
            "input_ids": [*itertools.chain.from_iterable(row["input_ids"] for row in line)],
            "labels": [*itertools.chain.from_iterable(row["labels"] for row in line)],
        }
        | {"seq_lengths": [len(row["input_ids"]) for row in line]}
        for line in lines
    ]

    def collate(several: list[Any]) -> dict[str, Any]:
        rows, start = [], 0
        for one in several:
            start = 0
            for length in one["seq_lengths"]:
                rows.append({name: one[name][start : start + length] for name in ("input_ids", "labels")})
                start += length
        return pack(rows, "trl")

    live = packed_trainer(tmp_path, "trl", per_device_train_batch_size=4, max_steps=1)
    live.train_dataset, live.data_collator = Dataset.from_list(data), collate
    attach(live, Random(keep="1/2"), quiet=True)
    live.train()
    names: dict[int, int] = {}
    for line in ledger(tmp_path):
        names[line["row"]] = names.get(line["row"], 0) + 1
    assert names == {0: 3, 1: 2, 2: 4, 3: 1}


class TestMessages:
    def test_one_line_says_what_a_packed_step_holds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        live = packed_trainer(tmp_path, "trl", max_steps=1)
        attach(live, MaxLoss(keep="1/4"))
        live.train()
        printed = capsys.readouterr().err
        assert re.search(r"the first step holds 8 rows of \d+ tokens in 1 micro-batch and trains on 2 rows", printed)
        assert "reads across" not in printed

    def test_packed_lines_are_announced_with_their_length_and_budget(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        live = sft(tmp_path, packing=True, max_steps=1, gradient_accumulation_steps=2)
        attach(live, MaxLoss(keep="all", keep_tokens=64))
        printed = capsys.readouterr().err
        assert "maxloss reads 8 packed lines of at most 64 tokens per step" in printed
        assert "trains on the best of them that fit in 64 tokens per micro-batch, the new effective batch" in printed
        live.train()
        assert "in 2 micro-batches and trains on the best of them that fit in 64 tokens per micro-batch" in (
            capsys.readouterr().err
        )

    def test_joined_single_rows_are_announced_as_candidates(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        attach(sft(tmp_path, padding_free=True), MaxLoss(keep="1/4"))
        assert "scores 4 candidates per step and trains on 1 of them" in capsys.readouterr().err

    def test_a_model_that_reads_across_rows_is_reported_once(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        live = packed_trainer(tmp_path, "neat", max_steps=2)  # sdpa takes row numbers for a padding mask
        attach(live, MaxLoss(keep="1/4"))
        live.train()
        assert capsys.readouterr().err.count("reads across the rows of a packed line") == 1

    def test_a_budget_below_one_segment(self, tmp_path: Path) -> None:
        live = sft(tmp_path, padding_free=True)
        attach(live, MaxLoss(keep="1/100"), quiet=True)  # how many rows a line holds is not known yet
        with pytest.raises(UserError, match="less than one row of a micro-batch of 4 candidates"):
            live.train()


class TestRefusals:
    def test_joined_rows_without_boundaries(self, tmp_path: Path) -> None:
        live = packed_trainer(tmp_path, "trl")
        collate = live.data_collator
        live.data_collator = lambda several: {
            name: value for name, value in collate(several).items() if name != "position_ids"
        }
        attach(live, MaxLoss(keep=1), quiet=True)
        with pytest.raises(
            UserError, match=r"one line of \d+ tokens where per_device_train_batch_size is 8.*neat_packing"
        ):
            live.train()

    def test_states_that_cross_segments(self, tmp_path: Path) -> None:
        model = tiny_model("llama", layers=2, width=16)
        model.config.layer_types = ["linear_attention", "full_attention"]
        live = packed_trainer(tmp_path, "neat", model=model)
        attach(live, MaxLoss(keep=1))
        with pytest.raises(UserError, match="carries a state from one packed row to the next"):
            live.train()


SFT_ROWS = rows_of(LENGTHS * 9, seed=2)


def sft(folder: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    data = Dataset.from_list(SFT_ROWS)
    return trl.SFTTrainer(
        model=tiny_model("llama", layers=2, width=16),
        args=trl.SFTConfig(
            **arguments(
                folder, **{"per_device_train_batch_size": 4, "max_steps": 10, "num_train_epochs": 9, **options}
            ),
            max_length=64 if options.get("packing") else None,
            gradient_checkpointing=False,
        ),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )


TRL: dict[str, dict[str, Any]] = {"padding-free": {"padding_free": True}, "packing": {"packing": True}}


def test_a_token_budget_gives_one_dense_line_of_trl_packing(tmp_path: Path) -> None:
    """Eight lines of 64 tokens come in and one goes out: the best segments first, none cut, while one still fits."""
    live = sft(tmp_path, packing=True, per_device_train_batch_size=8, max_steps=3)
    attach(live, MaxLoss(keep="all", keep_tokens=64), quiet=True)
    trained: list[Any] = []
    previous = live.training_step
    live.training_step = lambda model, batch, *more: trained.append(batch) or previous(model, batch, *more)
    live.train()
    lengths = {name.hex(): len(row["input_ids"]) for row in SFT_ROWS for name in token_ids(padded([row]))}
    for step, batch in enumerate(trained, 1):
        candidates = sorted(
            (line for line in ledger(tmp_path) if line["step"] == step), key=lambda line: -line["total"]
        )
        expected, room = set(), 64
        for line in candidates:
            if lengths[line["token_id"]] <= room:
                expected.add(line["token_id"])
                room -= lengths[line["token_id"]]
        assert sum(lengths[line["token_id"]] for line in candidates) > 7 * 64
        assert {line["token_id"] for line in candidates if line["kept"]} == expected
        assert {name.hex() for name in token_ids(batch)} == expected
        assert batch["input_ids"].shape == (1, 64 - room)
        assert room < min(lengths[line["token_id"]] for line in candidates if not line["kept"])


@pytest.mark.slow
@pytest.mark.parametrize("options", TRL.values(), ids=TRL)
@pytest.mark.parametrize(
    "make", [lambda: UDS(keep="1/4"), lambda: MaxLoss(keep="1/4", window="step")], ids=["uds", "maxloss-step"]
)
def test_trl_packing_is_sifted_and_resumes(
    tmp_path: Path, options: dict[str, Any], make: Callable[[], OnlineMethod], capsys: pytest.CaptureFixture[str]
) -> None:
    more = {**options, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5}
    complete = sft(tmp_path / "complete", **more)
    attach(complete, make())
    complete.train()
    assert "packed batches" in capsys.readouterr().err
    lines = ledger(tmp_path / "complete")
    assert {line["step"] for line in lines} == set(range(1, 11))
    shares = [sum(line["kept"] for line in lines if line["step"] == step) for step in range(1, 11)]
    assert all(kept > 0 for kept in shares)
    assert sum(shares) < 0.35 * len(lines)
    resumed = sft(tmp_path / "complete", **more)
    attach(resumed, make(), quiet=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-5"))
    assert ledger(tmp_path / "complete") == lines
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(complete).items())
