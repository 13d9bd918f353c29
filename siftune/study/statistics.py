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


def paired(values: Mapping[int, float], baseline: Mapping[int, float], *, level: float = LEVEL) -> Difference:
    """The paired difference of two methods' values by seed, over the seeds that both have a number for.

    >>> paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.0}).mean
    0.75
    """
    from scipy import stats

    seeds = sorted(seed for seed in values.keys() & baseline.keys() if math.isfinite(values[seed] - baseline[seed]))
    difference = mean_of([values[seed] - baseline[seed] for seed in seeds])
    if difference.n < 2:
        return Difference(difference.mean, difference.sd, math.nan, math.nan, difference.n)
    half = float(stats.t.ppf(0.5 + level / 2, difference.n - 1)) * difference.sd / math.sqrt(difference.n)
    return Difference(difference.mean, difference.sd, difference.mean - half, difference.mean + half, difference.n)
