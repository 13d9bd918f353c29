"""A page's charts, maps and matrices as PNG and SVG for papers, drawn by `figures`.

The keys of a chart's data are described in templates/charts.js; both read the same data, so a figure equals the page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import figures
from .blocks import Block, Chart, Heat, Map, Page, Pair, Table
from .figures import COLOURS, MARKERS

KEPT, REST, SECOND = COLOURS[0], "#BBBBBB", COLOURS[1]
MAX_COLOURS = 12
"""Columns with more values than this are not drawn on a map: the colours would not be distinguishable."""


def draw(page: Page, folder: Path) -> list[Path]:
    """Draw every chart, map and matrix of the page into `folder`, two files each; returns their paths. Raises `MissingExtra`.

    >>> draw(page_of(...), Path("figures"))
    """
    paths: list[Path] = []
    used: set[str] = set()
    for section in page.sections:
        for block in section.blocks:
            for name, one in _parts(section.name, block):
                stem = _stem(name, used)
                paths += _draw(one, folder / stem)
    return paths


def _parts(section: str, block: Block) -> list[tuple[str, Any]]:
    """The pictures of a block, each with a name; empty for blocks without a picture."""
    if isinstance(block, Chart):
        return [(block.name, block)]
    if isinstance(block, Map):
        colourings = [one for one in block.data["colours"] if len(one["names"]) <= MAX_COLOURS]
        named = [(f"{block.name}-{one['name']}", (block, one)) for one in colourings]
        return [*named, (f"{block.name}-chosen", (block, None))]
    if isinstance(block, Heat):
        return [(f"{section}-{block.corner}", block)]
    if isinstance(block, Table) and block.rows and any(isinstance(cell, Pair) for cell in block.rows[0]):
        return [(f"{section}-{block.columns[0]}", block)]
    return []


def _stem(name: str, used: set[str]) -> str:
    """A file name that is not used yet."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:60] or "figure"
    stem, number = plain, 2
    while stem in used:
        stem, number = f"{plain}-{number}", number + 1
    used.add(stem)
    return stem


def _draw(picture: Any, stem: Path) -> list[Path]:
    if isinstance(picture, Chart):
        return _chart(picture, stem)
    if isinstance(picture, Heat):
        return _heat(picture, stem)
    if isinstance(picture, Table):
        return _bars(picture, stem)
    block, colours = picture
    return _map(block.data, colours, stem)


# --- charts ---------------------------------------------------------------------------------------------------------


def _chart(chart: Chart, stem: Path) -> list[Path]:
    data = chart.data
    with figures.drawing(6.4, data["height"] / 90 if "height" in data else 3.6) as figure:
        axes = figure.add_subplot()
        stacked = [one for one in data["series"] if one.get("stackgroup")]
        if stacked:
            axes.stackplot(
                stacked[0]["x"],
                [one["y"] for one in stacked],
                labels=[_plain(one["name"]) for one in stacked],
                colors=[_colour(one["role"]) for one in stacked],
            )
        for one in data["series"]:
            if not one.get("stackgroup"):
                _series(axes, one)
        if data.get("diagonal"):
            axes.plot([0, 1], [0, 1], color=REST, linewidth=1, linestyle=":")
        if data.get("upright"):
            axes.axvline(0, color=figures.GREY, linewidth=1, linestyle="--")
        _finish(axes, data, chart.title)
        if len([one for one in data["series"] if one.get("name") and not one.get("hidden")]) > 1:
            if stacked:
                figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
            else:
                axes.legend(frameon=False, fontsize=8)
        return figures.save(figure, stem)


def _series(axes: Any, one: Mapping[str, Any]) -> None:
    colour, name = _colour(one["role"]), _plain(one.get("name", ""))
    if one["as"] == "bars":
        axes.bar(one["x"], one["y"], width=one.get("width", 0.8), color=colour, label=name)
    elif one["as"] == "band":
        low, high = (np.array(one[side], dtype=np.float64) for side in ("low", "high"))
        axes.fill_between(one["x"], low, high, color=colour, alpha=0.25, linewidth=0)
    elif one["as"] == "points":
        x, y = np.array(one["x"], dtype=np.float64), np.array(one["y"], dtype=np.float64)
        if "xerror" in one:
            axes.errorbar(x, y, xerr=one["xerror"], fmt="none", color=colour, capsize=3)
        size = np.square(one["size"]) if isinstance(one.get("size"), list) else 40.0
        faces = ["white" if hollow else colour for hollow in one.get("open", [])] or colour
        axes.scatter(x, y, s=size, c=faces, edgecolors=colour, zorder=3, label=name)
        if one.get("line"):
            axes.plot(x, y, color=colour, linewidth=1)
    else:
        axes.plot(one["x"], np.array(one["y"], dtype=np.float64), color=colour, linewidth=1.6, label=name)


