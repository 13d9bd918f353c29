"""Pseudo-labels of the probe set: k-means on e(x), started at the domain centroids (DaaR, arXiv 2502.04380, stage 3).

Cluster k keeps the name of the domain whose centroid it started from. Domains nearest to no row are left out:
k-means would otherwise move their centre to an outlier and call it by the domain's name.
Cost: about B * K * D per iteration, float64, one thread so that a rerun is bit-identical.

Axes: `B` rows of the probe set, `K` domains, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from ...errors import UserError


@dataclass(frozen=True, eq=False)
class Clusters:
    """The result of k-means on the probe set."""

    labels: NDArray[np.int64]
    """Shape `(B,)`, index of the domain."""
    centers: NDArray[np.float64]
    """Shape `(K, D)`; an absent domain keeps the centroid of its seeds."""
    sizes: NDArray[np.int64]
    """Shape `(K,)`, rows per domain; 0 for an absent one."""
    iterations: int

    @property
    def present(self) -> NDArray[np.bool_]:
        """Domains that the probe set holds. Shape `(K,)`."""
        return self.sizes > 0


def cluster(embedding_BD: NDArray[Any], centroids_KD: NDArray[np.float64], domains: Sequence[str]) -> Clusters:
    """k-means with one start, at the centroids.

    Raises `UserError` when all rows lie nearest to one domain's centroid: the domains cannot be separated then.

    >>> cluster(np.array([[0.0], [1.0], [9.0]]), np.array([[0.0], [10.0]]), ["a", "b"]).labels.tolist()
    [0, 0, 1]
    """
    embedding = embedding_BD.astype(np.float64)
    nearest = _distances(embedding, centroids_KD).argmin(axis=1)
    present = np.bincount(nearest, minlength=len(domains)) > 0
    if present.sum() < 2:
        only = domains[int(nearest[0])] if len(nearest) else "-"
        raise UserError(
            f"all {len(embedding)} rows of the probe set lie nearest to the seeds of {only!r}, so the domains "
            "cannot be separated; use seed rows of domains that the pool holds"
        )
    starts = centroids_KD[present]
    with threadpool_limits(limits=1):
        fitted = KMeans(n_clusters=len(starts), init=starts, n_init=1).fit(embedding)
    labels = np.flatnonzero(present)[fitted.labels_]
    centers = centroids_KD.copy()
    centers[present] = fitted.cluster_centers_
    return Clusters(labels, centers, np.bincount(labels, minlength=len(domains)), int(fitted.n_iter_))


def _distances(rows_BD: NDArray[np.float64], centers_KD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared Euclidean distances `(B, K)`, one centre at a time: no B x K x D array, no cancellation."""
    return np.stack([((rows_BD - center) ** 2).sum(axis=1) for center in centers_KD], axis=1)
