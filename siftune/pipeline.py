"""From a pool file to a chosen file: load, fit, score, cut, each a stage of a run folder that is never done twice.

`select` is what `siftune select` runs, `recut` what `siftune keep` runs. Everything the user can get wrong (options,
rows, budget, seeds, model folder) is checked before a weight is loaded. Cost beyond the method's own: one pass over
the pool for its index, one for rows.parquet, one over the chosen rows.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import registry
from .budget import parse_keep
from .config import PARTS, KeepOptions, Reading, SelectOptions, unknown
from .data.files import atomic_path, cache_folder, hash_file, hash_json
from .engines import check_engine
from .errors import UserError
from .offline.base import OfflineMethod
from .records import Pool, Scores, Subset
from .run import CONFIG, RunFolder, identity, peak_memory_mb, read_manifest
from .stored import ROWS, SCORES, SELECTED, counted, read_scores, write_rows, write_scores

if TYPE_CHECKING:
    from .engines.shard import Progress

DEFAULT_KEEP = "20%"
"""DaaR's budget: 8,000 of 40,000 rows."""
RUNS = Path("siftune-runs")


@dataclass(frozen=True)
class Budget:
    """A budget as the user said it, checked: what `Scores.keep` takes."""

    rule: Mapping[str, Any]
    order: Literal["original", "score"] = "original"

    @classmethod
    def read(cls, options: Any) -> Budget:
        """From `--keep`, `--tokens`, `--quota` and `--target-mix`. Raises `UserError` when they do not go together."""
        said = {name: getattr(options, name) for name in ("keep", "tokens", "quota")}
        given = [name for name, value in said.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} are two budgets; give one of them")
        rule: dict[str, Any] = {}
        if "tokens" in given:
            if options.tokens < 1:
                raise UserError(f"--tokens {options.tokens} keeps nothing; give at least 1")
            rule["tokens"] = options.tokens
        elif "quota" in given:
            for amount in options.quota.values():
                parse_keep(amount)
            if options.target_mix is not None:
                raise UserError("--quota and --target-mix are two budgets; give one of them")
            rule["quota"] = dict(options.quota)
        else:
            keep = DEFAULT_KEEP if said["keep"] is None else said["keep"]
            amount = parse_keep(keep)
            rule |= {"count": amount.count} if amount.fraction is None else {"fraction": amount.fraction}
        if options.target_mix is not None:
            rule["target_mix"] = dict(options.target_mix)
        return cls(rule, options.order)

    def check(self, pool: Pool, domains: tuple[str, ...], *, labels: bool = False) -> None:
        """Refuse what the pool or the domains (`()` for none) cannot meet; `labels` are domains without p(domain | row)."""
        usable = len(pool) - len(pool.reasons)
        if self.rule.get("count", 0) > usable:
            raise UserError(f"--keep {self.rule['count']} exceeds the {usable} usable rows of the pool; lower it")
        if "fraction" in self.rule and parse_keep(float(self.rule["fraction"])).rows(usable) < 1:
            raise UserError(
                f"--keep {self.rule['fraction']:g} of {usable} usable rows is less than one row; raise it or give a "
                "number of rows"
            )
        for name in ("quota", "target_mix"):
            for domain in self.rule.get(name, {}):
                flag = "--" + name.replace("_", "-")
                if not domains:
                    raise UserError(f"{flag} needs domains, and this method has none; use daar, or give --keep alone")
                if labels and name == "target_mix":
                    raise UserError(f"{flag} needs p(domain | row), and this method has labels; use daar, or --quota")
                if domain not in domains and not (name == "quota" and domain == "*"):
                    raise UserError(f"{flag} names the domain {domain!r}, which is not one of {', '.join(domains)}")

    def cut(self, scores: Scores) -> Subset:
        """The rows kept. Raises `UserError` when none is."""
        subset = scores.keep(**self.rule)
        if not len(subset):
            raise UserError(f"the budget {dict(self.rule)} keeps no row of this pool; raise it")
        return subset


@dataclass(frozen=True)
class Selection:
    """What a selection left behind."""

    folder: Path | None
    """The run folder; None for a dry run."""
    manifest: Mapping[str, Any]
    out: Path | None = None
    """Where the chosen rows are; None for a dry run and for one part of n."""
    subset: Subset | None = None
    pool: Pool | None = None


@dataclass(frozen=True)
class Job:
    """A selection that has been checked and can run."""

    method: OfflineMethod
    pool: Pool
    options: SelectOptions
    budget: Budget
    config: Mapping[str, Any]
    """The run's identity as said: written to config.yaml."""
    load_seconds: float
    progress: Progress | None = field(default=None)


