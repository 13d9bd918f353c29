"""The contract of an offline method: `fit(pool) -> self`, `score(pool) -> Scores`, higher is better.

A method describes its work on one shard (`shard_task`) and, where a score depends on the whole pool, how the shards'
columns come together (`finish`). Where the shards run is the engine's business, handed in and never imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..records import Engine, Pool, Scores, Shard, ShardResult, ShardTask


class ArrayStore(Protocol):
    """What a method may keep arrays in, by content hash: `siftune.models.store.Store`, or anything like it."""

    def get(self, key: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None: ...
    def put(self, key: str, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None: ...


class OfflineMethod(ABC):
    """Base of every offline method: subclasses are keyword-only dataclasses whose `__init__` only stores arguments.

    Subclasses give `name` and `shard_task`, and override `fit` or `finish` when they learn or rank globally.
    """

    name: ClassVar[str]
    """The registry's name."""

    engine: Engine | None = None
    """Where shards run; None is this process, one after the other, nothing cached. The pipeline sets it."""

    store: ArrayStore | None = None
    """Where a method that learns may remember what it learnt; None remembers nothing. The pipeline sets it."""

    cache: str | Path | None = None
    """Cache folder for files that a method reads itself (seeds); None is the default one. The pipeline sets it."""

    def fit(self, pool: Pool) -> Self:
        """Learn what the method needs from the pool. The default learns nothing."""
        return self

    @abstractmethod
    def shard_task(self, pool: Pool) -> ShardTask:
        """The work on one shard of `pool`; its result must hold the column `score` float32 (any columns if `finish`
        makes the score)."""

    def score(self, pool: Pool) -> Scores:
        """One number per row of `pool`, NaN with a reason where there is none; the same for every engine."""
        engine = self.engine or SerialEngine()
        columns, reasons = gather(pool, engine.run(self.shard_task(pool), pool, pool.shards(), label=self.name))
        return self.finish(pool, columns, {**reasons, **pool.reasons})

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """The shards' columns, each of `n` rows, as `Scores`. The default takes the column `score` as it is."""
        return Scores(
            pool=pool,
            method=self.name,
            values=columns["score"],
            reasons=reasons,
            tokens=columns.get("tokens"),
        )


class SerialEngine:
    """Every shard in this process, in order, nothing kept: the meaning of every other engine."""

    def run(
        self, task: ShardTask, pool: Pool, shards: Sequence[Shard], *, label: str
    ) -> Iterator[tuple[Shard, ShardResult]]:
        for shard in shards:
            yield shard, task(pool, shard)


def gather(pool: Pool, results: Iterator[tuple[Shard, ShardResult]]) -> tuple[dict[str, NDArray[Any]], dict[int, str]]:
    """Shard columns side by side, in the pool's order, whatever order they arrive in; plus every reason.

    Rows of shards that did not run hold NaN (floats) or -1 (integers).
    """
    columns: dict[str, NDArray[Any]] = {}
    reasons: dict[int, str] = {}
    for shard, result in results:
        for name, values in result.columns.items():
            assert len(values) == len(shard), (name, len(values), len(shard))
            if name not in columns:
                fill = np.nan if np.issubdtype(values.dtype, np.floating) else -1
                columns[name] = np.full((len(pool), *values.shape[1:]), fill, dtype=values.dtype)
            columns[name][shard.start : shard.stop] = values
        reasons.update(result.reasons)
    return columns, reasons
