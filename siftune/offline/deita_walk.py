"""From the best row down, keep a row when it is unlike every row kept before (Deita, arXiv 2312.15685, section 2.4).

    keep x  if  max over kept y of cos(x, y) < threshold

The rows are processed in blocks: one matrix product compares a block with all rows kept before it, one more the block
with itself, and only the few cosines within float32's rounding of the threshold are computed again in float64. The kept
rows are exactly those of the naive pass. Cost: at most n*n*D products if every row is kept, n*kept*D in general, none
of it in Python loops but for one pass over a block's own rows; memory n*D*4 bytes for the unit rows.

Shapes: `n` rows processed, `B` rows of a block, `M` rows kept so far, `D` width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024
"""Rows that are compared with the kept ones together."""
COLUMNS = 8192
"""Kept rows that one product takes at most: 1024 x 8192 float32 cosines are 32 MB."""
NEAR = 1e-4
"""Cosines this near the threshold are computed again in float64; float32 products of unit rows err by less."""


def unlike(
    vectors: NDArray[Any], order: NDArray[np.int64], *, threshold: float
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows of `order` the pass keeps, and for each other row one kept row that it is too similar to (else -1).

    `vectors` is `(rows, D)`, `order` the rows in turn, best first; both results have `order`'s shape. A row of zeros
    is similar to nothing.

    >>> unlike(np.array([[1.0, 0], [2, 0], [0, 1]]), np.array([0, 1, 2]), threshold=0.9)[0].tolist()
    [True, False, True]
    """
    kept = np.zeros(len(order), dtype=np.bool_)
    like = np.full(len(order), -1, dtype=np.int64)
    kept_MD = np.empty((len(order), vectors.shape[1]), dtype=np.float32)
    kept_rows = np.empty(len(order), dtype=np.int64)
    count = 0
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        block_BD = unit(vectors[rows]).astype(np.float32)
        similar_to = _like_any(block_BD, rows, kept_MD[:count], kept_rows[:count], vectors, threshold)
        similar_to = _inside(block_BD, rows, similar_to, vectors, threshold)
        is_kept = similar_to < 0
        kept[start : start + BLOCK], like[start : start + BLOCK] = is_kept, similar_to
        kept_MD[count : count + is_kept.sum()] = block_BD[is_kept]
        kept_rows[count : count + is_kept.sum()] = rows[is_kept]
        count += int(is_kept.sum())
    return kept, like


def unit(vectors_BD: NDArray[Any]) -> NDArray[np.float64]:
    """Rows at length 1, in float64; a row of zeros remains zero."""
    wide = vectors_BD.astype(np.float64)
    length_B1 = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(length_B1 > 0, length_B1, 1.0)


def _like_any(
    block_BD: NDArray[np.float32],
    rows: NDArray[np.int64],
    kept_MD: NDArray[np.float32],
    kept_rows: NDArray[np.int64],
    vectors: NDArray[Any],
    threshold: float,
) -> NDArray[np.int64]:
    """For each row of a block a kept row that it is too similar to, or -1. Shape `(B,)`."""
    similar_to = np.full(len(rows), -1, dtype=np.int64)
    for start in range(0, len(kept_rows), COLUMNS):
        open_rows = np.flatnonzero(similar_to < 0)
        if not len(open_rows):
            break
        cosine_BM = block_BD[open_rows] @ kept_MD[start : start + COLUMNS].T
        columns = kept_rows[start : start + COLUMNS]
        best = cosine_BM.argmax(axis=1)
        largest = cosine_BM[np.arange(len(open_rows)), best]
        sure = largest >= threshold + NEAR
        similar_to[open_rows[sure]] = columns[best[sure]]
        for index in np.flatnonzero(~sure & (largest >= threshold - NEAR)).tolist():
            close = columns[cosine_BM[index] >= threshold - NEAR]
            exact = unit(vectors[close]) @ unit(vectors[rows[open_rows[index]]][None])[0]
            if (exact >= threshold).any():
                similar_to[open_rows[index]] = close[int(exact.argmax())]
    return similar_to


def _inside(
    block_BD: NDArray[np.float32],
    rows: NDArray[np.int64],
    similar_to: NDArray[np.int64],
    vectors: NDArray[Any],
    threshold: float,
) -> NDArray[np.int64]:
    """The pass inside a block: the undecided rows, in order, each compared with those kept before it."""
    similar_to = similar_to.copy()
    open_rows = np.flatnonzero(similar_to < 0)
    cosine_BB = block_BD[open_rows] @ block_BD[open_rows].T
    like_BB = cosine_BB >= threshold
    for first, second in np.argwhere(np.triu(np.abs(cosine_BB - threshold) <= NEAR, k=1)).tolist():
        pair = unit(vectors[rows[open_rows[[first, second]]]])
        like_BB[first, second] = pair[0] @ pair[1] >= threshold
    for index, place in enumerate(open_rows.tolist()):
        if similar_to[place] < 0:
            later = open_rows[index + 1 :][like_BB[index, index + 1 :]]
            similar_to[later[similar_to[later] < 0]] = rows[place]
    return similar_to
