"""Progress where no terminal shows bars: a line on standard error at least every 30 seconds.

    siftune: select daar, 0:02:30: score > daar: 8,192 of 100,000 rows, 410 rows/s, about 0:03:44 left

A command calls `begin` and `end`; the code inside names its activity with `doing`, or through the calls that engines
and trainers make (`start`, `advance`, `close`). A separate thread prints the last known state, so that a stage that
spends long in one row is shown too. Nothing is printed in library use, in workers, or in forks.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from .errors import UserError
from .output import say

VARIABLE = "SIFTUNE_PROGRESS_SECONDS"
"""Environment variable: seconds between two lines."""
SECONDS = 30.0
SETTLED = 1.0
"""Seconds of an activity that its rate leaves out: results from a cache or a checkpoint arrive in them."""
SAMPLES = 5
"""The rate is that since the fifth line before, so that it follows a stage that becomes slower."""

Clock = Callable[[], float]
Item = TypeVar("Item")


class Activity:
    """One activity: its name, and how much of it is done."""

    def __init__(self, label: str, total: int | None, unit: str, done: int, clock: Clock) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._clock, self._began = clock, clock()
        self._samples = deque([(self._began, done)], maxlen=SAMPLES)

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        if (now := self._clock()) - self._began < SETTLED:
            self._samples[0] = (now, self.done)

    def text(self, now: float) -> str:
        """Name, count, rate and time left, as far as they are known; takes a sample for the next rate."""
        since, before = self._samples[0]
        rate = (self.done - before) / (now - since) if now > since else 0.0
        self._samples.append((now, self.done))
        if self.total is None:
            parts = [f"{self.done:,} {self.unit}"] if self.done else []
        else:
            parts = [f"{self.done:,} of {self.total:,} {self.unit}"]
        if rate > 0:
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s")
            if self.total is not None:
                parts.append(f"about {_time(max(0, self.total - self.done) / rate)} left")
        return f"{self.label}: {', '.join(parts)}" if parts else self.label


class ProgressLines:
    """The lines of one command. Engines report to it as they do to the bars of a terminal.

    >>> with ProgressLines("select random", every=30):
    ...     with doing("score", total=100) as score:
    ...         score.advance(10)
    """

    def __init__(self, command: str, *, every: float | None = None, clock: Clock = time.monotonic) -> None:
        self.command, self.every, self.clock = command, seconds() if every is None else every, clock
        self._began = clock()
        self._stream = sys.stderr  # as it is now: it may be redirected while a library is silenced
        self._activities: list[Activity] = []
        self._started: Activity | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="siftune progress", daemon=True)

    def __enter__(self) -> ProgressLines:
        global _lines
        _lines = self
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        global _lines
        _lines = None
        self._over.set()
        self._thread.join(timeout=5)  # a stream that blocks must not keep the command from ending

    # --- activities ---------------------------------------------------------------------------------------------------

    def push(self, label: str, total: int | None = None, unit: str = "rows", done: int = 0) -> Activity:
        """A new innermost activity."""
        activity = Activity(label, total, unit, done, self.clock)
        self._activities.append(activity)
        return activity

    def remove(self, activity: Activity) -> None:
        """The activity is over."""
        if activity in self._activities:
            self._activities.remove(activity)

    def start(self, label: str, total: int, unit: str = "rows") -> None:
        """Engines: a run named `label` over `total` rows begins."""
        self.close()
        self._started = self.push(label, total, unit)

    def advance(self, rows: int) -> None:
        """Engines: `rows` more are done."""
        if self._started is not None:
            self._started.advance(rows)

    def close(self) -> None:
        """Engines: the run is over."""
        if self._started is not None:
            self.remove(self._started)
            self._started = None

    # --- the lines ----------------------------------------------------------------------------------------------------

    def line(self) -> str:
        """The current activities, the outermost first."""
        now = self.clock()
        state = " > ".join(activity.text(now) for activity in list(self._activities)) or "working"
        return f"siftune: {self.command}, {_time(now - self._began)}: {state}"

    def _repeat(self) -> None:
        while not self._over.wait(self.every):
            with _printing:
                try:
                    say(self.line(), file=self._stream)
                except (OSError, ValueError):  # the stream is closed: no reader is left
                    return


_lines: ProgressLines | None = None
_printing = threading.Lock()
"""Held while a line is printed, so that no fork happens in the middle of one."""


def _in_fork() -> None:
    """A forked process has no progress thread, and prints nothing."""
    global _lines
    _lines = None
    _printing.release()


os.register_at_fork(before=_printing.acquire, after_in_parent=_printing.release, after_in_child=_in_fork)


def begin(command: str) -> None:
    """Print lines from now until `end`. Raises `UserError` where the environment variable is not a number of
    seconds."""
    end()
    ProgressLines(command).__enter__()


def end() -> None:
    """Print no more lines."""
    if _lines is not None:
        _lines.__exit__()


def current() -> ProgressLines | None:
    """The current `ProgressLines`, for engines and trainers to report to; None where there is none."""
    return _lines


@contextmanager
def doing(label: str, total: int | None = None, *, unit: str = "rows", done: int = 0) -> Iterator[Activity]:
    """Name what the code inside does; `advance` of what is yielded counts what is done of `total`.

    >>> with doing("reading pool.jsonl") as reading:
    ...     reading.advance(1000)
    """
    lines = _lines
    if lines is None:
        yield Activity(label, total, unit, done, time.monotonic)
        return
    activity = lines.push(label, total, unit, done)
    try:
        yield activity
    finally:
        lines.remove(activity)


def counted(
    label: str,
    items: Iterable[Item],
    total: int | None = None,
    *,
    unit: str = "rows",
    done: int = 0,
    size: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """The items as they are; each counts as `size` units of `total` once the next one is requested.

    >>> for batch in counted("held-out loss", batches, 1000, size=len): ...
    """
    with doing(label, total, unit=unit, done=done) as activity:
        for item in items:
            yield item
            activity.advance(size(item))


def seconds() -> float:
    """Seconds between two lines. Raises `UserError` where the environment variable is not a number above 0."""
    text = os.environ.get(VARIABLE, "").strip()
    try:
        value = float(text) if text else SECONDS
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{VARIABLE}={text!r} is not a number of seconds above 0; set it to 30, or unset it")
    return value


def _time(spent: float) -> str:
    """Hours, minutes and seconds.

    >>> _time(150.2)
    '0:02:30'
    """
    return str(timedelta(seconds=round(spent)))
