"""Groups of neighbours that fit a limit, and the batches that they fill: order kept, none left out, none divided."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from siftune.models.features import batches, pad_right
from siftune.models.grouping import consecutive_groups


@given(st.lists(st.integers(1, 30)), st.integers(1, 60))
def test_groups_are_consecutive_and_as_large_as_they_fit(sizes: list[int], limit: int) -> None:
    groups = list(consecutive_groups(sizes, lambda group, size: sum(group) + size <= limit))
    assert [size for group in groups for size in group] == sizes
    assert all(len(group) == 1 or sum(group) <= limit for group in groups)
    for group, following in itertools.pairwise(groups):
        assert sum(group) + following[0] > limit


@given(st.lists(st.integers(0, 40)), st.integers(1, 120))
def test_batches_are_those_of_their_definition(lengths: list[int], budget: int) -> None:
    order = [row for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]) if lengths[row]]
    expected, start = [], 0
    while start < len(order):
        stop = start + max(1, budget // lengths[order[start]])
        expected.append(order[start:stop])
        start = stop
    assert list(batches(np.array(lengths, np.int32), budget)) == expected


def test_padding_is_on_the_right_and_a_real_id() -> None:
    assert pad_right([np.array([4, 9]), np.array([7])]).tolist() == [[4, 9], [7, 7]]
