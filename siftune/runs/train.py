"""Fine-tune by a recipe into a run folder that resumes: `siftune train`, also called by the cells of a study.

    config.yaml  manifest.json   as in every run folder; the manifest holds tokens, seconds, loss, held-out loss
    rows.parquet                 every row read: trained on, or the reason why not
    checkpoints/                 the trainer's checkpoints, at the interval of sft.save_strategy
    model/                       the model or the adapter, its tokenizer and its card
    log.jsonl                    the trainer's log
    siftune/selection.parquet    every candidate, where a selector was attached

A killed run resumes from its newest complete checkpoint and ends with the same weights, bit for bit on a CPU; a finished one
is not run again. Cost beyond training: one pass over the rows for rows.parquet, one hash of the base's weights (cached).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.exports import MARK, check_export, check_replaceable, discard, place, seal
from ..data.protect import refuse_nested, refuse_overlap
from ..errors import UserError
from ..files import atomic_path, cache_folder, hash_file, hash_json, remove, temporary_beside
from ..progress import current
from ..sft.inputs import recipe_inputs
from ..sft.recipe import Recipe
from .folder import RunFolder, check_run_folder, identity, versions
from .job import RUNS
from .options import write_yaml
from .stored import counted

if TYPE_CHECKING:
    from transformers import Trainer

    from ..engines.shard import Progress
    from ..sft.trainer import Prepared

CHECKPOINTS, MODEL, MERGED = "checkpoints", "model", "merged"
LOG, ROWS, LEDGER = "log.jsonl", "rows.parquet", "siftune/selection.parquet"
NOT_OURS = "training_args.bin"
"""A pickle of the trainer's options, which config.yaml and the card hold as text."""


@dataclass(kw_only=True)
class TuneOptions:
    """Options of a fine-tuning run: folders and output."""

    run: str | None = None
    """Run folder; the default name holds a hash of recipe and inputs, so the same command finds its own run."""
    out: str | None = None
    """Folder for a copy of the model: new, empty, or an unchanged earlier copy; the run folder always has the model."""
    quiet: bool = False
    """Print only the model's folder."""
    json: bool = False
    """Print only one JSON object."""
    cache: str | None = None
    """Cache folder; default $SIFTUNE_CACHE, else ~/.cache/siftune."""
    dry_run: bool = False
    """Check recipe, rows, model folder and budget, print what would run, and stop."""


@dataclass(frozen=True)
class Tuned:
    """The result of a fine-tuning."""

    folder: Path
    """The run folder."""
    model: Path
    """A model folder, or an adapter's."""
    manifest: Mapping[str, Any]
    """`tokens`, `seconds`, `train_loss`, `steps`, `held_out`, `rows`, and the keys of every manifest."""

    @property
    def is_adapter(self) -> bool:
        """Whether `model` needs its base."""
        from ..sft.adapters import is_adapter

        return is_adapter(self.model)

    def merged(self) -> Path:
        """A folder with the complete model: `model` itself, or `merged/`, created on first use from an adapter and its base."""
        if not self.is_adapter:
            return self.model
        out = self.folder / MERGED
        if not (out / "config.json").is_file():
            from ..sft.adapters import merge

            merge(self.model, out)
        return out


