"""The page of a study, `study.md`: what was compared, tables, figures, cost, machine and command; all of it generated.

Only the last part of a path is shown, so that a page can be published unchanged.
"""

from __future__ import annotations

import datetime
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import atomic_path
from ..reports import figures
from ..reports.figures import Point
from ..runs.folder import versions
from .cells import groups_of, slug
from .composition import composition_table
from .entries import Entry
from .frame import Compared, Frame, lower_is_better, main_value
from .machine import cores, processor
from .spec import Study
from .statistics import LEVEL
from .tables import cost_table, tables


def write_page(frame: Frame, path: Path, drawn: Sequence[Path], *, command: str, notes: Sequence[str]) -> None:
    """Write the page; figures are linked relative to it."""
    study = frame.work.study
    pictures = [
        f"![{figure.stem}]({os.path.relpath(figure, path.parent)})" for figure in drawn if figure.suffix == ".svg"
    ]
    parts = [
        f"# Study: {study.name}",
        f"Written by `{command}`. Nothing on this page was entered manually.",
        machine(study),
        setting(frame),
        *(f"Note: {note}" for note in notes),
        tables(frame).strip(),
        *(["## Figures", *pictures] if pictures else []),
        *_composition(frame),
        "## Cost",
        "Means over the seeds. A selection that seeds share is counted once for each; its seconds are those of its first "
        "run, and rows in the cache cost nothing again. Tokens forward: of the scoring pass and of the training pass.",
        cost_table(frame),
        "## How to read the differences",
        reading(frame),
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _composition(frame: Frame) -> list[str]:
    table = composition_table(frame)
    if table is None:
        return []
    caption = "Rows by domain, a row counted as often as it was trained; means over the seeds."
    return ["## What was trained on", caption, table]


def setting(frame: Frame) -> str:
    """What is equal in all cells, and every method with its settings."""
    study, facts = frame.work.study, frame.work.data.facts
    domains = ", ".join(f"{name} {domain['rows']:,}" for name, domain in facts["domains"].items())
    equal = "trained rows" if study.equal == "rows" else f"trained tokens ({frame.work.stop:,})"
    lines = [
        f"Model `{Path(study.model).name}`. Pool: {facts['rows']:,} rows ({domains}), {facts['tokens']:,} tokens at most "
        f"{study.max_length} a row. Equal: {equal}; the cells without any selection train on all rows and are "
        f"references outside of the budget. Seeds: {', '.join(map(str, study.seeds))}. {study.jobs} job(s) of "
        f"{study.threads} thread(s).",
        _measured(study),
        "Recipe: " + "; ".join(f"{name} {_short(value)}" for name, value in study.recipe.items()) + ".",
        "Methods: " + "; ".join(_entry(entry) for entry in (*study.offline, *study.online)) + ".",
    ]
    if unusable := facts.get("unusable"):
        rows = ", ".join(f"{count:,} {reason}" for reason, count in unusable.items())
        lines.append(f"Rows met while drawing that could not be trained on, and were not drawn: {rows}.")
    return "\n\n".join(lines)


def _measured(study: Study) -> str:
    parts = []
    if study.held_out:
        parts.append(f"held-out loss and token accuracy on {study.held_out_rows or 'all'} rows a domain, answers only")
    if study.suite:
        parts.append(f"suite {Path(study.suite).name}")
    return "Measured: " + "; ".join(parts) + "."


def _entry(entry: Entry) -> str:
    settings = [f"{name} {_short(value)}" for name, value in entry.settings.items()]
    if entry.candidates is not None:
        settings.append(f"candidates {entry.candidates}")
    name = entry.name if entry.method in (None, entry.name) else f"{entry.name} = {entry.method}"
    return f"`{name}`" + (f" ({', '.join(settings)})" if settings else "")


def _short(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(inner)}" for name, inner in value.items()) + "}"
    text = str(value)
    return Path(text).name if "/" in text and not re.fullmatch(r"[\d./]+", text) else text


def reading(frame: Frame) -> str:
    """The statistics in two sentences, with the number of comparisons."""
    count = sum(len({comparison.arm for comparison in frame.compared(group)}) for group in groups_of(frame.arms))
    n = len(frame.work.study.seeds)
    if n < 2:
        return "One seed: differences have no spread and no interval; set several seeds."
    return (
        f"Every method and the baseline share their seeds, so differences are paired; intervals are {LEVEL:.0%}, by "
        f"Student's t with n - 1 degrees of freedom, n at most {n}. They hold for other seeds on these rows and this "
        f"model, not for other data. {count} methods are compared: about {count / 20:.1f} intervals of a column would "
        "exclude 0 by chance alone."
    )


