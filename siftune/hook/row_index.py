"""Which row of the training set a candidate is: `token_id` of what the model sees, and an index from it to the row.

The index passes the data set once through the trainer's own collator, so collators that rewrite rows keep their names
as long as they are deterministic. Cost: one collation of the data set; 24 bytes a row in memory.

Shapes: `n` rows of the data set, `B` rows of a batch, `T` columns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UserError
from ..models.layout import BatchWithLayout, with_layout
from ..online.token_id import token_ids

Batch = Mapping[str, Any]
_ERRORS_OF_NO_ROWS = (ValueError, LookupError, TypeError, RuntimeError)
"""What collators raise that are left without a row."""
ROWS_PER_COLLATION = 64
"""Rows per call of the collator while the data set is indexed."""


class RowIndex:
    """`token_id` -> row of the data set; of equal rows the first."""

    def __init__(self, digests: Sequence[bytes], rows: Sequence[int] | None = None) -> None:
        """`rows` are the rows of the digests; without them the digests' own positions."""
        self._rows = np.arange(len(digests)) if rows is None else np.asarray(rows, dtype=np.int64)
        halves = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
        self._order: NDArray[np.int64] = np.lexsort((np.arange(len(halves)), halves[:, 1], halves[:, 0]))
        self._high = halves[self._order, 0]
        self._low = halves[self._order, 1]

    def __len__(self) -> int:
        return len(self._order)

    def row(self, token_id: bytes) -> int | None:
        """The first row with this id, or None."""
        high, low = np.frombuffer(token_id, dtype="<u8")
        start, stop = np.searchsorted(self._high, high, "left"), np.searchsorted(self._high, high, "right")
        position = start + np.searchsorted(self._low[start:stop], low, "left")
        return int(self._rows[self._order[position]]) if position < stop and self._low[position] == low else None


def index_rows(dataset: Any, collate: Callable[[list[Any]], Batch]) -> RowIndex | None:
    """Index a map-style data set; None for iterable data, whose rows have no position to return to.

    Every global random state is restored, whatever the collator draws.
    """
    iterable = isinstance(dataset, torch.utils.data.IterableDataset)  # it has both methods below, and neither works
    if iterable or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    digests: list[bytes] = []
    rows: list[int] = []
    with preserved_random_state():
        for start in range(0, len(dataset), ROWS_PER_COLLATION):
            try:
                batches = collate_rows(dataset, collate, range(start, min(start + ROWS_PER_COLLATION, len(dataset))))
            except UserError:
                return None  # batches without lines of token ids, which `attach` refuses when they come
            for batch, positions in batches:
                digests.extend(token_ids(batch))
                rows.extend(positions)
    return RowIndex(digests, rows)


def collate_rows(
    dataset: Any, collate: Callable[[list[Any]], Batch], rows: Sequence[int]
) -> list[tuple[BatchWithLayout, list[int]]]:
    """Some rows of a data set as batches, each with the data set's row of every candidate.

    Where the collator returns another number of candidates than rows (a row of a packed data set holds several, and
    fully masked rows may be dropped), rows are collated one by one, and a row's candidates all have its number.
    """
    getitems = getattr(dataset, "__getitems__", None)
    items = getitems(list(rows)) if getitems else [dataset[row] for row in rows]
    try:
        batch = with_layout(collate(list(items)))
        if len(batch.layout) == len(rows):
            return [(batch, list(rows))]
    except (UserError, KeyError, TypeError):  # e.g. a collator that returns no input_ids for some of them
        pass
    result = []
    for row, item in zip(rows, items, strict=True):
        try:
            batch = with_layout(collate([item]))
        except _ERRORS_OF_NO_ROWS:  # a collator that drops this row has nothing to return
            continue
        result.append((batch, [row] * len(batch.layout)))
    return result


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore every global random state on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
