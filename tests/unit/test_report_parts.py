"""The report's parts against naive definitions: text made visible, JSON that stays in its element, counts, overlaps,
histograms, intervals of steps."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune.reports import words
from siftune.reports.blocks import Pair
from siftune.reports.composition import Labels, composition, in_order_of
from siftune.reports.distributions import histogram
from siftune.reports.overlap import rank_correlation, shared_rows
from siftune.reports.probe import reliability
from siftune.reports.reading import left_out, reasons_counted
from siftune.reports.training import intervals, mean_of
from siftune.reports.untrusted import clip, embedded_json, one_line, visible

TEXT = st.text(alphabet=st.characters(codec=None), max_size=60)


# --- untrusted text -------------------------------------------------------------------------------------------------


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_visible_text_holds_no_unseen_character(text: str) -> None:
    shown = visible(text)
    unseen = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x61C, 0xFEFF, 0x200B, 0x2028, 0x2029, 0, 0x1B}
    assert not set(map(ord, shown)) & unseen
    shown.encode()  # raises for a lone half of a surrogate pair
    assert [letter for letter in text if letter.isalnum()] == [
        letter for letter in re.sub(r"\[U\+[0-9A-F]+\]", "", shown) if letter.isalnum()
    ] or "[U+" in text


def test_every_character_that_is_not_seen_is_named() -> None:
    ranges = [
        (0, 9),
        (0x0B, 0x20),
        (0x7F, 0xA0),
        (0x200E, 0x2010),
        (0x2028, 0x202F),
        (0x2060, 0x2070),
        (0xE0000, 0xE0080),
    ]
    for code in [code for low, high in ranges for code in range(low, high)] + [0x61C, 0x200B, 0xFEFF, 0xD800, 0xDFFF]:
        assert visible(f"a{chr(code)}b") == f"a[U+{code:04X}]b"


def test_visible_leaves_ordinary_text_alone() -> None:
    for text in ("line\n\ttab", "naïve – „quotes“", "日本語 한국어 العربية עברית", "👩‍🔬 family", "a\u200cb"):
        assert visible(text) == text


@given(st.recursive(TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)))
@settings(max_examples=200, deadline=None)
def test_embedded_json_cannot_leave_its_element_and_says_the_same(value: object) -> None:
    text = embedded_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    if "\\ud" not in json.dumps(value):
        assert json.loads(text) == value


def test_embedded_json_knows_no_nan() -> None:
    assert embedded_json([math.nan, math.inf, np.float32("nan"), 1.5]) == "[null,null,null,1.5]"


@given(TEXT, st.integers(8, 60))
@settings(max_examples=200, deadline=None)
def test_one_line_fits_its_bytes(text: str, most: int) -> None:
    line = one_line(text, most)
    assert "\n" not in line
    assert len(embedded_json(line).encode()) - 2 <= most + len("…".encode())


def test_clip_counts_what_it_cuts() -> None:
    assert clip("a" * 1_000_000, 10) == ("a" * 10, 999_990)
    assert clip("short", 10) == ("short", 0)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.740061, 3, "0.740"),
        (12345.6, 4, "12,346"),
        (0, 4, "0"),
        (1.234e-7, 3, "1.2e-07"),
        (math.nan, 4, "–"),
        (9.999, 2, "10.0"),
    ],
)
def test_decimal(value: float, digits: int, text: str) -> None:
    assert words.decimal(value, digits) == text


def test_durations_and_sizes() -> None:
    assert [words.duration(seconds) for seconds in (0.25, 59.9, 60, 3599, 3600)] == [
        "0.2 s",
        "60 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
    ]
    assert [words.megabytes(number) for number in (653, 2400)] == ["653 MB", "2.4 GB"]
    assert words.share(1, 0) == "–"


# --- counts ---------------------------------------------------------------------------------------------------------


def test_composition_counts_every_row() -> None:
    draw = np.random.default_rng(0)
    of, kept = draw.integers(-1, 3, 500), draw.random(500) < 0.3
    table = composition("topic", ("a", "b", "c"), of, kept, "caption")
    for index, name in enumerate("abc"):
        pool = [row for row in range(500) if of[row] == index]
        chosen = [row for row in pool if kept[row]]
        line = table.rows[index]
        assert (line[0], line[1], line[3]) == (name, str(len(pool)), str(len(chosen)))
        assert line[5] == f"{100 * len(chosen) / len(pool):.1f} %"
        assert isinstance(line[6], Pair)
    assert table.rows[3][:2] == ["none", str(int((of < 0).sum()))]
    widest = max(max(line[6].pool, line[6].chosen) for line in table.rows[:3])  # type: ignore[union-attr]
    assert widest == pytest.approx(1)


def test_a_column_of_the_same_names_takes_their_order() -> None:
    labels = Labels("source", ("b", "a"), np.array([0, 1, -1, 1]))
    (same,) = in_order_of(("a", "b"), [labels])
    assert same.values == ("a", "b")
    assert same.of.tolist() == [1, 0, -1, 0]
    assert in_order_of(("a", "c"), [labels]) == [labels]


@pytest.mark.parametrize("log", [False, True])
def test_a_histogram_counts_every_known_row_once(log: bool) -> None:
    draw = np.random.default_rng(1)
    values = draw.lognormal(3, 1, 1000)
    values[:100] = np.nan
    kept = draw.random(1000) < 0.2
    chart = histogram("name", "Title", "axis", values, kept, log=log)
    assert chart is not None
    pool, chosen = chart.data["series"]
    assert sum(pool["y"]) == 900
    assert sum(chosen["y"]) == int(kept[100:].sum())
    assert all(part <= whole for whole, part in zip(pool["y"], chosen["y"], strict=True))
    left = np.array(pool["x"]) - np.array(pool["width"]) / 2
    scaled = np.log10(values[100:]) if log else values[100:]
    assert pool["y"][3] == int(((scaled >= left[3] - 1e-9) & (scaled < left[4] - 1e-9)).sum())


def test_a_few_different_scores_have_a_bar_each() -> None:
    values = np.array([1, 1, 2, 5, np.nan])
    chart = histogram("name", "Title", "axis", values, np.array([1, 0, 1, 0, 0], bool))
    assert chart is not None
    assert [(one["x"], one["y"]) for one in chart.data["series"]] == [([1, 2, 5], [2, 1, 1]), ([1, 2, 5], [1, 1, 0])]
    assert histogram("name", "Title", "axis", np.array([3.0, 3.0, np.nan]), np.zeros(3, bool)) is None


def test_overlap_and_rank_correlation_are_what_they_say() -> None:
    draw = np.random.default_rng(2)
    first, second = draw.random(200) < 0.3, draw.random(200) < 0.2
    a, b = set(np.flatnonzero(first).tolist()), set(np.flatnonzero(second).tolist())
    assert shared_rows(first, second) == len(a & b) / min(len(a), len(b))
    assert shared_rows(first, np.zeros(200, bool)) is None
    x = draw.permutation(50).astype(np.float32)
    y = draw.permutation(50).astype(np.float32)
    naive = 1 - 6 * float(((x - y) ** 2).sum()) / (50 * (50**2 - 1))
    y_known = np.append(y, np.nan).astype(np.float32)
    assert rank_correlation(np.append(x, 7).astype(np.float32), y_known) == pytest.approx(naive)
    assert rank_correlation(x, np.ones(50, np.float32)) is None


def test_rare_reasons_are_among_those_listed() -> None:
    reasons = dict.fromkeys(range(1000), "unparsable: x") | {1500: "missing field: output", 1600: "rare"}
    listed = left_out(reasons)
    assert len(listed) == 300
    assert {1500, 1600} <= set(listed)
    assert listed == sorted(listed)
    assert reasons_counted(reasons) == [("unparsable", 1000), ("missing field", 1), ("rare", 1)]
    assert reasons_counted({1: "duplicate of row 3", 2: "duplicate of row 4"}) == [("duplicate", 2)]


def test_means_over_intervals_of_steps() -> None:
    step = np.repeat(np.arange(1, 201), 3)
    values = np.random.default_rng(3).random(600)
    values[::7] = np.nan
    kept = np.arange(600) % 3 == 0
    of, ends = intervals(step)
    assert len(ends) == 60
    assert ends[-1] == 200
    assert (np.diff(of) >= 0).all()
    for index, mean in enumerate(mean_of(values, of, kept, 60)):
        low = 0 if index == 0 else ends[index - 1]
        inside = [
            v for s, v, k in zip(step, values, kept, strict=True) if low < s <= ends[index] and k and not math.isnan(v)
        ]
        assert mean == pytest.approx(sum(inside) / len(inside), rel=1e-5)
    assert intervals(np.array([5, 5]))[1] == [5]


def test_reliability_bins() -> None:
    probabilities = np.array([[0.95, 0.05], [0.92, 0.08], [0.4, 0.6], [1.0, 0.0]])
    chart = reliability(np.array([0, 1, 1, 0]), probabilities)
    (series,) = chart.data["series"]
    assert series["x"] == [0.6, pytest.approx((0.95 + 0.92 + 1.0) / 3, abs=1e-4)]
    assert series["y"] == [1.0, pytest.approx(2 / 3, abs=1e-4)]
