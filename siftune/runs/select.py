"""From a pool file to a file of chosen rows: load, fit, score, cut, each a stage of a run folder that is computed once.

`select` is what `siftune select` runs, `recut` what `siftune keep` runs; `job.py` checks the options before a weight is
loaded. Cost beyond the method's own: one pass over the pool for its index, one for rows.parquet, one over the chosen rows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.protect import refuse_overlap, setting_inputs
from ..errors import UserError
from ..files import cache_folder, hash_file, hash_json, read_json, write_json
from ..offline.base import OfflineMethod
from ..progress import current
from ..records import Pool, Scores, Subset
from .cut import Budget, check_out, copy_out, refuse_inside
from .filtering import LEFT_OUT, filtered, without
from .folder import CONFIG, MANIFEST, RunFolder, identity, peak_memory_mb, read_manifest
from .job import Job, inputs_of, plain, prepare, read_pool, run_folder
from .options import ONE_RUN, KeepOptions, Reading, SelectOptions
from .stored import ROWS, SCORES, SELECTED, counted, read_scores, write_rows, write_scores

if TYPE_CHECKING:
    from ..engines.shard import Progress


@dataclass(frozen=True)
class Selection:
    """The result of a selection."""

    folder: Path | None
    """The run folder; None for a dry run."""
    manifest: Mapping[str, Any]
    out: Path | None = None
    """Where the chosen rows are; None for a dry run and for one part of n."""
    subset: Subset | None = None
    pool: Pool | None = None


def select(
    method: str, options: SelectOptions, settings: Mapping[str, Any] | None = None, *, progress: Progress | None = None
) -> Selection:
    """Choose rows of a pool with an offline method, into a run folder that resumes by itself.

    `settings` are the method's own fields; `options.seed` fills its `seed`. Raises `UserError`.

    >>> select("random", SelectOptions(pool=["pool.jsonl"], keep="10%")).out
    """
    job = prepare(method, options, settings or {}, progress=progress or current())
    if options.dry_run:
        facts = {"config": job.config, "rows": counted(job.pool)}
        if (preview := job.method.preview(job.pool)) is not None:  # the requests to a judge
            facts["preview"] = preview
        return Selection(None, facts, pool=job.pool)
    inputs = {"pool": job.pool.fingerprint} | inputs_of(job.method)
    if job.benchmarks:
        inputs["decontaminate"] = hash_json(sorted(job.benchmarks.values()))
    folder = run_folder(options, method, identity(job.config, inputs))
    refuse_inside(options.out, folder, but=SELECTED)
    with RunFolder(folder, config=job.config, inputs=inputs) as run:
        key = identity(job.config, inputs)
        with run.stage("load", hash_json([key, "load"])) as stage:
            stage.counts = {"rows": len(job.pool), "bad": len(job.pool.reasons), "duplicates": job.pool.duplicates}
            stage.seconds = job.load_seconds
        if options.near_duplicates is not None or options.decontaminate is not None:
            job = _filter(run, job, key)
        if options.shards is not None:
            return _score_part(run, job, key)
        scores = _score(run, job, key)
        return _write(run, job, scores, key)


# --- stages ---------------------------------------------------------------------------------------------------------


def _filter(run: RunFolder, job: Job, key: str) -> Job:
    """The job over the rows that remain; the reasons of the others are in the run folder."""
    with run.stage("filter", hash_json([key, "filter"])) as stage:
        if stage.reused:
            stored = read_json(run.folder / LEFT_OUT)
            reasons = {int(row): str(reason) for row, reason in stored.items()}
        else:
            reasons, stage.counts = filtered(job.pool, job.options)
            write_json(run.folder / LEFT_OUT, {str(row): reason for row, reason in sorted(reasons.items())})
            stage.files = [LEFT_OUT]
    remaining = without(job.pool, reasons)
    if not len(remaining.eligible):
        raise UserError(
            f"--near-duplicates and --decontaminate leave out all {len(job.pool.eligible)} usable rows of the pool; "
            f"{run.folder / LEFT_OUT} holds the reason for each"
        )
    return dataclasses.replace(job, scored=remaining)


def _equip(run: RunFolder, job: Job) -> Any:
    """Set the method's engine and store; returns the engine."""
    from ..engines import make_engine
    from ..models.store import Store

    cache = cache_folder(job.options.cache)
    engine = make_engine(job.options, Store(cache / "shards"), backbone=job.method.backbone(), progress=job.progress)
    job.method.engine = engine
    job.method.store = Store(cache / "features")
    return engine


def _fit(run: RunFolder, job: Job, key: str) -> OfflineMethod:
    """The fitted method: loaded from the run folder, or fitted now, as a method that saves nothing is each time."""
    if not job.method.learns():
        return job.method
    settings = {item.name: getattr(job.method, item.name) for item in dataclasses.fields(job.method) if item.init}  # type: ignore[arg-type]
    with run.stage("fit", hash_json([key, "fit"]), again=not job.method.saves()) as stage:
        if stage.reused:
            fitted = job.method.load(run.folder, **settings)
            fitted.engine, fitted.store, fitted.cache = job.method.engine, job.method.store, job.method.cache
            return fitted
        engine: Any = job.method.engine
        before = engine.computed, engine.reused
        fitted = job.method.fit(job.rows)
        with run.watch() as stage.files:
            fitted.save(run.folder)
        stage.counts = _shards(engine, before)
    return fitted


def _shards(engine: Any, before: tuple[int, int]) -> dict[str, int]:
    """The shards that the engine computed and reused since `before`, for a stage's counts."""
    return {"shards_computed": engine.computed - before[0], "shards_reused": engine.reused - before[1]}


