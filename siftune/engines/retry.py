"""The course of one shard through failures: tried again, and where it keeps failing, the rows that are to blame are found.

A shard that raises or kills its worker is tried again. Still failing, it is halved until single rows are left that fail
alone; they get a reason, and the shard is computed as if they had been bad rows from the start, so that every other row
has the number it would have had without them. What is no row's fault (bad input, full disk, a GPU without memory) is
raised as it is, and memory that runs out whichever rows are left out is one sentence. The same course in one process or a cluster, so a poisoned row has the same reason wherever it meets its engine.
Cost: nothing for a sound shard; about two shards and 2 * log2(rows) calls per poisoned row.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from ..errors import UserError, is_failure, one_line
from ..records import Pool, Shard, ShardResult

MOST_POISONED = 8
"""Rows of a shard that may be left out; more than these is no matter of rows."""
DEATHS = 3
"""Times a shard may lose its worker (machines are taken away, memory runs out) before a row is suspected."""
SAID = 200
"""Characters of an error that a row's reason shows."""

OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")
"""How an attempt's error begins where memory ran out, on the processor or on the GPU."""

LeftOut = Mapping[int, str]
"""Rows that take no part in an attempt, beside the pool's own, with a reason each."""


@dataclass(frozen=True, eq=False)
class Done:
    """A shard's result."""

    result: ShardResult
    reused: bool = False
    """A store had it."""
    mended: bool = False
    """Rows that failed were left out of it; it is not in the store yet."""


@dataclass(frozen=True, eq=False)
class Failed:
    """An attempt that gave no result."""

    said: str
    """The error's type and message, on one line."""
    died: bool = False
    """The worker is gone; else it raised."""
    final: bool = False
    """No row's fault: trying again does not help, leaving rows out does not either."""
    error: BaseException | None = None
    """What was raised, where it was raised in this process or can be raised again."""
    trace: str = ""
    """Where it was raised, in a worker."""

    @classmethod
    def of(cls, error: BaseException, trace: str = "") -> Failed:
        """What `error` says of an attempt; an interruption, which is no failure, is raised again."""
        if not is_failure(error):
            raise error
        return cls(one_line(error, 2000), final=_is_final(error), error=error, trace=trace)

    def throw(self, shard: Shard) -> None:
        """Raise what happened."""
        where = f"rows {shard.start}-{shard.stop - 1}"
        if self.said.startswith(OUT_OF_MEMORY):
            raise UserError(
                f"memory ran out in {where}, and no single row is to blame ({self.said[:SAID]}); use fewer workers, lower "
                "--token-budget or --max-length, or take a machine with more memory"
            ) from self.error
        if self.error is not None:
            if self.trace:
                self.error.add_note(self.trace)
            raise self.error
        if self.died:
            raise UserError(
                f"the worker of {where} died {DEATHS} times, and no single row is to blame ({self.said}); it may lack "
                "memory: use fewer workers, or more memory each"
            )
        raise RuntimeError(f"{where}: {self.said}\n{self.trace}")


Outcome = Done | Failed


def _is_final(error: BaseException) -> bool:
    """Bad input, the machine's state: no row explains these. `MemoryError` may be one huge row's."""
    return isinstance(error, (UserError, OSError)) or type(error).__name__ == "OutOfMemoryError"


def course(pool: Pool, shard: Shard) -> Generator[LeftOut, Outcome, Done]:
    """Yields what to leave out of the next attempt, is sent its outcome, returns the shard's result or raises.

    >>> way = course(pool, shard); left_out = next(way)
    >>> left_out = way.send(outcome)         # StopIteration holds the result
    """
    outcome = yield from _tried(shard)
    if isinstance(outcome, Done):
        return outcome
    rows = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
    if isinstance((yield _without(rows, [])), Failed):
        outcome.throw(shard)
    poisoned: dict[int, str] = {}
    while isinstance(outcome, Failed) and len(poisoned) < MOST_POISONED:
        row, reason = yield from _find(shard, rows, [row for row in rows if row not in poisoned], outcome)
        poisoned[row] = reason
        outcome = yield dict(poisoned)
    if isinstance(outcome, Failed):
        outcome.throw(shard)
    assert isinstance(outcome, Done)
    for row, reason in poisoned.items():
        warnings.warn(f"row {row} is left out, {reason}", stacklevel=2)
    return Done(ShardResult(outcome.result.columns, {**outcome.result.reasons, **poisoned}), mended=True)


def _tried(shard: Shard) -> Generator[LeftOut, Outcome, Outcome]:
    """The whole shard, twice, or more often where its worker died. Raises what is nobody's fault."""
    raised = deaths = 0
    while True:
        outcome = yield {}
        if isinstance(outcome, Done):
            return outcome
        if outcome.final:
            outcome.throw(shard)
        raised, deaths = raised + (not outcome.died), deaths + outcome.died
        if raised == 2 or deaths == DEATHS:
            return outcome


def _find(
    shard: Shard, rows: list[int], suspects: list[int], failure: Failed
) -> Generator[LeftOut, Outcome, tuple[int, str]]:
    """One of the suspects that fails alone, and its reason; raises `failure` where the fault lies in no single row."""
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        outcome = yield _without(rows, half)
        _refuse(outcome, shard)
        suspects = half if isinstance(outcome, Failed) else suspects[len(half) :]
    outcome = yield _without(rows, suspects)
    _refuse(outcome, shard)
    if isinstance(outcome, Done):
        failure.throw(shard)
    assert isinstance(outcome, Failed)
    what = "its worker died" if outcome.died else outcome.said[:SAID]
    return suspects[0], f"could not be scored: {what}"


def _refuse(outcome: Outcome, shard: Shard) -> None:
    if isinstance(outcome, Failed) and outcome.final:
        outcome.throw(shard)


def _without(rows: list[int], kept: list[int]) -> dict[int, str]:
    """All of `rows` but `kept`, left out."""
    wanted = set(kept)
    return {row: "left out while a failing row is looked for" for row in rows if row not in wanted}
