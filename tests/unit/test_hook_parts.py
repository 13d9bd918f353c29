"""The parts of the hook by themselves: trimming, rebalancing, token ids, the ledger's files, a checkpoint's state."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from siftune.errors import UserError
from siftune.hook import checkpoint
from siftune.hook.batching import Padding, trim
from siftune.hook.exchange import Ranks
from siftune.hook.ledger import Ledger
from siftune.hook.rebalance import build_batches, rebalance
from siftune.hook.row_index import index_rows
from siftune.models.hidden_states import real_tokens
from siftune.online.token_id import token_ids
from siftune.sft.token_counts import TokenCounts
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import Drifting, rows


def batch_of(lengths: list[int], *, left: bool = False, width: int | None = None, start: int = 5) -> dict[str, Any]:
    """A padded batch whose row r holds the ids start + 100 r, + 1, ..."""
    width = width or max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        span = slice(width - length, width) if left else slice(0, length)
        ids[row, span] = torch.arange(length) + start + 100 * row
        mask[row, span] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rebalanced(batches: list[Any], kept: torch.Tensor, padding: Padding) -> list[Any]:
    """The kept rows of an accumulation window over its micro-batches, in a world of one."""
    origins = [(0, micro, row) for micro, batch in enumerate(batches) for row in range(len(batch["input_ids"]))]
    plan = rebalance([(0, micro) for micro in range(len(batches))], [origins[index] for index in kept.tolist()])
    return build_batches(batches, plan, padding, Ranks.alone())


def real_rows(batches: list[Any]) -> list[list[int]]:
    """Every row's real ids, over all batches."""
    return [row[real].tolist() for one in batches for row, real in zip(one["input_ids"], real_tokens(one), strict=True)]


class TestTrim:
    def test_right_padding_goes_down_to_the_longest_row(self) -> None:
        short = trim(batch_of([3, 5], width=12), Padding())
        assert short["input_ids"].shape == (2, 5)
        assert real_rows([short]) == real_rows([batch_of([3, 5], width=12)])

    def test_the_collators_multiple_is_kept(self) -> None:
        assert trim(batch_of([3, 5], width=24), Padding(multiple=8))["labels"].shape == (2, 8)
        assert trim(batch_of([3, 9], width=24, left=True), Padding(multiple=8, left=True))["labels"].shape == (2, 16)

    def test_left_padding_goes_only_where_positions_are_relative_or_given(self) -> None:
        wide = batch_of([3, 5], width=12, left=True)
        assert trim(wide, Padding(left=False)) is wide
        assert trim(wide, Padding(left=True))["input_ids"].shape == (2, 5)
        positions = torch.arange(12).expand(2, 12)
        sliced = trim({**wide, "position_ids": positions}, Padding(left=False))
        assert sliced["position_ids"].tolist() == [[7, 8, 9, 10, 11]] * 2

    def test_what_it_does_not_understand_stays_whole(self) -> None:
        square = {**batch_of([3, 5], width=12), "bias": torch.zeros(2, 1, 12, 12)}
        assert trim(square, Padding()) is square
        assert trim({"input_ids": torch.ones(2, 4)}, Padding())["input_ids"].shape == (2, 4)

    @pytest.mark.parametrize(
        ("family", "left"), [("llama", True), ("gpt_neox", True), ("gemma3", True), ("gpt2", False)]
    )
    def test_padding_knows_rotary_models(self, family: str, left: bool) -> None:
        class Live:
            data_collator = DataCollatorForSeq2Seq(tiny_tokenizer(), pad_to_multiple_of=8)
            processing_class = tiny_tokenizer()
            model = tiny_model(family, layers=1, width=16)

        assert Padding.of(Live()) == Padding(token=0, multiple=8, left=left)


