"""Choosing and rebalancing across ranks without processes: ranks are threads that meet where processes would gather."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune import UserError
from siftune.hook.batching import Padding
from siftune.hook.exchange import Ranks, pack, unpack
from siftune.hook.rebalance import rebalance, rebalance_by_tokens, rows_per_rank
from siftune.hook.selection_step import select_step
from siftune.models.layout import with_layout
from siftune.online.simple import Random
from siftune.records import RowScores
from tests import packed
from tests.trainers import Drifting
from tests.unit.test_hook_parts import batch_of, real_rows


class Meeting:
    """Where the threads of a world wait for each other's messages."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=20)
        self.said: list[Any] = [None] * world

    def exchange(self, rank: int, message: Any) -> list[Any]:
        self.said[rank] = message
        self.barrier.wait()
        heard = list(self.said)
        self.barrier.wait()
        return heard


class Thread(Ranks):
    """A rank that is a thread."""

    meeting: Meeting

    def gather(self, message: bytes) -> list[bytes]:
        return self.meeting.exchange(self.rank, message)

    def gather_ints(self, number: int) -> list[int]:
        return self.meeting.exchange(self.rank, number)


def together(world: int, task: Callable[[Ranks], Any]) -> list[Any]:
    """What `task` gives on each of `world` ranks; the first error, where one has it."""
    meeting = Meeting(world)

    def one(rank: int) -> Any:
        ranks = Thread(rank=rank, world=world, device=torch.device("cpu"))
        ranks.meeting = meeting
        try:
            return task(ranks)
        except threading.BrokenBarrierError:
            return None
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def global_batch(draw: np.random.Generator, size: int, start: int, *, left: bool) -> dict[str, Any]:
    """A micro-batch of all ranks; some rows have nothing to learn from."""
    one = batch_of(draw.integers(3, 9, size=size).tolist(), left=left, start=start)
    for row in (draw.random(size) < 0.2).nonzero()[0]:
        one["labels"][row] = -100
    return {**one, "names": [f"{start}-{row}" for row in range(size)]}


