"""Many shards over many workers, results in the shards' order, whatever order they finish in.

A `Crew` is where attempts run (processes, Ray actors); which shard goes where, what is tried again and what is handed
on lies here. At most `AHEAD` shards per worker are begun before the first that is not finished, so memory does not grow
with the pool when one shard is slow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..records import Shard
from .retry import Done, LeftOut, Outcome, course
from .shard import Work

AHEAD = 4


class Crew(Protocol):
    """Workers that hold one task and one pool."""

    @property
    def size(self) -> int:
        """Workers, numbered from 0."""
        ...

    def give(self, worker: int, shard: Shard, left_out: LeftOut) -> None:
        """Begin an attempt on a worker that has none."""

    def next(self) -> tuple[int, Outcome]:
        """Wait for any attempt to end; a worker that died in it has been replaced."""
        ...

    def close(self) -> None:
        """Let the workers go, at once."""


@dataclass
class _Under:
    """A shard under way."""

    position: int
    course: Generator[LeftOut, Outcome, Done]


def dispatch(crew: Crew, work: Work, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Done]]:
    """Every shard with its result, in order. Raises what a shard's course raises."""
    waiting = deque(range(len(shards)))
    free = deque(range(crew.size))
    under: dict[int, _Under] = {}
    finished: dict[int, Done] = {}
    due = 0
    while due < len(shards):
        while free and waiting and waiting[0] < due + AHEAD * crew.size:
            worker, position = free.popleft(), waiting.popleft()
            under[worker] = _Under(position, course(work.pool, shards[position]))
            crew.give(worker, shards[position], next(under[worker].course))
        worker, outcome = crew.next()
        busy = under[worker]
        try:
            crew.give(worker, shards[busy.position], busy.course.send(outcome))
        except StopIteration as stop:
            done: Done = stop.value
            finished[busy.position] = work.kept(shards[busy.position], done) if done.mended else done
            del under[worker]
            free.append(worker)
        while due in finished:
            yield shards[due], finished.pop(due)
            due += 1