class TestDeal:
    @settings(max_examples=60, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
        left=st.booleans(),
        seed=st.integers(0, 999),
        with_mask=st.booleans(),
    )
    def test_every_kept_row_arrives_once_in_order_in_even_micro_batches(
        self, sizes: list[int], left: bool, seed: int, with_mask: bool
    ) -> None:
        draw = np.random.default_rng(seed)
        batches = [
            batch_of(draw.integers(2, 9, size=size).tolist(), left=left, start=1000 * index + 5)
            for index, size in enumerate(sizes)
        ]
        if not with_mask:
            batches = [batch_of([3 + index] * size, start=1000 * index + 5) for index, size in enumerate(sizes)]
            for one in batches:
                del one["attention_mask"]
        everything = real_rows(batches)
        count = int(draw.integers(1, sum(sizes) + 1))
        kept = torch.tensor(sorted(draw.choice(sum(sizes), size=count, replace=False).tolist()))
        result = rebalanced(batches, kept, Padding(left=True))
        assert len(result) == len(batches)
        full = [one for one in result if (one["labels"] != -100).any()]
        assert real_rows(full) == [everything[index] for index in kept.tolist()]
        counts = [len(one["input_ids"]) for one in full]
        assert max(counts) - min(counts) <= 1
        assert len(full) == min(count, len(batches))
        for one in full:
            assert (one["labels"] != -100).sum() == real_tokens(one).sum()
        for dummy in result[len(full) :]:
            assert dummy["input_ids"].shape[0] == 1
            assert real_tokens(dummy).all()

    def test_columns_without_rows_and_lists_of_rows(self) -> None:
        one = {**batch_of([3, 4]), "names": ["a", "b"], "scale": 2.0, "flag": torch.tensor(1)}
        two = {**batch_of([2, 6]), "names": ["c", "d"], "scale": 2.0, "flag": torch.tensor(1)}
        first, second = rebalanced([one, two], torch.tensor([1, 2, 3]), Padding())
        assert first["names"] == ["b", "c"]
        assert second["names"] == ["d"]
        assert first["scale"] == 2.0
        assert first["flag"].item() == 1

    def test_dummy_batches_leave_the_candidates_alone(self) -> None:
        batches = [batch_of([4]), batch_of([5])]
        rebalanced(batches, torch.tensor([0]), Padding())
        assert (batches[0]["labels"] != -100).all()


class TestIdentity:
    def test_padding_and_sides_do_not_change_it_but_ids_and_label_mask_do(self) -> None:
        narrow, wide, left = batch_of([3, 5]), batch_of([3, 5], width=9), batch_of([3, 5], width=9, left=True)
        assert token_ids(narrow) == token_ids(wide) == token_ids(left)
        assert len({*token_ids(narrow)}) == 2
        masked = {**narrow, "labels": narrow["labels"].clone()}
        masked["labels"][0, 0] = -100
        assert token_ids(masked)[0] != token_ids(narrow)[0]
        assert token_ids(masked)[1] == token_ids(narrow)[1]

    def test_the_index_finds_every_row_and_of_equal_rows_the_first(self) -> None:
        data = [*rows(150), *rows(10)]
        collate = DataCollatorForSeq2Seq(tiny_tokenizer())
        index = index_rows(data, collate)
        assert index is not None
        assert len(index) == 160
        found = [index.row(digest) for digest in token_ids(collate([dict(row) for row in data]))]
        assert found == [*range(150), *range(10)]
        assert index.row(b"\0" * 16) is None

    def test_iterable_data_has_no_rows(self) -> None:
        assert index_rows(iter(rows(3)), DataCollatorForSeq2Seq(tiny_tokenizer())) is None

    def test_a_collator_that_draws_leaves_the_random_state(self) -> None:
        collate = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)

        def noisy(several: list[Any]) -> Any:
            torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
            return collate([{"input_ids": row["input_ids"]} for row in several])

        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        assert index_rows(rows(9), noisy) is not None
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert (before[1] == after[1]).all()
        assert before[2] == after[2]


def _line(book: Ledger, step: int, *, parts: dict[str, list[float]] | None = None) -> None:
    book.add(
        step,
        [0, 0],
        token_ids=[b"a" * 16, b"b" * 16],
        rows=[step, None],
        total=[1.0, float("nan")],
        parts=parts or {},
        kept=[True, False],
        reasons={1: "why"},
    )


