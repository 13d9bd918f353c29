"""Figures: both kinds of file, the same bytes each time, what was given is in them, colours told apart."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from siftune.reports import figures
from siftune.reports.figures import Point

POINTS = [Point("uds <b>", -0.02, -0.03, -0.01), Point("random", 0.0), Point("maxloss", 0.1, -0.1, 0.3)]


def draw(folder: Path) -> list[Path]:
    made = figures.intervals(folder / "a" / "one", POINTS, title="T & t", axis="nats", zero="random")
    made += figures.grouped(folder / "two", {"maths": POINTS, "code": POINTS}, title="by domain", axis="nats")
    pairs = [(Point(one.label, 100.0 * index), one) for index, one in enumerate(POINTS)]
    return made + figures.scatter(folder / "three", pairs, title="tokens", across="trained tokens", upward="loss")


def test_png_and_svg_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "first"), draw(tmp_path / "second")
    assert [path.name for path in first] == [
        f"{stem}.{kind}" for stem in ("one", "two", "three") for kind in ("svg", "png")
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path not in first + second]


def test_the_text_is_in_the_svg_and_no_date(tmp_path: Path) -> None:
    svg = draw(tmp_path)[0].read_text()
    for said in ("uds &lt;b&gt;", "T &amp; t", "nats", "random"):
        assert said in svg
    assert not re.search(r"20\d\d-\d\d-\d\d", svg)


def test_one_point_without_an_interval_draws(tmp_path: Path) -> None:
    assert figures.intervals(tmp_path / "x", [Point("a", 1.0)], title="t", axis="x")[0].stat().st_size > 1000
    assert figures.grouped(tmp_path / "y", {"d": [Point("a", math.nan)]}, title="t", axis="x")


def test_matplotlibs_global_settings_are_left_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(tmp_path)
    assert dict(matplotlib.rcParams) == before


def seen(colour: str, kind: str) -> tuple[float, float, float]:
    """A colour as a red-blind or green-blind eye sees it, roughly: linear RGB through Vienot's (1999) matrices."""
    rgb = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (value**2.2 for value in rgb)
    if kind == "protan":
        mixed = 0.11238 * red + 0.88762 * green
        return mixed, mixed, 0.00401 * red - 0.00401 * green + blue
    mixed = 0.29275 * red + 0.70725 * green
    return mixed, mixed, -0.02234 * red + 0.02234 * green + blue


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_the_first_colours_differ_to_a_colour_blind_eye(kind: str) -> None:
    for one, other in itertools.combinations(figures.COLOURS[:4], 2):
        assert math.dist(seen(one, kind), seen(other, kind)) > 0.1, (one, other)


def test_without_matplotlib_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from siftune.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="pip install"):
        figures.intervals(tmp_path / "x", POINTS, title="t", axis="x")


def test_names_beside_a_scatter_never_touch_and_move_as_little_as_they_can() -> None:
    assert figures.spread([0.5, 0.5, 0.9], gap=0.1) == [0.45, 0.55, 0.9]
    assert figures.spread([0.1, 0.3], gap=0.1) == [0.1, 0.3]
    crowded = figures.spread(sorted([0.2, 0.21, 0.22, 0.3, 0.31, 0.8]), gap=0.05)
    assert all(b - a >= 0.05 - 1e-6 for a, b in itertools.pairwise(crowded))
    assert sum(crowded) == pytest.approx(0.2 + 0.21 + 0.22 + 0.3 + 0.31 + 0.8)


def test_what_stands_outside_of_the_budget_is_said_in_words(tmp_path: Path) -> None:
    far = [(Point("full", 4e5), Point("full", 3.2))]
    pairs = [(Point("a", 8e4), Point("a", 3.6)), (Point("b", 9e4), Point("b", 3.7))]
    svg = figures.scatter(tmp_path / "x", pairs, title="t", across="x", upward="y", outside=far)[0].read_text()
    assert "not drawn: full at 400,000, 3.200" in svg
