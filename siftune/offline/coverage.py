"""Rows that cover the pool: k-means with an equal take per cluster, and facility location.

    kmeans     clusters of the representations; turn by turn every cluster gives its row nearest to the centre
    facility   greedily the row that raises  sum_i max_{j chosen} max(0, cos(i, j))  most, over reference rows i

Both on the representations of `rds` (arXiv 2503.01807), of length 1; a row's score is minus its position in that order, so
any budget is a prefix. Facility location by lazy greedy (Minoux 1978) on at most `reference` drawn rows i, which are all
rows of a smaller pool. Cost: one forward of the model over the pool; then k-means on at most 50,000 rows, or one product
of n x reference numbers and a few more a row. Memory: 4 D bytes a row.

Axes: `N` scored rows, `R` reference rows, `D` width.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..models.backbone import Backbone, DType
from ..models.representations import RepresentationTask, backbone_of
from ..progress import doing
from ..records import Pool, Scores
from .base import OfflineMethod
from .draw import blocks, numbers

SAMPLE = 50_000
"""Rows that k-means is fitted on, at most."""
TOGETHER = 64
"""Rows whose gains are computed in one product."""
DIGITS = 6
"""Decimals of a gain: two rows that represent each other alone gain equally but for rounding. A gain of 0 is the end: the
rows that remain follow by their first gain."""


@dataclass(kw_only=True, eq=False)
class _Coverage(OfflineMethod):
    """Base of both: the representations, and minus the position in an order."""

    model: str
    """The causal LM whose last hidden states are compared: a folder or a hub id."""
    max_length: int = 2048
    """Tokens of a row that are read at most."""
    dtype: DType = "auto"
    """`auto` (bfloat16 for a 16-bit checkpoint on CUDA, else float32), `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""
    seed: int = 0
    """Seed of the draws."""

    def check(self) -> None:
        """Check settings and model folder before any weight is loaded. Raises `UserError`."""
        _ = self.backbone().config, self.backbone().tokenizer

    def feature_task(self, *, for_fit: bool) -> RepresentationTask:
        return RepresentationTask(self.backbone(), token_budget=self.token_budget)

    def backbone(self) -> Backbone:
        """One backbone per method, so that the model loads once."""
        return backbone_of(self)

    def shard_task(self, pool: Pool) -> RepresentationTask:
        self.check()
        return self.feature_task(for_fit=False)

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """Minus the position in the method's order."""
        hidden = columns["hidden"]
        rows = np.flatnonzero(np.isfinite(hidden).all(axis=1))
        ties = [numbers(self.seed, self.name, pool.source.ids(block.tolist())) for block in blocks(rows)]
        by_content = np.argsort(np.concatenate([np.empty(0, dtype=np.uint64), *ties]), kind="stable")
        vectors_ND = hidden[rows[by_content]]  # in an order that depends on the rows' content alone
        vectors_ND /= np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
        with doing(self.name):
            order, info = self.order(vectors_ND)
        values = np.full(len(pool), np.nan, dtype=np.float32)
        values[rows[by_content[order]]] = -np.arange(len(order), dtype=np.float32)
        return Scores(pool=pool, method=self.name, values=values, reasons=reasons, tokens=columns["tokens"], info=info)

    def order(self, vectors_ND: NDArray[np.float32]) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """All rows, the first chosen first, and plain facts."""
        raise NotImplementedError


@dataclass(kw_only=True, eq=False)
class KMeansCoverage(_Coverage):
    """Every cluster gives equally many rows, those nearest to its centre first.

    Raises `UserError` for settings or a model that cannot be used.

    >>> from siftune.offline.coverage import KMeansCoverage
    >>> KMeansCoverage(model="Qwen/Qwen2.5-0.5B", clusters=100).fit(pool).score(pool).keep(fraction=0.1)
    """

    name: ClassVar[str] = "kmeans"

    clusters: int = 100
    """Number of clusters; a pool of fewer rows has as many as rows."""

    def check(self) -> None:
        if self.clusters < 1:
            raise UserError(f"clusters={self.clusters} must be at least 1")
        super().check()

    def order(self, vectors_ND: NDArray[np.float32]) -> tuple[NDArray[np.int64], dict[str, Any]]:
        from sklearn.cluster import KMeans

        count = min(self.clusters, len(vectors_ND))
        if not count:
            return np.empty(0, dtype=np.int64), {"clusters": 0}
        fitted = KMeans(count, n_init=1, random_state=self.seed).fit(vectors_ND[:SAMPLE])
        label_N, distance_N = fitted.predict(vectors_ND), np.empty(len(vectors_ND))
        for start in range(0, len(vectors_ND), SAMPLE):
            part = slice(start, start + SAMPLE)
            distance_N[part] = np.linalg.norm(vectors_ND[part] - fitted.cluster_centers_[label_N[part]], axis=1)
        return equal_take(label_N, distance_N), {"clusters": len(np.unique(label_N))}


def equal_take(label_N: NDArray[Any], distance_N: NDArray[Any]) -> NDArray[np.int64]:
    """Rows in turns: the nearest row of every cluster, then the second nearest of every cluster, and so on.

    >>> equal_take(np.array([0, 0, 1, 0]), np.array([0.2, 0.1, 0.5, 0.3])).tolist()
    [1, 2, 0, 3]
    """
    by_cluster = np.lexsort((distance_N, label_N))
    begin = np.searchsorted(label_N[by_cluster], label_N[by_cluster])
    turn = np.arange(len(by_cluster)) - begin
    result: NDArray[np.int64] = by_cluster[np.lexsort((label_N[by_cluster], turn))]
    return result


@dataclass(kw_only=True, eq=False)
class Facility(_Coverage):
    """Greedily the rows that represent the pool best: each row of the pool counts by its nearest chosen row.

    Raises `UserError` for settings or a model that cannot be used.

    >>> from siftune.offline.coverage import Facility
    >>> Facility(model="Qwen/Qwen2.5-0.5B").fit(pool).score(pool).keep(fraction=0.1)
    """

    name: ClassVar[str] = "facility"

    reference: int = 4096
    """Rows of the pool that have to be represented, drawn by seed; a smaller pool is represented in full."""

    def check(self) -> None:
        if self.reference < 1:
            raise UserError(f"reference={self.reference} must be at least 1")
        super().check()

    def order(self, vectors_ND: NDArray[np.float32]) -> tuple[NDArray[np.int64], dict[str, Any]]:
        reference_RD = vectors_ND[: self.reference]  # the first in a seeded order of content: a draw
        order, greedy = facility_order(vectors_ND, reference_RD)
        return order, {"reference_rows": len(reference_RD), "rows_by_gain": greedy}


def facility_order(vectors_ND: NDArray[np.float32], reference_RD: NDArray[np.float32]) -> tuple[NDArray[np.int64], int]:
    """All rows in the greedy order, and how many of them raised the sum; the others follow by their first gain.

    Lazy: a row's gain only falls as rows are chosen, so a gain that is current and largest is the largest of all.
    """
    covered_R = np.zeros(len(reference_RD))

    def gains(rows: list[int]) -> NDArray[np.float64]:
        similarity = (vectors_ND[rows] @ reference_RD.T).astype(np.float64)
        result: NDArray[np.float64] = np.maximum(similarity - covered_R, 0).sum(axis=1).round(DIGITS)
        return result

    blocks_of_rows = [range(start, min(start + 1024, len(vectors_ND))) for start in range(0, len(vectors_ND), 1024)]
    first_N = np.concatenate([np.empty(0), *(gains(list(block)) for block in blocks_of_rows)])
    heap = [(-gain, row, 0) for row, gain in enumerate(first_N.tolist())]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        if heap[0][2] == len(order):
            gain, row, _ = heapq.heappop(heap)
            if not gain:
                heapq.heappush(heap, (gain, row, len(order)))
                break
            order.append(row)
            covered_R = np.maximum(covered_R, vectors_ND[row] @ reference_RD.T)
            continue
        stale: list[int] = []
        while heap and heap[0][2] != len(order) and len(stale) < TOGETHER:
            stale.append(heapq.heappop(heap)[1])
        for row, gain in zip(stale, gains(stale).tolist(), strict=True):
            heapq.heappush(heap, (-gain, row, len(order)))
    rest = np.array(sorted((row for _, row, _ in heap), key=lambda row: (-first_N[row], row)), dtype=np.int64)
    return np.concatenate([np.array(order, dtype=np.int64), rest]), len(order)
