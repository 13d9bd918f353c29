"""Means and paired intervals against printed tables of Student's t, scipy's paired test and exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from siftune.study.statistics import mean_of, paired

PRINTED = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 10: 2.2622, 30: 2.0452}
"""Seeds -> the 97.5 % point of t with one degree of freedom less, from a printed table."""
numbers = st.integers(-10_000, 10_000).map(lambda one: one / 64)


def exact(values: list[float]) -> tuple[float, float]:
    """Mean and n - 1 standard deviation in rational arithmetic."""
    parts = [Fraction(value) for value in values]
    mean = sum(parts, Fraction(0)) / len(parts)
    return float(mean), math.sqrt(sum(((part - mean) ** 2 for part in parts), Fraction(0)) / (len(parts) - 1))


@given(st.lists(numbers, min_size=2, max_size=12))
def test_mean_and_deviation_are_exact(values: list[float]) -> None:
    mean, sd = exact(values)
    found = mean_of(values)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.sd == pytest.approx(sd, abs=1e-9)
    assert found.n == len(values)


@pytest.mark.parametrize("n", PRINTED)
def test_the_interval_is_that_of_the_printed_table(n: int) -> None:
    draw = np.random.default_rng(n)
    ours, theirs = draw.normal(size=n).tolist(), draw.normal(size=n).tolist()
    mean, sd = exact([one - other for one, other in zip(ours, theirs, strict=True)])
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    half = PRINTED[n] * sd / math.sqrt(n)
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - half, abs=1e-4)
    assert found.high == pytest.approx(mean + half, abs=1e-4)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8))
def test_it_agrees_with_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [one for one, _ in pairs], [other for _, other in pairs]
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    if found.sd < 1e-9:
        return
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    assert found.low == pytest.approx(float(low), abs=1e-7)
    assert found.high == pytest.approx(float(high), abs=1e-7)
    if abs(float(test.pvalue) - 0.05) > 1e-6:
        assert found.clear == (float(test.pvalue) < 0.05)


def test_pairs_are_by_seed_and_only_those_that_both_have() -> None:
    found = paired({0: 1.0, 1: 5.0, 2: 9.0, 3: math.nan}, {2: 8.0, 0: 2.0, 3: 1.0, 7: 100.0})
    assert (found.mean, found.n) == (0.0, 2)


def test_one_seed_has_a_difference_and_no_interval() -> None:
    found = paired({0: 1.0}, {0: 3.0})
    assert (found.mean, found.n) == (-2.0, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.sd)
    assert not found.clear
    assert paired({0: 1.0}, {1: 1.0}).n == 0


def test_the_order_of_seeds_does_not_matter_and_swapping_changes_the_sign() -> None:
    ours, theirs = {0: 1.0, 1: 2.5, 2: 0.5}, {0: 0.9, 1: 2.0, 2: 0.7}
    found, swapped = paired(ours, theirs), paired(theirs, ours)
    assert paired(dict(reversed(ours.items())), theirs) == found
    assert swapped.low == pytest.approx(-found.high)
    assert swapped.high == pytest.approx(-found.low)
