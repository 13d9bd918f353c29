"""Two overlaid histograms of a quantity: over the pool, and over the chosen rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blocks import Chart

BINS = 50
FEW = 40
"""Up to this many distinct values, each has its own bar."""


def histogram(
    name: str, title: str, axis: str, values: NDArray[Any], kept: NDArray[np.bool_], *, log: bool = False
) -> Chart | None:
    """Bars of the pool in grey, of the chosen rows in blue; None with fewer than two distinct known values.

    With `log` the bins have equal width in the logarithm, and known `values` are positive.
    """
    known = np.isfinite(values) & ((values > 0) | (not log))
    numbers, chosen = values[known].astype(np.float64), values[known & kept].astype(np.float64)
    distinct = np.unique(numbers)
    if len(distinct) < 2:
        return None
    data: dict[str, Any] = {"x": axis, "y": "rows", "zero": True}
    if len(distinct) <= FEW and not log:
        centres, width = distinct, np.full(len(distinct), 0.9 * np.diff(distinct).min())
        counts = [np.array([(part == value).sum() for value in distinct]) for part in (numbers, chosen)]
    else:
        scaled = np.log10(numbers) if log else numbers
        edges = np.histogram_bin_edges(scaled, bins=min(BINS, max(8, int(2 * len(numbers) ** 0.4))))
        counts = [np.histogram(np.log10(part) if log else part, edges)[0] for part in (numbers, chosen)]
        centres, width = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
        if log:
            data |= _log_ticks(edges[0], edges[-1])
    shown = np.round(centres, 6).tolist()
    ranges = [_range(centre, size, log) for centre, size in zip(centres, width, strict=True)]
    data["series"] = [
        {"as": "bars", "name": which, "role": role, "x": shown, "y": count.tolist(), "width": width.tolist()}
        for which, role, count in (("pool", "rest", counts[0]), ("chosen", "kept", counts[1]))
    ]
    medians = f"median {_number(np.median(numbers))} in the pool" + (
        f", {_number(np.median(chosen))} among the chosen rows" if len(chosen) else ""
    )
    label = f"{title}: histogram over {len(numbers):,} rows from {ranges[0]} to {ranges[-1]}; {medians}"
    return Chart(name=name, title=f"{title} ({medians})", label=label, data=data, half=True)


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    ticks = [
        step * 10.0**power
        for power in range(int(np.floor(low)), int(np.ceil(high)) + 1)
        for step in (1, 2, 5)
        if low <= np.log10(step * 10.0**power) <= high
    ]
    if len(ticks) > 8:
        ticks = [tick for tick in ticks if np.log10(tick) % 1 < 1e-9]
    return {"ticks": [float(np.log10(tick)) for tick in ticks], "ticktext": [f"{tick:,.10g}" for tick in ticks]}


def _range(centre: float, width: float, log: bool) -> str:
    return _number(10**centre if log else centre)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
