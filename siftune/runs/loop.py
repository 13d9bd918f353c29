"""The closed loop of DaaR (arXiv 2502.04380, stage 8): choose rows, tune on them, probe again with the tuned model.

Tuning is a recipe of `siftune train`, run in this process, or the user's command: its placeholders are filled in and it runs
without a shell. Each round chooses from the rows that no earlier round chose. A finished round is never repeated: selection
and recipe resume as any run does, and the result of a command with the same words, rows and model is reused.
Cost: per round one selection, one tuning, and a copy of the remaining rows.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.protect import claim, refuse_overlap
from ..errors import UserError
from ..files import FolderLock, atomic_path, hash_file, hash_json, read_json, write_json
from ..progress import doing
from ..records import Pool
from .cut import check_out, refuse_inside
from .job import RUNS, named_inputs, plain
from .options import Running, SelectOptions
from .select import Selection, select

if TYPE_CHECKING:
    from ..engines.shard import Progress

PLACES = ("model", "train_file", "out_model", "round", "seed")
NEEDED = ("train_file", "out_model")
SEEDS = "seeds.jsonl"
LAST_LINES = 5
"""Of a failed command's output, in the error."""


@dataclass(kw_only=True)
class LoopOptions(SelectOptions):
    """`siftune loop METHOD POOL...`"""

    tune: str | None = None
    """Command that fine-tunes, run without a shell: {model} {train_file} {out_model} {round} {seed} are filled in."""
    recipe: str | None = None
    """Recipe of `siftune train` to tune with, instead of --tune; model and train are filled in, an adapter is merged."""
    rounds: int = 2
    """Number of rounds of choosing and tuning (paper: 1)."""
    again: bool = False
    """Allow rows of earlier rounds to be chosen again."""


@dataclass(frozen=True)
class Round:
    """The result of one round."""

    number: int
    model: str
    """The model that was probed, and tuned from."""
    selection: Selection
    tuned: Path
    """The folder that the tuning wrote."""
    seconds: float
    """Seconds of the tuning; 0 where it was already finished."""

    @property
    def facts(self) -> dict[str, Any]:
        """For loop.json and the summary."""
        manifest = self.selection.manifest
        info = manifest.get("info", {})
        rows = manifest["rows"]
        return {
            "round": self.number,
            "model": self.model,
            "run": str(self.selection.folder),
            "selected": str(self.selection.out),
            "tuned": str(self.tuned),
            "rows": {name: rows[name] for name in ("usable", "kept")},
            "domains": {name: counts["kept"] for name, counts in rows.get("domains", {}).items()},
            "probe_accuracy": info.get("validation_accuracy"),
            "tune_seconds": round(self.seconds, 1),
        }


def command_of(template: str | None) -> list[str]:
    """The words of `--tune`, checked. Raises `UserError` for an unknown placeholder and where `{train_file}` or `{out_model}` is
    missing.

    >>> command_of("python tune.py {train_file} {out_model}")
    ['python', 'tune.py', '{train_file}', '{out_model}']
    """
    example = "--tune 'python tune.py --model {model} --data {train_file} --out {out_model}'"
    if not template or not template.strip():
        raise UserError(f"siftune loop needs a command that fine-tunes: {example}, or --recipe recipe.yaml")
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UserError(f"--tune {template!r} cannot be parsed ({error}); fix its quotes") from error
    places = [name for word in words for name in re.findall(r"\{(\w+)\}", word)]
    if wrong := [name for name in places if name not in PLACES]:
        known = ", ".join("{" + name + "}" for name in PLACES)
        raise UserError(f"--tune holds {{{wrong[0]}}}, which is not one of {known}")
    if absent := [name for name in NEEDED if name not in places]:
        raise UserError(f"--tune has no {{{absent[0]}}}; write it as in {example}")
    return words


