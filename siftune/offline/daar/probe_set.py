"""The probe set: the rows both probes are fitted on, drawn from the pool itself, and their features.

The paper takes 5,000 rows of the pool's distribution that are not in the pool; here they are drawn from the pool and
remain eligible, because the reward targets are cross-fitted. Features come through the engine in chunks, so that a run
that is stopped loses one chunk. Cost: one truncated forward over the probe set.

Axes: `B` rows of the probe set, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...files import hash_json
from ...records import Engine, Pool, Row, RowSource, Shard, ShardTask
from ..base import gather
from ..draw import draw

CHUNK_ROWS = 512
"""Rows whose features are computed, and kept, together."""
FEWEST_ROWS = 256
"""A probe set takes more than half of the pool where half would be fewer rows than this."""


@dataclass(frozen=True, eq=False)
class PickedRows:
    """A subset of a pool's rows, in any order, as rows 0, 1, 2, ... of a smaller pool."""

    source: RowSource
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def _outer(self, rows: Sequence[int]) -> list[int]:
        return [int(self.rows[row]) for row in rows]

    def read(self, rows: Sequence[int]) -> list[Row]:
        """The rows at these positions; a row's number is its position here, so that no key depends on the larger
        pool."""
        read = self.source.read(self._outer(rows))
        return [replace(row, row=int(place)) for place, row in zip(rows, read, strict=True)]

    def originals(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return self.source.originals(self._outer(rows))

    def ids(self, rows: Sequence[int]) -> list[str]:
        return self.source.ids(self._outer(rows))

    def locations(self, rows: Sequence[int]) -> list[tuple[str, int]]:
        return self.source.locations(self._outer(rows))

    def write(self, rows: Sequence[int], path: Path) -> None:
        self.source.write(self._outer(rows), path)


def draw_probe_set(pool: Pool, probe_rows: int, *, seed: int) -> Pool:
    """`min(probe_rows, half the pool)` eligible rows (more of a tiny pool), as a pool of their own.

    The draw and its order depend on the rows' content, so a permuted pool gives the same probe set.
    Raises `UserError` for a pool with fewer than two usable rows.
    """
    usable = len(pool) - len(pool.reasons)
    if usable < 2:
        raise UserError(f"the pool has {usable} usable rows, and probes need at least 2; use a larger pool")
    count = min(probe_rows, usable, max(usable // 2, FEWEST_ROWS))
    rows = draw(pool, count, seed=seed, purpose="probe set")
    source = PickedRows(pool.source, rows)
    return Pool(source=source, format=pool.format, fingerprint=hash_json(source.ids(range(len(source)))))


def features_of(
    pool: Pool, task: ShardTask, engine: Engine, *, label: str
) -> tuple[Mapping[str, NDArray[Any]], NDArray[np.int64]]:
    """The task's columns for every row of a small pool, and the rows whose features are sound, ascending."""
    starts = range(0, len(pool), CHUNK_ROWS)
    chunks = [Shard(index, start, min(start + CHUNK_ROWS, len(pool))) for index, start in enumerate(starts)]
    columns, _ = gather(pool, engine.run(task, pool, chunks, label=label))
    sound = np.isfinite(columns["hidden"]).all(axis=1) & np.isfinite(columns["embedding"]).all(axis=1)
    return columns, np.flatnonzero(sound)