def select(
    method: str, options: SelectOptions, settings: Mapping[str, Any] | None = None, *, progress: Progress | None = None
) -> Selection:
    """Choose rows of a pool with an offline method, into a run folder that resumes by itself.

    `settings` are the method's own fields; `options.seed` fills its `seed`. Raises `UserError`.

    >>> select("random", SelectOptions(pool=["pool.jsonl"], keep="10%")).out
    """
    job = prepare(method, options, settings or {}, progress=progress)
    if options.dry_run:
        facts = {"config": job.config, "rows": counted(job.pool)}
        if (preview := getattr(job.method, "preview", None)) is not None:  # what would be asked of a judge
            facts["preview"] = preview(job.pool)
        return Selection(None, facts, pool=job.pool)
    inputs = {"pool": job.pool.fingerprint} | inputs_of(job.method)
    folder = run_folder(options, method, identity(job.config, inputs))
    with RunFolder(folder, config=job.config, inputs=inputs) as run:
        key = identity(job.config, inputs)
        with run.stage("load", hash_json([key, "load"])) as stage:
            stage.counts = {"rows": len(job.pool), "bad": len(job.pool.reasons), "duplicates": job.pool.duplicates}
            stage.seconds = job.load_seconds
        if options.shards is not None:
            return _score_part(run, job, key)
        scores = _score(run, job, key)
        return _write(run, job, scores, key)


def prepare(name: str, options: SelectOptions, settings: Mapping[str, Any], *, progress: Progress | None = None) -> Job:
    """Check all that can be checked without a model's weights, reading the pool on the way."""
    budget = Budget.read(options)
    check_out(options.out)
    check_engine(options)
    method = build(name, options.seed, settings)
    started = perf_counter()
    pool = read_pool(options)
    seconds = perf_counter() - started
    method.cache = options.cache
    domains, labels = check_method(method), labels_of(method, pool)
    budget.check(pool, domains or labels, labels=bool(labels))
    if options.shards is not None:
        from .engines.shard import part_of

        part_of(pool.shards(), options.shards)
    return Job(method, pool, options, budget, resolved(name, options, method), seconds, progress)


def read_pool(options: Reading) -> Pool:
    """The pool of `--pool` and its reading options."""
    from .data.load import load_pool

    if not options.pool:
        raise UserError("no pool was given; name a file, a folder, a glob or a hub id after the method")
    return load_pool(
        options.pool[0] if len(options.pool) == 1 else list(options.pool),
        columns=options.columns,
        on_bad_row=options.on_bad_row,
        duplicates=options.duplicates,
        format=options.format,
        cache=getattr(options, "cache", None),
    )


def build(name: str, seed: int, settings: Mapping[str, Any]) -> OfflineMethod:
    """The method by name, with its settings. Raises `UserError` for a setting it does not have."""
    cls = registry.find("offline", name).load()
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for setting in settings:
        if setting not in fields or setting in PARTS:
            raise unknown(setting, list(fields), what="setting", where=f"method {name}")
    given = {"seed": seed, **settings} if "seed" in fields else dict(settings)
    for setting, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and given.get(setting) is None:
            raise UserError(f"siftune select {name} needs --{setting.replace('_', '-')}; see its --help")
    method = cls(**given)
    assert isinstance(method, OfflineMethod), cls
    return method


def check_method(method: OfflineMethod) -> tuple[str, ...]:
    """Check settings, seeds and model folder without a weight; the method's domains, `()` where it has none.

    A method may offer `check()`, which raises `UserError` and returns what holds its `domains`, and `feature_task`,
    whose `backbone` knows the model's configuration and tokenizer.
    """
    check: Callable[[], Any] | None = getattr(method, "check", None)
    checked = check() if check is not None else None
    if backbone := getattr(_features(method), "backbone", None):
        _ = backbone.config, backbone.tokenizer
    return tuple(getattr(checked, "domains", ()))


def labels_of(method: OfflineMethod, pool: Pool) -> tuple[str, ...]:
    """The domains that the pool's own rows name, for a method that reads such labels (it offers `labels(pool)`, which
    raises `UserError`); `()` for the others."""
    labels: Callable[[Pool], tuple[str, ...]] | None = getattr(method, "labels", None)
    return () if labels is None else labels(pool)