def _finish(axes: Any, data: Mapping[str, Any], title: str) -> None:
    axes.set_xlabel(_plain(data.get("x", "")))
    axes.set_ylabel(_plain(data.get("y", "")))
    axes.set_title(_plain(title), loc="left", fontsize=10)
    if data.get("ticks"):
        axes.set_xticks(data["ticks"], data["ticktext"])
    if data.get("yticks"):
        axes.set_yticks(data["yticks"], [_plain(name) for name in data["yticktext"]])
        axes.set_ylim(-0.6, len(data["yticks"]) - 0.4)
    if data.get("yshare"):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if data.get("zero"):
        axes.set_ylim(bottom=0)


# --- other pictures -------------------------------------------------------------------------------------------------


def _heat(heat: Heat, stem: Path) -> list[Path]:
    rows, columns = len(heat.rows), len(heat.columns)
    values = np.array([[np.nan if value is None else value for value in line] for line in heat.values])
    with figures.drawing(2.2 + 0.75 * columns, 1.4 + 0.45 * rows) as figure:
        axes = figure.add_subplot()
        axes.imshow(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, column in np.argwhere(np.isfinite(values)):
            value = values[row, column]
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(columns), [_plain(name) for name in heat.columns], rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(rows), [_plain(name) for name in heat.rows], fontsize=8)
        axes.grid(visible=False)
        axes.set_title(_plain(heat.caption), loc="left", fontsize=9, wrap=True)
        return figures.save(figure, stem)


def _bars(table: Table, stem: Path) -> list[Path]:
    """Shares of the pool and of the chosen rows, a pair of bars per value."""
    lines = [(line[0], line[2], line[4]) for line in table.rows if isinstance(line[-1], Pair)]
    names = [_plain(str(name)) for name, *_ in lines]
    places = np.arange(len(lines))[::-1]
    sides = (table.columns[1], table.columns[3])
    with figures.drawing(6.4, 1.3 + 0.42 * len(lines)) as figure:
        axes = figure.add_subplot()
        for number, (side, colour) in enumerate(zip(sides, (REST, KEPT), strict=True)):
            shares = [float(str(line[1 + number]).split()[0]) for line in lines]
            axes.barh(places + 0.2 - 0.4 * number, shares, height=0.36, color=colour, label=_plain(side))
        axes.set_yticks(places, names)
        axes.set_xlabel("share in percent")
        axes.set_title(_plain(table.caption), loc="left", fontsize=10)
        axes.grid(axis="y", visible=False)
        axes.legend(frameon=False, fontsize=8)
        return figures.save(figure, stem)


def _map(data: Mapping[str, Any], colours: Mapping[str, Any] | None, stem: Path) -> list[Path]:
    x, y = np.array(data["x"]), np.array(data["y"])
    if colours is None:
        kept = np.array(data["kept"], dtype=bool)
        groups: list[tuple[str, Any, str, str]] = [("not chosen", ~kept, REST, "o"), ("chosen", kept, KEPT, "o")]
    else:
        of = np.array(colours["of"])
        groups = [
            (name, of == index, _colour(index), MARKERS[index // len(COLOURS) % len(MARKERS)])
            for index, name in enumerate(colours["names"])
        ]
        groups += [("none", of < 0, REST, "o")] if (of < 0).any() else []
    with figures.drawing(6.0, 6.0) as figure:
        axes = figure.add_subplot()
        for name, inside, colour, marker in groups:
            axes.scatter(
                x[inside], y[inside], s=4, c=colour, marker=marker, linewidths=0, label=_plain(name), rasterized=True
            )
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.legend(frameon=False, fontsize=8, markerscale=3, loc="upper right")
        return figures.save(figure, stem)


def _colour(role: str | int) -> str:
    if isinstance(role, int):
        return COLOURS[role % len(COLOURS)]
    return {"kept": KEPT, "rest": REST, "second": SECOND}[role]


def _plain(text: str) -> str:
    """Text for matplotlib: dollars are escaped, and a long text is cut to one line."""
    line = " ".join(text.split()).replace("$", r"\$")
    return line if len(line) <= 80 else line[:79] + "…"
