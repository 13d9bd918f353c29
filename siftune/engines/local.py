"""Shards one after the other in this process; finished ones are kept in a store and never computed twice.

Same results as `offline.base.SerialEngine`, which is the meaning of every engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field

from ..models.store import Store
from ..records import Pool, Shard, ShardResult, ShardTask
from .shard import Progress, load_result, run_shard, shard_key, store_result


@dataclass(eq=False)
class LocalEngine:
    """Runs shards in order, here. A run that was stopped goes on after its last finished shard.

    >>> engine = LocalEngine(Store("cache/shards"))
    >>> method.engine = engine
    >>> scores = method.score(pool); engine.computed, engine.reused
    """

    store: Store | None = None
    """Where finished shards are kept; None keeps nothing."""
    _: KW_ONLY
    progress: Progress | None = None
    """Told of every finished shard."""
    threads: int | None = None
    """Torch threads inside a shard; None leaves torch's own number. Part of a shard's key."""
    computed: int = field(default=0, init=False)
    """Shards computed since this engine was made."""
    reused: int = field(default=0, init=False)
    """Shards taken from the store since this engine was made."""

    def run(
        self, task: ShardTask, pool: Pool, shards: Sequence[Shard], *, label: str
    ) -> Iterator[tuple[Shard, ShardResult]]:
        """Every shard with its result, in order. A shard is in the store before it is handed out."""
        if self.progress is not None:
            self.progress.start(label, sum(len(shard) for shard in shards))
        try:
            task_key = task.key if self.store is not None else ""
            for shard in shards:
                result = self._one(task, task_key, pool, shard)
                if self.progress is not None:
                    self.progress.advance(len(shard))
                yield shard, result
        finally:
            if self.progress is not None:
                self.progress.close()

    def _one(self, task: ShardTask, task_key: str, pool: Pool, shard: Shard) -> ShardResult:
        if self.store is None:
            result = run_shard(task, pool, shard, threads=self.threads)
            self.computed += 1
            return result
        key = shard_key(task_key, pool, shard, threads=self.threads)
        found = load_result(self.store, key, shard)
        if found is not None:
            self.reused += 1
            return found
        result = run_shard(task, pool, shard, threads=self.threads)
        store_result(self.store, key, shard, result)
        self.computed += 1
        return result
