"""The cells of a study: an arm (offline method, online method, budget) for every seed, with names that are valid folder names.

An arm's label is its name in tables: the name of the side that varies. Arms are compared inside a group (a budget, where
the study has several and crosses everything); the arm without any selection belongs to all groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..budget import Keep
from ..errors import UserError
from .entries import Entry
from .spec import Study


@dataclass(frozen=True)
class Arm:
    """One line of the tables."""

    label: str
    offline: Entry
    online: Entry
    budget: Keep | None
    """None where nothing is chosen before training."""
    group: str | None
    """Arms of a group are compared; None belongs to every group."""

    @property
    def plain(self) -> bool:
        """No selection at all: the reference on all rows, outside of the equal budget."""
        return self.offline.method is None and self.online.method is None

    @property
    def folder(self) -> str:
        """A name for folders."""
        parts = [self.offline.name, self.online.name]
        return "-".join(parts if self.budget is None else [*parts, slug(self.budget)])


@dataclass(frozen=True)
class Cell:
    """One run: an arm with a seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Its folder under `cells/`."""
        return f"{self.arm.folder}-seed{self.seed}"

    @property
    def selection(self) -> str | None:
        """The folder under `selections/` that holds its rows; None for all rows. Seeds share it where they can."""
        if self.arm.offline.method is None:
            return None
        assert self.arm.budget is not None
        shared = f"{self.arm.offline.name}-{slug(self.arm.budget)}"
        return f"{shared}-seed{self.seed}" if self.arm.offline.takes_seed() else shared


def arms_of(study: Study) -> tuple[Arm, ...]:
    """Every arm, in the file's order. Raises `UserError` when the baseline is none of them, or two have one label."""
    triples = _triples(study)
    varies = {side: any(entry.method for entry in getattr(study, side)) for side in ("offline", "online")}
    several = len({str(budget) for _, _, budget in triples if budget is not None}) > 1
    grouped = study.cells == "product" and several
    arms = []
    for offline, online, budget in triples:
        label = _label(offline, online, varies)
        if several and not grouped and budget is not None:
            label = label.replace(offline.name, f"{offline.name} {budget}", 1)
        group = (None if budget is None else str(budget)) if grouped else ""
        arms.append(Arm(label, offline, online, budget, group))
    by_label: dict[tuple[str, str | None], Arm] = {}
    for arm in arms:
        if (arm.label, arm.group) in by_label:
            raise UserError(f"study {study.name} has two cells labelled {arm.label!r}; set another name: for one entry")
        by_label[arm.label, arm.group] = arm
    labels = list(dict.fromkeys(arm.label for arm in arms))
    if study.baseline not in labels:
        raise UserError(
            f"study {study.name}: baseline {study.baseline!r} is none of its cells ({', '.join(labels)}); name one of them"
        )
    return tuple(arms)


def cells_of(study: Study) -> tuple[Cell, ...]:
    """Every cell, seed by seed, so that a study stopped early has complete seeds."""
    arms = arms_of(study)
    return tuple(Cell(arm, seed) for seed in study.seeds for arm in arms)


def part_of(cells: Sequence[Cell], part: str | None) -> tuple[Cell, ...]:
    """Part i of n of the cells (`2/8`). Raises `UserError` for anything else."""
    if part is None:
        return tuple(cells)
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part {part} is not a part; write i/n with 1 <= i <= n, such as 2/8")
    return tuple(cells[int(match[1]) - 1 :: int(match[2])])


def baseline_of(study: Study, arms: Sequence[Arm], group: str) -> Arm | None:
    """The arm that a group is compared with; None where it has no such arm."""
    return next((arm for arm in arms if arm.label == study.baseline and arm.group in (group, None)), None)


def groups_of(arms: Sequence[Arm]) -> list[str]:
    """The groups, in order."""
    return list(dict.fromkeys(arm.group for arm in arms if arm.group is not None)) or [""]


def slug(budget: Keep) -> str:
    """A budget as folders take it.

    >>> slug("20%"), slug("1/8")
    ('20pct', '1of8')
    """
    return re.sub(r"[^A-Za-z0-9.]", "", str(budget).replace("%", "pct").replace("/", "of"))


def _triples(study: Study) -> list[tuple[Entry, Entry, Keep | None]]:
    if study.cells != "product":
        offline = {entry.name: entry for entry in study.offline}
        online = {entry.name: entry for entry in study.online}
        return [
            (offline[offline_name], online[online_name], budget) for offline_name, online_name, budget in study.cells
        ]
    triples: list[tuple[Entry, Entry, Keep | None]] = []
    for entry in study.offline:
        budgets: tuple[Keep | None, ...] = (None,) if entry.method is None else study.budgets
        triples += [(entry, online_entry, budget) for budget in budgets for online_entry in study.online]
    return triples


def _label(offline: Entry, online: Entry, varies: dict[str, bool]) -> str:
    if not varies["online"]:
        return offline.name
    if not varies["offline"]:
        return online.name
    return f"{offline.name} + {online.name}"
