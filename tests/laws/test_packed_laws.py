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

from siftune import MaxGrad, MaxLoss, UserError, attach
from siftune.online.base import OnlineMethod
from siftune.online.simple import Random, Regular
from siftune.online.token_id import token_ids
from siftune.online.uds import UDS
from tests.packed import LAYOUTS, Row, pack, padded, rows_of
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import arguments, ledger, loss_by_hand, losses, weights

LENGTHS = [9, 4, 12, 6, 5, 11, 3, 8] * 3
SFT_ROWS = rows_of(LENGTHS * 9, seed=2)


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
@pytest.mark.parametrize("window", ["micro", "step"])
def test_keep_all_returns_every_batch_untouched(tmp_path: Path, kind: str, window: str) -> None:
    live = packed_trainer(tmp_path, kind, gradient_accumulation_steps=2, max_steps=1)
    read: list[Any] = []
    collate = live.data_collator
    attach(live, MaxLoss(keep="all", window=window), quiet=True)
    live.data_collator = lambda several: read.append(collate(several)) or read[-1]  # type: ignore[func-returns-value]
    trained: list[Any] = []
    batches_of = live.get_batch_samples
    live.get_batch_samples = lambda *some: trained.append(batches_of(*some)) or trained[-1]  # type: ignore[func-returns-value]
    live.train()
    batches = trained[0][0]
    assert len(batches) == 2
    for batch in batches:
        source = next(one for one in read if torch.equal(one["input_ids"], batch["input_ids"]))
        assert batch.keys() == source.keys()
        for name, value in source.items():
            assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value, name


@pytest.mark.parametrize("kind", LAYOUTS)
def test_keep_all_trains_as_the_plain_trainer(tmp_path: Path, kind: str) -> None:
    plain, sifted = (packed_trainer(tmp_path / name, kind) for name in ("plain", "sifted"))
    plain.train()
    attach(sifted, Regular(), quiet=True)
    sifted.train()
    assert losses(sifted) == losses(plain)
    assert all(torch.equal(value, weights(sifted)[name]) for name, value in weights(plain).items())


def _mean_of_this_batch(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A user's own loss, divided by the label tokens of its micro-batch."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    "rule", ["sum over the step", "own loss", "label smoothing", "trl padding-free", "trl packing"]
)
def test_the_loss_is_the_trainers_own_on_the_kept_segments_bit_for_bit(tmp_path: Path, rule: str) -> None:
    def build(folder: Path) -> Any:
        more: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0}
        if rule.startswith("trl"):
            return sft(folder, **{"packing" if rule == "trl packing" else "padding_free": True}, bf16=False, **more)
        live = packed_trainer(
            folder, "trl", rows=SFT_ROWS, label_smoothing_factor=0.1 if rule == "label smoothing" else 0.0, **more
        )
        live.compute_loss_func = _mean_of_this_batch if rule == "own loss" else None
        return live

    sifted = build(tmp_path / "sifted")
    attach(sifted, MaxLoss(keep=3), quiet=True)
    ours = OnSteps(sifted)
    sifted.train()
    chosen = {line["token_id"] for line in ledger(tmp_path / "sifted") if line["kept"]}
    order = [line["token_id"] for line in ledger(tmp_path / "sifted") if line["kept"]]
    rows = {name.hex(): row for row in SFT_ROWS for name in token_ids(padded([row])) if name.hex() in chosen}
    kept = [{name: rows[key][name] for name in ("input_ids", "labels")} for key in order]
    plain = build(tmp_path / "plain")
    collate = plain.data_collator
    plain.data_collator = lambda several: collate(kept)
    theirs = OnSteps(plain)
    plain.train()
    assert len(kept) == 3
    assert losses(sifted) == losses(plain)
    for name, gradient in theirs.gradients[0].items():
        assert torch.equal(ours.gradients[0][name], gradient), name


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


@pytest.mark.parametrize(
    ("kind", "alone"), [("trl", True), ("flattening", True), ("neat", False), ("block-mask", False)]
)
@pytest.mark.parametrize("build", [lambda: UDS(keep="1/4"), lambda: MaxGrad(keep="1/4")], ids=["uds", "maxgrad"])
def test_separated_segments_are_scored_as_rows_and_keep_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, alone: bool, build: Callable[[], OnlineMethod]
) -> None:
    """sdpa computes all pairs of tokens in a line, so rows are cheaper; flash attention scores the line."""
    shapes: list[list[tuple[int, ...]]] = [[], []]
    for at, separate in enumerate((True, False)):
        selector = build()
        measure = selector.measure
        selector.measure = lambda model, batch, measure=measure, at=at: (  # type: ignore[method-assign]
            shapes[at].append(tuple(batch["input_ids"].shape)) or measure(model, batch)
        )
        monkeypatch.setattr("siftune.hook.attach.attends_to_complete_lines", lambda _, separate=separate: separate)
        live = packed_trainer(tmp_path / str(separate), kind, max_steps=3)
        attach(live, selector, quiet=True)
        live.train()
    as_rows, as_lines = (ledger(tmp_path / name) for name in ("True", "False"))
    assert {shape[0] for shape in shapes[0]} == {8 if alone else 1}
    assert {shape[0] for shape in shapes[1]} == {1}
    assert [(line["token_id"], line["kept"]) for line in as_rows] == [
        (line["token_id"], line["kept"]) for line in as_lines
    ]
    totals = [[line["total"] for line in lines] for lines in (as_rows, as_lines)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


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

    @pytest.mark.parametrize("quiet", [False, True])
    def test_states_that_cross_segments(self, tmp_path: Path, quiet: bool) -> None:
        model = tiny_model("llama", layers=2, width=16)
        model.config.layer_types = ["linear_attention", "full_attention"]
        live = packed_trainer(tmp_path, "neat", model=model)
        attach(live, MaxLoss(keep=1), quiet=quiet)
        with pytest.raises(UserError, match="carries a state from one packed row to the next"):
            live.train()


def sft(folder: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    data = Dataset.from_list(SFT_ROWS)
    return trl.SFTTrainer(
        model=tiny_model("llama", layers=2, width=16),
        args=trl.SFTConfig(
            **arguments(
                folder, **{"per_device_train_batch_size": 4, "max_steps": 10, "num_train_epochs": 60, **options}
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
    more = {**options, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 25, "max_steps": 50}
    complete = sft(tmp_path / "complete", **more)
    attach(complete, make())
    complete.train()
    assert "packed batches" in capsys.readouterr().err
    lines = ledger(tmp_path / "complete")
    assert {line["step"] for line in lines} == set(range(1, 51))
    shares = [sum(line["kept"] for line in lines if line["step"] == step) for step in range(1, 51)]
    assert all(kept > 0 for kept in shares)
    assert sum(shares) < 0.35 * len(lines)
    lengths = {name.hex(): len(row["input_ids"]) for row in SFT_ROWS for name in token_ids(padded([row]))}
    logged = [line["sift/tokens_trained"] for line in complete.state.log_history if "loss" in line]
    assert logged[-1] == sum(lengths[line["token_id"]] for line in lines if line["kept"])
    resumed = sft(tmp_path / "complete", **more)
    attach(resumed, make(), quiet=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-25"))
    assert ledger(tmp_path / "complete") == lines
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(complete).items())
