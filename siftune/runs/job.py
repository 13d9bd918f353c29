"""A selection before it runs: everything that can be invalid (options, rows, budget, seeds, model folder), checked
before a weight is loaded, and the configuration that identifies the run. Cost: one pass over the pool for its index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .. import registry
from ..data.protect import refuse_overlap, setting_inputs
from ..engines import check_engine
from ..errors import UserError
from ..files import hash_file
from ..offline.base import OfflineMethod
from ..records import Pool
from .cut import DEFAULT_KEEP, Budget, check_out
from .filtering import benchmark_files, check_filtering
from .options import ONE_RUN, PARTS, Reading, SelectOptions, unknown

if TYPE_CHECKING:
    from ..engines.shard import Progress

RUNS = Path("siftune-runs")


@dataclass(frozen=True)
class Job:
    """A selection whose options and rows are checked."""

    method: OfflineMethod
    pool: Pool
    options: SelectOptions
    budget: Budget
    config: Mapping[str, Any]
    """The resolved options that identify the run: written to config.yaml."""
    load_seconds: float
    progress: Progress | None = field(default=None)
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    """Content hashes of the files of `--decontaminate`, by path."""
    scored: Pool | None = None
    """The pool without the rows that `--near-duplicates` and `--decontaminate` leave out, once known."""

    @property
    def rows(self) -> Pool:
        """The pool that the method sees."""
        return self.pool if self.scored is None else self.scored


def prepare(name: str, options: SelectOptions, settings: Mapping[str, Any], *, progress: Progress | None = None) -> Job:
    """Check everything that can be checked without a model's weights; reads the pool."""
    budget = Budget.read(options)
    check_out(options.out)
    check_engine(options)
    benchmarks = check_filtering(options, cache=options.cache)
    method = build(name, options.seed, settings)
    outputs = {"--out": options.out, "--run": options.run}
    refuse_overlap(outputs, named_inputs(options, {item: getattr(method, item) for item in settings}))
    started = perf_counter()
    pool = read_pool(options)
    seconds = perf_counter() - started
    method.cache = options.cache
    domains, labels = check_method(method), method.labels(pool)
    budget.check(pool, domains or labels, labels=bool(labels))
    if options.shards is not None:
        from ..engines.shard import part_of

        part_of(pool.shards(), options.shards)
    return Job(method, pool, options, budget, resolved(name, options, method), seconds, progress, benchmarks)


def named_inputs(options: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a command by name, for `refuse_overlap`: the pool, the method's own settings, the configuration."""
    inputs = {"the pool": list(getattr(options, "pool", ())), "--config": options.config}
    if (benchmarks := getattr(options, "decontaminate", None)) is not None:
        inputs["--decontaminate"] = [str(file) for file in benchmark_files(benchmarks)]
    return inputs | {name.replace("_", "-"): value for name, value in setting_inputs(settings, "--{}").items()}


def read_pool(options: Reading) -> Pool:
    """The pool of `--pool` and its reading options."""
    from ..data.load import load_pool

    if not options.pool:
        raise UserError("no pool; pass a file, a folder, a glob or a hub id after the method")
    return load_pool(
        options.pool[0] if len(options.pool) == 1 else list(options.pool),
        columns=options.columns,
        roles=options.roles,
        on_bad_row=options.on_bad_row,
        duplicates=options.duplicates,
        format=options.format,
        cache=getattr(options, "cache", None),
    )


def build(name: str, seed: int, settings: Mapping[str, Any]) -> OfflineMethod:
    """The method by name, with its settings. Raises `UserError` for an unknown setting."""
    cls = registry.find("offline", name).load()
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for setting in settings:
        if setting not in fields or setting in PARTS:
            raise unknown(setting, list(fields), what="setting", where=f"method {name}")
    arguments = {"seed": seed, **settings} if "seed" in fields else dict(settings)
    for setting, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and arguments.get(setting) is None:
            raise UserError(f"siftune select {name} needs --{setting.replace('_', '-')}; see its --help")
    method = cls(**arguments)
    assert isinstance(method, OfflineMethod), cls
    return method


def check_method(method: OfflineMethod) -> tuple[str, ...]:
    """Check settings, seeds and model folder without a weight; the method's domains, `()` where it has none."""
    checked = method.check()
    if (backbone := method.backbone()) is not None:
        _ = backbone.config, backbone.tokenizer
    return () if checked is None else checked.domains


def inputs_of(method: OfflineMethod) -> dict[str, str]:
    """Content hashes of what the method reads beside the pool: the files of its fields, its model, its own `inputs`."""
    hashes: dict[str, str] = {}
    for item in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, item.name)
        if isinstance(value, (str, Path)) and Path(value).is_file():
            hashes[item.name] = hash_file(value)
    if (task := method.feature_task(for_fit=True)) is not None:
        hashes["model"] = str(task.key)
    return hashes | method.inputs()


def resolved(name: str, options: SelectOptions, method: OfflineMethod) -> dict[str, Any]:
    """Every option that decides the result, defaults included, in reading order: config.yaml, which
    `--config` reads."""
    config: dict[str, Any] = {"command": "select", "method": name, "pool": list(options.pool), "seed": options.seed}
    for item in dataclasses.fields(method):  # type: ignore[arg-type]
        if item.init and item.name not in (*PARTS, *ONE_RUN, "seed"):
            config[item.name] = plain(getattr(method, item.name))
    for setting in (
        "keep",
        "tokens",
        "quota",
        "target_mix",
        "order",
        "columns",
        "roles",
        "format",
        "on_bad_row",
        "duplicates",
        "near_duplicates",
        "decontaminate",
    ):
        config[setting] = plain(getattr(options, setting))
    if all(config[budget] is None for budget in ("keep", "tokens", "quota")):
        config["keep"] = DEFAULT_KEEP
    return {setting: value for setting, value in config.items() if value is not None}


def plain(value: Any) -> Any:
    """A setting as JSON and YAML values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, Pool):
        return f"pool {value.fingerprint}"
    return str(value) if isinstance(value, Path) else value


def run_folder(options: SelectOptions, method: str, hashed: str) -> Path:
    """`--run`, else a name that is the same for the same command; a part of n has a separate folder beside it."""
    folder = Path(options.run) if options.run else RUNS / f"{method}-{hashed}"
    if options.shards is None:
        return folder
    index, _, parts = options.shards.replace(" ", "").partition("/")
    return folder.with_name(f"{folder.name}.part-{index}-of-{parts}")
