"""Run a study: draw the rows, choose, train and measure every cell, then tables and figures. Resumes by itself.

    RUN/study.json           the study, resolved          RUN/table.md, study.md        tables; the whole page
    RUN/data/                the rows that were drawn     RUN/cells.parquet             one line per cell
    RUN/selections/NAME/     offline selections           RUN/differences.parquet       paired differences
    RUN/cells/NAME/          training and cell.json       RUN/figures/*.svg, *.png

A folder belongs to one study; its parts may run at the same time on several machines that share it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..data.protect import foreign_name, refuse_overlap, setting_inputs
from ..errors import UserError
from ..evaluation.suite import suite_file
from ..files import atomic_path, hash_json, read_json, write_json
from ..redaction import redact
from ..runs.cut import copy_file, refuse_inside
from ..runs.folder import make_folder
from ..runs.job import RUNS, build, check_method
from . import cell as pieces
from .cell import (
    Work,
    alone,
    check_cell,
    finished,
    recipe_of,
    run_base,
    run_cell,
    run_reference,
    run_selection,
    selected,
    selection_folder,
)
from .cells import Arm, Cell, arms_of, baseline_of, cells_of, groups_of, part_of
from .data import model_key, prepare
from .frame import Frame, read_frame, write_cells, write_differences
from .page import draw, write_page
from .plan import Plan, check_equal, plan_arm, stop_of
from .schedule import Failure, Task, run_tasks
from .spec import DEMO, Study
from .tables import tables

STUDY, PAGE = "study.json", "study.md"


@dataclass(frozen=True)
class Outcome:
    """The result of a study."""

    folder: Path
    plans: Mapping[str, Plan]
    """By the arm's label and group."""
    cells: Sequence[Cell]
    """Those of this part."""
    ran: int
    """Cells that were trained in this call."""
    frame: Frame | None = None
    """Every finished cell; None for a dry run."""
    complete: bool = False
    """Every cell of the study is finished, so tables and figures are written."""
    page: Path | None = None


def compare(
    study: Study,
    *,
    run: str | None = None,
    out: str | None = None,
    part: str | None = None,
    cache: str | None = None,
    dry_run: bool = False,
    command: str = "siftune compare",
    on_event: Callable[[str, float], None] = lambda name, done: None,
) -> Outcome:
    """Run every unfinished cell of a study (of its part), and write tables and figures once all are finished.

    `on_event` is called with the name of each finished piece of work and the share done. Raises `UserError` for every
    error that can be detected before a model is trained, and at the end for cells that failed.

    >>> compare(read_study("study.yaml")).page
    """
    arms = arms_of(study)
    cells = part_of(cells_of(study), part)
    key = hash_json([__version__, _identity(study), study.budgets, study.cells, study.seeds])
    folder = Path(run) if run else RUNS / f"{study.name}-{key[:12]}"
    figures = None if out is None else figures_beside(Path(out))
    refuse_overlap({"--run": run, "--out": out, "the figures beside --out": figures}, study_inputs(study))
    refuse_inside(out, folder, but=PAGE)
    make_folder(folder)
    work, plans = _ready(study, arms, folder, cache)
    if dry_run:
        return Outcome(folder, plans, cells, 0)
    unfinished = [cell for cell in cells if not finished(folder / "cells" / cell.name)]
    failures = run_tasks(_tasks(work, unfinished), jobs=study.jobs, threads=study.threads, on_event=on_event)
    frame = read_frame(work)
    unequal = _unequal(work, frame, plans)
    complete = len(frame.done) == len(arms) * len(study.seeds)
    page = None
    if frame.done and (complete or part is None):
        notes = [f"cell {failure.name} failed: {failure.message}" for failure in failures] + unequal
        page = _write(frame, out, command=command, notes=notes)
    _raise_failures(failures, unequal, folder)
    ran = sum(finished(folder / "cells" / cell.name) for cell in unfinished)
    return Outcome(folder, plans, cells, ran, frame, complete, page)


SHARED = [
    "model",
    "pool",
    "recipe",
    "held_out",
    "rows",
    "held_out_rows",
    "suite",
    "evaluate",
    "equal",
    "threads",
    "columns",
    "roles",
    "format",
    "on_bad_row",
    "label",
    "draw_seed",
    "seed_rows",
    "validation_rows",
    "reference_rows",
]
"""Keys that decide every cell; more seeds, methods and budgets may join a study, and cells that are done stay."""