class TestLedger:
    def test_parts_merge_and_forget(self, tmp_path: Path) -> None:
        book = Ledger(tmp_path)
        _line(book, 1)
        _line(book, 2, parts={"intra": [0.5, float("nan")]})
        book.flush(2)
        _line(book, 10, parts={"intra": [0.5, 2.0]})
        book.flush(10)
        _line(book, 11)  # buffered, never flushed: the run was killed
        again = Ledger(tmp_path)
        again.drop_after(2)
        assert [path.name for path in (tmp_path / "selection").iterdir()] == ["part-2.parquet"]
        _line(again, 3)
        again.flush(3)
        path = again.merge()
        assert path == tmp_path / "selection.parquet"
        lines = pq.read_table(path).to_pylist()
        assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3]
        assert [line["intra"] for line in lines] == [None, None, 0.5, None, None, None]
        assert lines[1] == {
            "step": 1, "rank": 0, "micro": 0, "row": None, "token_id": (b"b" * 16).hex(), "total": None, "intra": None,
            "kept": False, "reason": "why",
        }  # fmt: skip
        assert not list(tmp_path.rglob("*.tmp"))

    def test_parts_are_ordered_by_number_and_rank(self, tmp_path: Path) -> None:
        for step in (9, 10):
            for rank in (1, 0):
                book = Ledger(tmp_path, rank=rank)
                _line(book, step)
                book.flush(step)
        lines = pq.read_table(Ledger(tmp_path).merge()).to_pylist()
        assert [(line["step"], line["rank"]) for line in lines[::2]] == [(9, 0), (9, 1), (10, 0), (10, 1)]

    def test_nothing_written_is_nothing_merged(self, tmp_path: Path) -> None:
        assert Ledger(tmp_path).merge() is None