def _score(run: RunFolder, job: Job, key: str) -> Scores:
    scored = hash_json([key, "score"])
    learns = job.method.learns()
    again = _asks_again(job)
    if not again and run.finished("score", scored) and (not learns or run.finished("fit", hash_json([key, "fit"]))):
        if learns:
            with run.stage("fit", hash_json([key, "fit"])):
                pass
        with run.stage("score", scored):  # as stored: no model is needed
            return read_scores(run.folder / SCORES, job.pool, run.manifest.get("info", {}))
    engine = _equip(run, job)
    fitted = _fit(run, job, key)
    with run.stage("score", scored, again=again) as stage:
        before = engine.computed, engine.reused
        scores = dataclasses.replace(fitted.score(job.rows), pool=job.pool)  # what was left out keeps its reason
        write_scores(run.folder / SCORES, scores)
        stage.files = [SCORES]
        stage.counts = {"rows": int((~np.isnan(scores.values)).sum())} | _shards(engine, before)
        run.note(info=plain(dict(scores.info)))
    return scores


def _asks_again(job: Job) -> bool:
    """Whether a finished run is scored again, because requests that were refused have to be sent again."""
    return any(getattr(job.method, name, None) is not None for name in ONE_RUN)


def _score_part(run: RunFolder, job: Job, key: str) -> Selection:
    """Fit, and score one part of the shards into the cache."""
    from ..engines.shard import part_of

    engine = _equip(run, job)
    fitted = _fit(run, job, key)
    part = part_of(job.rows.shards(), job.options.shards)
    with run.stage(f"score {job.options.shards}", hash_json([key, job.options.shards])) as stage:
        task = fitted.shard_task(job.rows)
        before = engine.computed, engine.reused
        for _ in engine.run(task, job.rows, part, label=f"{fitted.name} {job.options.shards}"):
            pass
        stage.counts = {"rows": sum(len(shard) for shard in part)} | _shards(engine, before)
    return Selection(run.folder, run.finish(rows=counted(job.pool), part=job.options.shards), pool=job.pool)


def _write(run: RunFolder, job: Job, scores: Scores, key: str) -> Selection:
    if np.isnan(scores.values).all():  # report the reasons; the budget is not the cause
        write_rows(run.folder / ROWS, scores, np.empty(0, np.int64))
        raise UserError(f"no row has a score ({_reasons(scores)}); {run.folder / ROWS} holds the reason for each")
    subset = job.budget.cut(scores)
    with run.stage("write", hash_json([key, "write", hash_file(run.folder / SCORES)])) as stage:
        if not stage.reused:
            write_rows(run.folder / ROWS, scores, subset.rows)
            subset.write(run.folder / SELECTED, order=job.budget.order)
            stage.files = [ROWS, SELECTED]
            stage.counts = {"kept": len(subset)}
    out = copy_out(subset, run.folder / SELECTED, job.options.out, order=job.budget.order)
    manifest = run.finish(rows=counted(job.pool, subset), peak_memory_mb=peak_memory_mb())
    return Selection(run.folder, manifest, out, subset, job.pool)


def _reasons(scores: Scores) -> str:
    """The three most frequent kinds of reason, counted."""
    kinds = Counter(reason.split(":")[0] for reason in scores.reasons.values())
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(3))


# --- another budget -------------------------------------------------------------------------------------------------


def recut(run: str, options: KeepOptions) -> Selection:
    """Cut a finished run's stored scores at another budget, in seconds and without the model.

    Needs `options.out`. Raises `UserError` when the run is not finished or its pool has changed since.

    >>> recut("siftune-runs/daar-1f00", KeepOptions(keep="10%", out="ten.jsonl")).subset
    """
    budget = Budget.read(options)
    if options.out is None:
        raise UserError("siftune keep needs --out FILE; the run's own result is not replaced")
    check_out(options.out)
    folder = Path(run)
    manifest = read_manifest(folder)
    config = manifest["config"]
    scored = next((record for record in manifest["stages"] if record["name"] == "score"), None)
    again = f"run siftune select --config {folder / CONFIG} --run {folder}"
    if scored is None:
        raise UserError(f"{folder} has no scores yet; {again} first")
    if not (folder / SCORES).is_file() or hash_file(folder / SCORES) != scored["files"].get(SCORES):
        raise UserError(f"{folder / SCORES} has changed since its run; {again}, which computes it again")
    refuse_overlap({"--out": options.out}, setting_inputs(config, "the run's {}") | {"--config": options.config})
    refuse_inside(options.out, folder)
    reading = {item.name: config.get(item.name) for item in dataclasses.fields(Reading)}
    sources, columns = reading.get("pool"), reading.get("columns")
    if not isinstance(sources, list) or not sources or not isinstance(columns or {}, dict):
        raise UserError(f"{folder / MANIFEST} is damaged: it does not name the run's pool; {again}, in another --run")
    pool = read_pool(SelectOptions(**reading, cache=options.cache))
    if pool.fingerprint != manifest["inputs"].get("pool"):
        raise UserError(
            f"the pool {', '.join(map(str, sources))} has changed since {folder} scored it; run siftune select"
        )
    scores = read_scores(folder / SCORES, pool, manifest.get("info", {}))
    budget.check(pool, scores.domains)
    subset = budget.cut(scores)
    out = subset.write(options.out, order=budget.order)
    return Selection(folder, {**manifest, "rows": counted(pool, subset)}, out, subset, pool)