def _identity(study: Study) -> dict[str, Any]:
    """All settings that decide the results; the number of processes does not."""
    settings: dict[str, Any] = {name: getattr(study, name) for name in SHARED}
    for entry in (*study.offline, *study.online):
        settings[f"{entry.side} {entry.name}"] = [entry.method, entry.candidates, entry.settings]
    identity: dict[str, Any] = redact(json.loads(json.dumps(settings, default=str)))
    return identity


# --- before anything runs ---------------------------------------------------------------------------------------------


def _ready(study: Study, arms: Sequence[Arm], folder: Path, cache: str | None) -> tuple[Work, dict[str, Plan]]:
    """Claim the folder, draw the rows, and check budgets, methods and recipe."""
    with alone(folder, "study"):
        _claim(study, folder)
        data = prepare(study, folder / "data")
        plain = {arm: plan_arm(study, arm, rows=data.rows, mean_tokens=data.mean_tokens) for arm in arms}
        check_equal(study, arms, plain)
        stop = stop_of(study, arms, rows=data.rows, mean_tokens=data.mean_tokens)
        work = Work(study, folder, data, stop, cache)
        _check_stop(folder, stop)
        _check_methods(work, arms)
        _check_recipes(work, arms)
        pieces.check_suite(study)
    plans = {_name(arm): plan_arm(study, arm, rows=data.rows, mean_tokens=data.mean_tokens, stop=stop) for arm in arms}
    return work, plans


def _name(arm: Arm) -> str:
    return f"{arm.label} ({arm.group})" if arm.group else arm.label


def _claim(study: Study, folder: Path) -> None:
    """Claim the folder for this study, or refuse one that holds another."""
    now = {"version of siftune": __version__, "model's content": model_key(study), **_identity(study)}
    path = folder / STUDY
    before: dict[str, Any] = read_json(path) if path.is_file() else {}
    if not before and (name := foreign_name(folder)) is not None:
        raise UserError(f"{folder} holds {name} and no {STUDY}, so it is no study; pass a new --run")
    if before and not (isinstance(before, dict) and {"version of siftune", "model's content"} <= before.keys()):
        raise UserError(f"{path} was not written by siftune; pass another --run")
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{folder} holds another study: its {name} was {before[name]} and is now {value}; pass another --run"
            )
    write_json(path, before | now)


def _check_stop(folder: Path, stop: int | None) -> None:
    """Cells of one folder train the same number of tokens."""
    before = read_json(folder / STUDY)
    if before.get("stop", stop) != stop:
        raise UserError(
            f"{folder} holds cells of {before['stop']:,} trained tokens, and this study trains {stop:,}; set tokens: "
            f"{before['stop']}, or pass another --run"
        )
    write_json(folder / STUDY, before | {"stop": stop})


def _check_methods(work: Work, arms: Sequence[Arm]) -> None:
    """Check every method with its settings, as far as that is possible without weights."""
    seed = work.study.seeds[0]
    places = work.data.places(work.study, seed)
    for entry in dict.fromkeys(arm.offline.name for arm in arms):
        offline = next(arm.offline for arm in arms if arm.offline.name == entry)
        if offline.method is not None:
            settings = offline.filled(places, seed=seed)
            method = build(offline.method, int(settings.pop("seed", seed)), settings)
            method.cache = work.cache
            _naming(f"offline {entry}", partial(check_method, method))
    for entry in dict.fromkeys(arm.online.name for arm in arms):
        online = next(arm.online for arm in arms if arm.online.name == entry)
        if online.method is not None:
            options = {"method": online.method, **online.filled(places, seed=seed)}
            _naming(f"online {entry}", partial(_check_online, options))


def _check_online(options: Mapping[str, Any]) -> None:
    from ..hook.selector import selector_of

    selector_of(options).check()


def _naming(where: str, check: Callable[[], Any]) -> None:
    """Run `check` with `where` in front of its error message."""
    try:
        check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_recipes(work: Work, arms: Sequence[Arm]) -> None:
    """Check the recipe of every arm by the classes that will read it. The table of the reference model does not exist yet;
    the study's model is used in its place."""
    table = work.data.places(work.study, work.study.seeds[0])["reference"]
    for arm in arms:
        recipe = recipe_of(work, work.study.seeds[0], train=work.data.pool, cell=Cell(arm, work.study.seeds[0]))
        if "online" in recipe:
            recipe["online"] = {
                name: recipe["model"] if value == table else value for name, value in recipe["online"].items()
            }
        _naming(arm.label, partial(pieces.check_recipe, recipe, work.cache))


