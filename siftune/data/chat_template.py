"""Chat templates, rendered under limits: they are programs that come with a model, and must not end a run.

A render is stopped between two operations of the template when it takes too much processor time or memory, in any
thread and in any process; its result may be only so much longer than the row's messages. What the template raises, and
a render that was stopped, becomes the row's reason. A single operation inside Python itself (such as one multiplication
of enormous numbers) is not interrupted; the operator `**`, which produces them easily, is refused.
Cost: some microseconds per render; one thread that checks ten times a second while templates are rendered.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import UserError
from .bad_row import BadRow, row_failures

SECONDS, SECONDS_PER_CHARACTER = 2.0, 1e-5
"""Processor time of one render: a constant, and some for every character of the messages (usual templates: 1e-4 s)."""
MEMORY, MEMORY_PER_CHARACTER = 2**30, 100
"""Bytes by which the process may grow during one render."""
MOST_ADDED = 64 * 2**20
"""Characters by which a rendered row may exceed its messages."""
MOST_OVERRUNS = 32
"""Renders of a process that may be stopped; with more, the template is considered faulty, not the rows."""
TICK = 0.1
"""Seconds between two checks of the renders in progress."""
_IDLE_TICKS = 50
_AGAIN = 1.0
"""Seconds after which a render that did not stop is stopped again."""

_OVERRUNS = itertools.count(1)

Result = TypeVar("Result")


class Refusal(BadRow):
    """The template itself refuses the row (`raise_exception`): some know no system role."""


class Overrun(BadRow):
    """A render that exceeded a limit."""


def apply_template(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """`tokenizer.apply_chat_template(turns, **options)` under the limits above.

    Raises `Refusal` where the template refuses the row, another `BadRow` with the reason where it fails, and
    `UserError` for a template that cannot be parsed or exceeded the limits more than `MOST_OVERRUNS` times.

    >>> apply_template(tokenizer, [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    characters = _characters([list(turns), options.get("tools")])
    with row_failures("chat template fails"):
        try:
            result = limited(lambda: tokenizer.apply_chat_template(turns, **options), characters=characters)
            if isinstance(result, str) and len(result) - characters > MOST_ADDED:
                raise Overrun(
                    f"chat template fails: its text is {len(result):,} characters for a row of {characters:,}"
                )
        except TemplateSyntaxError as error:
            raise UserError(f"{_name(tokenizer)} cannot be parsed (line {error.lineno}: {error}); {_FIX}") from error
        except TemplateError as error:
            if type(error) is not TemplateError:  # such as an undefined variable: an error of the template
                raise
            raise Refusal(f"chat template refuses the row: {' '.join(str(error).split())[:120]}") from error
        except Overrun as error:
            if (count := next(_OVERRUNS)) > MOST_OVERRUNS:
                raise UserError(f"{_name(tokenizer)} exceeded its limits {count} times ({error}); {_FIX}") from error
            raise
    return result


def _characters(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(item) for key, item in value.items() if key != "role")
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


_FIX = "fix it in the model's folder (chat_template.jinja, or chat_template in tokenizer_config.json)"


def check_template(tokenizer: Any) -> None:
    """Raise `UserError` for a template that cannot be parsed, uses `**`, or exceeds the limits on the shortest chat.

    Failures on other rows are reported per row.
    """
    from jinja2 import Environment, TemplateSyntaxError

    if not getattr(tokenizer, "chat_template", None):
        return
    try:
        source = str(tokenizer.get_chat_template())
        if any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(source)):
            raise UserError(f"{_name(tokenizer)} uses the operator **, which can take any time and memory; {_FIX}")
    except (ValueError, TemplateSyntaxError) as error:  # several templates without a default; reported below as well
        if isinstance(error, UserError):
            raise
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        apply_template(tokenizer, turns, tokenize=False)
    except Overrun as error:
        raise UserError(f"{_name(tokenizer)} cannot be used ({error}); {_FIX}") from error
    except BadRow:
        return


def _name(tokenizer: Any) -> str:
    return f"the chat template of model={str(getattr(tokenizer, 'name_or_path', ''))!r}"


# --- a limit of time and memory for any call ------------------------------------------------------------------------


class _Stopped(BaseException):
    """Raised in the thread of a call that exceeded a limit; no template and no library catches it."""


@dataclass(eq=False)
class _Call:
    """A call in progress, and its limits."""

    thread: int
    seconds: float
    memory: int
    clock: Callable[[], float]
    begun: float
    resident: int | None = None
    """Bytes of the process at the first check."""
    verdict: str = ""
    """The limit that was exceeded."""
    stopped: float = 0.0
    """When the call was last stopped."""

    def exceeded(self) -> str:
        """The limit that is exceeded now, or nothing."""
        if self.clock() - self.begun > self.seconds:
            return f"it took more than {self.seconds:.3g} seconds"
        resident = _resident()
        if self.resident is None:
            self.resident = resident
        if resident - self.resident > self.memory:
            return f"it took more than {self.memory / 2**30:.3g} GiB of memory"
        return ""


_LOCK = threading.Lock()
_CALLS: dict[int, _Call] = {}
"""Calls in progress, by thread."""
_WATCHES: list[threading.Thread] = []
"""The thread that checks them, where there is one."""


def limited(call: Callable[[], Result], *, characters: int) -> Result:
    """`call()`, stopped between two of its operations once it exceeds the limits for so many characters of input.

    Works in every thread, by an exception raised from another one; time is the processor time of this thread, so that a
    busy or suspended machine stops nothing. Raises `Overrun`.
    """
    thread = threading.get_ident()
    clock = _clock(thread)
    entry = _Call(
        thread, SECONDS + SECONDS_PER_CHARACTER * characters, MEMORY + MEMORY_PER_CHARACTER * characters, clock, clock()
    )
    _begin(entry)
    try:
        try:
            return call()
        finally:
            _end(entry)
    except _Stopped:
        _end(entry)
        raise Overrun(f"chat template fails: {entry.verdict}") from None


def _clock(thread: int) -> Callable[[], float]:
    """Processor time of a thread; where the system has no such clock (macOS), elapsed time."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    identity = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(identity)


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _forget() -> None:
    """In a forked process: the watching thread does not exist, and may have held the lock."""
    global _LOCK
    _LOCK = threading.Lock()
    _CALLS.clear()
    _WATCHES.clear()


os.register_at_fork(after_in_child=_forget)


def _begin(entry: _Call) -> None:
    with _LOCK:
        _CALLS[entry.thread] = entry
        if not _WATCHES:
            _WATCHES.append(threading.Thread(target=_watch, name="siftune template limits", daemon=True))
            _WATCHES[0].start()


def _end(entry: _Call) -> None:
    """Nothing is raised in the thread of `entry` afterwards, neither now nor from a stop that is still on its way."""
    while True:
        try:
            with _LOCK:
                _CALLS.pop(entry.thread, None)
                if entry.verdict:
                    _raise_in(entry.thread, None)
            return
        except _Stopped:
            continue


def _watch() -> None:
    idle = 0
    while True:
        time.sleep(TICK)
        with _LOCK:
            idle = 0 if _CALLS else idle + 1
            if idle == _IDLE_TICKS:
                _WATCHES.clear()
                return
            for entry in _CALLS.values():
                now = time.monotonic()
                if now - entry.stopped > _AGAIN and (verdict := entry.exceeded()):
                    entry.verdict, entry.stopped = verdict, now
                    _raise_in(entry.thread, _Stopped)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise `error` in a thread before its next operation; None withdraws one that was not raised yet."""
    what = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)
