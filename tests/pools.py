"""Pools in memory for the tests, so that a test of a method needs no file: rows are dicts of any recognised format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from siftune.data.formats import Reading, recognise
from siftune.records import Pool, Row


def row_id(original: Mapping[str, Any]) -> str:
    text = json.dumps(original, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class MemoryRows:
    """A `RowSource` over a list."""

    rows: tuple[Mapping[str, Any], ...]
    format: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> list[Row]:
        return [Reading(self.format).row(int(row), row_id(self.rows[row]), self.rows[row]) for row in rows]

    def originals(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [dict(self.rows[row]) for row in rows]

    def ids(self, rows: Sequence[int]) -> list[str]:
        return [row_id(self.rows[row]) for row in rows]

    def locations(self, rows: Sequence[int]) -> list[tuple[str, int]]:
        return [("memory", int(row) + 1) for row in rows]

    def write(self, rows: Sequence[int], path: Path) -> None:
        path.write_text("".join(json.dumps(self.rows[row]) + "\n" for row in rows))


def make_pool(rows: Sequence[Mapping[str, Any]], reasons: Mapping[int, str] | None = None) -> Pool:
    """A pool of these rows; `reasons` marks the bad ones."""
    reasons = dict(reasons or {})
    first = next(row for number, row in enumerate(rows) if number not in reasons)
    source = MemoryRows(tuple(rows), recognise(first, {}) or "alpaca")
    ids = source.ids(range(len(rows)))
    return Pool(
        source=source,
        format=source.format,
        fingerprint=row_id({"ids": ids, "reasons": sorted(reasons.items())}),
        reasons=reasons,
        duplicates=len(ids) - len(set(ids)),
    )