def _features(method: OfflineMethod) -> Any:
    """The task that reads the model for the fit; None for a method that reads no model."""
    task: Callable[..., Any] | None = getattr(method, "feature_task", None)
    return None if task is None else task(for_fit=True)


def check_out(out: str | None, *, copied: bool = False) -> None:
    """Refuse a result file of an unknown kind, or a folder, before any work is done; a copy is JSONL only."""
    if out is None:
        return
    if Path(out).is_dir():
        raise UserError(f"--out {out} is a folder; give the path of a file")
    known = (".jsonl",) if copied else (".jsonl", ".jsonl.gz", ".json", ".parquet")
    if not out.endswith(known):
        raise UserError(f"--out {out} has no known suffix; give one of {', '.join(known)}")


def inputs_of(method: OfflineMethod) -> dict[str, str]:
    """Content hashes of what the method reads beside the pool: the model's layers, the seeds file, other files.

    A method may offer `inputs()` for what is no file of its fields: a folder of seeds, a generator.
    """
    found: dict[str, str] = {}
    own: Callable[[], dict[str, str]] | None = getattr(method, "inputs", None)
    for item in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, item.name)
        if isinstance(value, (str, Path)) and Path(value).is_file():
            found[item.name] = hash_file(value)
    if task := _features(method):
        found["model"] = str(task.key)
    return found | (own() if own is not None else {})


def resolved(name: str, options: SelectOptions, method: OfflineMethod) -> dict[str, Any]:
    """Every option that was said or has a default and decides the result, in a reader's order: config.yaml, which
    `--config` takes."""
    config: dict[str, Any] = {"command": "select", "method": name, "pool": list(options.pool), "seed": options.seed}
    for item in dataclasses.fields(method):  # type: ignore[arg-type]
        if item.init and item.name not in (*PARTS, "seed"):
            config[item.name] = plain(getattr(method, item.name))
    for setting in ("keep", "tokens", "quota", "target_mix", "order", "columns", "format", "on_bad_row", "duplicates"):
        config[setting] = plain(getattr(options, setting))
    if all(config[budget] is None for budget in ("keep", "tokens", "quota")):
        config["keep"] = DEFAULT_KEEP
    return {setting: value for setting, value in config.items() if value is not None}


def plain(value: Any) -> Any:
    """A setting as JSON and YAML hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def run_folder(options: SelectOptions, method: str, hashed: str) -> Path:
    """`--run`, else a name that the same command finds again; a part of n has a folder of its own beside it."""
    folder = Path(options.run) if options.run else RUNS / f"{method}-{hashed}"
    if options.shards is None:
        return folder
    index, _, parts = options.shards.replace(" ", "").partition("/")
    return folder.with_name(f"{folder.name}.part-{index}-of-{parts}")


# --- stages ---------------------------------------------------------------------------------------------------------


def _equip(run: RunFolder, job: Job) -> Any:
    """Hand the method the engine and the store; returns the engine."""
    from .engines import make_engine
    from .models.store import Store

    cache = cache_folder(job.options.cache)
    backbone = getattr(_features(job.method), "backbone", None)
    engine = make_engine(job.options, Store(cache / "shards"), backbone=backbone, progress=job.progress)
    job.method.engine = engine
    job.method.store = Store(cache / "features")
    return engine


def _fit(run: RunFolder, job: Job, key: str) -> OfflineMethod:
    """The fitted method: fitted now, or as the run folder holds it."""
    if type(job.method).fit is OfflineMethod.fit:  # it learns nothing
        return job.method
    said = {item.name: getattr(job.method, item.name) for item in dataclasses.fields(job.method) if item.init}  # type: ignore[arg-type]
    with run.stage("fit", hash_json([key, "fit"])) as stage:
        if stage.reused:
            fitted = type(job.method).load(run.folder, **said)  # type: ignore[attr-defined]
            assert isinstance(fitted, OfflineMethod)
            fitted.engine, fitted.store, fitted.cache = job.method.engine, job.method.store, job.method.cache
            return fitted
        engine: Any = job.method.engine
        before = engine.computed, engine.reused
        fitted = job.method.fit(job.pool)
        if hasattr(fitted, "save"):
            with run.watch() as stage.files:
                fitted.save(run.folder)
        stage.counts = _shards(engine, before)
    return fitted


def _shards(engine: Any, before: tuple[int, int]) -> dict[str, int]:
    """What the engine did since `before`, for a stage's counts."""
    return {"shards_computed": engine.computed - before[0], "shards_reused": engine.reused - before[1]}


