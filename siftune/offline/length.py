"""The length of the question in words, a baseline of DaaR (arXiv 2502.04380). Cost: one split per row.

Higher = longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..records import Pool, Shard, ShardResult, ShardTask
from .base import OfflineMethod


@dataclass(frozen=True)
class WordsTask:
    """Words (runs of characters between white space) of the question or of the answer, float32."""

    part: Literal["question", "output"]

    @property
    def key(self) -> str:
        return f"words-{self.part}"

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        score = np.full(len(shard), np.nan, dtype=np.float32)
        good = np.array([row for row in range(shard.start, shard.stop) if row not in pool.reasons], dtype=np.int64)
        for block in np.array_split(good, max(1, len(good) // 256)):
            for row in pool.read(block.tolist()):
                score[row.row - shard.start] = len(getattr(row, self.part).split())
        return ShardResult({"score": score})


@dataclass(kw_only=True, eq=False)
class Length(OfflineMethod):
    """The longest questions first: words in `instruction` and `input` (of a chat, in every turn before the last
    answer).

    >>> siftune.offline.length.Length().score(pool).keep(fraction=0.2)
    """

    name: ClassVar[str] = "length"

    def shard_task(self, pool: Pool) -> ShardTask:
        return WordsTask("question")
