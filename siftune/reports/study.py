"""The page of a study: each method's results, its differences to the baseline, its cost.

Read from `cells.parquet` and `differences.parquet`, which `siftune compare` wrote; only means over seeds are computed
here. Parts are named `MEASURE/PART`, as there: `loss/mathematics`, `accuracy/mean`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import read_json
from . import words
from .blocks import Block, Chart, Fact, Facts, Page, Section, Table
from .untrusted import visible

CELLS, DIFFERENCES, STUDY, BASE = "cells.parquet", "differences.parquet", "study.json", "base.json"
MEASURES = {"loss": "Held-out loss", "accuracy": "Held-out accuracy"}
DIGITS = 4
READING = (
    "Differences are paired by seed; the interval is Student's, 95 % for one comparison: of twenty comparisons, one "
    "excludes 0 by chance. A filled dot marks an interval that excludes 0."
)

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """A study's two tables."""

    folder: Path
    cells: Sequence[Line]
    differences: Sequence[Line]
    facts: Mapping[str, Any]
    """`study.json`; empty where there is none."""
    before: Mapping[str, float]
    """The values of the model before tuning."""

    @property
    def values(self) -> list[str]:
        """`MEASURE/PART` of every value, in the table's order."""
        return [name for name in (self.cells[0] if self.cells else {}) if "/" in name]

    @property
    def groups(self) -> list[str]:
        """The budgets that are compared separately, or one group without a name."""
        return list(dict.fromkeys(str(line["group"]) for line in self.cells if line["group"] is not None)) or [""]

    def labels(self, group: str) -> list[str]:
        """The methods of a group."""
        return list(dict.fromkeys(str(line["label"]) for line in self.cells if line["group"] in (group, None)))

    def of(self, group: str, label: str, value: str) -> list[float]:
        """A method's values over the seeds, those that are numbers."""
        lines = [line for line in self.cells if line["label"] == label and line["group"] in (group, None)]
        return [float(line[value]) for line in lines if _number(line.get(value))]


def is_study(folder: Path) -> bool:
    """Whether the folder holds a study's tables."""
    return (folder / CELLS).is_file() and (folder / DIFFERENCES).is_file()


def read_study(folder: Path) -> Study:
    """A study's folder. Raises `UserError` for damaged tables, and for a study without a finished cell."""
    from ..data.checked_parquet import read_checked

    again = "run siftune compare again"
    cells, differences = (read_checked(folder / name, way_out=again).to_pylist() for name in (CELLS, DIFFERENCES))
    if not cells:
        raise UserError(f"{folder} holds a study without a finished cell; run siftune compare again")
    facts = read_json(folder / STUDY) if (folder / STUDY).is_file() else {}
    base = read_json(folder / BASE).get("values", {}) if (folder / BASE).is_file() else {}
    return Study(folder, cells, differences, facts, {name: float(v) for name, v in base.items() if _number(v)})


def study_page(folder: Path) -> Page:
    """The page of a study. Raises `UserError` for damaged tables."""
    study = read_study(folder)
    name = visible(folder.resolve().name)
    methods = list(dict.fromkeys(str(line["label"]) for line in study.cells))
    seeds = sorted({int(line["seed"]) for line in study.cells})
    baselines = dict.fromkeys(str(line["baseline"]) for line in study.differences)
    subtitle = f"{words.count(len(methods))} methods over {words.count(len(seeds))} seeds"
    subtitle += f", against {visible(', '.join(baselines))}." if baselines else "."
    return Page(
        title=f"Study: {name}",
        subtitle=subtitle,
        facts=headline(study, methods, seeds),
        sections=[section for section in _sections(study) if section.blocks],
        foot=f"siftune compare, {name}. This page holds all of its data and needs no network.",
    )


def headline(study: Study, methods: Sequence[str], seeds: Sequence[int]) -> Facts:
    """Cells, methods, seeds, trained rows, time."""
    seconds = sum(_float(line.get("train_seconds")) + _float(line.get("measure_seconds")) for line in study.cells)
    memory = max((_float(line.get("peak_memory_mb")) for line in study.cells), default=0.0)
    items = [
        Fact(label="Methods", value=words.count(len(methods))),
        Fact(label="Seeds", value=words.count(len(seeds)), note=", ".join(map(str, seeds[:10]))),
        Fact(label="Cells", value=words.count(len(study.cells)), note="finished"),
        Fact(label="Training and measuring", value=words.duration(seconds), note="sum over all cells"),
    ]
    if study.facts.get("equal"):
        items.insert(3, Fact(label="Held equal", value=f"trained {study.facts['equal']}"))
    cost = sum(_float(line.get("judge_cost")) for line in study.cells)
    if cost:
        items.append(Fact(label="Cost of judges", value=words.decimal(cost)))
    if memory:
        items.append(Fact(label="Peak memory", value=words.megabytes(memory), note="of the largest cell"))
    return Facts(items=items)


def _sections(study: Study) -> list[Section]:
    sections = []
    for number, group in enumerate(study.groups):
        measures = list(dict.fromkeys(value.split("/")[0] for value in study.values))
        for at, measure in enumerate(measures):
            own = [value for value in study.values if value.split("/")[0] == measure]
            title = MEASURES.get(measure, visible(measure)) + (f", budget {visible(group)}" if group else "")
            name = f"measure-{number}-{at}"
            blocks = [*_differences(study, group, own, name), _means(study, group, own, title)]
            sections.append(Section(name=name, title=title, lede=_better(study, own), blocks=blocks))
    sections.append(Section(name="cost", title="Cost", blocks=[_cost(study, group) for group in study.groups]))
    options = [(visible(str(name)), visible(str(value))) for name, value in study.facts.items()]
    settings: list[Block] = [Table(caption="The study's settings", columns=("key", "value"), rows=options)]
    return [*sections, Section(name="made", title="How it was made", blocks=settings if options else [])]