def loop(
    method: str,
    options: LoopOptions,
    settings: Mapping[str, Any] | None = None,
    *,
    progress: Progress | None = None,
    on_event: Callable[[str], None] = lambda line: None,
) -> list[Round]:
    """Choose and tune `options.rounds` times; returns the rounds. `on_event` is called with one line per step.

    Raises `UserError` for invalid options, and when the command fails or writes no model.

    >>> loop("daar", LoopOptions(pool=["pool.jsonl"], tune="..."), {"model": "./model", "seeds": "seeds.jsonl"})
    """
    values = dict(settings or {})
    if options.recipe is not None and options.tune is not None:
        raise UserError("--recipe and --tune are two ways to tune; pass one of them")
    words = command_of(options.tune) if options.recipe is None else []
    if values.get("model") is None:
        raise UserError(f"siftune loop {method} needs --model: the model that is probed and tuned")
    if options.recipe is not None:
        check_recipe(options, str(values["model"]))
    if options.rounds < 1:
        raise UserError(f"--rounds must be >= 1, got {options.rounds}")
    if options.shards is not None:
        raise UserError("siftune loop has no --shards; remove it")
    check_out(options.out, copied=True)
    refuse_overlap({"--out": options.out, "--run": options.run}, _inputs(options, values))
    if options.dry_run:
        select(method, SelectOptions(**_chosen(options)), values)
        return []
    folder = Path(options.run) if options.run else RUNS / f"loop-{method}-{_identity(method, options, values)}"
    refuse_inside(options.out, folder)
    with FolderLock(folder):
        claim(folder, "loop")
        rounds: list[Round] = []
        for number in range(1, options.rounds + 1):
            with doing(f"round {number} of {options.rounds}"):
                rounds.append(_round(number, folder, words, method, options, values, rounds, progress, on_event))
            write_json(
                folder / "loop.json",
                {"tune": options.tune or f"siftune train {options.recipe}", "rounds": [done.facts for done in rounds]},
            )
        if options.out is not None:
            _join([done.selection for done in rounds], Path(options.out))
    return rounds


def _round(
    number: int,
    folder: Path,
    words: list[str],
    method: str,
    options: LoopOptions,
    settings: Mapping[str, Any],
    before: list[Round],
    progress: Progress | None,
    on_event: Callable[[str], None],
) -> Round:
    run = folder / f"round-{number}"
    model = str(before[-1].tuned) if before else str(settings["model"])
    on_event(f"round {number}: choosing with {model}")
    round_settings: dict[str, Any] = {**settings, "model": model}
    if before and round_settings.get("generator") is not None:  # the rows that the first round wrote serve every round
        seeds = str(before[0].selection.folder / SEEDS)  # type: ignore[operator]
        round_settings |= {"generator": None, "request": None, "domains": None, "seeds": seeds}
    pool = (
        options.pool if options.again or not before else [_rest(folder / f"pool-{number}.jsonl", before[-1].selection)]
    )
    chosen = {item.name: getattr(options, item.name) for item in fields(SelectOptions)}
    selection = select(
        method,
        SelectOptions(**{**chosen, "pool": pool, "run": str(run), "out": None}),
        round_settings,
        progress=progress,
    )
    assert selection.out is not None
    on_event(f"round {number}: {selection.manifest['rows']['kept']:,} rows in {selection.out}, tuning on them")
    place = folder / f"tune-{number}"
    if options.recipe is not None:
        tuned, seconds = _by_recipe(place, options, model, selection.out)
    else:
        tuned, seconds = _tune(number, place, words, model, selection.out, options.seed)
    on_event(f"round {number}: tuned model in {tuned}")
    return Round(number, model, selection, tuned, seconds)