def part(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: value[start:stop] for name, value in batch.items()}


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(1, 4),
    micro=st.integers(1, 3),
    share=st.integers(1, 4),
    keep=st.sampled_from(["1/8", "1/3", "5/8", "all"]),
    window=st.sampled_from(["micro", "step"]),
    left=st.booleans(),
    dummies=st.booleans(),
    seed=st.integers(0, 999),
)
def test_many_ranks_train_the_rows_that_one_would(
    world: int, micro: int, share: int, keep: Any, window: str, left: bool, dummies: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    sizes = [world * share] * (micro - 1) + [world * share - int(draw.integers(0, share))]  # the last one may be short
    whole = [global_batch(draw, size, 10_000 * index + 5, left=left) for index, size in enumerate(sizes)]
    cuts = [np.minimum(np.arange(world + 1) * share, size).tolist() for size in sizes]

    def task(ranks: Ranks) -> Any:
        held = [part(one, cut[ranks.rank], cut[ranks.rank + 1]) for one, cut in zip(whole, cuts, strict=True)]
        selector = Drifting(keep=keep, window=window, scope="global")
        model = torch.nn.Linear(1, 1)
        return [
            select_step(selector, model, held, ranks=ranks, padding=Padding(left=True), allow_dummies=dummies)
            for _ in range(2)
        ]

    reference = Drifting(keep=keep, window=window)
    enough = all(reference.count(size) >= world for size in sizes) and reference.count(sum(sizes)) >= world * micro
    expected = [
        select_step(reference, torch.nn.Linear(1, 1), whole, padding=Padding(left=True), allow_dummies=True)
        for _ in "12"
    ]
    everything = real_rows(whole)
    for step, done in enumerate(zip(*together(world, task), strict=True)):
        kept = done[0].kept
        if dummies or enough:
            assert kept.tolist() == expected[step].kept.tolist()
            assert done[0].total.tolist() == pytest.approx(expected[step].total.tolist(), nan_ok=True)
        assert sorted(index for one in done for index in one.local) == list(range(sum(sizes)))
        batches = [one.batches for one in done]
        assert all(len(one) == micro and all(len(batch["input_ids"]) for batch in one) for one in batches)
        full = [[batch for batch in one if not is_dummy(batch)] for one in batches]
        trained = [row for one in full for row in real_rows(one)]
        assert sorted(trained) == sorted(everything[index] for index in kept.nonzero().flatten().tolist())
        names = {name for one in full for batch in one for name in batch["names"]}
        assert len(names) == len(trained)
        counts = [sum(len(batch["input_ids"]) for batch in one) for one in full]
        if window == "step" and not bool(kept.all()):
            assert max(counts) - min(counts) <= 1
        if not dummies:
            assert all(len(one) == micro for one in full)


def is_dummy(batch: dict[str, Any]) -> bool:
    """A dummy micro-batch: two columns and no label. Every row here is longer."""
    return batch["input_ids"].shape == (1, 2) and bool((batch["labels"] == -100).all())


@settings(max_examples=100, deadline=None)
@given(kept=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_as_few_rows_move_as_can(kept: list[int]) -> None:
    slots = [(rank, 0) for rank in range(len(kept))]
    rows = [(rank, 0, row) for rank, count in enumerate(kept) for row in range(count)]
    plan = rebalance(slots, rows)
    assert sorted(row for assigned in plan.values() for row in assigned) == rows
    counts = [len(plan[slot]) for slot in slots]
    assert max(counts) - min(counts) <= 1
    moved = sum(row[0] != slot[0] for slot, assigned in plan.items() for row in assigned)
    base, more = divmod(len(rows), len(kept))
    fewest = min(  # over every way to say who trains one row more
        sum(max(0, count - base - (rank in extra)) for rank, count in enumerate(kept))
        for extra in itertools.combinations(range(len(kept)), more)
    )
    assert moved == fewest


def test_shares_are_even_and_odd_rows_stay_where_most_were_kept() -> None:
    assert rows_per_rank({0: 0, 1: 5, 2: 2}) == {0: 2, 1: 3, 2: 2}


def test_nothing_is_sent_where_no_row_moves() -> None:
    calls: list[int] = []

    def task(ranks: Ranks) -> Any:
        gather = ranks.gather
        ranks.gather = lambda message: calls.append(len(message)) or gather(message)  # type: ignore[method-assign,func-returns-value]
        one = batch_of([3, 4])
        return select_step(Random(keep="all"), torch.nn.Linear(1, 1), [one], ranks=ranks, padding=Padding())

    done = together(2, task)
    assert len(calls) == 2  # the measurements, once per rank
    assert done[1].batches[0]["input_ids"].tolist() == batch_of([3, 4])["input_ids"].tolist()


@pytest.mark.parametrize("window", ["micro", "step"])
def test_ranks_may_bring_fewer_micro_batches_or_none(window: str) -> None:
    held = {0: [batch_of([3, 4, 5], start=5), batch_of([6, 3], start=1005)], 1: [batch_of([7, 4], start=2005)], 2: []}

    def task(ranks: Ranks) -> Any:
        selector = Random(keep="1/2", window=window)
        return [
            select_step(selector, torch.nn.Linear(1, 1), brought, ranks=ranks, padding=Padding(), allow_dummies=True)
            for brought in (held[ranks.rank], [])
        ]

    for ranks_said in together(3, task):
        assert ranks_said[0].kept.sum() == 4
        assert ranks_said[1].batches == []
        assert len(ranks_said[1].kept) == 0
    done = [said[0].batches for said in together(3, task)]
    assert [len(one) for one in done] == [2, 1, 0]
    trained = [row for one in done for batch in one if not is_dummy(batch) for row in real_rows([batch])]
    assert len(trained) == 4


def test_ranks_that_differ_stop_before_any_row_moves() -> None:
    def task(ranks: Ranks) -> Any:
        selector = Random(keep="1/2", seed=ranks.rank)
        return select_step(selector, torch.nn.Linear(1, 1), [batch_of([3, 4])], ranks=ranks, padding=Padding())

    with pytest.raises(RuntimeError, match="rank 1 kept different rows or remember different ones than rank 0"):
        together(2, task)


def test_a_memory_that_drifts_apart_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siftune.hook.selection_step.STATE_CHECK_EVERY", 3)
    steps: list[int] = []

    def task(ranks: Ranks) -> Any:
        selector = Drifting(keep="all", scope="global")
        for step in range(9):
            if step == 4 and ranks.rank == 1:
                selector.phase = selector.phase + 1e-12  # far too little to change a choice
            if ranks.rank == 0:
                steps.append(step)
            select_step(selector, torch.nn.Linear(1, 1), [batch_of([3, 4])], ranks=ranks, padding=Padding())

    with pytest.raises(RuntimeError, match="rank 1"):
        together(2, task)
    assert steps[-1] == 6


def test_columns_that_cannot_be_sent_are_refused() -> None:
    def task(ranks: Ranks) -> Any:
        one = {**batch_of([3, 4] if ranks.rank else [5, 6]), "things": [object(), object()]}
        selector = Drifting(keep="1/2", scope="global")
        selector.combine = lambda measured: RowScores(-torch.arange(measured.rows).double())  # type: ignore[method-assign]
        select_step(selector, torch.nn.Linear(1, 1), [one], ranks=ranks, padding=Padding())

    with pytest.raises(UserError, match=r"'things' .* object, which cannot be sent"):
        together(2, task)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float64, torch.bfloat16, torch.uint8])
