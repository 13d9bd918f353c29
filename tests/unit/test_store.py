"""The store: what goes in comes out, or nothing does."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from siftune.models.store import Store

ARRAYS = {
    "hidden": np.arange(12, dtype=np.float32).reshape(3, 4),
    "tokens": np.array([1, -1, 3], dtype=np.int32),
    "truncated": np.array([True, False, True]),
    "labels": np.array([0, 1, -1], dtype=np.int16),
    "none": np.empty((0, 4), dtype=np.float64),
}
META = {"reasons": {"1": 'a "reason" with ünïcode'}, "rows": 3}
KEY = "ab" + "0" * 30


def same(found: Any) -> None:
    assert found is not None
    arrays, meta = found
    assert meta == META
    assert arrays.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        assert arrays[name].dtype == values.dtype
        np.testing.assert_array_equal(arrays[name], values)


def test_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(KEY) is None
    assert KEY not in store
    store.put(KEY, ARRAYS, META)
    same(store.get(KEY))
    same(pickle.loads(pickle.dumps(store)).get(KEY))
    assert KEY in store
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == [f"ab/{KEY}.safetensors"]
    assert load_file(store.path(KEY)).keys() == ARRAYS.keys(), "any safetensors reader can open it"


def test_nan_survives_and_strided_arrays_too(tmp_path: Path) -> None:
    values = np.array([[1.0, np.nan], [np.inf, -0.0]], dtype=np.float32).T
    Store(tmp_path).put(KEY, {"a": values}, {})
    found = Store(tmp_path).get(KEY)
    assert found is not None
    assert found[0]["a"].tobytes() == np.ascontiguousarray(values).tobytes()
    assert found[1] == {}


def test_any_single_damage_counts_as_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEY, ARRAYS, META)
    sound = store.path(KEY).read_bytes()

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(sound) - 1), st.integers(1, 255))
    def flipped(place: int, by: int) -> None:
        damaged = bytearray(sound)
        damaged[place] ^= by
        store.path(KEY).write_bytes(damaged)
        try:
            found = store.get(KEY)
        except Exception as error:
            raise AssertionError(f"byte {place} ^ {by}") from error
        if found is None:
            assert not store.path(KEY).exists(), "an unsound entry is removed"
        else:
            same(found)  # a byte of the header's own white space, say

    flipped()

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, len(sound) - 1))
    def cut(length: int) -> None:
        store.path(KEY).write_bytes(sound[:length])
        assert store.get(KEY) is None
        assert not store.path(KEY).exists()

    cut()
    store.put(KEY, ARRAYS, META)
    same(store.get(KEY))


def test_an_entry_under_another_key_is_not_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEY, ARRAYS, META)
    other = "ab" + "1" * 30
    store.path(KEY).rename(store.path(other))
    assert store.get(other) is None


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        path.open("wb").write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises((OSError, ValueError)):
        Store(tmp_path).put(KEY, ARRAYS, META)
    monkeypatch.undo()
    assert Store(tmp_path).get(KEY) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _write_and_read(folder: str, turns: int) -> int:
    store, unsound = Store(folder), 0
    for _ in range(turns):
        store.put(KEY, ARRAYS, META)
        found = store.get(KEY)
        unsound += found is None or found[0]["hidden"].tobytes() != ARRAYS["hidden"].tobytes()
    return unsound


def test_concurrent_writers(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as workers:
        unsound = workers.starmap(_write_and_read, [(str(tmp_path), 40)] * 3)
    assert unsound == [0, 0, 0]
    same(Store(tmp_path).get(KEY))
    assert len(list(tmp_path.rglob("*.*"))) == 1
