"""Estimates the cost of a selection by any offline method, from a run of the method itself over a sample of the pool.

Rows, bad rows and duplicates are exact; tokens, minutes, memory and disk are estimates. A method that asks a judge is not
run: the plan holds the requests, tokens and cost of its preview. Cost: reading the pool; the method's fit on the sample,
and its score twice (once to load, once to measure).

Shapes: `n` rows of the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from ..data.protect import refuse_overlap
from ..engines.local import LocalEngine
from ..errors import UserError
from ..files import cache_folder, hash_json
from ..offline.daar.probe_set import PickedRows
from ..offline.picking import IN_MEMORY
from ..offline.similarity import SimilarityMethod
from ..records import Pool, Scores, Shard, ShardResult, ShardTask
from .folder import peak_memory_mb
from .job import build, check_method, named_inputs, plain, read_pool
from .options import PlanOptions
from .stored import counted


class MeteredEngine(LocalEngine):
    """Runs shards in this process, and counts the bytes of their results."""

    row_bytes: float = 0.0
    """Bytes of one row's result in the last run."""

    def run(
        self, task: ShardTask, pool: Pool, shards: Sequence[Shard], *, label: str
    ) -> Iterator[tuple[Shard, ShardResult]]:
        size = rows = 0
        for shard, result in super().run(task, pool, shards, label=label):
            size += sum(values.nbytes for values in result.columns.values())
            rows += len(shard)
            yield shard, result
        self.row_bytes = size / max(1, rows)


def plan_method(name: str, options: PlanOptions, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Facts and estimates for `siftune select NAME`, as JSON values.

    Bad rows are counted and are not an error here. Raises `UserError` for a pool, settings or a model that cannot be used.

    >>> plan_method("rds", PlanOptions(pool=["pool.jsonl"]), {"model": "./model", "target": "queries.jsonl"})
    """
    if options.sample < 1:
        raise UserError(f"--sample must be >= 1, got {options.sample}")
    method = build(name, options.seed, settings)
    refuse_overlap({"--out": options.out, "--run": options.run}, named_inputs(options, settings))
    method.cache = options.cache
    check_method(method)
    pool = read_pool(dataclasses.replace(options, on_bad_row="skip"))
    method.labels(pool)
    facts: dict[str, Any] = {
        "method": name,
        "rows": counted(pool),
        "cache": {"folder": str(cache_folder(options.cache))},
    }
    if (preview := method.preview(pool)) is not None:
        return facts | {"preview": plain(preview)}
    sample = draw_sample(pool, options.sample, options.seed)
    engine = method.engine = MeteredEngine()
    fit_seconds, _ = _timed(lambda: method.fit(sample))
    first_seconds, _ = _timed(lambda: method.score(sample))
    score_seconds, scores = _timed(lambda: method.score(sample))
    usable = len(pool) - len(pool.reasons)
    scale = usable / len(sample)
    fit_estimate = fit_seconds * (scale if method.fit_grows else 1.0)
    held = usable * engine.row_bytes
    if isinstance(method, SimilarityMethod):  # larger similarities are in a file
        held = min(held, float(IN_MEMORY))
    seconds = fit_estimate + max(0.0, first_seconds - score_seconds) + score_seconds * scale
    return facts | {
        "measured": {
            "sample_rows": len(sample),
            "sample_rows_left_out": len(scores.reasons),
            "tokens_per_row": _tokens_per_row(scores),
            "fit_seconds": fit_seconds,
            "fit_grows_with_the_pool": method.learns() and method.fit_grows,
            "rows_per_second": len(sample) / max(score_seconds, 1e-9),
            "peak_memory_mb": peak_memory_mb(),
        },
        "estimate": {
            "minutes": seconds / 60,
            "memory_gb": (peak_memory_mb() * 1e6 + held) / 1e9,
            "disk_gb": usable * (engine.row_bytes + 64) / 1e9,
        },
    }


def draw_sample(pool: Pool, count: int, seed: int) -> Pool:
    """Usable rows drawn by seed, in the pool's order, as a pool of their own."""
    eligible = pool.eligible
    rows = np.sort(np.random.default_rng(seed).choice(eligible, size=min(count, len(eligible)), replace=False))
    source = PickedRows(pool.source, rows)
    return Pool(source=source, format=pool.format, fingerprint=hash_json(source.ids(range(len(source)))))


def _timed(act: Any) -> tuple[float, Any]:
    started = perf_counter()
    result = act()
    return perf_counter() - started, result


def _tokens_per_row(scores: Scores) -> float | None:
    known = None if scores.tokens is None else scores.tokens[scores.tokens >= 0]
    return None if known is None or not len(known) else float(known.mean())
