"""tools/golden.py: what its digests see, and what they do not; the run itself is the tool's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "golden.py"


@pytest.fixture(scope="module")
def golden() -> Any:
    spec = importlib.util.spec_from_file_location("golden", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(golden: Any, values: Any) -> dict[str, str]:
    return {"exact": golden.digest(values, exact=True), "rounded": golden.digest(values, exact=False)}


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_last_bit_changes_exact_alone_and_a_sixth_digit_changes_both(golden: Any, kind: Any) -> None:
    values = np.array([0.0, 1.234567, -2e-30, 5e20, np.nan, np.inf, -np.inf], dtype=kind)
    values[1] = 1.2345671
    before = both(golden, values)
    values[1] = np.nextafter(values[1], kind(2))
    bit = both(golden, values)
    assert bit["exact"] != before["exact"]
    assert bit["rounded"] == before["rounded"]
    values[1] = 1.23458
    assert both(golden, values)["rounded"] != before["rounded"]


def test_numbers_that_are_not_finite_have_digests_of_their_own(golden: Any) -> None:
    kinds = [np.array([value]) for value in (0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, 10.0, 1e-9)]
    assert len({golden.digest(one, exact=False) for one in kinds}) == len(kinds)
    assert golden.digest(np.array([0.9999999]), exact=False) == golden.digest(np.array([1.0]), exact=False)


def test_columns_shapes_names_and_nulls_count(golden: Any) -> None:
    column = pa.chunked_array([pa.array([1.0, None, float("nan")])])
    assert golden.digest(column, exact=True) != golden.digest(pa.chunked_array([[1.0, None, None]]), exact=True)
    assert golden.digest(column, exact=True) == golden.digest(
        pa.chunked_array([pa.array([1.0, None]), pa.array([float("nan")])]), exact=True
    ), "how a file is cut into pieces is no result"
    ones = np.ones((2, 3), dtype=np.float32)
    assert golden.digest(ones, exact=False) != golden.digest(ones.reshape(3, 2), exact=False)
    assert golden.digest({"a": ones}, exact=True) != golden.digest({"b": ones}, exact=True)
    assert golden.digest(["a", "b"], exact=True) != golden.digest(["b", "a"], exact=True)


def test_the_comparison_names_what_differs(golden: Any) -> None:
    same, bit, digit = ({"exact": e, "rounded": r} for e, r in (("1", "1"), ("2", "1"), ("3", "3")))
    assert golden.differences({"a": same}, {"a": same}) == []
    assert golden.differences({"a": same, "b": same, "c": same}, {"a": bit, "b": digit, "d": same}) == [
        "a: differs beyond 6 significant digits alone",
        "b: differs within 6 significant digits",
        "c: is not computed any more",
        "d: is new",
    ]


def test_the_exit_code_is_the_comparisons(golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "digests", lambda: {"a": {"exact": "1", "rounded": "1"}})
    assert golden.main(["--out", str(tmp_path / "a.json")]) == 0
    assert golden.main(["--compare", str(tmp_path / "a.json")]) == 0
    monkeypatch.setattr(golden, "digests", lambda: {"a": {"exact": "2", "rounded": "1"}})
    assert golden.main(["--compare", str(tmp_path / "a.json")]) == 1
