"""Shards on this machine, in this process or in several; finished ones are kept in a store and never computed twice.

Same results as `offline.base.SerialEngine`, which is the meaning of every engine. Several workers are processes of
their own, one GPU each where there are any, all with the thread setting of this one.
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
from .retry import Done, Failed, Outcome, course
from .shard import Progress, Work


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
    """Threads inside a shard; None is torch's own number here. Part of a shard's key, the same for every worker."""
    workers: int = 1
    """Processes; 1 is this one. Each has its own copy of the model, and the GPU of its number where there are GPUs."""
    computed: int = field(default=0, init=False)
    """Shards computed since this engine was made."""
    reused: int = field(default=0, init=False)
    """Shards taken from the store since this engine was made."""

    def run(
        self, task: ShardTask, pool: Pool, shards: Sequence[Shard], *, label: str
    ) -> Iterator[tuple[Shard, ShardResult]]:
        """Every shard with its result, in order. A shard is in the store before it is handed out.

        A shard that fails is tried again, then its failing rows are left out with a reason (see `course`).
        """
        if self.progress is not None:
            self.progress.start(label, sum(len(shard) for shard in shards))
        try:
            self._sweep()
            for shard, done in self._results(task, pool, shards):
                self.computed, self.reused = self.computed + (not done.reused), self.reused + done.reused
                if self.progress is not None:
                    self.progress.advance(len(shard))
                yield shard, done.result
        finally:
            if self.progress is not None:
                self.progress.close()

    # --- here, or there -----------------------------------------------------------------------------------------------

    def _results(self, task: ShardTask, pool: Pool, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Done]]:
        work = Work(task, pool, self.store, torch.get_num_threads() if self.threads is None else self.threads)
        left = deque(shards)
        if self.workers > 1 and not stays(task):
            while left and (found := work.found(left[0])) is not None:
                yield left.popleft(), found
        if self.workers > 1 and not stays(task) and len(left) > 1:
            from .processes import Processes

            with closing(Processes(work, min(self.workers, len(left)))) as crew:
                yield from dispatch(crew, work, left)
        else:
            for shard in left:
                yield shard, here(work, shard)

    def _sweep(self) -> None:
        """Remove what dead processes left half-written in the store."""
        if self.store is not None:
            for folder in Path(self.store.folder).glob("??"):
                sweep_temporaries(folder)


def stays(task: ShardTask) -> bool:
    """Must this task stay in one process? One that asks a server does: it has one journal, and is concurrent inside."""
    return bool(getattr(task, "one_process", False))


def here(work: Work, shard: Shard) -> Done:
    """One shard through its course, in this process."""
    way = course(work.pool, shard)
    left_out = next(way)
    while True:
        outcome: Outcome
        try:
            outcome = work.attempt(shard, left_out)
        except BaseException as error:
            outcome = Failed.of(error)
        try:
            left_out = way.send(outcome)
        except StopIteration as stop:
            done: Done = stop.value
            return work.kept(shard, done) if done.mended else done
