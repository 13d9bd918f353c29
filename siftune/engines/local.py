"""Shards on this machine, in this process or in several; finished ones are kept in a store and never computed twice.

Same results as `offline.base.SerialEngine`, which defines the result of every engine. Several workers are separate
processes, one GPU each where there are any, all with the thread setting of this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import torch

from ..files import sweep_temporaries
from ..models.store import Store
from ..records import Pool, Shard, ShardResult, ShardTask
from .dispatch import dispatch
from .retry import Done, Failed, Outcome, retry_policy
from .shard import Progress, Work


@dataclass(eq=False)
class LocalEngine:
    """Runs shards in order, here. A run that was stopped resumes after its last finished shard.

    >>> engine = LocalEngine(Store("cache/shards"))
    >>> method.engine = engine
    >>> scores = method.score(pool); engine.computed, engine.reused
    """

    store: Store | None = None
    """Where finished shards are kept; None keeps nothing."""
    _: KW_ONLY
    progress: Progress | None = None
    """Receives every finished shard."""
    threads: int | None = None
    """Threads inside a shard; None is torch's own number here. Part of a shard's key, the same for every worker."""
    workers: int = 1
    """Processes; 1 is this one. Each has its own copy of the model, and the GPU of its number where there are GPUs."""
    computed: int = field(default=0, init=False)
    """Shards computed since this engine was created."""
    reused: int = field(default=0, init=False)
    """Shards taken from the store since this engine was created."""

    def run(
        self, task: ShardTask, pool: Pool, shards: Sequence[Shard], *, label: str
    ) -> Iterator[tuple[Shard, ShardResult]]:
        """Every shard with its result, in order. A shard is in the store before it is yielded.

        A shard that fails is tried again, then its failing rows are left out with a reason (see `retry_policy`).
        """
        if self.progress is not None:
            self.progress.start(label, sum(len(shard) for shard in shards))
        try:
            self._sweep()
            for shard, result in self._results(task, pool, shards):
                self.computed, self.reused = self.computed + (not result.reused), self.reused + result.reused
                if self.progress is not None:
                    self.progress.advance(len(shard))
                yield shard, result.result
        finally:
            if self.progress is not None:
                self.progress.close()

    # --- in this process, or in several ---------------------------------------------------------------------------------

    def _results(self, task: ShardTask, pool: Pool, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Done]]:
        work = Work(task, pool, self.store, torch.get_num_threads() if self.threads is None else self.threads)
        remaining = deque(shards)
        if self.workers > 1 and not needs_one_process(task):
            while remaining and (result := work.load(remaining[0])) is not None:
                yield remaining.popleft(), result
        if self.workers > 1 and not needs_one_process(task) and len(remaining) > 1:
            from .processes import Processes

            with closing(Processes(work, min(self.workers, len(remaining)))) as workers:
                yield from dispatch(workers, work, remaining)
        else:
            for shard in remaining:
                yield shard, run_in_process(work, shard)

    def _sweep(self) -> None:
        """Remove what dead processes left incomplete in the store."""
        if self.store is not None:
            for folder in Path(self.store.folder).glob("??"):
                sweep_temporaries(folder)


def needs_one_process(task: ShardTask) -> bool:
    """Whether this task must run in one process. One that sends requests to a server
    must: it has one journal, and is concurrent inside."""
    return bool(getattr(task, "one_process", False))


def run_in_process(work: Work, shard: Shard) -> Done:
    """One shard under the retry policy, in this process."""
    policy = retry_policy(work.pool, shard)
    left_out = next(policy)
    while True:
        outcome: Outcome
        try:
            outcome = work.attempt(shard, left_out)
        except BaseException as error:
            outcome = Failed.of(error)
        try:
            left_out = policy.send(outcome)
        except StopIteration as stop:
            result: Done = stop.value
            return work.keep(shard, result) if result.partial else result