def test_messages_come_back_as_they_were(dtype: torch.dtype) -> None:
    for values in ([[0, 1], [1, 0]], [[-100, 3], [70_000, 2**31 - 1]], [[]]):
        tensor = torch.tensor(values).to(dtype)
        (back, note) = unpack(pack({"a": tensor, "b/c": tensor[:0]}, {"x": [1, "ä", None]}))
        assert back["a"].dtype == dtype
        assert torch.equal(back["a"], tensor)
        assert back["b/c"].shape == tensor[:0].shape
        assert note == {"x": [1, "ä", None]}


def test_token_ids_travel_narrow() -> None:
    ids = torch.randint(0, 50_000, (4, 512))
    assert len(pack({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})) < 4 * 512 * 9 + 500


@settings(max_examples=30, deadline=None)
@given(
    world=st.integers(1, 4),
    micro=st.integers(1, 3),
    lengths=st.lists(st.integers(2, 12), min_size=8, max_size=8),
    keep=st.sampled_from(["1/20", "1/8", "1/2", "5/8", "all"]),
    window=st.sampled_from(["micro", "step"]),
    kind=st.sampled_from(packed.LAYOUTS),
    seed=st.integers(0, 999),
)
def test_many_ranks_train_the_segments_that_one_would(
    world: int, micro: int, lengths: list[int], keep: Any, window: str, kind: str, seed: int
) -> None:
    lines = [
        [packed.rows_of(lengths, seed=seed + 10 * rank + index) for index in range(micro)] for rank in range(world)
    ]

    def task(ranks: Ranks) -> Any:
        held = [packed.pack(rows, kind) for rows in lines[ranks.rank]]
        selector = Random(keep=keep, window=window, seed=seed)
        return select_step(selector, torch.nn.Linear(1, 1), held, ranks=ranks, padding=Padding(), allow_dummies=True)

    done = together(world, task)
    everyone = [row for index in range(micro) for rank in range(world) for row in lines[rank][index]]
    kept = [everyone[index]["input_ids"] for index in done[0].kept.nonzero().flatten().tolist()]
    reference = Random(keep=keep, window=window, seed=seed)
    global_batches = [
        packed.pack([row for rank in range(world) for row in lines[rank][index]], kind) for index in range(micro)
    ]
    alone = select_step(reference, torch.nn.Linear(1, 1), global_batches, padding=Padding(), allow_dummies=True)
    assert alone.kept.tolist() == done[0].kept.tolist()
    trained: list[list[int]] = []
    for one in done:
        assert len(one.batches) == micro
        for batch in one.batches:
            layout = with_layout(batch, packed=True).layout
            labelled = batch["labels"] != -100
            for line, start, stop in layout.spans:
                if bool(labelled[line, start:stop].any()):
                    trained.append(batch["input_ids"][line, start:stop].tolist())
    assert sorted(trained) == sorted(kept)


@settings(max_examples=100, deadline=None)
@given(
    held=st.lists(st.lists(st.integers(1, 50), max_size=6), min_size=1, max_size=4).filter(any),
    micro=st.integers(1, 3),
)
def test_rebalancing_by_tokens_keeps_every_row_and_leaves_no_slot_empty(held: list[list[int]], micro: int) -> None:
    slots = [(rank, index) for rank in range(len(held)) for index in range(micro)]
    tokens = {(rank, 0, row): size for rank, sizes in enumerate(held) for row, size in enumerate(sizes)}
    rows = sorted(tokens)
    plan = rebalance_by_tokens(slots, rows, tokens)
    assert set(plan) == set(slots)
    assert sorted(row for assigned in plan.values() for row in assigned) == rows
    assert all(assigned == sorted(assigned) for assigned in plan.values())
    if len(rows) >= len(slots):
        assert all(plan.values())
    loads = [sum(tokens[row] for slot in slots if slot[0] == rank for row in plan[slot]) for rank in range(len(held))]
    if len(rows) >= len(slots) and micro == 1:
        assert max(loads) - min(loads) <= 2 * max(tokens.values())
