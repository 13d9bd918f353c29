"""Figures as PNG and SVG: the one module that draws with matplotlib.

Colours are Okabe and Ito's (Color Universal Design, 2008), distinguishable with every common kind of colour blindness, and each
has its own marker, so that no figure depends on colour. Equal data give equal bytes: SVG ids are salted with a
fixed word and no date is written. No global state of matplotlib is used. Cost: about half a second a figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtra
from ..files import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#777777"
_STYLE = {
    "svg.hashsalt": "siftune",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Point:
    """A number with the ends of its interval, which may be NaN."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """A new figure of `width` x `height` inches in siftune's style, without pyplot. Raises `MissingExtra`."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", extra="report", needed_for="drawing figures") from error
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, stem: Path) -> list[Path]:
    """Write `STEM.png` and `STEM.svg` atomically; returns the paths. Call it inside `drawing`."""
    paths = []
    for suffix, options in (
        (".svg", {"metadata": {"Date": None}}),
        (".png", {"dpi": 150, "metadata": {"Software": None}}),
    ):
        path = stem.with_name(stem.name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix[1:], **options)
        paths.append(path)
    return paths


def intervals(stem: Path, points: Sequence[Point], *, title: str, axis: str, zero: str | None = None) -> list[Path]:
    """One line per point with its interval, in their order from the top; `zero` labels a line at 0.

    >>> intervals(Path("out/differences"), [Point("uds", -0.02, -0.03, -0.01)], title="...", axis="nats", zero="random")
    """
    with drawing(7.0, 1.2 + 0.34 * len(points)) as figure:
        axes = figure.add_subplot()
        if zero is not None:
            axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
            axes.annotate(zero, (0, 1), xycoords=("data", "axes fraction"), color=GREY, fontsize=8,
                          xytext=(3, 2), textcoords="offset points")  # fmt: skip
        for place, point in enumerate(points):
            row = len(points) - 1 - place
            clear = point.low > 0 or point.high < 0
            if not math.isnan(point.low):
                axes.plot([point.low, point.high], [row, row], color=COLOURS[0], linewidth=1.6)
            axes.plot(point.value, row, marker="o", color=COLOURS[0], markerfacecolor=COLOURS[0] if clear else "white")
        axes.set_yticks(range(len(points)), [point.label for point in reversed(points)])
        axes.set_ylim(-0.6, len(points) - 0.4)
        axes.set_xlabel(axis)
        axes.set_title(title, loc="left", fontsize=11, pad=16)
        axes.grid(axis="y", visible=False)
        return save(figure, stem)


def grouped(
    stem: Path, series: Mapping[str, Sequence[Point]], *, title: str, axis: str, zero: str | None = None
) -> list[Path]:
    """Several series (domains) side by side for the same labels (methods); each has its own colour and marker.

    `series` holds one point per label, in the same order in each; missing ones are NaN.
    """
    labels = [point.label for point in next(iter(series.values()))]
    with drawing(7.4, 1.6 + 0.42 * len(labels)) as figure:
        axes = figure.add_subplot()
        if zero is not None:
            axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
            axes.annotate(zero, (0, 1), xycoords=("data", "axes fraction"), color=GREY, fontsize=8,
                          xytext=(3, 2), textcoords="offset points")  # fmt: skip
        for index, (name, points) in enumerate(series.items()):
            shift = 0.5 * (index / max(1, len(series) - 1) - 0.5) if len(series) > 1 else 0.0
            rows = [len(labels) - 1 - place - shift for place in range(len(labels))]
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot([point.value for point in points], rows, linestyle="", marker=marker, color=colour, label=name,
                      markersize=5)  # fmt: skip
            for point, row in zip(points, rows, strict=True):
                if not math.isnan(point.low):
                    axes.plot([point.low, point.high], [row, row], color=colour, linewidth=1)
        axes.set_yticks(range(len(labels)), list(reversed(labels)))
        axes.set_ylim(-0.7, len(labels) - 0.3)
        axes.set_xlabel(axis)
        axes.set_title(title, loc="left", fontsize=11, pad=16)
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=min(5, len(series)), fontsize=8, frameon=False)
        return save(figure, stem)


def scatter(
    stem: Path,
    points: Sequence[tuple[Point, Point]],
    *,
    title: str,
    across: str,
    upward: str,
    outside: Sequence[tuple[Point, Point]] = (),
) -> list[Path]:
    """One marker per (x, y) pair of points of the same label, with whiskers where y has an interval, and its name at the
    right edge. Pairs `outside`, which would compress the scale, are listed in the title."""
    with drawing(7.0, 4.6) as figure:
        axes = figure.add_subplot()
        for index, (x, y) in enumerate(points):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS) % len(MARKERS)]
            if not math.isnan(y.low):
                axes.plot([x.value, x.value], [y.low, y.high], color=colour, linewidth=1)
            axes.plot(x.value, y.value, marker=marker, linestyle="", color=colour, label=x.label, markersize=6)
        axes.set_xlabel(across)
        axes.set_ylabel(upward)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        words = [f"{x.label} at {x.value:,.0f}, {y.value:.3f}" for x, y in outside]
        axes.set_title(
            "\n".join([title, *(["not drawn: " + "; ".join(words)] if words else [])]), loc="left", fontsize=11
        )
        axes.margins(x=0.12)
        low, high = axes.get_ylim()
        ordered = sorted(points, key=lambda pair: pair[1].value)
        heights = spread([(y.value - low) / (high - low) for _, y in ordered], gap=0.042)
        for (x, y), height in zip(ordered, heights, strict=True):
            axes.annotate(
                x.label,
                (x.value, y.value),
                xytext=(1.03, height),
                textcoords="axes fraction",
                fontsize=7,
                va="center",
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 4},
            )
        return save(figure, stem)


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Ascending heights moved apart, as little as possible, until neighbours are `gap` apart; groups keep their centre.

    >>> spread([0.5, 0.5, 0.9], gap=0.1)
    [0.45, 0.55, 0.9]
    """
    groups: list[list[float]] = []  # [sum of the heights, number of heights]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and _edge(groups[-2], gap, +1) + gap > _edge(groups[-1], gap, -1):
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    return [round(_edge(group, gap, -1) + gap * place, 6) for group in groups for place in range(int(group[1]))]


def _edge(group: Sequence[float], gap: float, side: int) -> float:
    total, count = group
    return total / count + side * gap * (count - 1) / 2
