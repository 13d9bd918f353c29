"""kmeans, facility and length-matched against their definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftune.errors import UserError
from siftune.offline.coverage import Facility, KMeansCoverage, equal_take, facility_order
from siftune.offline.length_matched import LengthMatched
from tests.pools import make_pool


def naive_greedy(vectors: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], count: int) -> list[int]:
    """The definition: at every step every remaining row is tried."""
    similarity = np.maximum(vectors.astype(np.float64) @ reference.astype(np.float64).T, 0)
    chosen: list[int] = []
    for _ in range(count):
        values = {
            row: similarity[[*chosen, row]].max(axis=0).sum().round(5)
            for row in range(len(vectors))
            if row not in chosen
        }
        chosen.append(max(values, key=lambda row: (values[row], -row)))
    return chosen


@pytest.mark.parametrize("reference", [60, 25])
def test_facility_location_is_the_greedy_of_the_definition(reference: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order, greedy = facility_order(vectors, vectors[:reference])
    assert sorted(order.tolist()) == list(range(60))
    assert greedy >= 20
    assert order[:20].tolist() == naive_greedy(vectors, vectors[:reference], 20)


def test_rows_that_raise_nothing_come_last() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], dtype=np.float32)
    order, greedy = facility_order(vectors, vectors)
    assert (order.tolist(), greedy) == ([0, 2, 1, 3], 2)


def test_every_cluster_gives_equally_many_rows_nearest_first() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    distances = np.array([0.3, 0.1, 0.2, 0.9, 0.8, 0.5])
    assert equal_take(labels, distances).tolist() == [1, 4, 5, 2, 3, 0]


def test_the_k_means_order_takes_from_every_group() -> None:
    drawn = np.random.default_rng(1)
    centres = np.eye(4)[[0] * 30 + [1] * 5 + [2] * 5]
    vectors = (centres + 0.01 * drawn.normal(size=centres.shape)).astype(np.float32)
    order, facts = KMeansCoverage(model="unused", clusters=3, seed=2).order(vectors)
    assert facts == {"clusters": 3}
    assert np.bincount(centres[order[:15]].argmax(axis=1), minlength=3).tolist()[:3] == [5, 5, 5]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (KMeansCoverage(model="unused", clusters=0), "clusters=0 must be at least 1"),
        (Facility(model="unused", reference=0), "reference=0 must be at least 1"),
        (LengthMatched(like="no-such-run"), "like: .*no-such-run"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(method: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.check()


# --- length-matched ---------------------------------------------------------------------------------------------------


def text(words: int, number: int) -> dict[str, str]:
    return {"text": " ".join([f"w{number}"] * words)}


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_draw_has_the_other_runs_length_histogram(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 41, 4000)
    pool = make_pool([text(int(length), number) for number, length in enumerate(lengths)])
    like = [text(length, number) for number, length in enumerate([5] * 60 + [20] * 30 + [35] * 10)]
    method = LengthMatched(like=write(tmp_path / "like.jsonl", like), seed=1)
    method.cache = tmp_path / "cache"
    for count in (50, 100):
        kept = lengths[method.fit(pool).score(pool).keep(count=count).rows]
        near = [int(((kept >= low) & (kept < high)).sum()) for low, high in ((5, 20), (20, 35), (35, 36))]
        assert sum(near) == count
        np.testing.assert_allclose(np.array(near) / count, [0.6, 0.3, 0.1], atol=0.02)
    other = LengthMatched(like=method.like, seed=2)
    other.cache = method.cache
    first, second = (set(one.score(pool).keep(count=100).rows.tolist()) for one in (method, other))
    assert len(first & second) < 50, "another seed is another draw"


def test_a_run_folder_is_read_as_that_run_read_its_pool(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write(run / "selected.jsonl", [{"frage": "a b c", "antwort": "d"}, {"frage": "a", "antwort": "b"}])
    (run / "config.yaml").write_text("columns: {instruction: frage, output: antwort}\n")
    method = LengthMatched(like=str(run))
    method.cache = tmp_path / "cache"
    assert sorted(method._lengths().tolist()) == [2, 4]


def test_a_folder_that_is_no_selection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no finished selection: it holds no selected\.jsonl"):
        LengthMatched(like=str(tmp_path)).check()
