"""InsTag-D in one pass over the tags equals the walk as it is defined, pass by pass over sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune.offline.instag_walk import passes


def defined(tags: list[set[int]]) -> list[int]:
    """The order in which rows are taken; rows are given in the order of the walk."""
    left = [row for row, own in enumerate(tags) if own]
    taken: list[int] = []
    while left:
        covered: set[int] = set()
        skipped = []
        for row in left:
            if tags[row] - covered:
                taken.append(row)
                covered |= tags[row]
            else:
                skipped.append(row)
        left = skipped
    return taken + [row for row, own in enumerate(tags) if not own]


def array(tags: list[set[int]], width: int = 6) -> np.ndarray:
    return np.array([[*sorted(own), *[0] * (width - len(own))] for own in tags], dtype=np.int64).reshape(-1, width)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sets(st.integers(1, 9), max_size=6), max_size=40))
def test_every_pool_of_tags(tags: list[set[int]]) -> None:
    order = np.argsort(passes(array(tags)), kind="stable")
    assert order.tolist() == defined(tags)


@pytest.mark.parametrize("kinds", [3, 40, 2000])
def test_a_larger_pool(kinds: int) -> None:
    chance = np.random.default_rng(kinds)
    tags = [set((chance.zipf(1.5, size=chance.integers(0, 7)) % kinds + 1).tolist()) for _ in range(2000)]
    tags.sort(key=lambda own: -len(own))
    assert np.argsort(passes(array(tags)), kind="stable").tolist() == defined(tags)


def test_nothing() -> None:
    assert passes(np.zeros((0, 4), dtype=np.int64)).tolist() == []
    assert passes(np.zeros((2, 4), dtype=np.int64)).tolist() == [0, 0]
