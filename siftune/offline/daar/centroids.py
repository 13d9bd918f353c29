"""Domain centroids from seed rows: C_k = mean of e(x) over the seeds of domain k (DaaR, arXiv 2502.04380, stage 2).

`e(x)` is the mean of the embedding layer's output over a row's real tokens. Sums run in float64.
Cost: one pass over S rows of width D.

Axes: `S` seed rows, `K` domains, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError

Floats = NDArray[Any]


def centroids(embedding_SD: Floats, labels_S: NDArray[np.integer[Any]], domains: Sequence[str]) -> NDArray[np.float64]:
    """C_k of every domain, float64 `(K, D)`; rows without features (NaN) are left out.

    Raises `UserError` when a domain has no usable seed row, or when two domains have the same centroid.

    >>> centroids(np.array([[0.0], [2.0], [5.0]]), np.array([0, 0, 1]), ["a", "b"]).tolist()
    [[1.0], [5.0]]
    """
    embedding = embedding_SD.astype(np.float64)
    usable = np.isfinite(embedding).all(axis=1)
    centroids_KD = np.empty((len(domains), embedding.shape[1]))
    for index, name in enumerate(domains):
        members = embedding[usable & (labels_S == index)]
        if not len(members):
            raise UserError(f"no seed row of the domain {name!r} has features (empty text?); add seed rows for it")
        centroids_KD[index] = members.mean(axis=0)
    for first in range(len(domains)):
        for second in range(first + 1, len(domains)):
            if np.array_equal(centroids_KD[first], centroids_KD[second]):
                raise UserError(
                    f"the domains {domains[first]!r} and {domains[second]!r} have the same centroid; "
                    "use different seed rows for them"
                )
    return centroids_KD


def cosines(first_AD: Floats, second_BD: Floats) -> NDArray[np.float64]:
    """Cosine of every row of one matrix with every row of the other, float64 `(A, B)`; 0 where a row is all zero."""
    first, second = first_AD.astype(np.float64), second_BD.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1)[:, None] * np.linalg.norm(second, axis=1)[None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, (first @ second.T) / lengths, 0.0)


def mean_pairwise_distance(centroids_KD: Floats) -> float:
    """Mean Euclidean distance over the pairs of centroids: the paper's global figure of diversity between domains."""
    first, second = np.triu_indices(len(centroids_KD), k=1)
    return float(np.linalg.norm(centroids_KD[first] - centroids_KD[second], axis=1).mean())
