"""A random draw whose rows are as long as those that another run chose: what remains of a method once length is equal.

Lengths are words of question and answer, in at most 20 ranges that hold equally many rows of the other run. The draw takes
from every range in proportion to the other run's share there, in a seeded order within each; a row's score is minus its
position, so any budget has that histogram as far as the pool's rows allow. Cost: reading both texts once.

Axes: `N` rows of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..data.formats import text_of
from ..data.load import load_pool
from ..errors import UserError
from ..records import Pool, Scores, Shard, ShardResult
from ..yaml_io import read_yaml
from .base import OfflineMethod
from .draw import blocks, numbers

RANGES = 20
ROWS_AT_ONCE = 256
_SELECTED, _CONFIG = "selected.jsonl", "config.yaml"


@dataclass(frozen=True)
class TextLengthTask:
    """Words (runs of characters between white space) of a row's text, float32 `words`."""

    @property
    def key(self) -> str:
        return "text-length-1"

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        words = np.full(len(shard), np.nan, dtype=np.float32)
        usable = np.array([row for row in range(shard.start, shard.stop) if row not in pool.reasons], dtype=np.int64)
        words[usable - shard.start] = text_lengths(pool, usable)
        return ShardResult({"words": words})


def text_lengths(pool: Pool, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Words of the text of eligible rows."""
    lengths: list[int] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        lengths += [len(text_of(row).split()) for row in pool.read(rows[start : start + ROWS_AT_ONCE].tolist())]
    return np.array(lengths, dtype=np.float32)


@dataclass(kw_only=True, eq=False)
class LengthMatched(OfflineMethod):
    """A random draw with the length histogram of the rows that another run chose.

    Raises `UserError` where `like` is neither a run nor a file of rows.

    >>> from siftune.offline.length_matched import LengthMatched
    >>> LengthMatched(like="siftune-runs/less-0a1b2c").fit(pool).score(pool).keep(fraction=0.05)
    """

    name: ClassVar[str] = "length-matched"

    like: str
    """The other run's folder, or a file of rows."""
    seed: int = 0
    """Another seed is another draw."""

    def check(self) -> None:
        """Read the other run's rows. Raises `UserError`."""
        self._lengths()

    def inputs(self) -> dict[str, str]:
        return {**super().inputs(), "like": self._other().fingerprint}

    def _other(self) -> Pool:
        """The rows that the other run chose, read as that run read its pool."""
        folder = Path(self.like).expanduser()
        config: Mapping[str, Any] = {}
        if folder.is_dir():
            if not (folder / _SELECTED).is_file():
                raise UserError(
                    f"like={self.like!r} is no finished selection: it holds no {_SELECTED}; set its run folder"
                )
            if (folder / _CONFIG).is_file():
                config = read_yaml(folder / _CONFIG, what="like", write="set the folder of a finished selection")
        source = folder / _SELECTED if folder.is_dir() else self.like
        try:
            return load_pool(str(source), columns=config.get("columns"), format=config.get("format"), cache=self.cache)
        except UserError as error:
            raise UserError(f"like: {error}") from error

    def _lengths(self) -> NDArray[np.float32]:
        """Words of each row of the other run."""
        other = self._other()
        return text_lengths(other, other.eligible)

    def shard_task(self, pool: Pool) -> TextLengthTask:
        return TextLengthTask()

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """Minus the position in the draw."""
        lengths, words = self._lengths(), columns["words"]
        rows = np.flatnonzero(~np.isnan(words))
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, RANGES + 1)))
        drawn = [numbers(self.seed, "length-matched", pool.source.ids(block.tolist())) for block in blocks(rows)]
        order = matched_order(words[rows], lengths, edges, np.concatenate([np.empty(0, dtype=np.uint64), *drawn]))
        values = np.full(len(pool), np.nan, dtype=np.float32)
        values[rows[order]] = -np.arange(len(order), dtype=np.float32)
        info = {"like_rows": len(lengths), "mean_words_like": round(float(lengths.astype(np.float64).mean()), 3)}
        return Scores(pool=pool, method=self.name, values=values, reasons=reasons, info=info)


def matched_order(
    words_N: NDArray[np.float32], lengths: NDArray[np.float32], edges: NDArray[Any], drawn_N: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """All rows, in turns that take from each range of lengths in proportion to its share of `lengths`.

    Rows outside the ranges, or in one that `lengths` does not use, come last. `drawn_N` orders the rows of a range.
    """

    def ranges(values: NDArray[Any]) -> NDArray[np.int64]:
        inside = np.searchsorted(edges, values, side="right")  # the largest length is a range of its own
        return np.where(values > edges[-1], 0, inside)

    share = np.bincount(ranges(lengths), minlength=len(edges) + 1) / max(1, len(lengths))
    range_N = ranges(words_N)
    by_range = np.lexsort((drawn_N, range_N))
    begin = np.searchsorted(range_N[by_range], range_N[by_range])
    turn = np.arange(len(by_range)) - begin + 0.5
    with np.errstate(divide="ignore"):
        due = turn / share[range_N[by_range]]
    result: NDArray[np.int64] = by_range[np.lexsort((drawn_N[by_range], due))]
    return result
