"""BM25: rows that share rare words with the target, from word counts alone.

    BM25(q, x) = sum over the words w of q, repeated ones too, of  idf(w) * tf / (tf + k1 * (1 - b + b * |x| / mean |x|))
    idf(w)     = ln(1 + (n - df(w) + 0.5) / (df(w) + 0.5))                     the variant of Lucene; Robertson et al. 1994

Higher is more similar. tf counts w in the row, |x| the row's words, df the rows of the pool that hold w. Only the
target's words matter, so no index of the pool is built: one pass counts df and lengths, one computes a sparse product.
Cost: two passes of splitting texts into words; memory one shard, whatever the pool's size.

Axes: `B` rows of a shard, `W` distinct words of the target, `M` target rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from ..data.formats import TEXT_FORM, text_of
from ..errors import UserError
from ..files import hash_json
from ..progress import counted
from ..records import Pool, Shard, ShardResult
from .draw import blocks
from .similarity import SimilarityMethod, similarity_result
from .target import TargetRows
from .words import VERSION, words_of

ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class PoolStatistics:
    """What BM25 knows of the pool: rows, their mean length in words, and the rows that hold each word of the target."""

    rows: int
    mean_words: float
    rows_with: NDArray[np.int64]
    """Shape `(W,)`: df."""

    @property
    def idf(self) -> NDArray[np.float64]:
        """Shape `(W,)`."""
        result: NDArray[np.float64] = np.log1p((self.rows - self.rows_with + 0.5) / (self.rows_with + 0.5))
        return result


def count_words(pool: Pool, index: Mapping[str, int]) -> PoolStatistics:
    """One pass over the eligible rows; `index` numbers the words of the target."""
    rows_with = np.zeros(len(index), dtype=np.int64)
    rows, total = 0, 0
    eligible = pool.eligible
    for block in counted("counting words", list(blocks(eligible)), len(eligible), size=len):
        for start in range(0, len(block), ROWS_AT_ONCE):
            for row in pool.read(block[start : start + ROWS_AT_ONCE].tolist()):
                words = words_of(text_of(row))
                rows, total = rows + 1, total + len(words)
                for word in index.keys() & set(words):
                    rows_with[index[word]] += 1
    return PoolStatistics(rows, total / max(1, rows), rows_with)


@dataclass(frozen=True, eq=False)
class BM25Task:
    """Similarities of a shard's rows: see `similarity_result`."""

    index: Mapping[str, int]
    """Number of each word of the target."""
    queries: csr_matrix
    """`(W, M)`: how often each target row holds a word."""
    statistics: PoolStatistics
    known: TargetRows
    k1: float
    b: float

    @property
    def key(self) -> str:
        query = [array.tolist() for array in (self.queries.data, self.queries.indices, self.queries.indptr)]
        facts = [self.statistics.rows, self.statistics.mean_words, self.statistics.rows_with.tolist()]
        return hash_json(
            ["bm25", 1, VERSION, TEXT_FORM, list(self.index), query, facts, self.known.key, self.k1, self.b]
        )

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        usable = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        rows: list[int] = []
        ids: list[str] = []
        reasons: dict[int, str] = {}
        entries: list[tuple[int, int, int]] = []
        lengths: list[int] = []
        for start in range(0, len(usable), ROWS_AT_ONCE):
            remaining, left_out = self.known.split(pool.read(usable[start : start + ROWS_AT_ONCE]))
            reasons |= left_out
            for row in remaining:
                counts = Counter(words_of(text_of(row)))
                lengths.append(counts.total())
                entries += [(len(rows), self.index[word], counts[word]) for word in self.index.keys() & counts.keys()]
                rows.append(row.row)
                ids.append(row.id)
        similarity_BM = self._product(entries, np.array(lengths, dtype=np.float64))
        return similarity_result(shard, rows, ids, similarity_BM, reasons)

    def _product(self, entries: list[tuple[int, int, int]], length_B: NDArray[np.float64]) -> NDArray[np.float64]:
        """BM25 of every row and target row, `(B, M)`. The entries of a row are sorted, so that sums run in one order."""
        row, word, tf = np.array(sorted(entries), dtype=np.int64).reshape(-1, 3).T
        mean = max(self.statistics.mean_words, 1e-12)
        scale = self.k1 * (1 - self.b + self.b * length_B[row] / mean)
        weight = self.statistics.idf[word] * tf / (tf + scale)
        weights_BW = csr_matrix((weight, (row, word)), shape=(len(length_B), len(self.index)))
        product: NDArray[np.float64] = (weights_BW @ self.queries).toarray()
        return product


@dataclass(kw_only=True, eq=False)
class BM25(SimilarityMethod):
    """Rows that share rare words with the target first. Needs no model.

    Raises `UserError` for settings or a target that cannot be used.

    >>> from siftune.offline.bm25 import BM25
    >>> BM25(target="queries.jsonl").fit(pool).score(pool).keep(count=10_000)
    """

    name: ClassVar[str] = "bm25"

    k1: float = 1.5
    """How soon repetitions of a word stop counting, 0 or more (1.5 is common; 0: a word counts once)."""
    b: float = 0.75
    """How much long rows are discounted, 0 to 1 (0.75 is common; 0: not at all)."""

    statistics: PoolStatistics | None = field(default=None, init=False, repr=False)
    """The result of `fit`."""

    def check(self) -> None:
        """Check settings and target. Raises `UserError`."""
        if not (np.isfinite(self.k1) and self.k1 >= 0):
            raise UserError(f"k1={self.k1} must be 0 or more; 1.5 is common")
        if not 0 <= self.b <= 1:
            raise UserError(f"b={self.b} must be from 0 to 1; 0.75 is common")
        super().check()
        if not self._index():
            raise UserError("target: no row holds a word, and bm25 compares words; use rds, which reads a model")

    def fit(self, pool: Pool) -> Self:
        """Count in how many rows of the pool each word of the target is."""
        self.check()
        self.statistics = count_words(pool, self._index())
        return self

    def _words(self) -> list[list[str]]:
        """The words of every target row."""
        return [words_of(text_of(row)) for row in self.read_target().read()]

    def _index(self) -> dict[str, int]:
        distinct = sorted({word for words in self._words() for word in words})
        return {word: number for number, word in enumerate(distinct)}

    def shard_task(self, pool: Pool) -> BM25Task:
        if self.statistics is None:
            raise UserError("bm25 is not fitted; call fit(pool) first")
        index = self._index()
        counts = [Counter(words) for words in self._words()]
        column = np.repeat(np.arange(len(counts)), [len(count) for count in counts])
        word = np.array([index[name] for count in counts for name in count], dtype=np.int64)
        often = np.array([number for count in counts for number in count.values()], dtype=np.float64)
        queries = csr_matrix((often, (word, column)), shape=(len(index), len(counts)))
        queries.sort_indices()
        return BM25Task(index, queries, self.statistics, TargetRows.of(self.read_target()), self.k1, self.b)

    def facts(self) -> dict[str, Any]:
        assert self.statistics is not None
        return {
            "k1": self.k1,
            "b": self.b,
            "target_words": len(self.statistics.rows_with),
            "mean_words_per_row": round(self.statistics.mean_words, 3),
        }