def _inputs(options: LoopOptions, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a loop, by name."""
    inputs = named_inputs(options, settings)
    if options.recipe is not None:
        from ..sft.inputs import recipe_inputs

        inputs |= {"the recipe": options.recipe}
        inputs |= recipe_inputs(_recipe(options, str(settings["model"]), "rows.jsonl")) | {"train": None}
    return inputs


def _chosen(options: LoopOptions) -> dict[str, Any]:
    """The options of a round's selection."""
    return {item.name: getattr(options, item.name) for item in fields(SelectOptions)}


def _rest(path: Path, last: Selection) -> str:
    """The usable rows that the last round did not choose, written as a new pool."""
    assert last.subset is not None
    pool: Pool = last.subset.scores.pool
    rest = np.setdiff1d(pool.eligible, last.subset.rows)
    if not len(rest):
        raise UserError("every usable row has been chosen; lower --keep or --rounds, or pass --again")
    pool.source.write(rest.tolist(), path)
    return str(path)


def _tune(number: int, folder: Path, words: list[str], model: str, rows: Path, seed: int) -> tuple[Path, float]:
    """Run the user's command, unless its result exists; returns the tuned model's folder and the seconds."""
    out, done = folder / "model", folder / "done.json"
    key = hash_json([words, model, hash_file(rows), seed])
    if done.is_file() and read_json(done).get("key") == key and (out / "config.json").is_file():
        return out, 0.0
    filled = {"model": model, "train_file": str(rows), "out_model": str(out), "round": str(number), "seed": str(seed)}
    command = [re.sub(r"\{(\w+)\}", lambda match: filled.get(match[1], match[0]), word) for word in words]
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    started = perf_counter()
    log = folder / "log.txt"
    try:
        with log.open("wb") as output, doing(f"tuning by {command[0]}"):
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    except OSError as error:
        raise UserError(f"--tune: {command[0]!r} cannot be run ({error.strerror}); check the command") from error
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
        raise UserError(
            f"--tune ended with code {code} in round {number} ({' | '.join(lines)}); its output is in {log}"
        )
    if not (out / "config.json").is_file():
        raise UserError(
            f"--tune succeeded but wrote no model to {out} (no config.json); save the model to {{out_model}}"
        )
    seconds = perf_counter() - started
    write_json(done, {"key": key, "command": command, "seconds": round(seconds, 1)})
    return out, seconds


def _recipe(options: LoopOptions, model: str, rows: str) -> Any:
    """The recipe with model and rows filled in, and `--seed` where it is set."""
    from ..sft.recipe import Recipe

    assert options.recipe is not None
    seed = {"seed": options.seed} if options.seed else {}
    return Recipe.read(options.recipe, {"model": model, "train": rows, **seed})


def check_recipe(options: LoopOptions, model: str) -> None:
    """Refuse an invalid recipe before the first rows are chosen. Raises `UserError`."""
    from ..sft.trainer import check_sections

    check_sections(_recipe(options, model, "rows.jsonl"))


def _by_recipe(folder: Path, options: LoopOptions, model: str, rows: Path) -> tuple[Path, float]:
    """Tune in this process, unless the result exists; returns the folder of the merged model and the seconds of this run."""
    from .train import TuneOptions, tune

    started = perf_counter()
    finished = (folder / "model" / "README.md").is_file()
    done = tune(_recipe(options, model, str(rows)), TuneOptions(run=str(folder), quiet=True, cache=options.cache))
    return done.merged(), 0.0 if finished else perf_counter() - started


def _join(selections: list[Selection], out: Path) -> None:
    """The rows of every round, one file, in the order of the rounds."""
    with atomic_path(out) as temporary, temporary.open("wb") as target:
        for selection in selections:
            assert selection.out is not None
            target.write(selection.out.read_bytes())


def _identity(method: str, options: LoopOptions, settings: Mapping[str, Any]) -> str:
    """A hash of all options, for the folder's name; the inputs of a round are checked by its run folder."""
    values = {item.name: plain(getattr(options, item.name)) for item in fields(options)}
    running_options = [item.name for item in fields(Running)]  # these never change a result
    for name in ("run", "out", "quiet", "json", "config", "cache", *running_options):
        values.pop(name, None)
    return hash_json(json.loads(json.dumps([method, values, plain(dict(settings))], default=str)))[:12]