# --- work -------------------------------------------------------------------------------------------------------------


def _tasks(work: Work, cells: Sequence[Cell]) -> list[Task]:
    """The unfinished pieces of work, each after those it needs."""
    tasks: dict[str, Task] = {}
    if cells and not (work.folder / "base.json").is_file():
        tasks["base"] = Task("base", partial(run_base, work))
    for cell in cells:
        needs = []
        if (folder := selection_folder(work, cell)) is not None and not selected(folder):
            name = f"select {folder.name}"
            tasks.setdefault(name, Task(name, partial(run_selection, work, cell)))
            needs.append(name)
        if "reference" in cell.arm.online.places | cell.arm.offline.places:
            tasks.setdefault("reference", Task("reference", partial(run_reference, work)))
            needs.append("reference")
        tasks[cell.name] = Task(cell.name, partial(run_cell, work, cell), tuple(needs))
    return list(tasks.values())


def _unequal(work: Work, frame: Frame, plans: Mapping[str, Plan]) -> list[str]:
    """One sentence for every finished cell that trained on more or less than its budget."""
    sentences = []
    for group in groups_of(frame.arms):
        baseline = baseline_of(work.study, frame.arms, group)
        tokens = {done.cell.seed: done.facts["tokens"] for done in frame.done if done.cell.arm == baseline}
        for done in frame.done:
            arm = done.cell.arm
            if arm.group not in (group, None) or done.cell.seed not in tokens or (baseline and baseline.plain):
                continue
            try:
                kept = max(plans[_name(arm)].kept, plans[_name(baseline)].kept) if baseline else 0
                check_cell(work, done.cell, done.facts["tokens"], tokens[done.cell.seed], kept=kept)
            except UserError as error:
                sentences.append(str(error))
    return list(dict.fromkeys(sentences))


def _write(frame: Frame, out: str | None, *, command: str, notes: Sequence[str]) -> Path:
    folder = frame.work.folder
    with alone(folder, "write"):
        with atomic_path(folder / "table.md") as temporary:
            temporary.write_text(tables(frame), encoding="utf-8")
        write_cells(frame, folder / "cells.parquet")
        write_differences(frame, folder / "differences.parquet")
        drawn = draw(frame, folder / "figures")
        page = folder / PAGE
        write_page(frame, page, drawn, command=command, notes=notes)
        if out is not None:
            page = Path(out)
            copies = [figures_beside(page) / f"{page.stem}-{figure.name}" for figure in drawn]
            for figure, copy in zip(drawn, copies, strict=True):
                copy_file(figure, copy)
            write_page(frame, page, copies, command=command, notes=notes)
    return page


def figures_beside(page: Path) -> Path:
    """The folder of a page's figures."""
    return page.parent / "figures"


def study_inputs(study: Study) -> dict[str, Any]:
    """The inputs of a study, by name, for `refuse_overlap`."""
    inputs: dict[str, Any] = {
        "the model": study.model,
        "the suite": suite_file(study.suite),
        "evaluate.data": study.evaluate.get("data"),
    }
    inputs |= {f"pool {name}": source for name, source in study.pool.items()}
    inputs |= {f"held_out {name}": source for name, source in study.held_out.items()}
    for entry in (*study.offline, *study.online):
        inputs |= setting_inputs(entry.settings, f"{entry.name}: {{}}")
    return {name: value for name, value in inputs.items() if value != DEMO}


def _raise_failures(failures: Sequence[Failure], unequal: Sequence[str], folder: Path) -> None:
    """Raise for the failures: `RuntimeError` for an internal error, `UserError` for an error of the input."""
    for failure in failures:
        if failure.internal:
            raise RuntimeError(f"{failure.name}: {failure.message}\n{failure.trace}")
    messages = [f"{failure.name}: {failure.message}" for failure in failures] + list(unequal)
    if messages:
        more = f" ({len(messages) - 1} more in {folder / 'study.md'})" if len(messages) > 1 else ""
        raise UserError(f"{messages[0]}{more}; the other cells are kept, and the same command resumes from them")
