"""The length of the answer in words, a baseline of DaaR (arXiv 2502.04380). Cost: one split per row.

Higher = longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..records import Pool, ShardTask
from .base import OfflineMethod
from .length import WordsTask


@dataclass(kw_only=True, eq=False)
class OutputLength(OfflineMethod):
    """The longest answers first: words in `output` (of a chat, in the last answer).

    >>> siftune.offline.output_length.OutputLength().score(pool).keep(fraction=0.2)
    """

    name: ClassVar[str] = "output-length"

    def shard_task(self, pool: Pool) -> ShardTask:
        return WordsTask("output")
