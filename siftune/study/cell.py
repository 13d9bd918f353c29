"""The pieces of work of a study: a selection, the reference model, one cell. The only place where `select`, `tune` and the
evaluation are called, so that a test can replace them by three small functions.

Each piece of work is a plain record that can be passed to another process. A finished piece is a file written last
(`cell.json`, the selection's own manifest), and is never done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from ..data.exports import discard
from ..errors import UserError
from ..files import lock_file, read_json, write_json
from .cells import Cell
from .data import Data, model_folder
from .plan import plan_arm
from .spec import Study

CELL = "cell.json"
BASE = "base.json"


@dataclass(frozen=True)
class Work:
    """All that a piece of work needs."""

    study: Study
    folder: Path
    """The study's run folder."""
    data: Data
    stop: int | None
    """Trained tokens at which a cell ends; None for `equal: rows`."""
    cache: str | None = None


@contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """One process at a time at this piece of work; others wait. The system frees the lock at any death."""
    path = folder / ".locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(path, wait=True)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


# --- the three functions that tests replace -----------------------------------------------------------------------------


def choose(work: Work, cell: Cell, run: Path) -> Mapping[str, Any]:
    """Run the cell's offline method into the run folder `run`; the manifest. `run/selected.jsonl` holds the rows."""
    from ..runs.options import SelectOptions
    from ..runs.select import select

    study, entry = work.study, cell.arm.offline
    assert entry.method is not None
    settings = entry.filled(work.data.places(study, cell.seed), seed=cell.seed)
    seed = int(settings.pop("seed", cell.seed))
    options = SelectOptions(
        pool=[str(work.data.pool)],
        keep=cell.arm.budget,
        run=str(run),
        seed=seed,
        columns=dict(study.columns) if study.columns else None,
        roles=dict(study.roles) if study.roles else None,
        format=study.format,  # type: ignore[arg-type]
        cache=work.cache,
        quiet=True,
    )
    return select(entry.method, options, settings).manifest


def train(work: Work, recipe: Mapping[str, Any], run: Path) -> tuple[Path, Mapping[str, Any]]:
    """Tune by a recipe into the run folder `run`, resuming there; the model's folder and the manifest."""
    from ..runs.train import TuneOptions, tune
    from ..sft.recipe import Recipe

    tuned = tune(Recipe.read(recipe), TuneOptions(run=str(run), quiet=True, cache=work.cache))
    return tuned.model, tuned.manifest


def measure(work: Work, model: Path, run: Path) -> dict[str, float]:
    """Every measure of a tuned (or the untouched) model: `loss/DOMAIN`, `accuracy/DOMAIN`, a suite's `TASK/METRIC`."""
    from .measure import measured

    return measured(work.study, work.data, model, run)


# --- work ---------------------------------------------------------------------------------------------------------------


def selection_folder(work: Work, cell: Cell) -> Path | None:
    """The run folder of the cell's selection; None for all rows."""
    return None if cell.selection is None else work.folder / "selections" / cell.selection


def run_selection(work: Work, cell: Cell) -> None:
    """Choose the rows that this cell (and others with the same selection) trains on."""
    folder = selection_folder(work, cell)
    assert folder is not None
    with alone(work.folder, f"selection-{folder.name}"):
        if not selected(folder):
            choose(work, cell, folder)


def selected(folder: Path) -> bool:
    """Whether this selection is finished."""
    manifest = folder / "manifest.json"
    return manifest.is_file() and read_json(manifest).get("status") == "finished"


def run_reference(work: Work) -> None:
    """Tune the reference model on `{rest}` and tabulate its loss of every row of the pool, once for all cells."""
    folder = work.folder / "reference"
    table = Path(work.data.places(work.study, 0)["reference"])
    with alone(work.folder, "reference"):
        if table.is_file():
            return
        recipe = recipe_of(work, work.study.seeds[0], train=Path(work.data.places(work.study, 0)["rest"]))
        model, manifest = train(work, recipe, folder / "train")
        tabulate(work, recipe | {"train": str(work.data.pool)}, model, table)
        write_json(folder / "reference.json", {"training": _training(manifest)})
        _drop_model(folder / "train", work.study)


def tabulate(work: Work, recipe: Mapping[str, Any], model: Path, table: Path) -> None:
    """The table of losses under `model` of every row that `recipe` would train on."""
    from ..runs.score_reference import score_reference
    from ..sft.recipe import Recipe

    score_reference(Recipe.read(recipe), str(model), out=table, cache=work.cache)


def run_base(work: Work) -> None:
    """Measure the model before tuning."""
    with alone(work.folder, "base"):
        if not (work.folder / BASE).is_file():
            write_json(work.folder / BASE, {"values": measure(work, model_folder(work.study), work.folder / "base")})


