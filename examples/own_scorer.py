"""A scorer of your own: an offline method in twenty lines, registered, and used by the command line's own `select`.

It ranks rows by the share of distinct words in their answer. `docs/add-a-method.md` goes through it line by line.

python examples/own_scorer.py
python examples/own_scorer.py pool.jsonl --keep 10% --least 5 --out selected.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

import siftune
from siftune.cli.main import main
from siftune.demo import corpus
from siftune.offline.base import OfflineMethod
from siftune.records import Pool, Shard, ShardResult


@dataclass(frozen=True)
class DistinctWordsTask:
    """The work on one shard: it runs anywhere, so it is picklable, and `key` names all that decides its result."""

    least: int

    @property
    def key(self) -> str:
        return f"distinct-words-1-{self.least}"

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        score, reasons = np.full(len(shard), np.nan, dtype=np.float32), {}
        for row in pool.read([row for row in range(shard.start, shard.stop) if row not in pool.reasons]):
            words = row.output.lower().split()
            if len(words) < self.least:
                reasons[row.row] = f"fewer than {self.least} words in the answer"
            else:
                score[row.row - shard.start] = len(set(words)) / len(words)
        return ShardResult({"score": score}, reasons)


@dataclass(kw_only=True, eq=False)
class DistinctWords(OfflineMethod):
    """Rows whose answers repeat themselves least first: distinct words over words."""

    name: ClassVar[str] = "distinct-words"

    least: int = 3
    """Answers of fewer words have no score: a word alone is always distinct."""

    def shard_task(self, pool: Pool) -> DistinctWordsTask:
        return DistinctWordsTask(self.least)


siftune.register("offline", "distinct-words", f"{__name__}:DistinctWords", summary="distinct words of the answer")

if __name__ == "__main__":
    words = sys.argv[1:]
    if not words:
        folder = corpus.write(Path("runs") / "own-scorer", count=600)
        words = [str(folder / "pool.jsonl"), "--keep", "10%", "--out", str(folder / "selected.jsonl")]
    sys.exit(main(["select", "distinct-words", *words]))
