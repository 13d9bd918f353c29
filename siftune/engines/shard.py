"""One shard, wherever it runs: its cache key, its thread count, its result in and out of the store, its part of n.

A key is made of the task and of the shard's rows as they are read, never of the pool's path or of other shards, so a
pool that grew at its end reuses its finished shards. Cost of a key: reading the shard's rows once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from hashlib import blake2b
from typing import Protocol

import torch

from ..errors import UserError
from ..models.store import Store
from ..records import Pool, Shard, ShardResult, ShardTask

ROWS_AT_ONCE = 256


class Progress(Protocol):
    """Who is told how far a run is; rates and time left are made of these three calls by whoever shows them."""

    def start(self, label: str, total: int) -> None:
        """A run named `label` over `total` rows begins."""

    def advance(self, rows: int) -> None:
        """`rows` more are done, computed or reused."""

    def close(self) -> None:
        """The run is over, finished or not."""


def run_shard(task: ShardTask, pool: Pool, shard: Shard, *, threads: int | None = None) -> ShardResult:
    """`task` on one shard with `threads` torch threads (None: as they are); the setting comes back afterwards."""
    with torch_threads(threads):
        return task(pool, shard)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """The number of torch threads inside; floating sums may differ between settings, never within one."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    found = store.get(key)
    if found is None:
        return None
    columns, meta = found
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
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", part)
    index, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= parts:
        raise UserError(f"shards={part!r} is not a part; give i/n with i from 1 to n, such as 2/4")
    if parts > max(1, len(shards)):
        raise UserError(f"shards={part!r} leaves parts without work, for the pool has {len(shards)} shards; lower n")
    return list(shards[index - 1 :: parts])
