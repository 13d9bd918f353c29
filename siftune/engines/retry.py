"""The retry policy of one shard: retried after a failure, and where it keeps failing, its failing rows are located.

A shard that raises or kills its worker is retried. If it still fails, it is halved until single rows are left that fail
alone; they get a reason, and the shard is computed as if they had been bad rows from the start, so that every other row
has the score that it would have had without them. A row-independent failure (bad input, full disk, a GPU without
memory) is raised as it is, and memory that runs out whichever rows are left out is one sentence. The policy is the same
in one process and on a cluster, so a failing row has the same reason everywhere.
Cost: nothing for a shard that succeeds; about two shards and 2 * log2(rows) calls per failing row.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from ..errors import UserError, is_failure, one_line
from ..records import Pool, Shard, ShardResult

MAX_FAILING_ROWS = 8
"""Rows of a shard that may be left out; with more, the failure is not due to single rows."""
MAX_DEATHS = 3
"""Times a shard may lose its worker (preemption, memory that runs out) before its rows are searched."""
REASON_CHARACTERS = 200
"""Characters of an error that a row's reason shows."""

OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")
"""How an attempt's error begins where memory ran out, on the processor or on the GPU."""

LeftOut = Mapping[int, str]
"""Rows that are left out of an attempt, beyond the pool's own bad rows, with a reason each."""


@dataclass(frozen=True, eq=False)
class Done:
    """A shard's result."""

    result: ShardResult
    reused: bool = False
    """It was in the store."""
    partial: bool = False
    """Rows that failed were left out of it; it is not in the store yet."""


@dataclass(frozen=True, eq=False)
class Failed:
    """An attempt that gave no result."""

    message: str
    """The error's type and message, on one line."""
    died: bool = False
    """The worker is gone; else it raised."""
    final: bool = False
    """Row-independent: neither a retry nor leaving rows out helps."""
    error: BaseException | None = None
    """What was raised, where it was raised in this process or can be raised again."""
    trace: str = ""
    """Where it was raised, in a worker."""

    @classmethod
    def of(cls, error: BaseException, trace: str = "") -> Failed:
        """The outcome of an attempt that raised `error`; an interruption, which is not a failure, is raised again."""
        if not is_failure(error):
            raise error
        return cls(one_line(error, 2000), final=_is_final(error), error=error, trace=trace)

    def throw(self, shard: Shard) -> None:
        """Raise the error of this attempt."""
        where = f"rows {shard.start}-{shard.stop - 1}"
        if self.message.startswith(OUT_OF_MEMORY):
            raise UserError(
                f"memory ran out in {where}, and not because of a single row "
                f"({self.message[:REASON_CHARACTERS]}); use fewer workers, lower --token-budget or --max-length, or use a machine with more memory"
            ) from self.error
        if self.error is not None:
            if self.trace:
                self.error.add_note(self.trace)
            raise self.error
        if self.died:
            raise UserError(
                f"the worker of {where} died {MAX_DEATHS} times, and not because of a single row "
                f"({self.message}); it may run out of memory: use fewer workers, or more memory each"
            )
        raise RuntimeError(f"{where}: {self.message}\n{self.trace}")


Outcome = Done | Failed


def _is_final(error: BaseException) -> bool:
    """Bad input or the state of the machine: independent of the rows. `MemoryError` may be due to one huge row."""
    return isinstance(error, (UserError, OSError)) or type(error).__name__ == "OutOfMemoryError"


def retry_policy(pool: Pool, shard: Shard) -> Generator[LeftOut, Outcome, Done]:
    """Yields what to leave out of the next attempt, is sent its outcome, returns the shard's result or raises.

    >>> policy = retry_policy(pool, shard); left_out = next(policy)
    >>> left_out = policy.send(outcome)         # StopIteration holds the result
    """
    outcome = yield from _retried(shard)
    if isinstance(outcome, Done):
        return outcome
    rows = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
    if isinstance((yield _without(rows, [])), Failed):
        outcome.throw(shard)
    failing: dict[int, str] = {}
    while isinstance(outcome, Failed) and len(failing) < MAX_FAILING_ROWS:
        row, reason = yield from _find(shard, rows, [row for row in rows if row not in failing], outcome)
        failing[row] = reason
        outcome = yield dict(failing)
    if isinstance(outcome, Failed):
        outcome.throw(shard)
    assert isinstance(outcome, Done)
    for row, reason in failing.items():
        warnings.warn(f"row {row} is left out, {reason}", stacklevel=2)
    return Done(ShardResult(outcome.result.columns, {**outcome.result.reasons, **failing}), partial=True)


def _retried(shard: Shard) -> Generator[LeftOut, Outcome, Outcome]:
    """The complete shard, twice, or more often where its worker died. Raises a row-independent failure."""
    raised = deaths = 0
    while True:
        outcome = yield {}
        if isinstance(outcome, Done):
            return outcome
        if outcome.final:
            outcome.throw(shard)
        raised, deaths = raised + (not outcome.died), deaths + outcome.died
        if raised == 2 or deaths == MAX_DEATHS:
            return outcome


def _find(
    shard: Shard, rows: list[int], suspects: list[int], failure: Failed
) -> Generator[LeftOut, Outcome, tuple[int, str]]:
    """One of the suspects that fails alone, and its reason; raises `failure` where no single row fails alone."""
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
    what = "its worker died" if outcome.died else outcome.message[:REASON_CHARACTERS]
    return suspects[0], f"could not be scored: {what}"


def _refuse(outcome: Outcome, shard: Shard) -> None:
    if isinstance(outcome, Failed) and outcome.final:
        outcome.throw(shard)


def _without(rows: list[int], kept: list[int]) -> dict[int, str]:
    """All of `rows` but `kept`, left out."""
    kept_rows = set(kept)
    return {row: "left out while a failing row is looked for" for row in rows if row not in kept_rows}
