"""Run a command so that every trainer in it, and in all processes that it starts, is sifted: what `siftune run` does.

The request travels in the environment; a folder on PYTHONPATH holds a `sitecustomize` that every Python process of the
command imports at its start (`siftune.integrations.startup`). No file of the command is changed. Signals are forwarded, and
the command's own exit code is returned. Cost: one waiting process, and a few microseconds per process of the command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import UserError, did_you_mean
from ..output import say
from .request import Request

STARTUP = Path(__file__).parent / "startup"
"""The folder whose `sitecustomize` every process of the command imports."""
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_FROM_TERMINAL = ("SIGINT", "SIGQUIT")
"""Signals that a terminal sends to every process of the foreground, so the command has them already."""


def launch(command: Sequence[str], request: Request) -> int:
    """Run `command` with `request` in its environment; returns its exit code, 128 + n where signal n ended it.

    Raises `UserError` for a command that cannot be run, for a trainer that selection does not work with, and for a command
    that ends without an error and never reached a trainer: it would have trained on every row unnoticed.
    """
    check_command(command)
    with tempfile.TemporaryDirectory(prefix="siftune-run-") as folder:
        code = _run(command, environment(replace(request, reports=folder), os.environ))
        reports = _read_reports(Path(folder))
    lines = {
        outcome: [line for kind, line in reports if kind == outcome] for outcome in ("attached", "left", "refused")
    }
    if lines["refused"]:
        if code == 2:  # the process printed the sentence and ended with this code itself
            return 2
        raise UserError(lines["refused"][0])
    if lines["attached"]:
        return code
    left = f" ({'; '.join(dict.fromkeys(lines['left']))})" if lines["left"] else ""
    if code:
        say(f"siftune: {command[0]} ended with exit code {code}, and no trainer was sifted{left}", error=True)
        return code
    raise UserError(
        f"{command[0]} ended and no trainer was sifted{left}, so nothing was chosen; siftune run reaches every transformers "
        "Trainer whose train() runs in a Python process that reads PYTHONPATH (not python -I or -E, not a container)"
    )


def check_command(command: Sequence[str]) -> None:
    """Raise `UserError` where the first word is no program."""
    if shutil.which(command[0]) is None:
        near = [name for name in ("torchrun", "accelerate", "deepspeed", "python", "trl") if shutil.which(name)]
        raise UserError(
            f"siftune run cannot start {command[0]!r}: no such program on PATH; "
            f"{did_you_mean(command[0], near, otherwise='check its spelling, or activate the environment that has it')}"
        )


def environment(request: Request, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of the command: `base`, the request, and the startup folder first on PYTHONPATH."""
    path = os.pathsep.join(part for part in (str(STARTUP), base.get("PYTHONPATH", "")) if part)
    return {**base, **request.as_environment(), "PYTHONPATH": path}


def _run(command: Sequence[str], env: Mapping[str, str]) -> int:
    sys.stdout.flush()
    with _forwarding() as started:
        try:
            process = subprocess.Popen(list(command), env=dict(env))
        except OSError as error:
            raise UserError(f"siftune run cannot start {command[0]!r}: {error.strerror}") from error
        started(process)
        code = process.wait()
    return 128 - code if code < 0 else code


@contextmanager
def _forwarding() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """While the context is open, signals to this process go to the command; yields a function that takes the process."""
    running: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def send(number: int, _: object = None) -> None:
        if not running:
            early.append(number)
        elif not (signal.Signals(number).name in _FROM_TERMINAL and _in_foreground()):
            running[0].send_signal(number)

    def started(process: subprocess.Popen[bytes]) -> None:
        running.append(process)
        for number in early:
            send(number)

    numbers = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # nohup: the command ignores it too
            signal.signal(number, send)
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Whether this process group is the foreground one of its terminal."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _read_reports(folder: Path) -> list[tuple[str, str]]:
    """Outcome and line of every process that trained, in the order of their names."""
    reports = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # a process was killed while it wrote
            continue
        reports.append((str(values["outcome"]), str(values["line"])))
    return reports
