"""Run a Python program that a model wrote, with its tests, in a process of its own, within limits.

This is no sandbox. The program runs as the same user, may read what that user reads and may open connections; the
limits (wall and CPU time, memory, size of files, a folder of its own, no inherited environment) stop accidents and not
attacks. So nothing here runs before the user says so; for models you do not trust, run inside a container.
Cost: one Python start per program, tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10.0
"""Wall and CPU time of one program."""
MEMORY_MB = 4096
"""Address space of one program."""
FILE_MB = 16
"""Largest file that it may write."""

_FIRST = """\
import resource, sys
for kind, most in ((resource.RLIMIT_CPU, {cpu}), (resource.RLIMIT_AS, {memory}), (resource.RLIMIT_FSIZE, {file}),
                   (resource.RLIMIT_CORE, 0)):
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:
        resource.setrlimit(kind, (most, most))
    except (ValueError, OSError):  # a system that knows the limit and does not set it
        pass
del resource
sys.argv = ["program.py"]
scope = {{"__name__": "__main__", "__file__": "program.py"}}
with open("program.py", encoding="utf-8") as source:
    code = compile(source.read(), "program.py", "exec")
exec(code, scope)
with open({done!r}, "w") as done:
    done.write({word!r})
"""


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Does the program run to its end without an exception, within the limits?

    A program that leaves early, by `exit()` with whatever code, has not passed: its last line has to be reached.
    What it prints is thrown away.

    >>> passes("assert 1 + 1 == 2")
    True
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="siftune-program-") as place, tempfile.TemporaryDirectory() as aside:
        folder, done = Path(place), Path(aside) / "done"
        limits = {"cpu": max(1, round(seconds)), "memory": MEMORY_MB << 20, "file": FILE_MB << 20}
        first = _FIRST.format(**limits, done=str(done), word=word)
        (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", first],
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": place},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:  # the whole group: what the program started dies with it
            _kill(process)
        return process.returncode == 0 and done.is_file() and done.read_text() == word


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
