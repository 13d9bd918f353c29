"""Seeded draws that depend on a row's content, not on its position (shared by the random method and the probe set).

A row's number is blake2b-64 of (seed, purpose, row id), so a permuted pool permutes its numbers, and the numbers are
the same for every engine, worker and interruption. Copies of one row share a number; `nth` separates them.
Cost: one hash per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ..records import SHARD_ROWS, Pool


def number(seed: int, purpose: str, row_id: str, nth: int = 0) -> int:
    """A uniform 64-bit number for a row; `nth` counts the earlier copies of the same row.

    >>> number(0, "random", "ab") == number(0, "random", "ab")
    True
    """
    content = f"{seed}\0{purpose}\0{row_id}\0{nth}".encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def numbers(seed: int, purpose: str, ids: Sequence[str]) -> NDArray[np.uint64]:
    """`number` of each id. Shape `(len(ids),)`."""
    return np.array([number(seed, purpose, row_id) for row_id in ids], dtype=np.uint64)


def draw(pool: Pool, count: int, *, seed: int, purpose: str) -> NDArray[np.int64]:
    """`count` of the pool's eligible rows, uniformly without replacement, in the order of their numbers.

    The order is that of the draw, so that a permuted pool yields the same rows in the same order.
    """
    eligible = pool.eligible
    parts = [numbers(seed, purpose, pool.source.ids(block.tolist())) for block in blocks(eligible)]
    if not parts:
        return eligible
    return eligible[np.argsort(np.concatenate(parts), kind="stable")[:count]]


def blocks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows in runs of at most `SHARD_ROWS`, so that no step holds a whole pool's ids as Python strings."""
    for start in range(0, len(rows), SHARD_ROWS):
        yield rows[start : start + SHARD_ROWS]