def _better(study: Study, values: Sequence[str]) -> str:
    lower = next((line["lower_is_better"] for line in study.differences if line["value"] in values), None)
    return {None: "", True: "Lower is better. ", False: "Higher is better. "}[lower] + (
        READING if lower is not None else ""
    )


def _main(values: Sequence[str]) -> str:
    return next((value for value in values if value.endswith("/mean")), values[0])


def _differences(study: Study, group: str, values: Sequence[str], name: str) -> list[Block]:
    """The differences of the measure's mean as dots with intervals, and of every part as a table."""
    lines = [line for line in study.differences if str(line["group"] or "") == group and line["value"] in values]
    if not lines:
        return []
    labels = list(dict.fromkeys(str(line["label"]) for line in lines))
    by_value = {(str(line["label"]), str(line["value"])): line for line in lines}
    main, baseline = _main(values), visible(str(lines[0]["baseline"]))
    rows = [(visible(label), *(_interval(by_value.get((label, value)), "\n") for value in values)) for label in labels]
    caption = f"Difference to {baseline}: mean over the seeds, 95 % interval"
    columns = ("method", *(_part(value) for value in values))
    table = Table(caption=caption, columns=columns, rows=rows, numbers=range(1, len(columns)))
    known = [
        (label, line) for label in labels if (line := by_value.get((label, main))) is not None and _number(line["mean"])
    ]
    return [_forest(known, name, baseline, _part(main)), table] if known else [table]


def _forest(lines: Sequence[tuple[str, Line]], name: str, baseline: str, part: str) -> Chart:
    """One line per method, the first at the top."""
    places = list(range(len(lines)))[::-1]
    text = [f"{visible(label)}: {_interval(line)}, {line['n']} seeds" for label, line in lines]
    half = [(line["high"] - line["low"]) / 2 if _number(line["low"]) else 0 for _, line in lines]
    clear = [_number(line["low"]) and (line["low"] > 0 or line["high"] < 0) for _, line in lines]
    point = {"as": "points", "role": "kept", "name": "difference", "size": 10, "template": "%{text}<extra></extra>"}
    point |= {"x": [line["mean"] for _, line in lines], "y": places, "text": text, "xerror": half}
    data = {"x": f"difference to {baseline} ({part})", "y": "", "hover": "closest", "upright": True}
    data |= {"yticks": places, "yticktext": [visible(label) for label, _ in lines], "height": 110 + 38 * len(lines)}
    data["series"] = [point | {"open": [not one for one in clear]}]
    title = f"Difference to {baseline}, {part}"
    return Chart(name=f"{name}-differences", title=title, label=f"{title}. " + "; ".join(text), data=data)


def _means(study: Study, group: str, values: Sequence[str], title: str) -> Table:
    rows = []
    if any(value in study.before for value in values):
        before = [words.decimal(_before(study, value, values), DIGITS) for value in values]
        rows.append(("before tuning", "", *before))
    for label in study.labels(group):
        numbers = [study.of(group, label, value) for value in values]
        rows.append((visible(label), words.count(max(map(len, numbers))), *map(_spread, numbers)))
    columns = ("method", "seeds", *(_part(value) for value in values))
    caption = f"{title}: mean and standard deviation over the seeds"
    return Table(caption=caption, columns=columns, rows=rows, numbers=range(1, len(columns)))


def _before(study: Study, value: str, values: Sequence[str]) -> float | None:
    """The value before tuning; for a measure's mean, the mean of its parts, as for the cells."""
    if value in study.before or not value.endswith("/mean"):
        return study.before.get(value)
    parts = [study.before.get(other) for other in values if other != value]
    known = [part for part in parts if part is not None]
    return sum(known) / len(known) if known and len(known) == len(parts) else None


def _cost(study: Study, group: str) -> Table:
    names = {
        "trained_rows": "rows trained",
        "trained_tokens": "tokens trained",
        "forward_tokens": "tokens forward",
        "candidates": "candidates",
    }
    known = {name: title for name, title in names.items() if any(_number(line.get(name)) for line in study.cells)}
    rows = []
    for label in study.labels(group):
        means = [np.mean(values) if (values := study.of(group, label, name)) else math.nan for name in known]
        seconds = study.of(group, label, "train_seconds")
        counts = ["–" if math.isnan(mean) else words.count(float(mean)) for mean in means]
        rows.append((visible(label), *counts, words.duration(float(np.mean(seconds))) if seconds else "–"))
    columns = ("method", *known.values(), "training")
    caption = "Means over the seeds" + (f", budget {visible(group)}" if group else "")
    return Table(caption=caption, columns=columns, rows=rows, numbers=range(1, len(columns)))


def _part(value: str) -> str:
    return visible(value.partition("/")[2])


def _spread(numbers: Sequence[float]) -> str:
    if not numbers:
        return "–"
    mean = f"{np.mean(numbers):.3f}"
    return f"{mean} ± {np.std(numbers, ddof=1):.3f}" if len(numbers) > 1 else mean


def _interval(line: Line | None, between: str = " ") -> str:
    if line is None or not _number(line["mean"]):
        return "–"
    mean = f"{line['mean']:+.3f}"
    return f"{mean}{between}[{line['low']:+.3f}, {line['high']:+.3f}]" if _number(line["low"]) else mean


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _float(value: Any) -> float:
    return float(value) if _number(value) else 0.0