def _score(run: RunFolder, job: Job, key: str) -> Scores:
    scored = hash_json([key, "score"])
    learns = type(job.method).fit is not OfflineMethod.fit
    if run.finished("score", scored) and (not learns or run.finished("fit", hash_json([key, "fit"]))):
        if learns:
            with run.stage("fit", hash_json([key, "fit"])):
                pass
        with run.stage("score", scored):  # as stored: no model is needed
            return read_scores(run.folder / SCORES, job.pool, run.manifest.get("info", {}))
    engine = _equip(run, job)
    fitted = _fit(run, job, key)
    with run.stage("score", scored) as stage:
        before = engine.computed, engine.reused
        scores = fitted.score(job.pool)
        write_scores(run.folder / SCORES, scores)
        stage.files = [SCORES]
        stage.counts = {"rows": int((~np.isnan(scores.values)).sum())} | _shards(engine, before)
        run.note(info=plain(dict(scores.info)))
    return scores


def _score_part(run: RunFolder, job: Job, key: str) -> Selection:
    """Fit, and score one part of the shards into the cache."""
    from .engines.shard import part_of

    engine = _equip(run, job)
    fitted = _fit(run, job, key)
    part = part_of(job.pool.shards(), job.options.shards)
    with run.stage(f"score {job.options.shards}", hash_json([key, job.options.shards])) as stage:
        task = fitted.shard_task(job.pool)
        before = engine.computed, engine.reused
        for _ in engine.run(task, job.pool, part, label=f"{fitted.name} {job.options.shards}"):
            pass
        stage.counts = {"rows": sum(len(shard) for shard in part)} | _shards(engine, before)
    return Selection(run.folder, run.finish(rows=counted(job.pool), part=job.options.shards), pool=job.pool)


def _write(run: RunFolder, job: Job, scores: Scores, key: str) -> Selection:
    if np.isnan(scores.values).all():  # the reasons must reach the user, and no budget is to blame
        write_rows(run.folder / ROWS, scores, np.empty(0, np.int64))
        raise UserError(f"no row has a score ({_reasons(scores)}); {run.folder / ROWS} says why for each")
    subset = job.budget.cut(scores)
    with run.stage("write", hash_json([key, "write"])) as stage:
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


def copy_out(
    subset: Subset, written: Path, out: str | None, *, order: Literal["original", "score"] = "original"
) -> Path:
    """The chosen rows at `--out` too, where it is given."""
    if out is None or Path(out).resolve() == written.resolve():
        return written
    if out.endswith(".jsonl"):
        return copy_file(written, Path(out))
    return subset.write(out, order=order)


def copy_file(written: Path, out: Path) -> Path:
    """A copy that is whole or absent."""
    with atomic_path(out) as temporary:
        shutil.copyfile(written, temporary)
    return out


# --- another budget -------------------------------------------------------------------------------------------------


def recut(run: str, options: KeepOptions) -> Selection:
    """Cut a finished run's stored scores at another budget: no model, no method, seconds.

    Needs `options.out`. Raises `UserError` when the run is not finished or its pool has changed since.

    >>> recut("siftune-runs/daar-1f00", KeepOptions(keep="10%", out="ten.jsonl")).subset
    """
    budget = Budget.read(options)
    if options.out is None:
        raise UserError("siftune keep needs --out FILE: the run's own result stays as it is")
    check_out(options.out)
    folder = Path(run)
    manifest = read_manifest(folder)
    config = manifest["config"]
    scored = next((record for record in manifest["stages"] if record["name"] == "score"), None)
    again = f"run siftune select --config {folder / CONFIG} --run {folder}"
    if scored is None:
        raise UserError(f"{folder} has no scores yet; {again} first")
    if not (folder / SCORES).is_file() or hash_file(folder / SCORES) != scored["files"].get(SCORES):
        raise UserError(f"{folder / SCORES} is not as its run left it; {again}, which makes it again")
    reading = {item.name: config.get(item.name) for item in dataclasses.fields(Reading)}
    pool = read_pool(SelectOptions(**reading, cache=options.cache))
    if pool.fingerprint != manifest["inputs"]["pool"]:
        raise UserError(
            f"the pool {', '.join(config['pool'])} has changed since {folder} scored it; run siftune select"
        )
    scores = read_scores(folder / SCORES, pool, manifest.get("info", {}))
    budget.check(pool, scores.domains)
    subset = budget.cut(scores)
    out = subset.write(options.out, order=budget.order)
    return Selection(folder, {**manifest, "rows": counted(pool, subset)}, out, subset, pool)