def machine(study: Study) -> str:
    """Processor, accelerator, versions, date. Never a host name."""
    import torch

    parts = [processor(), f"{cores()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [
        f"{name} {number}" for name, number in versions().items() if name in ("python", "torch", "transformers", "trl")
    ]
    return "; ".join([*parts, datetime.datetime.now(tz=datetime.UTC).date().isoformat()])


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(frame: Frame, folder: Path, *, prefix: str = "") -> list[Path]:
    """Per group: differences of the mean, differences by domain, and the mean against the trained tokens."""
    written: list[Path] = []
    if not frame.done:
        return written
    value = main_value(frame.names)
    for group in groups_of(frame.arms):
        tail = f"-{slug(group)}" if group else ""
        compared = frame.compared(group)
        if compared:
            written += _differences(compared, value, folder / f"{prefix}differences{tail}")
            written += _domains(compared, value, folder / f"{prefix}domains{tail}")
        written += _tokens(frame, group, value, folder / f"{prefix}tokens{tail}")
    return written


def _best_first(compared: Sequence[Compared], value: str) -> list[Compared]:
    sign = 1 if lower_is_better(value) else -1
    of_value = [comparison for comparison in compared if comparison.value == value]

    def rank(comparison: Compared) -> float:
        mean = comparison.difference.mean
        return sign * mean if math.isfinite(mean) else math.inf

    return sorted(of_value, key=rank)


def _axis(value: str) -> str:
    titles = {"loss": "held-out loss, nats per answer token", "tasks": "mean score of the tasks"}
    return titles.get(value.split("/")[0], value)


def _differences(compared: Sequence[Compared], value: str, stem: Path) -> list[Path]:
    ordered = _best_first(compared, value)
    points = [
        Point(comparison.arm.label, difference.mean, difference.low, difference.high)
        for comparison in ordered
        for difference in [comparison.difference]
    ]
    better = "left" if lower_is_better(value) else "right"
    return figures.intervals(
        stem,
        points,
        title=f"Difference to {ordered[0].baseline.label}, 95 % interval ({better} is better)",
        axis=_axis(value),
        zero=ordered[0].baseline.label,
    )


def _domains(compared: Sequence[Compared], value: str, stem: Path) -> list[Path]:
    measure = value.split("/")[0]
    names = [name for name in dict.fromkeys(comparison.value for comparison in compared)
             if name != value and (name.split("/")[0] == measure if measure == "loss" else "/mean" not in name
                                   and name.split("/")[0] not in ("loss", "accuracy"))]  # fmt: skip
    if len(names) < 2:
        return []
    arms = [comparison.arm for comparison in _best_first(compared, value)]
    differences = {(comparison.arm, comparison.value): comparison.difference for comparison in compared}
    series = {}
    for name in names:
        by_arm = [(arm, differences.get((arm, name))) for arm in arms]
        series[name.split("/")[1] if measure == "loss" else name] = [
            Point(
                arm.label,
                math.nan if difference is None else difference.mean,
                *((math.nan,) * 2 if difference is None else (difference.low, difference.high)),
            )
            for arm, difference in by_arm
        ]
    baseline = compared[0].baseline.label
    title = f"Difference to {baseline} by part, 95 % interval"
    return figures.grouped(stem, series, title=title, axis=_axis(value), zero=baseline)


def _tokens(frame: Frame, group: str, value: str, stem: Path) -> list[Path]:
    points: list[tuple[Point, Point]] = []
    outside: list[tuple[Point, Point]] = []
    for arm in frame.arms:
        if arm.group in (group, None) and (mean := frame.mean(arm, value)).n:
            x = Point(arm.label, frame.tokens(arm, "trained_tokens").mean)
            y = Point(arm.label, mean.mean, mean.mean - mean.sd, mean.mean + mean.sd)
            (outside if arm.plain else points).append((x, y))
    title = "Trained tokens and result (mean ± sd over the seeds)"
    if not points:  # nothing was selected anywhere
        points, outside = outside, points
    return figures.scatter(stem, points, title=title, across="trained tokens", upward=_axis(value), outside=outside)
