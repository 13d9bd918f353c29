"""A seeded uniform draw: the reference every other method is compared with at equal budget.

The score is uniform on [0, 1), higher is kept; it depends on the seed and the row's content (see `draw`), so permuting a
pool permutes its scores. Cost: one hash per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..records import Pool, Scores, Shard, ShardResult, ShardTask
from .base import OfflineMethod
from .draw import blocks, number

_PURPOSE = "random"


def _uniform(bits: int) -> float:
    """The top 24 of 64 bits as a number in [0, 1) that float32 holds exactly."""
    return (bits >> 40) / (1 << 24)


@dataclass(frozen=True)
class UniformTask:
    """Uniform numbers for the rows of one shard, every copy of a row as if it were the first."""

    seed: int

    @property
    def key(self) -> str:
        return f"random-{self.seed}"

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        score = np.full(len(shard), np.nan, dtype=np.float32)
        rows = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        for row, row_id in zip(rows, pool.source.ids(rows), strict=True):
            score[row - shard.start] = _uniform(number(self.seed, _PURPOSE, row_id))
        return ShardResult({"score": score})


@dataclass(kw_only=True, eq=False)
class Random(OfflineMethod):
    """A uniform draw without replacement: any budget is a random sample, and a larger one contains a smaller one.

    >>> siftune.offline.random.Random(seed=1).fit(pool).score(pool).keep(fraction=0.2)
    """

    name: ClassVar[str] = "random"

    seed: int = 0
    """Another seed is another draw."""

    def shard_task(self, pool: Pool) -> ShardTask:
        return UniformTask(self.seed)

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """Later copies of a row get separate numbers here, where the whole pool is available."""
        values = columns["score"].copy()
        if pool.duplicates:
            seen: Counter[bytes] = Counter()
            for block in blocks(pool.eligible):
                for row, row_id in zip(block.tolist(), pool.source.ids(block.tolist()), strict=True):
                    digest = bytes.fromhex(row_id)
                    if (nth := seen[digest]) and not np.isnan(values[row]):
                        values[row] = _uniform(number(self.seed, _PURPOSE, row_id, nth))
                    seen[digest] += 1
        return Scores(pool=pool, method=self.name, values=values, reasons=reasons, info={"seed": self.seed})
