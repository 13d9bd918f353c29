"""Means, and differences to the baseline paired by seed, with a 95 % interval by Student's t.

    d_s = value(method, seed s) - value(baseline, seed s)
    interval = mean(d) +- t_{0.975, n-1} * sd(d) / sqrt(n)            n seeds, sd with n - 1

Pairing takes out what the seeds of both share: the order of the rows and the draw of new weights. One seed gives no
spread and no interval. The intervals are for one comparison each: of k that are looked at, k/20 exclude 0 by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    mean: float
    sd: float
    """With n - 1; NaN for one seed."""
    n: int


@dataclass(frozen=True)
class Difference:
    """A paired difference over the seeds that both have."""

    mean: float
    sd: float
    low: float
    """Lower end of the interval; NaN for one seed."""
    high: float
    n: int

    @property
    def clear(self) -> bool:
        """Does the interval exclude 0?"""
        return self.low > 0 or self.high < 0


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard deviation. NaN of no value.

    >>> mean_of([1.0, 3.0])
    Mean(mean=2.0, sd=1.4142135623730951, n=2)
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Mean(math.nan, math.nan, 0)
    return Mean(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan, len(array))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], *, level: float = LEVEL) -> Difference:
    """The paired difference of two methods' values by seed, over the seeds that both have a number for.

    >>> paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.0}).mean
    0.75
    """
    from scipy import stats

    seeds = sorted(seed for seed in ours.keys() & theirs.keys() if math.isfinite(ours[seed] - theirs[seed]))
    found = mean_of([ours[seed] - theirs[seed] for seed in seeds])
    if found.n < 2:
        return Difference(found.mean, found.sd, math.nan, math.nan, found.n)
    half = float(stats.t.ppf(0.5 + level / 2, found.n - 1)) * found.sd / math.sqrt(found.n)
    return Difference(found.mean, found.sd, found.mean - half, found.mean + half, found.n)