class TestState:
    def test_tensors_and_values_come_back(self, tmp_path: Path) -> None:
        selector = Drifting(keep=1)
        selector.phase += 0.1
        checkpoint.write(tmp_path, selector, {"tokens_trained": 3}, step=7)
        assert not checkpoint.is_complete(tmp_path)
        checkpoint.finish(tmp_path, step=7)
        assert checkpoint.is_complete(tmp_path)
        saved = checkpoint.read(tmp_path, Drifting(keep=1))
        assert torch.equal(saved.selector["phase"], selector.phase)
        assert saved.selector["note"] == "any plain value"
        assert saved.totals == {"tokens_trained": 3}
        assert not list(tmp_path.rglob("*.tmp"))

    def test_another_selectors_state_and_a_missing_rank_are_refused(self, tmp_path: Path) -> None:
        checkpoint.write(tmp_path, Drifting(keep=1), {}, step=7)
        with pytest.raises(UserError, match="no selection state of rank 3"):
            checkpoint.read(tmp_path, Drifting(keep=1), rank=3)
        record = json.loads((tmp_path / "siftune" / "selector.json").read_text())
        record["selector"] = "uds"
        (tmp_path / "siftune" / "selector.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="saved with the selector uds, and drifting is attached"):
            checkpoint.read(tmp_path, Drifting(keep=1))

    def test_ranks_that_chose_together_serve_any_number_and_alone_only_theirs(self, tmp_path: Path) -> None:
        checkpoint.write(tmp_path / "together", Drifting(keep=1, scope="global"), {}, step=7, world=4)
        for world in (1, 2):
            saved = checkpoint.read(tmp_path / "together", Drifting(keep=1), world=world, across_ranks=True)
            assert saved.selector["note"] == "any plain value"
        for rank in (0, 1):
            checkpoint.write(tmp_path / "alone", Drifting(keep=1, scope="local"), {}, step=7, rank=rank, world=2)
        checkpoint.read(tmp_path / "alone", Drifting(keep=1), rank=1, world=2)
        for now in ({"world": 2, "across_ranks": True}, {"world": 1}, {"world": 3}):
            with pytest.raises(UserError, match='resume with 2 processes and scope="local"'):
                checkpoint.read(tmp_path / "alone", Drifting(keep=1), **now)  # type: ignore[arg-type]

    def test_true_means_the_newest_complete_checkpoint(self, tmp_path: Path) -> None:
        folder = str(tmp_path)
        assert checkpoint.checkpoint_to_resume(True, folder, allow_fresh=False) is True
        for step in (9, 10, 11):
            (tmp_path / f"checkpoint-{step}").mkdir()
        with pytest.raises(UserError, match=r"checkpoint-11 holds no complete selection state"):
            checkpoint.checkpoint_to_resume(True, folder, allow_fresh=False)
        assert checkpoint.checkpoint_to_resume(True, folder, allow_fresh=True) is True
        for step in (9, 10):
            (tmp_path / f"checkpoint-{step}" / "siftune").mkdir()
            checkpoint.finish(tmp_path / f"checkpoint-{step}", step=step)
        assert checkpoint.checkpoint_to_resume(True, folder, allow_fresh=False) == str(tmp_path / "checkpoint-10")
        with pytest.raises(UserError, match=r"checkpoint-11 .* allow_fresh_selector=True"):
            checkpoint.checkpoint_to_resume(str(tmp_path / "checkpoint-11"), folder, allow_fresh=False)
        assert checkpoint.checkpoint_to_resume(None, folder, allow_fresh=False) is None


class TestDamage:
    """What a resumed run reads back: used as it was written, or refused in one sentence that names the file."""

    def test_any_flipped_bit_in_a_part_is_noticed_when_a_run_resumes(self, tmp_path: Path) -> None:
        book = Ledger(tmp_path)
        _line(book, 5)
        book.flush(5)
        path = tmp_path / "selection" / "part-5.parquet"
        sound, content = pq.read_table(path), path.read_bytes()
        messages = []
        for place in range(0, len(content), 7):
            path.write_bytes(flipped(content, place))
            try:
                Ledger(tmp_path).drop_after(9)
                merged = Ledger(tmp_path).merge()
                assert merged is not None
                assert pq.read_table(merged).equals(sound), place
            except UserError as error:
                messages.append(str(error))
        assert messages
        assert all(f"{path} cannot be read" in message and "delete it" in message for message in messages)

    @pytest.mark.parametrize("name", ["selector.json", "selector.safetensors", "COMPLETE"])
    def test_any_flipped_bit_in_a_selectors_state_is_noticed(self, tmp_path: Path, name: str) -> None:
        checkpoint.write(tmp_path, Drifting(keep=1), {"tokens_trained": 3}, step=7)
        checkpoint.finish(tmp_path, step=7)
        path = tmp_path / "siftune" / name
        content = path.read_bytes()
        for place in range(0, len(content), 5):
            path.write_bytes(flipped(content, place))
            with pytest.raises(UserError, match=r"is damaged; delete .* and run again"):
                checkpoint.read(tmp_path, Drifting(keep=1))
        path.write_bytes(content)
        checkpoint.read(tmp_path, Drifting(keep=1))

    def test_a_state_that_was_cut_is_one_sentence_even_without_sums(self, tmp_path: Path) -> None:
        for name in ("selector.json", "selector.safetensors"):
            checkpoint.write(tmp_path, Drifting(keep=1), {}, step=7)
            (tmp_path / "siftune" / "COMPLETE").write_text("7\n")  # as earlier versions wrote it
            checkpoint.read(tmp_path, Drifting(keep=1))
            (tmp_path / "siftune" / name).write_bytes((tmp_path / "siftune" / name).read_bytes()[:20])
            with pytest.raises(UserError, match="is damaged"):
                checkpoint.read(tmp_path, Drifting(keep=1))

    def test_damaged_counts_of_a_training_run_are_one_sentence(self, tmp_path: Path) -> None:
        counts = TokenCounts(None)
        counts.save(tmp_path)
        checkpoint.finish(tmp_path, step=7)
        path = tmp_path / "siftune" / "tally.json"
        for content in (path.read_bytes().replace(b'"steps": 0', b'"steps": 8'), b"{", b'{"a": 1}'):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"tally.json is damaged; delete"):
                TokenCounts(None).begin(tmp_path)


def flipped(content: bytes, place: int) -> bytes:
    data = bytearray(content)
    data[place] ^= 1 << place % 8
    return bytes(data)