def run_cell(work: Work, cell: Cell) -> None:
    """Train and measure one cell. Raises `UserError` where it trained on more or less than its budget."""
    folder = work.folder / "cells" / cell.name
    with alone(work.folder, f"cell-{cell.name}"):
        if finished(folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        rows = selection_folder(work, cell)
        chosen = work.data.pool if rows is None else rows / "selected.jsonl"
        recipe = recipe_of(work, cell.seed, train=chosen, cell=cell)
        chosen_by = None if rows is None else read_json(rows / "manifest.json")
        started = perf_counter()
        model, manifest = train(work, recipe, folder / "train")
        trained = perf_counter()
        values = measure(work, model, folder / "evaluate")
        write_json(
            folder / CELL,
            {
                "cell": {"label": cell.arm.label, "offline": cell.arm.offline.name, "online": cell.arm.online.name,
                         "budget": cell.arm.budget, "seed": cell.seed},
                "values": values,
                "tokens": dict(manifest["tokens"]),
                "train_loss": manifest.get("train_loss"),
                "selection": None if chosen_by is None else _selection(chosen_by),
                "times": {"choose": None if chosen_by is None else _choosing(chosen_by), "train": _seconds(manifest, trained - started),
                          "measure": round(perf_counter() - trained, 3), "peak_memory_mb": manifest.get("peak_memory_mb")},
            },
        )  # fmt: skip
        _drop_model(folder / "train", work.study)


def finished(folder: Path) -> bool:
    """Whether this cell is finished."""
    return (folder / CELL).is_file()


def recipe_of(work: Work, seed: int, *, train: Path, cell: Cell | None = None) -> dict[str, Any]:
    """The study's recipe, filled in for one run."""
    study = work.study
    recipe: dict[str, Any] = {**study.recipe, "model": str(model_folder(study)), "train": str(train), "seed": seed}
    for key in ("format", "columns", "roles"):
        if getattr(study, key):
            recipe[key] = getattr(study, key)
    sft = dict(recipe.get("sft", {}))
    if cell is not None:
        online = cell.arm.online
        if online.candidates is not None:
            sft["per_device_train_batch_size"] = online.candidates
        if online.method is not None:
            settings = online.filled(work.data.places(study, seed), seed=seed)
            recipe["online"] = {"method": online.method, **settings}
    if cell is not None and work.stop is not None and not cell.arm.plain:
        plan = plan_arm(study, cell.arm, rows=work.data.rows, mean_tokens=work.data.mean_tokens, stop=work.stop)
        recipe["stop_at"] = {"trained_tokens": work.stop}
        sft["max_steps"] = plan.steps
    return {**recipe, "sft": sft}


def _selection(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and judge cost from a selection's manifest."""
    judge = manifest.get("info", {}).get("judge")
    if judge is not None:  # the number of requests of this run depends on the cache
        judge = {
            name: value
            for name, value in judge.items()
            if not name.endswith("_now") and name not in ("found_in_journal", "parameters_left_out", "replies")
        }
    return {"rows": manifest["rows"]["kept"], "judge": judge}


def _choosing(manifest: Mapping[str, Any]) -> float:
    """Seconds in which a selection was computed, in this run or an earlier one."""
    return round(float(sum(stage["computed_seconds"] for stage in manifest.get("stages", []))), 3)


def _training(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"tokens": dict(manifest["tokens"]), "seconds": manifest.get("seconds")}


def _seconds(manifest: Mapping[str, Any], spent: float) -> float:
    return round(float(manifest.get("seconds") or spent), 3)


def _drop_model(run: Path, study: Study) -> None:
    """Delete a cell's weights once it is measured; a folder that holds other files is kept."""
    if not study.keep_models:
        for name in ("checkpoints", "model"):
            discard(run / name)


def check_cell(
    work: Work, cell: Cell, tokens: Mapping[str, Any], baseline_tokens: Mapping[str, Any], *, kept: int
) -> None:
    """Check the equal budget on the trained rows or tokens, from the `tokens` of two cells. Raises `UserError`."""
    if cell.arm.plain:
        return
    if work.stop is not None:
        if int(tokens["trained_tokens"]) < work.stop:
            raise UserError(
                f"{cell.name} trained {tokens['trained_tokens']:,} of {work.stop:,} tokens before its last step; its "
                "method keeps very short rows, so raise keep, or compare at equal: rows"
            )
        return
    rows, baseline_rows = int(tokens["trained_rows"]), int(baseline_tokens["trained_rows"])
    if abs(rows - baseline_rows) > kept:
        raise UserError(
            f"{cell.name} trained {rows:,} rows and the baseline {baseline_rows:,}, more than one step ({kept} rows) apart; "
            "its method could not score enough rows, so lower the budget"
        )


def check_recipe(recipe: Mapping[str, Any], cache: str | None) -> None:
    """Refuse a recipe that its own classes, its files or its model's folder refuse; no weight is read."""
    from ..sft.recipe import Recipe
    from ..sft.trainer import prepare

    prepare(Recipe.read(recipe), cache=cache)


def check_suite(study: Study) -> None:
    """Refuse an evaluation suite that cannot run; no weight is read."""
    from .measure import check_suite as check

    check(study)
