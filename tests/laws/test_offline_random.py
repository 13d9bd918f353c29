"""The random method: uniform, by content, and copies of a row are drawn apart."""

from __future__ import annotations

import numpy as np

from siftune.offline.draw import draw
from siftune.offline.random import Random
from tests.pools import make_pool

ROWS = [{"text": f"row {number}"} for number in range(5000)]


def test_scores_are_uniform_and_another_seed_is_another_draw() -> None:
    pool = make_pool(ROWS)
    values = Random().fit(pool).score(pool).values
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert (abs(counts - 500) < 5 * np.sqrt(450)).all()
    other = Random(seed=1).score(pool).values
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.06


def test_copies_of_a_row_get_numbers_of_their_own_and_the_first_keeps_its() -> None:
    pool = make_pool([*ROWS[:10], ROWS[3], ROWS[3], ROWS[4]], {12: "duplicate of row 4"})
    values = Random().score(pool).values
    assert len({float(values[row]) for row in (3, 10, 11)}) == 3
    assert np.isnan(values[12])
    alone = make_pool(ROWS[:10])
    np.testing.assert_array_equal(Random().score(alone).values, values[:10])


def test_a_draw_takes_each_row_about_equally_often() -> None:
    pool = make_pool(ROWS[:50], {7: "bad"})
    often = np.zeros(50)
    for seed in range(400):
        rows = draw(pool, 10, seed=seed, purpose="test")
        assert len(set(rows.tolist())) == 10
        often[rows] += 1
    assert often[7] == 0
    expected = 400 * 10 / 49
    assert (abs(np.delete(often, 7) - expected) < 5 * np.sqrt(expected)).all()
