"""From one similarity per row and target row to one order of the pool, so that a stored score is cut at any budget.

    round-robin   each target row in turn takes the row most similar to it that none has taken (RDS+, arXiv 2503.01807);
                  with subtasks the turns alternate between subtasks first. Score: minus the position in that order
    mean          mean similarity to the target rows; with subtasks the mean of the subtasks' means
    max           largest similarity to a target row; with subtasks the largest of the subtasks' means (LESS, arXiv 2402.04333)

Equal similarities in a round robin go by the rows' content, so that the pool's order does not matter.
Cost: M sorts of n numbers for a round robin, one pass otherwise. Memory: one matrix of M x n numbers of 4 bytes, in a
file beside the cache where it is large.

Axes: `N` rows of the pool, `M` target rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Pick = Literal["round-robin", "mean", "max"]
PICKS: tuple[Pick, ...] = ("round-robin", "mean", "max")
IN_MEMORY = 1 << 28
"""Bytes of a matrix that is held in memory; a larger one is in a file."""
WINDOW = 1024
"""Rows of a target row's ranking that are looked at together."""


@contextmanager
def matrix(rows: int, columns: int, folder: Path) -> Iterator[NDArray[np.float32]]:
    """An uninitialised float32 matrix `(rows, columns)`, in memory or in an unnamed file in `folder`."""
    if rows * columns * 4 <= IN_MEMORY:
        yield np.empty((rows, columns), dtype=np.float32)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        yield np.memmap(file, dtype=np.float32, mode="w+", shape=(rows, columns))


def subtask_means(
    similarity_BM: NDArray[Any], groups: Sequence[NDArray[np.int64]], *, by_subtask: bool
) -> NDArray[np.float64]:
    """Similarities to what `mean` and `max` compare: `(B, M)` target rows, or `(B, subtasks)` means of each subtask."""
    similarity = similarity_BM.astype(np.float64)
    if not by_subtask:
        return similarity
    return np.stack([similarity[:, group].mean(axis=1) for group in groups], axis=1)


def round_robin(
    similarity_MN: NDArray[np.float32], tie_N: NDArray[np.int64], groups: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The rows in the order in which they are taken, and the target row that took each; rows of NaN are left out.

    `tie_N` orders equal similarities. The matrix is overwritten: each target row's ranking replaces its similarities.

    >>> order, taker = round_robin(np.array([[3, 2, 1], [3, 1, 2]], np.float32), np.zeros(3, np.int64), [np.arange(2)])
    >>> order.tolist(), taker.tolist()
    ([0, 2, 1], [0, 1, 0])
    """
    targets, _ = similarity_MN.shape
    scored = np.flatnonzero(~np.isnan(similarity_MN[0])) if targets else np.empty(0, dtype=np.int64)
    by_tie = scored[np.argsort(tie_N[scored], kind="stable")]
    ranking_MN = similarity_MN.view(np.int32)
    count = len(scored)
    for index in range(targets):
        ranking = by_tie[np.argsort(-similarity_MN[index, by_tie], kind="stable")]
        ranking_MN[index, :count] = ranking
    return _take_turns(ranking_MN[:, :count], similarity_MN.shape[1], groups)


def _take_turns(
    ranking_MN: NDArray[np.int32], rows: int, groups: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Turn by turn: the next target row takes the first row of its ranking that is free."""
    count = ranking_MN.shape[1]
    order, taker = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int32)
    taken = np.zeros(rows, dtype=bool)
    place = [0] * len(ranking_MN)
    for turn in range(count):
        group = groups[turn % len(groups)]
        target = int(group[(turn // len(groups)) % len(group)])
        while True:
            window = ranking_MN[target, place[target] : place[target] + WINDOW]
            free = ~taken[window]
            first = int(free.argmax())
            if free[first]:
                break
            place[target] += len(window)
        row = int(window[first])
        place[target] += first + 1
        taken[row] = True
        order[turn], taker[turn] = row, target
    return order, taker
