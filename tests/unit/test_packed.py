"""Packed batches: where their rows begin, cutting and joining them, and the scores of segments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune import Greats, MaxGrad, MaxLoss, RhoLoss, UserError, reference_losses
from siftune.models.layout import BatchWithLayout, Span, layout_of, real_columns, with_layout
from siftune.models.repack import cut_segments, segments_as_rows
from siftune.online.token_id import token_ids
from siftune.online.uds import UDS
from tests.packed import LAYOUTS, pack, padded, rows_of
from tests.tiny import tiny_model


def lengths_of(batch: Any) -> list[int]:
    return [span.tokens for span in layout_of(batch).spans]


@pytest.mark.parametrize("kind", LAYOUTS)
class TestReading:
    def test_segments_are_where_the_collator_put_them(self, kind: str) -> None:
        rows = rows_of([5, 3, 9, 2, 7])
        batch = pack(rows, kind)
        assert layout_of(batch).packed
        assert lengths_of(batch) == [5, 3, 9, 2, 7]

    def test_names_are_those_of_the_padded_rows(self, kind: str) -> None:
        rows = rows_of([5, 3, 9, 2, 7])
        assert token_ids(pack(rows, kind)) == token_ids(padded(rows))

    def test_cutting_gives_what_the_collator_makes_of_the_kept_rows(self, kind: str) -> None:
        rows = rows_of([5, 3, 9, 2, 7])
        kept = [1, 2, 4]
        cut = cut_segments(pack(rows, kind), torch.tensor(kept))
        expected = pack([rows[index] for index in kept], kind, width=cut["input_ids"].shape[1])
        assert set(cut) == set(expected)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert cut[name].dtype == value.dtype, name
                assert cut[name].tolist() == value.tolist(), name
            else:
                assert cut[name] == value, name


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=12),
    kind=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_every_kept_segment_arrives_once_in_order(lengths: list[int], kind: str, seed: int) -> None:
    rows = rows_of(lengths, seed=seed)
    batch = with_layout(pack(rows, kind))
    if not batch.layout.packed or len(batch.layout) < 2:
        return
    generator = np.random.default_rng(seed)
    count = len(batch.layout)
    kept = sorted(generator.choice(count, size=int(generator.integers(1, count)), replace=False).tolist())
    cut = cut_segments(batch, torch.tensor(kept))
    names = token_ids(batch)
    assert token_ids(cut) == [names[index] for index in kept]
    if len(kept) > 1 and not all(size == 1 for size in lengths_of(cut)):
        again = layout_of(dict(cut))
        held = [span for span in cut.layout.spans if span.tokens > 1]
        assert [span for span in again.spans if span.tokens > 1] == held or not again.packed


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    kind=st.sampled_from(["neat", "axolotl", "block-mask"]),
    width=st.integers(9, 20),
    unlabelled=st.integers(0, 11),
    seed=st.integers(0, 99),
)
def test_lines_of_any_segments_are_cut_as_the_collator_packs(
    lengths: list[int], kind: str, width: int, unlabelled: int, seed: int
) -> None:
    """One-token segments, lines of one segment, rows without labels and padded ends."""
    rows = rows_of(lengths, seed=seed)
    for row in rows[unlabelled : unlabelled + 1]:
        row["labels"] = [-100] * len(row["labels"])
    batch = with_layout(pack(rows, kind, width=width), packed=True)
    assert token_ids(batch) == token_ids(padded(rows))
    generator = np.random.default_rng(seed)
    kept = sorted(generator.choice(len(rows), size=int(generator.integers(1, len(rows) + 1)), replace=False).tolist())
    cut = cut_segments(batch, torch.tensor(kept))
    assert token_ids(cut) == token_ids(padded([rows[index] for index in kept]))
    assert cut["input_ids"].shape[1] <= max(width, *lengths)
    for span, index in zip(cut.layout.spans, kept, strict=True):
        labels = cut["labels"][span.line, span.start : span.stop].tolist()
        assert labels == [-100, *rows[index]["labels"][1:]]


def left_padded_block_mask(rows: list[Any], dtype: torch.dtype) -> dict[str, Any]:
    """Rows padded on the left with a 4-D mask whose padding rows are completely open, as `transformers` leaves them."""
    batch = {
        name: value.flip(1) for name, value in padded([{k: v[::-1] for k, v in row.items()} for row in rows]).items()
    }
    real = batch["attention_mask"].bool()
    width = real.shape[1]
    allowed = torch.ones(width, width, dtype=torch.bool).tril() & real[:, None, :] & real[:, :, None]
    allowed |= ~real[:, :, None]
    mask = allowed[:, None] if dtype == torch.bool else torch.where(allowed, 0.0, torch.finfo(dtype).min)[:, None]
    return {**batch, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_open_rows_of_a_block_mask_are_padding(dtype: torch.dtype) -> None:
    rows = rows_of([9, 4, 6], seed=3)
    batch = left_padded_block_mask(rows, dtype)
    assert not layout_of(batch).packed
    assert real_columns(batch).sum(dim=1).tolist() == [9, 4, 6]
    model = tiny_model("llama", layers=2)
    batch["position_ids"] = (real_columns(batch).cumsum(dim=1) - 1).clamp_min(0)
    for method in (MaxLoss(keep=2), UDS(keep=2, alpha=0.1)):
        torch.testing.assert_close(
            method.score(model, batch).total, method.score(model, padded(rows)).total, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("kind", LAYOUTS)
def test_segments_as_rows_are_the_padded_rows(kind: str) -> None:
    rows = rows_of([9, 4, 12, 6, 1], seed=3)
    batch = with_layout(pack(rows, kind))
    result = segments_as_rows(batch)
    if kind == "block-mask":  # it may hide tokens inside a segment
        assert result is batch
        return
    for name, value in padded(rows).items():
        assert torch.equal(result[name], value), name
    assert not layout_of(result).packed


def test_batches_that_are_not_only_joined_rows_stay_as_they_are() -> None:
    rows = rows_of([4, 3, 2])
    extra = with_layout({**pack(rows, "trl"), "token_type_ids": torch.zeros(1, 9, dtype=torch.long)})
    joined = pack(rows, "trl")
    several = with_layout({**joined, "position_ids": joined["position_ids"].expand(3, 1, 9)})
    one_a_line = with_layout(pack(rows, "neat", width=4), packed=True)
    for batch in (extra, several, one_a_line):
        assert segments_as_rows(batch) is batch


class TestBudget:
    """`keep_tokens` of packed batches: the best segments while all of their tokens fit."""

    LENGTHS = (9, 4, 12, 6, 5, 1)

    @pytest.mark.parametrize("budget", [1, 4, 5, 10, 17, 30, 37, 1000])
    @pytest.mark.parametrize("kind", ["trl", "neat"])
    def test_the_best_segments_fill_the_line(self, budget: int, kind: str) -> None:
        model = tiny_model("llama", layers=2)
        batch = pack(rows_of(self.LENGTHS, seed=3), kind)
        total = MaxLoss(keep="all").score(model, batch).total.nan_to_num(nan=-torch.inf)
        expected, room = [], budget
        for index in torch.argsort(-total, stable=True).tolist():
            if self.LENGTHS[index] <= room:
                expected.append(index)
                room -= self.LENGTHS[index]
        kept = MaxLoss(keep="all", keep_tokens=budget).select(model, batch)
        assert kept.indices.tolist() == sorted(expected)
        assert sum(lengths_of(kept.batch)) <= budget

    def test_at_least_one_segment_is_kept(self) -> None:
        batch = pack(rows_of([9, 8], seed=3), "trl")
        assert len(MaxLoss(keep="all", keep_tokens=3).select(tiny_model("llama", layers=2), batch).indices) == 1

    def test_keep_bounds_the_number_as_well(self) -> None:
        batch = pack(rows_of(self.LENGTHS, seed=3), "trl")
        assert len(MaxLoss(keep=2, keep_tokens=1000).select(tiny_model("llama", layers=2), batch).indices) == 2


def test_the_scoring_forward_of_the_original_maxloss_keeps_the_segments() -> None:
    """`compat="paper"` drops the mask, which holds the segments of some layouts."""
    model = tiny_model("llama", layers=2)
    rows = rows_of([9, 4, 12], seed=3)
    theirs = MaxLoss(keep=1).score(model, padded(rows))
    ours = MaxLoss(keep=1, compat="paper").score(model, pack(rows, "axolotl"))  # position_ids keep rows apart
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-5, atol=1e-7)


class TestRefusals:
    def test_boundaries_that_contradict_each_other(self) -> None:
        batch = pack(rows_of([4, 4]), "flattening")
        batch["cu_seq_lens_q"] = torch.tensor([0, 3, 8], dtype=torch.int32)
        with pytest.raises(UserError, match="cu_seq_lens_q divides the batch into 2 segments and cu_seq_lens_k"):
            layout_of(batch)

    def test_positions_that_fall_without_a_restart(self) -> None:
        batch = {"input_ids": torch.ones(1, 6, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 2, 1, 2, 3]])}
        with pytest.raises(UserError, match="position_ids fall from 2 to 1 inside line 0"):
            layout_of(batch)

    def test_a_block_mask_that_reaches_outside(self) -> None:
        batch = pack(rows_of([3, 3]), "block-mask")
        batch["attention_mask"][0, 0, 4, 0] = 0.0
        with pytest.raises(UserError, match="attend outside their own segment"):
            layout_of(batch)

    def test_lengths_that_leave_labels_out(self) -> None:
        batch = pack(rows_of([4, 4]), "unsloth")
        batch["packed_seq_lengths"] = torch.tensor([4], dtype=torch.int32)
        with pytest.raises(UserError, match="packed_seq_lengths covers 4 of the batch's 1 x 8 tokens"):
            layout_of(batch)

    def test_a_key_of_another_length(self) -> None:
        batch: dict[str, Any] = {**pack(rows_of([4, 4, 2]), "trl"), "weights": torch.ones(7)}
        with pytest.raises(
            UserError, match="key 'weights' of size \\(7,\\), which belongs neither to its 1 x 10 tokens"
        ):
            cut_segments(batch, torch.tensor([0]))


class TestKeys:
    def test_unknown_keys_of_tokens_and_of_segments_are_cut(self) -> None:
        batch = {
            **pack(rows_of([4, 3, 2]), "trl"),
            "extra": torch.arange(9)[None],
            "names": ["a", "b", "c"],
            "scale": 2.0,
        }
        cut = cut_segments(batch, torch.tensor([0, 2]))
        assert cut["extra"].tolist() == [[0, 1, 2, 3, 7, 8]]
        assert cut["names"] == ["a", "c"]
        assert cut["scale"] == 2.0

    def test_positions_with_three_components(self) -> None:
        batch = pack(rows_of([4, 3, 2]), "trl")
        batch["position_ids"] = batch["position_ids"].expand(3, 1, 9).clone()
        cut = cut_segments(batch, torch.tensor([1, 2]))
        assert cut["position_ids"].shape == (3, 1, 5)
        assert cut["position_ids"][0].tolist() == [[0, 1, 2, 0, 1]]

    def test_the_first_label_of_a_segment_is_masked(self) -> None:
        batch = pack(rows_of([4, 3, 2]), "neat")
        batch["labels"] = batch["input_ids"].clone()
        cut = cut_segments(batch, torch.tensor([1, 2]))
        assert [bool(cut["labels"][span.line, span.start] == -100) for span in cut.layout.spans] == [True, True]

    def test_several_lines_stay_lines_filled_in_order(self) -> None:
        batch = pack(rows_of([6, 3, 5, 4, 8]), "neat", width=10)
        assert batch["input_ids"].shape == (3, 10)
        cut = cut_segments(batch, torch.tensor([1, 2, 4]))
        assert list(cut.layout.spans) == [Span(0, 0, 3), Span(0, 3, 8), Span(1, 0, 8)]
        assert cut["attention_mask"].tolist() == [[1] * 3 + [2] * 5, [1] * 8]

    def test_trailing_padding_is_no_candidate(self) -> None:
        assert lengths_of(pack(rows_of([4, 3]), "trl", width=12)) == [4, 3]
        assert lengths_of(pack(rows_of([4, 3]), "positions", width=12)) == [4, 3]


SEPARATED = ["block-mask", "trl"]


@pytest.mark.parametrize("kind", SEPARATED)
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "cohere", "gpt_neox"]
)
def test_packed_scores_are_padded_scores(family: str, kind: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(family, layers=2)
    rows = rows_of([9, 4, 12, 6, 5], seed=3)
    packed, alone = pack(rows, kind), padded(rows)
    for method in (MaxLoss(keep=2), UDS(keep=2, alpha=0.1)):
        ours, theirs = method.score(model, packed), method.score(model, alone)
        torch.testing.assert_close(ours.total, theirs.total, rtol=1e-5, atol=1e-7)
        for name, part in theirs.parts.items():
            torch.testing.assert_close(ours.parts[name], part, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", SEPARATED)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("variant", ["exact", "last-layer"])
def test_packed_gradient_norms_are_padded_ones(family: str, kind: str, variant: Any) -> None:
    torch.manual_seed(0)
    model = tiny_model(family, layers=2)
    rows = rows_of([9, 4, 12, 6, 5], seed=3)
    method = MaxGrad(keep=2, variant=variant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # factors, not one row at a time
        ours = method.score(model, pack(rows, kind))
    theirs = method.score(model, padded(rows))
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["padded", "several lines"])
def test_gradients_do_not_depend_on_chunks(form: str) -> None:
    model = tiny_model("llama", layers=2)
    rows = rows_of([12, 4, 9, 6, 11, 5], seed=3)
    batch = padded(rows) if form == "padded" else pack(rows, "block-mask", width=16)
    complete, chunked = (MaxGrad(keep=2, score_tokens=tokens).score(model, batch) for tokens in (None, 20))
    torch.testing.assert_close(chunked.total, complete.total, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", SEPARATED)
def test_packed_greats_and_rho_loss_are_padded_ones(kind: str) -> None:
    torch.manual_seed(0)
    model, reference = tiny_model("llama", layers=2), tiny_model("qwen2", layers=2)
    rows = rows_of([9, 4, 12, 6, 5], seed=3)
    held_out = padded(rows_of([8, 7], seed=9))
    for method in (Greats(keep=2, validation=held_out, learning_rate=1e-2), RhoLoss(keep=2, reference=reference)):
        ours, theirs = method.score(model, pack(rows, kind)), method.score(model, padded(rows))
        torch.testing.assert_close(ours.total, theirs.total, rtol=1e-5, atol=1e-6)
        for name, part in theirs.parts.items():
            torch.testing.assert_close(ours.parts[name], part, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_reference_table_of_packed_rows_names_each_of_them(tmp_path: Path) -> None:
    from tests.laws.test_packed_laws import packed_trainer

    rows = rows_of([9, 4, 12, 6, 5, 7, 8, 3], seed=1)
    live = packed_trainer(tmp_path, "trl", rows=rows)
    table = pq.read_table(reference_losses(live, tiny_model("llama", layers=2), out=tmp_path / "table.parquet"))
    assert table["token_id"].to_pylist() == [name.hex() for name in token_ids(padded(rows))]
    assert table["row"].to_pylist() == list(range(8))
    kept = RhoLoss(keep=2, reference=str(tmp_path / "table.parquet")).score(live.model, pack(rows, "trl"))
    assert not kept.reasons


def test_select_gives_a_packed_batch_of_the_kept_segments() -> None:
    model = tiny_model("llama", layers=2)
    rows = rows_of([9, 4, 12, 6, 5], seed=3)
    kept = MaxLoss(keep=2).select(model, pack(rows, "trl"))
    assert isinstance(kept.batch, BatchWithLayout)
    expected = pack([rows[index] for index in kept.indices.tolist()], "trl")
    assert kept.batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert kept.batch["position_ids"].tolist() == expected["position_ids"].tolist()


@pytest.mark.parametrize("subclass", [False, True])
def test_joined_rows_without_boundaries_are_refused(tmp_path: Path, subclass: bool) -> None:
    from transformers import DataCollatorWithFlattening

    from siftune import attach
    from tests.trainers import trainer

    class Own(DataCollatorWithFlattening):
        pass

    live = trainer(tmp_path, max_steps=1)
    live.data_collator = (Own if subclass else DataCollatorWithFlattening)(return_position_ids=False)
    attach(live, MaxLoss(keep=1), quiet=True)
    with pytest.raises(UserError, match="this trainer joins rows, and nothing in its first batch"):
        live.train()
