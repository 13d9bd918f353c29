"""Estimates the cost of a selection on this machine before it runs, from a short timed forward pass over a sample.

Rows, bad rows and duplicates are counted exactly; tokens, minutes and memory are estimates from a seeded sample of
rows. Cost: reading the pool, loading the model's first layers, two forward passes over the sample.

Shapes: `n` rows of the sample.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np

from ..data.protect import refuse_overlap
from ..errors import UserError
from ..files import cache_folder
from ..records import SHARD_ROWS, Pool
from .folder import peak_memory_mb
from .job import build, named_inputs, read_pool
from .options import PlanOptions
from .stored import counted

METHOD = "daar"
WARM_UP_ROWS = 16


def plan(options: PlanOptions, settings: Mapping[str, Any], *, method: str = METHOD) -> dict[str, Any]:
    """Facts and estimates for `siftune select METHOD`, as JSON values; for other methods than daar see `plan_method`.

    Bad rows are counted and are not an error here. Raises `UserError` for a pool, settings or a model that cannot be used.

    >>> plan(PlanOptions(pool=["pool.jsonl"]), {"model": "./model"})["estimate"]["minutes"]
    """
    if method != METHOD:
        from .plan_method import plan_method

        return plan_method(method, options, settings)
    from ..offline.daar.selector import DaaR

    selector = build(METHOD, options.seed, settings)
    refuse_overlap({"--out": options.out, "--run": options.run}, named_inputs(options, settings))
    assert isinstance(selector, DaaR), METHOD
    backbone = selector.backbone()
    assert backbone is not None, "daar reads a model"
    cache = cache_folder(options.cache)
    pools_before = _entries(cache / "pools")
    pool = read_pool(dataclasses.replace(options, on_bad_row="skip"))
    measured = measure(backbone, pool, sample=options.sample, seed=options.seed)
    probe_rows = min(selector.probe_rows, max(1, len(pool.eligible) // 2))
    return {
        "method": METHOD,
        "model": str(settings.get("model")),
        "rows": counted(pool),
        "measured": measured,
        "estimate": estimate(measured, len(pool.eligible), probe_rows),
        "writing": writing(settings),
        "cache": {
            "folder": str(cache),
            "pool_index": "reused" if _entries(cache / "pools") == pools_before else "made now",
            "finished_shards": _entries(cache / "shards", "*/*.safetensors"),
        },
    }


def measure(backbone: Any, pool: Pool, *, sample: int, seed: int) -> dict[str, Any]:
    """Tokens and speed of a seeded sample of usable rows, through the model's first layers on this machine."""
    from ..models.features import extract_tokens
    from ..models.tokenise import Tokenised, texts_of, tokenise

    if sample < 1:
        raise UserError(f"--sample must be >= 1, got {sample}")
    eligible = pool.eligible
    drawn = np.sort(np.random.default_rng(seed).choice(eligible, size=min(sample, len(eligible)), replace=False))

    def tokenised(picked: Any) -> list[Tokenised]:
        return tokenise(backbone, texts_of(pool.read(picked.tolist()), backbone.tokenizer))

    started = perf_counter()
    extract_tokens(backbone, tokenised(drawn[:WARM_UP_ROWS]))  # loads tokenizer and layers
    loaded = perf_counter() - started
    started = perf_counter()
    rows = tokenised(drawn)
    extract_tokens(backbone, rows)
    seconds = perf_counter() - started
    failing = {int(index): row.reason for index, row in zip(drawn, rows, strict=True) if row.reason is not None}
    rows = [row for row in rows if row.reason is None]
    _warn_failing(pool, failing, readable=len(rows))
    lengths_n = np.array([len(row.ids) for row in rows], dtype=np.int64)
    return {
        "sample_rows": len(rows),
        "sample_rows_left_out": len(failing),
        "tokens_per_row": float(lengths_n.mean()),
        "tokens_per_row_error": float(lengths_n.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else None,
        "truncated_share": float(np.mean([row.truncated for row in rows])),
        "rows_per_second": len(rows) / seconds,
        "tokens_per_second": float(lengths_n.sum() / seconds),
        "load_seconds": loaded,
        "device": str(backbone.torch_device),
        "width": int(backbone.width),
        "peak_memory_mb": peak_memory_mb(),
        "device_memory_mb": _device_memory_mb(backbone.torch_device),
    }


def _warn_failing(pool: Pool, failing: Mapping[int, str], *, readable: int) -> None:
    """Warn of the sample's rows that cannot be tokenised, naming the first; raises `UserError` where all of them fail."""
    if not failing:
        return
    row, reason = next(iter(failing.items()))
    ((file, line),) = pool.source.locations([row])
    if not readable:
        raise UserError(f"none of the sample's {len(failing)} rows can be tokenised; {file}, line {line}: {reason}")
    warnings.warn(
        f"{len(failing)} of the sample's {len(failing) + readable} rows cannot be tokenised; a selection leaves such "
        f"rows out; {file}, line {line}: {reason}",
        stacklevel=2,
    )


def estimate(measured: Mapping[str, Any], usable: int, probe_rows: int) -> dict[str, Any]:
    """Estimates for the complete pool: one pass over the probe set for the fit, one over the pool for the scores.

    Memory beyond the sample's is one shard of features; disk is the probe set's features and the scores.
    """
    seconds = (usable + probe_rows) / measured["rows_per_second"] + measured["load_seconds"]
    shard_mb = 3 * SHARD_ROWS * measured["width"] * 4 / 1e6
    return {
        "tokens": round(measured["tokens_per_row"] * usable),
        "probe_rows": probe_rows,
        "minutes": seconds / 60,
        "memory_gb": (measured["peak_memory_mb"] + shard_mb) / 1e3,
        "disk_gb": (probe_rows * measured["width"] * 8 + usable * 64) / 1e9,
    }


def writing(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Upper bounds of the requests and tokens of a generator before rows are scored; None without a generator.

    A server usually bills less: a domain stops at its number of rows, and a reply at its end.
    """
    if settings.get("generator") is None:
        return None
    from ..offline.daar.descriptions import read_descriptions
    from ..offline.daar.synthesis import SEED_TRIES, Synthesis

    descriptions = read_descriptions(settings.get("domains"))
    how = Synthesis.of(descriptions.settings)
    domains = len(descriptions.domains)
    requests = domains * (SEED_TRIES + how.attempts)
    return {
        "generator": str(settings["generator"]),
        "domains": domains,
        "rows_wanted": domains * how.rows,
        "requests_at_least": domains * (1 + how.rows - min(how.rows, how.seeds)),
        "requests_at_most": requests,
        "reply_tokens_at_most": requests * how.max_new_tokens,
    }


def _device_memory_mb(device: Any) -> int | None:
    """Peak memory on a CUDA device so far, in MB; None elsewhere."""
    import torch

    return round(torch.cuda.max_memory_allocated(device) / 1e6) if device.type == "cuda" else None


def _entries(folder: Any, pattern: str = "*") -> int:
    return sum(1 for _ in folder.glob(pattern)) if folder.is_dir() else 0
