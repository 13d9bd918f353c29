"""The files of a run: scores.safetensors (exact, for another cut), rows.parquet (for people), counts (for both).

Equal scores give equal bytes. Cost: one pass over the pool's index for rows.parquet, in pieces, so that memory does not
grow with the pool.

Shapes: `n` rows of the pool, `K` domains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_path
from ..records import Pool, Scores, Subset

SCORES = "scores.safetensors"
ROWS = "rows.parquet"
SELECTED = "selected.jsonl"
ROWS_AT_ONCE = 65_536


def write_scores(path: Path, scores: Scores) -> None:
    """Write `Scores` exactly, without the pool and `info`, as one safetensors file; equal scores give equal bytes."""
    from safetensors.numpy import save

    optional = {
        "tokens": scores.tokens,
        "probabilities": scores.probabilities,
        "pseudo_labels": scores.pseudo_labels,
        "target_rows": scores.target_rows,
    }
    arrays = {"values": scores.values} | {name: array for name, array in optional.items() if array is not None}
    reasons = {str(row): reason for row, reason in sorted(scores.reasons.items()) if row not in scores.pool.reasons}
    facts = {"method": scores.method, "domains": list(scores.domains), "reasons": reasons}
    # one metadata key: the format does not keep the order of several
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"siftune": json.dumps(facts)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_scores(path: Path, pool: Pool, info: Mapping[str, Any]) -> Scores:
    """Read a file of `write_scores`, for the same pool."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as stored:
        facts = json.loads(stored.metadata()["siftune"])
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    return Scores(
        pool=pool,
        method=facts["method"],
        values=arrays["values"],
        reasons={**{int(row): reason for row, reason in facts["reasons"].items()}, **pool.reasons},
        tokens=arrays.get("tokens"),
        domains=tuple(facts["domains"]),
        probabilities=arrays.get("probabilities"),
        pseudo_labels=arrays.get("pseudo_labels"),
        target_rows=arrays.get("target_rows"),
        info=info,
    )


def write_rows(path: Path, scores: Scores, kept: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """`rows.parquet`: every row of the pool exactly once, bad ones included, in the pool's order. Streamed.

    Columns: row, id, file, line, tokens, score, kept, reason, pseudo_label, p_<domain> for each domain, and target_row
    (0-based, in the target) for a method with a target.
    """
    from ..data.checked_parquet import open_writer

    mask = np.zeros(len(scores.pool), dtype=bool)
    mask[kept] = True
    writer = None
    with atomic_path(path) as temporary:
        for start in range(0, len(scores.pool), ROWS_AT_ONCE):
            table = _rows_table(scores, mask, start, min(start + ROWS_AT_ONCE, len(scores.pool)))
            writer = writer or open_writer(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None, "load_pool refuses an empty pool"
        writer.close()


def _rows_table(scores: Scores, mask: np.ndarray[Any, np.dtype[np.bool_]], start: int, stop: int) -> Any:
    import pyarrow as pa

    rows = range(start, stop)
    places = scores.pool.source.locations(rows)
    values = scores.values[start:stop]
    tokens = np.full(len(rows), -1, np.int32) if scores.tokens is None else scores.tokens[start:stop]
    labels = np.full(len(rows), -1, np.int16) if scores.pseudo_labels is None else scores.pseudo_labels[start:stop]
    columns = {
        "row": pa.array(np.arange(start, stop, dtype=np.int64)),
        "id": pa.array(scores.pool.source.ids(rows), pa.string()),
        "file": pa.array([file for file, _ in places], pa.string()),
        "line": pa.array([line for _, line in places], pa.int64()),
        "tokens": pa.array(tokens, pa.int32(), mask=tokens < 0),
        "score": pa.array(values, pa.float32(), mask=np.isnan(values)),
        "kept": pa.array(mask[start:stop]),
        "reason": pa.array([scores.reasons.get(row) for row in rows], pa.string()),
        "pseudo_label": pa.array([scores.domains[label] if label >= 0 else None for label in labels], pa.string()),
    }
    for index, domain in enumerate(scores.domains if scores.probabilities is not None else ()):
        assert scores.probabilities is not None
        share = np.ascontiguousarray(scores.probabilities[start:stop, index])
        columns[f"p_{domain}"] = pa.array(share, pa.float32(), mask=np.isnan(share))
    if scores.target_rows is not None:
        targets = scores.target_rows[start:stop]
        columns["target_row"] = pa.array(targets, pa.int32(), mask=targets < 0)
    return pa.table(columns)


def counted(pool: Pool, subset: Subset | None = None) -> dict[str, Any]:
    """The row counts of a run, with every row that was left out counted under its reason."""
    scores = subset.scores if subset is not None else None
    kinds: dict[str, int] = {}
    for reason in (scores.reasons if scores is not None else pool.reasons).values():
        kind = reason.split(":")[0]
        kind = "duplicate" if kind.startswith("duplicate of row") else kind
        kinds[kind] = kinds.get(kind, 0) + 1
    facts: dict[str, Any] = {
        "read": len(pool),
        "usable": len(pool) - len(pool.reasons),
        "duplicates": pool.duplicates,
        "reasons": dict(sorted(kinds.items())),
    }
    if scores is not None and subset is not None:
        facts["kept"] = len(subset)
        if scores.tokens is not None:
            facts["tokens"] = int(np.maximum(scores.tokens, 0).sum(dtype=np.int64))
            facts["tokens_kept"] = int(np.maximum(scores.tokens[subset.rows], 0).sum(dtype=np.int64))
        if scores.pseudo_labels is not None:
            facts["domains"] = {
                name: {
                    "pool": int((scores.pseudo_labels == index).sum()),
                    "kept": int((scores.pseudo_labels[subset.rows] == index).sum()),
                }
                for index, name in enumerate(scores.domains)
            }
    return facts
