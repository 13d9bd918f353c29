"""Engines: the same results as the serial one, finished shards reused exactly when their content is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from siftune.engines.local import LocalEngine
from siftune.engines.shard import Progress, part_of, run_shard, shard_key
from siftune.errors import UserError
from siftune.models.store import Store
from siftune.offline.base import SerialEngine, gather
from siftune.records import SHARD_ROWS, Pool, Row, Shard, ShardResult


@dataclass
class Rows:
    """Made-up rows; `column` stands for which of the user's columns is read as the instruction."""

    count: int
    column: str = "a"
    changed: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int]) -> list[Row]:
        return [Row(r, f"{r:032x}", f"{self.column}{r}{'!' * (r in self.changed)}", "", "out") for r in rows]


def pool_of(count: int, reasons: dict[int, str] | None = None, **rows: Any) -> Pool:
    return Pool(Rows(count, **rows), "alpaca", "fingerprint of no use here", reasons or {})  # type: ignore[arg-type]


@dataclass
class Lengths:
    """A task: score = length of the instruction, rows divisible by 1000 fail; remembers what it ran."""

    key: str = "lengths1"
    ran: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        self.ran.append(shard.index)
        self.threads.append(torch.get_num_threads())
        score = np.full(len(shard), np.nan, dtype=np.float32)
        rows = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        for row in pool.read(rows):
            if row.row % 1000:
                score[row.row - shard.start] = len(row.instruction)
        return ShardResult({"score": score}, {row: f"row {row} is round" for row in rows if row % 1000 == 0})


COUNT = 2 * SHARD_ROWS + 100
REASONS = {3: "unparsable line 4", SHARD_ROWS + 1: "missing field 'ü'"}


def run(engine: Any, task: Lengths, pool: Pool, shards: Sequence[Shard] | None = None) -> tuple[Any, Any]:
    return gather(pool, engine.run(task, pool, pool.shards() if shards is None else shards, label="lengths"))


def equal(one: tuple[Any, Any], two: tuple[Any, Any]) -> None:
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    for name, values in one[0].items():
        assert values.tobytes() == two[0][name].tobytes()


def test_every_way_gives_the_serial_result(tmp_path: Any) -> None:
    pool = pool_of(COUNT, REASONS)
    serial = run(SerialEngine(), Lengths(), pool)
    equal(run(LocalEngine(), Lengths(), pool), serial)
    engine = LocalEngine(Store(tmp_path))
    equal(run(engine, Lengths(), pool), serial)
    assert (engine.computed, engine.reused) == (3, 0)
    again = LocalEngine(Store(tmp_path))
    task = Lengths()
    equal(run(again, task, pool), serial)
    assert (again.computed, again.reused, task.ran) == (0, 3, [])
    assert serial[1][SHARD_ROWS - SHARD_ROWS % 1000] == f"row {SHARD_ROWS - SHARD_ROWS % 1000} is round"


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Any) -> None:
    pool, task = pool_of(COUNT, REASONS), Lengths()
    running = LocalEngine(Store(tmp_path)).run(task, pool, pool.shards(), label="lengths")
    next(running)
    running.close()
    engine = LocalEngine(Store(tmp_path))
    equal(run(engine, task, pool), run(SerialEngine(), Lengths(), pool))
    assert task.ran == [0, 1, 2]
    assert (engine.computed, engine.reused) == (2, 1)


