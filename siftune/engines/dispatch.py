"""Many shards over many workers, results in the shards' order, whatever order they finish in.

A `WorkerPool` is where attempts run (processes, Ray actors); which shard goes where, what is retried and what is
returned is decided here. At most `AHEAD` shards per worker are started before the first that is not finished, so memory
does not grow with the pool when one shard is slow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..records import Shard
from .retry import Done, LeftOut, Outcome, retry_policy
from .shard import Work

AHEAD = 4


class WorkerPool(Protocol):
    """Workers that hold one task and one pool."""

    @property
    def size(self) -> int:
        """Workers, numbered from 0."""
        ...

    def submit(self, worker: int, shard: Shard, left_out: LeftOut) -> None:
        """Start an attempt on an idle worker."""

    def next(self) -> tuple[int, Outcome]:
        """Wait for any attempt to end; a worker that died in it has been replaced."""
        ...

    def close(self) -> None:
        """Stop the workers at once."""


@dataclass
class _Running:
    """A shard that is being computed."""

    index: int
    policy: Generator[LeftOut, Outcome, Done]


def dispatch(workers: WorkerPool, work: Work, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Done]]:
    """Every shard with its result, in order. Raises what the retry policy of a shard raises."""
    waiting = deque(range(len(shards)))
    free = deque(range(workers.size))
    running: dict[int, _Running] = {}
    finished: dict[int, Done] = {}
    due = 0
    while due < len(shards):
        while free and waiting and waiting[0] < due + AHEAD * workers.size:
            worker, index = free.popleft(), waiting.popleft()
            running[worker] = _Running(index, retry_policy(work.pool, shards[index]))
            workers.submit(worker, shards[index], next(running[worker].policy))
        worker, outcome = workers.next()
        busy = running[worker]
        try:
            workers.submit(worker, shards[busy.index], busy.policy.send(outcome))
        except StopIteration as stop:
            done: Done = stop.value
            finished[busy.index] = work.keep(shards[busy.index], done) if done.partial else done
            del running[worker]
            free.append(worker)
        while due in finished:
            yield shards[due], finished.pop(due)
            due += 1
