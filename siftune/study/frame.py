"""The finished cells as one table, and from it the means and the paired differences: plain records and two Parquet files.

A value's name is `MEASURE/PART`: `loss/mathematics`, `accuracy/coding`, `gsm8k/exact_match`. `loss/mean` and
`accuracy/mean` are the unweighted means over the domains, `tasks/mean` is the suite's own average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..data.checked_parquet import write_checked
from ..files import atomic_path, read_json
from .cell import BASE, CELL, Work
from .cells import Arm, Cell, arms_of, baseline_of, groups_of
from .statistics import Difference, Mean, mean_of, paired

HELD_OUT = ("loss", "accuracy")
TOKENS = ("trained_rows", "trained_tokens", "trained_label_tokens", "forward_tokens", "candidates")


@dataclass(frozen=True)
class Done:
    """One finished cell."""

    cell: Cell
    facts: Mapping[str, Any]
    """cell.json."""
    values: Mapping[str, float]
    """Its values with their means."""


@dataclass(frozen=True)
class Compared:
    """One arm against the baseline of its group."""

    group: str
    arm: Arm
    baseline: Arm
    value: str
    difference: Difference


@dataclass(frozen=True)
class Frame:
    """All finished cells of a study."""

    work: Work
    arms: tuple[Arm, ...]
    done: tuple[Done, ...]
    base: Mapping[str, float]
    """The untouched model's values; empty where it was not measured."""

    @property
    def names(self) -> list[str]:
        """Every value's name, in the order of the measures."""
        return list(dict.fromkeys(name for done in self.done for name in done.values))

    def of(self, arm: Arm, value: str) -> dict[int, float]:
        """An arm's values by seed."""
        return {
            done.cell.seed: done.values[value] for done in self.done if done.cell.arm == arm and value in done.values
        }

    def mean(self, arm: Arm, value: str) -> Mean:
        """Over the seeds."""
        return mean_of(list(self.of(arm, value).values()))

    def tokens(self, arm: Arm, name: str) -> Mean:
        """`trained_rows`, `trained_tokens`, `forward_tokens`, ... of an arm over the seeds."""
        return mean_of([done.facts["tokens"].get(name) or 0 for done in self.done if done.cell.arm == arm])

    def time(self, arm: Arm, name: str) -> Mean:
        """`choose`, `train`, `measure`, `peak_memory_mb` of an arm, over the seeds that have one."""
        times = [done.facts["times"].get(name) for done in self.done if done.cell.arm == arm]
        return mean_of([value for value in times if value is not None])

    def compared(self, group: str) -> list[Compared]:
        """Every arm of a group but the baseline, every value."""
        baseline = baseline_of(self.work.study, self.arms, group)
        if baseline is None:
            return []
        comparisons = []
        for arm in self.arms:
            if arm.group in (group, None) and arm != baseline:
                for value in self.names:
                    difference = paired(self.of(arm, value), self.of(baseline, value))
                    if difference.n:
                        comparisons.append(Compared(group, arm, baseline, value, difference))
        return comparisons


def read_frame(work: Work) -> Frame:
    """The finished cells of a study's folder, in the study's order."""
    arms = arms_of(work.study)
    done = []
    for arm in arms:
        for seed in work.study.seeds:
            path = work.folder / "cells" / Cell(arm, seed).name / CELL
            if path.is_file():
                facts = read_json(path)
                done.append(Done(Cell(arm, seed), facts, with_means(facts["values"])))
    base = work.folder / BASE
    return Frame(work, arms, tuple(done), with_means(read_json(base)["values"]) if base.is_file() else {})


def with_means(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values with their means, measure by measure; a value that is no number is NaN."""
    numbers = {name: float("nan") if value is None else float(value) for name, value in values.items()}
    result: dict[str, float] = {}
    for measure in HELD_OUT:
        of_measure = {name: value for name, value in numbers.items() if name.startswith(f"{measure}/")}
        if of_measure:
            result |= of_measure | {f"{measure}/mean": sum(of_measure.values()) / len(of_measure)}
    tasks = {name: value for name, value in numbers.items() if name.split("/")[0] not in HELD_OUT}
    average = tasks.pop("tasks/mean", sum(tasks.values()) / len(tasks) if tasks else None)
    return result | tasks | ({} if average is None else {"tasks/mean": average})


def lower_is_better(value: str) -> bool:
    """A loss is better when it is small; accuracies and scores when they are large."""
    return value.startswith("loss/")


def main_value(names: Sequence[str]) -> str:
    """The value that figures and the first table show."""
    return next((name for name in ("loss/mean", "tasks/mean") if name in names), names[0] if names else "loss/mean")


# --- files ------------------------------------------------------------------------------------------------------------


def write_cells(frame: Frame, path: Path) -> None:
    """One line per cell: its arm and seed, its values, its tokens; times last."""
    columns: dict[str, list[Any]] = {}
    for done in frame.done:
        arm, facts = done.cell.arm, done.facts
        judge = (facts.get("selection") or {}).get("judge") or {}
        line: dict[str, Any] = {
            "label": arm.label, "offline": arm.offline.name, "online": arm.online.name,
            "budget": None if arm.budget is None else str(arm.budget), "group": arm.group, "seed": done.cell.seed,
            **{name: done.values.get(name) for name in frame.names},
            **{name: facts["tokens"].get(name) for name in TOKENS},
            "train_loss": facts.get("train_loss"), "judge_cost": judge.get("cost"),
            "train_seconds": facts["times"]["train"], "measure_seconds": facts["times"]["measure"],
            "peak_memory_mb": facts["times"]["peak_memory_mb"],
        }  # fmt: skip
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
    _write(columns, path)


def write_differences(frame: Frame, path: Path) -> None:
    """One line per arm, group and value."""
    columns: dict[str, list[Any]] = {name: [] for name in
        ("group", "label", "baseline", "value", "mean", "sd", "low", "high", "n", "lower_is_better")}  # fmt: skip
    for group in groups_of(frame.arms):
        for comparison in frame.compared(group):
            difference, value = comparison.difference, comparison.value
            line = (comparison.group, comparison.arm.label, comparison.baseline.label, value, difference.mean, difference.sd,
                    difference.low, difference.high, difference.n, lower_is_better(value))  # fmt: skip
            for name, cell in zip(columns, line, strict=True):
                columns[name].append(cell)
    _write(columns, path)


def _write(columns: Mapping[str, list[Any]], path: Path) -> None:
    with atomic_path(path) as temporary:
        write_checked(pa.table(dict(columns)), temporary)