def test_a_damaged_shard_is_computed_again(tmp_path: Any) -> None:
    pool = pool_of(COUNT)
    run(LocalEngine(Store(tmp_path)), Lengths(), pool)
    damaged = sorted(tmp_path.rglob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    engine = LocalEngine(Store(tmp_path))
    equal(run(engine, Lengths(), pool), run(SerialEngine(), Lengths(), pool))
    assert (engine.computed, engine.reused) == (1, 2)


@pytest.mark.parametrize(
    ("pool", "task", "reused"),
    [
        (pool_of(COUNT + 5000, REASONS), "lengths1", 2),  # grew: the last, short shard is another one now
        (pool_of(2 * SHARD_ROWS, REASONS), "lengths1", 2),  # shrank
        (pool_of(COUNT, REASONS, changed=frozenset({SHARD_ROWS})), "lengths1", 2),  # one row is another
        (pool_of(COUNT, {**REASONS, 9: "duplicate of row 1"}), "lengths1", 2),  # one row takes no part any more
        (pool_of(COUNT, {**REASONS, 3: "unparsable line 5"}), "lengths1", 2),  # for another reason
        (pool_of(COUNT, REASONS, column="b"), "lengths1", 0),  # same rows, another column read
        (pool_of(COUNT, REASONS), "lengths2", 0),  # another task
    ],
)
def test_reuse_is_by_content(pool: Pool, task: str, reused: int, tmp_path: Any) -> None:
    run(LocalEngine(Store(tmp_path)), Lengths(), pool_of(COUNT, REASONS))
    engine = LocalEngine(Store(tmp_path))
    equal(run(engine, Lengths(key=task), pool), run(SerialEngine(), Lengths(key=task), pool))
    assert engine.reused == reused


def test_place_and_threads_are_part_of_a_key() -> None:
    pool = pool_of(COUNT)
    keys = {shard_key("t", pool, shard) for shard in pool.shards()}
    keys |= {shard_key("t", pool, pool.shards()[0], threads=threads) for threads in (5, 6)}
    assert len(keys) == 5
    assert shard_key("t", pool, pool.shards()[0], threads=torch.get_num_threads()) in keys


def test_threads_are_set_and_given_back() -> None:
    before = torch.get_num_threads()
    task, pool = Lengths(), pool_of(10)
    run(LocalEngine(threads=before + 1), task, pool)
    assert task.threads == [before + 1]
    assert torch.get_num_threads() == before

    def broken(pool: Pool, shard: Shard) -> ShardResult:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_shard(broken, pool, pool.shards()[0], threads=before + 1)  # type: ignore[arg-type]
    assert torch.get_num_threads() == before


@dataclass
class Told(Progress):
    calls: list[Any] = field(default_factory=list)

    def start(self, label: str, total: int) -> None:
        self.calls.append((label, total))

    def advance(self, rows: int) -> None:
        self.calls.append(rows)

    def close(self) -> None:
        self.calls.append("closed")


def test_progress_counts_every_row_and_always_closes() -> None:
    pool, told = pool_of(COUNT), Told()
    run(LocalEngine(progress=told), Lengths(), pool)
    assert told.calls == [("lengths", COUNT), SHARD_ROWS, SHARD_ROWS, 100, "closed"]
    stopped = Told()
    running = LocalEngine(progress=stopped).run(Lengths(), pool, pool.shards(), label="lengths")
    next(running)
    running.close()
    assert stopped.calls[-1] == "closed"


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_make_the_whole(parts: int, tmp_path: Any) -> None:
    pool = pool_of(COUNT, REASONS)
    cut = [part_of(pool.shards(), f"{i}/{parts}") for i in range(1, parts + 1)]
    assert sorted(shard for part in cut for shard in part) == pool.shards()
    for part in cut:
        run(LocalEngine(Store(tmp_path)), Lengths(), pool, part)
    merged = LocalEngine(Store(tmp_path))
    equal(run(merged, Lengths(), pool), run(SerialEngine(), Lengths(), pool))
    assert (merged.computed, merged.reused) == (0, 3)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "", "1/4"])
def test_parts_that_are_none(part: str) -> None:
    with pytest.raises(UserError, match="shards="):
        part_of(pool_of(COUNT).shards(), part)


def test_no_part_is_all_of_it() -> None:
    shards = pool_of(COUNT).shards()
    assert part_of(shards, None) == part_of(shards, " 1 / 1 ") == shards
    assert part_of([], "1/1") == []