def tune(
    recipe: Recipe | str | Path | Mapping[str, Any],
    options: TuneOptions | None = None,
    *,
    progress: Progress | None = None,
    on_event: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Fine-tune by a recipe; a killed run resumes, a finished one is returned unchanged. `on_event` is called
    with a line per event.

    Raises `UserError` for an invalid recipe, rows or model, for a run folder or `out` that is an input or
    holds files of the user, before any weight is loaded; and under `torchrun` with several processes, where
    `build_trainer` is to be used.

    >>> tuned = tune(Recipe.read("recipe.yaml"), TuneOptions(run="runs/first"))
    >>> tuned.model, tuned.manifest["tokens"]["trained_tokens"]
    """
    options = options or TuneOptions()
    file = recipe if isinstance(recipe, (str, Path)) else None
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"siftune train runs in one process, and WORLD_SIZE={os.environ['WORLD_SIZE']}; in your own script, call "
            "siftune.build_trainer(recipe, folder).train() under torchrun"
        )
    _check_places(recipe, options, file)
    from ..sft.dataset import write_rows
    from ..sft.trainer import prepare

    prepared = prepare(recipe, cache=options.cache)
    config = {"command": "train", **recipe.plain}
    inputs = _inputs(prepared)
    folder = Path(options.run) if options.run else RUNS / f"train-{identity(config, inputs)}"
    _check_places(recipe, options, file, run=folder, model=prepared.folder)
    check_run_folder(folder)
    if options.dry_run:
        return Tuned(folder, folder / MODEL, {"config": config, "rows": _row_facts(prepared)})
    with RunFolder(folder, config=config, inputs=inputs) as run:
        key = identity(config, inputs)
        job = _Job(run, prepared, options, progress, on_event)
        with run.stage("rows", hash_json([key, "rows"])) as stage:
            if not stage.reused:
                write_rows(run.folder / ROWS, prepared.pool, prepared.rows)
                stage.files = [ROWS]
                stage.counts = {"rows": prepared.rows.meta["rows"]}
                run.note(rows=_row_facts(prepared))
        with run.stage("train", hash_json([key, "train"])) as stage:
            if not stage.reused:
                for name in (MODEL, MERGED):  # before the training, not after it
                    check_replaceable(run.folder / name)
                stage.files, facts = job.train()
                stage.counts = {"steps": facts["steps"], **facts["tokens"]}
                run.note(info=facts)
        if recipe.eval:
            with run.stage("held-out", hash_json([key, "held-out"])) as stage:
                if not stage.reused:
                    run.note(info={**run.manifest["info"], "held_out": job.held_out()})
                    stage.counts = {"files": len(recipe.eval)}
        manifest = run.finish(**run.manifest["info"])
        if options.out is not None:
            _copy(run.folder / MODEL, Path(options.out))
    return Tuned(folder, folder / MODEL, manifest)


# --- what decides the result ----------------------------------------------------------------------------------------


def _inputs(prepared: Prepared) -> dict[str, str]:
    """Content hashes of all inputs: rows, weights, and files that the selector names."""
    from ..sft.adapters import model_key

    recipe = prepared.recipe
    hashes = {"train": prepared.pool.fingerprint, "model": model_key(prepared.folder)}
    hashes |= {f"eval {name}": pool.fingerprint for name, pool in prepared.held_out.items()}
    for name, value in (recipe.online or {}).items():
        path = Path(value).expanduser() if isinstance(value, (str, Path)) else None
        if path is not None and path.is_file():
            hashes[f"online {name}"] = hash_file(path)
        elif path is not None and (path / "config.json").is_file():
            hashes[f"online {name}"] = model_key(path)
    return hashes


def _check_places(
    recipe: Recipe,
    options: TuneOptions,
    file: str | Path | None,
    *,
    run: Path | None = None,
    model: Path | None = None,
) -> None:
    """Refuse a run folder or an `--out` that is an input or belongs to the user: by what the recipe names and, once they
    are known, by the run folder and the model's own folder."""
    inputs = {"the recipe": file, **recipe_inputs(recipe), "the model's folder": model}
    refuse_overlap({"--run": options.run, "--out": options.out}, inputs)
    refuse_overlap({"--out": options.out}, {"the run folder": run, "the cache": cache_folder(options.cache)})
    if options.out is not None and run is not None:
        refuse_nested("--out", Path(options.out), "the run folder", run)
    if options.out is not None and run is None:  # once, because it reads an earlier export
        check_export("--out", Path(options.out))


def _copy(model: Path, out: Path) -> None:
    """Copy the model's folder to `out`; the copy is complete or absent."""
    temporary = temporary_beside(out.resolve())
    try:
        shutil.copytree(model, temporary, ignore=shutil.ignore_patterns(MARK))
        place(temporary, out)
    finally:
        remove(temporary)


# --- rows -----------------------------------------------------------------------------------------------------------


def _row_facts(prepared: Prepared) -> dict[str, Any]:
    """The row counts, with every row that was left out counted under its reason."""
    facts, meta = counted(prepared.pool), prepared.rows.meta
    for reason in prepared.rows.reasons.values():
        kind = reason.partition(":")[0]
        facts["reasons"][kind] = facts["reasons"].get(kind, 0) + 1
    return {**facts, "used": meta["rows"], **{name: meta[name] for name in ("cut", "beyond", "tokens", "label_tokens")}}


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Job:
    """One run's training, in its folder."""

    run: RunFolder
    prepared: Prepared
    options: TuneOptions
    progress: Progress | None
    on_event: Callable[[str], None]

    def train(self) -> tuple[list[str], dict[str, Any]]:
        """Train, from the newest complete checkpoint where there is one; returns the written files and the manifest's facts."""
        import torch
        from transformers import set_seed

        from ..hook.row_index import preserved_random_state
        from ..models.load import quiet
        from ..sft.progress_callback import ProgressCallback
        from ..sft.token_counts import TokenCounts

        recipe, folder = self.prepared.recipe, self.run.folder
        newest = _newest(folder / CHECKPOINTS)
        token_counts = TokenCounts(recipe.stop_at)
        verbose = not (self.options.quiet or self.options.json)
        trainer = self.prepared.trainer(folder / CHECKPOINTS, token_counts=token_counts, quiet=not verbose)
        trainer.add_callback(ProgressCallback(self.progress or current(), self.on_event))
        if newest is not None:
            self.on_event(f"resuming from {newest}")
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        token_counts.begin(newest)
        with preserved_random_state(), quiet():
            set_seed(recipe.seed)
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        token_counts.close()
        totals = token_counts.totals
        facts: dict[str, Any] = {
            "tokens": totals.tokens,
            "seconds": round(totals.seconds, 3),
            "train_loss": totals.train_loss,
            "steps": totals.steps,
            "preset": recipe.preset,
        }
        if cuda:
            facts["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
        return self._save(trainer, facts), facts

    def _save(self, trainer: Trainer, facts: Mapping[str, Any]) -> list[str]:
        """Write model, card, log and ledger into the run folder; returns their names."""
        from ..models.load import quiet

        folder = self.run.folder
        temporary = temporary_beside(folder / MODEL)
        try:
            with quiet():
                trainer.save_model(str(temporary))
            (temporary / NOT_OURS).unlink(missing_ok=True)
            (temporary / "README.md").write_text(self._card(temporary, facts), encoding="utf-8")
            if not discard(folder / MERGED):  # it was merged from the model that is replaced
                check_replaceable(folder / MERGED)
            place(temporary, folder / MODEL)
            if (folder / CHECKPOINTS).is_dir():
                seal(folder / CHECKPOINTS, hashed=False)
        finally:
            remove(temporary)
        with atomic_path(folder / LOG) as log:
            log.write_text("".join(json.dumps(line) + "\n" for line in trainer.state.log_history), encoding="utf-8")
        written = [LOG]
        merged = folder / CHECKPOINTS / LEDGER
        if self.prepared.recipe.online is not None and merged.is_file():
            with atomic_path(folder / LEDGER) as copy:
                shutil.copyfile(merged, copy)
            written.append(LEDGER)
        return written + sorted(str(path.relative_to(folder)) for path in (folder / MODEL).rglob("*") if path.is_file())

    def _card(self, model: Path, facts: Mapping[str, Any]) -> str:
        from .. import __version__
        from ..sft.adapters import is_adapter
        from ..sft.model_card import model_card, selection_behind

        recipe = self.prepared.recipe
        return model_card(
            {
                **facts,
                "recipe": recipe.plain,
                "yaml": write_yaml(recipe.plain),
                "adapter": is_adapter(model),
                "rows": self.run.manifest["rows"],
                "selection": selection_behind(recipe.train),
                "versions": versions(),
                "siftune": __version__,
            }
        )

    def held_out(self) -> dict[str, Any]:
        """Loss and accuracy of the answers of the recipe's held-out files, under the tuned model."""
        import torch

        from ..evaluation.held_out import held_out
        from ..sft.adapters import load_tuned

        recipe = self.prepared.recipe
        self.on_event(f"held-out loss of {', '.join(recipe.eval)}")
        network: Any = load_tuned(self.run.folder / MODEL, dtype=str(recipe.model_kwargs.get("dtype", "auto")))
        if torch.cuda.is_available():
            network = network.to("cuda")
        results = held_out(
            network,
            self.prepared.tokenizer,
            {name: list(files) for name, files in recipe.eval.items()},
            text=recipe.text,
            max_length=self.prepared.length,
            columns=recipe.columns,
            roles=recipe.roles,
            format=recipe.format,  # type: ignore[arg-type]
        )
        return {name: dict(result.facts) for name, result in results.items()}


def _newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint. An unfinished one is left in place: the trainer writes it again at the same step."""
    from ..hook.checkpoint import folder_of, is_complete

    complete = []
    for path in checkpoints.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step is None:
            continue
        if is_complete(path) and (folder_of(path) / "tally.json").is_file():
            complete.append((int(step[1]), path))
    return max(complete)[1] if complete else None
