"""The facts of a fit that a manifest and a report show: plain JSON-able values (DaaR, arXiv 2502.04380).

Cost: nothing beside the fit.

Axes: `K` domains, `D` width.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from .centroids import cosines, mean_pairwise_distance
from .clusters import Clusters
from .seeds import Seeds


def cluster_facts(seeds: Seeds, centroids_KD: NDArray[np.float64], clusters: Clusters) -> dict[str, Any]:
    """The facts of seeds and clusters for the report."""
    moved = np.diagonal(cosines(centroids_KD, clusters.centers))
    return {
        "domains": list(seeds.domains),
        "seed_rows": seeds.counts,
        "absent_domains": [name for name, held in zip(seeds.domains, clusters.present, strict=True) if not held],
        "cluster_rows": dict(zip(seeds.domains, clusters.sizes.tolist(), strict=True)),
        "cluster_iterations": clusters.iterations,
        "centroid_cosines": cosines(centroids_KD, centroids_KD).round(6).tolist(),
        "centroid_distance": mean_pairwise_distance(centroids_KD),
        "cluster_distance": mean_pairwise_distance(clusters.centers),
        "cosine_to_cluster": dict(zip(seeds.domains, moved.round(6).tolist(), strict=True)),
    }


def tell_absent(clusters: Clusters, domains: tuple[str, ...]) -> None:
    """Warn, in one sentence, of domains that have seeds but no row of the probe set."""
    absent = [name for name, held in zip(domains, clusters.present, strict=True) if not held]
    if absent:
        warnings.warn(
            f"no row of the probe set is nearest to the seeds of {', '.join(absent)}: probability 0 on every row",
            stacklevel=3,
        )


def counted(domains: tuple[str, ...], labels: NDArray[np.int16]) -> dict[str, int]:
    """Rows per domain of pseudo-labels `(rows,)`."""
    return dict(zip(domains, np.bincount(labels, minlength=len(domains)).tolist(), strict=True))


def rank_correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float | None:
    """Spearman's rho; None where one of the two does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)
