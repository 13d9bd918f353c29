"""One shard: its cache key, its threads, an attempt at it, its result in and out of the store, its part
of n.

A key is made of the task and of the shard's rows as they are read, never of the pool's path or of other shards, so a
pool that grew at its end reuses its finished shards. Cost of a key: reading the shard's rows once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Protocol

import torch
from threadpoolctl import threadpool_limits

from ..errors import UserError
from ..models.store import Store
from ..records import Pool, Shard, ShardResult, ShardTask
from .retry import Done, LeftOut

ROWS_AT_ONCE = 256


class Progress(Protocol):
    """Receives the progress of a run; the display derives rates and time left from these three calls."""

    def start(self, label: str, total: int, unit: str = "rows") -> None:
        """A run named `label` over `total` rows (or other units) begins."""

    def advance(self, rows: int) -> None:
        """`rows` more are done, computed or reused."""

    def close(self) -> None:
        """The run is over, finished or not."""


def run_shard(task: ShardTask, pool: Pool, shard: Shard, *, threads: int | None = None) -> ShardResult:
    """`task` on one shard with `threads` threads (None: torch's own number); the setting is restored afterwards."""
    with math_threads(torch.get_num_threads() if threads is None else threads):
        return task(pool, shard)


@contextmanager
def math_threads(threads: int) -> Iterator[None]:
    """The number of threads of torch and of numpy's BLAS inside; floating sums may differ between settings, never
    within one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(limits=threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(eq=False)
class Work:
    """A task over a pool. Pickles without its key, which depends on the machine that computes."""

    task: ShardTask
    pool: Pool
    store: Store | None
    """Where finished shards are kept; None keeps nothing."""
    threads: int
    """Threads inside a shard."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "task_key"}

    @cached_property
    def task_key(self) -> str:
        """The task's key, where shards are kept."""
        return self.task.key

    def attempt(self, shard: Shard, left_out: LeftOut) -> Done:
        """A shard from the store, else computed and kept; with rows left out it is computed, and not kept."""
        if left_out:
            smaller = replace(self.pool, reasons={**self.pool.reasons, **left_out})
            return Done(run_shard(self.task, smaller, shard, threads=self.threads))
        if (result := self.load(shard)) is not None:
            return result
        return self.keep(shard, Done(run_shard(self.task, self.pool, shard, threads=self.threads)))

    def load(self, shard: Shard) -> Done | None:
        """A finished shard, from the store."""
        result = None if self.store is None else load_result(self.store, self._key(shard), shard)
        outdated = getattr(self.task, "outdated", None)  # a judge's: refusals that have to be asked for again
        return None if result is None or (outdated is not None and outdated(result)) else Done(result, reused=True)

    def keep(self, shard: Shard, done: Done) -> Done:
        """The same result, after storing it."""
        if self.store is not None:
            store_result(self.store, self._key(shard), shard, done.result)
        return done

    def _key(self, shard: Shard) -> str:
        return shard_key(self.task_key, self.pool, shard, threads=self.threads)


def shard_key(task_key: str, pool: Pool, shard: Shard, *, threads: int | None = None) -> str:
    """Content hash of a shard's result: the task, every row of the shard as read or its reason, where the shard starts
    (a task may rank by position, and reasons name rows), and the thread setting."""
    threads = torch.get_num_threads() if threads is None else threads
    digest = blake2b(f"shard 1|{task_key}|{shard.start}|{shard.stop}|{threads}".encode(), digest_size=16)
    out = {row: pool.reasons[row] for row in range(shard.start, shard.stop) if row in pool.reasons}
    digest.update(json.dumps(sorted(out.items())).encode())
    rows = [row for row in range(shard.start, shard.stop) if row not in out]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        read = [astuple(row) for row in pool.read(rows[start : start + ROWS_AT_ONCE])]
        digest.update(json.dumps(read).encode())
    return digest.hexdigest()


def load_result(store: Store, key: str, shard: Shard) -> ShardResult | None:
    """A finished shard from the store, or None."""
    result = store.get(key)
    if result is None:
        return None
    columns, meta = result
    reasons = {shard.start + int(offset): reason for offset, reason in meta["reasons"].items()}
    return ShardResult(columns, reasons)


def store_result(store: Store, key: str, shard: Shard, result: ShardResult) -> None:
    """Keep a finished shard, its reasons with it."""
    reasons = {str(row - shard.start): reason for row, reason in result.reasons.items()}
    store.put(key, result.columns, {"reasons": reasons})


def part_of(shards: Sequence[Shard], part: str | None) -> list[Shard]:
    """The shards of part `i/n`: every n-th from the i-th on, i from 1, so that n machines share the work evenly.

    Raises `UserError` for anything but two whole numbers with 1 <= i <= n, and for a part that gets no shard.

    >>> part_of(pool.shards(), "2/4")
    """
    if part is None:
        return list(shards)
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", part)
    index, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= parts:
        raise UserError(f"shards={part!r} is not a part; pass i/n with i from 1 to n, such as 2/4")
    if parts > max(1, len(shards)):
        raise UserError(f"shards={part!r} leaves parts without work, for the pool has {len(shards)} shards; lower n")
    return list(shards[index - 1 :: parts])
