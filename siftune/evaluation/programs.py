"""Run a Python program that a model wrote, with its tests, in a process of its own, within limits.

This is no sandbox. The program runs as the same user, may read and write what that user may and may open connections; the
limits (wall and CPU time, memory, processes, size of files and of its folder, no inherited environment) stop accidents and
not attacks. So nothing here runs unless the user allows it; for untrusted models, run inside a container.
A program that fails costs only its own answer, with a reason. Cost: one Python start per program, tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import program_keeper

SECONDS = 10.0
"""Wall time of one program with all that it starts; CPU time of each of its processes."""
MEMORY_MB = 4096
"""Address space of each process, and resident memory of all together."""
FILE_MB = 16
"""Largest file that it may write."""
FOLDER_MB = 64
"""All that its folder may hold; every entry counts as a block of 4 KB at least."""
PROCESSES = 64
"""Processes and threads at a time."""
DEPTH = 64
"""Folders inside folders."""
TICK = 0.05
"""Seconds between two looks at what the program uses."""
NAMESPACES = True
"""Whether a PID namespace is tried."""
_BLOCK = 4096
_KEEPER = Path(program_keeper.__file__)


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether the program runs to its end without an exception, within the limits.

    A program that exits early, by `exit()` with any code, has not passed: its last line has to be reached.
    Its output is discarded.

    >>> passes("assert 1 + 1 == 2")
    True
    """
    return failure(program, seconds=seconds) is None


def failure(program: str, *, seconds: float = SECONDS) -> str | None:
    """Why the program has not passed, in a few words; None where it has.

    >>> failure("while True: pass", seconds=1)
    'took longer than 1 s'
    """
    place = tempfile.mkdtemp(prefix="siftune-program-")
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        Path(place, "program.py").write_text(program, encoding="utf-8", errors="replace")
        reason = _run(place, folder, seconds)
        moved = not _is_at(folder, place)
        unremoved = _remove(place, folder)
        return "replaced its folder by something else" if moved else reason or unremoved
    finally:
        os.close(folder)


def _run(place: str, folder: int, seconds: float) -> str | None:
    """Run `program.py` of the folder until it ends or breaks a limit; nothing that it started is left."""
    word = secrets.token_hex(16)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    options = {
        "cpu": max(1, round(seconds)),
        "memory": MEMORY_MB << 20,
        "file": FILE_MB << 20,
        "processes": PROCESSES,
        "namespaces": NAMESPACES,
        "pipe": writing,
        "word": word,
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_KEEPER), json.dumps(options)],
            cwd=place,
            env=_environment(place),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(writing,),
        )
        try:
            reason = _watch(process, folder, seconds)
        finally:
            _kill(process)
        if reason is None and process.returncode == program_keeper.LEFT:
            reason = "left a process running"
        if reason is None and (process.returncode != 0 or _received(reading) != word.encode()):
            reason = "did not reach its last line"
        return reason
    finally:
        os.close(reading)
        os.close(writing)


def _environment(place: str) -> dict[str, str]:
    """No variable of this process; libraries that start a thread per core start one."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": place, "TMPDIR": place, **threads}


def _received(reading: int) -> bytes:
    """The bytes in the pipe, which a process of the program may have filled with anything."""
    try:
        return os.read(reading, 1024)
    except BlockingIOError:
        return b""


# --- while it runs ----------------------------------------------------------------------------------------------------


def _watch(process: subprocess.Popen[bytes], folder: int, seconds: float) -> str | None:
    """Wait for the end; the limit that was broken before it, in words, or None."""
    until = time.monotonic() + seconds
    while True:
        try:
            process.wait(timeout=max(0.0, min(TICK, until - time.monotonic())))
            break
        except subprocess.TimeoutExpired:
            if time.monotonic() >= until:
                return f"took longer than {seconds:g} s"
        alive = list(_descendants(process.pid))
        if sum(child.threads for child in alive) > PROCESSES + 2:  # the keeper's own
            return f"ran more than {PROCESSES} processes and threads"
        if sum(child.resident for child in alive) > MEMORY_MB << 20:
            return f"held more than {MEMORY_MB} MB of memory"
        if _size(folder) > FOLDER_MB << 20:
            return _TOO_LARGE
    return _TOO_LARGE if _size(folder) > FOLDER_MB << 20 else None


_TOO_LARGE = f"wrote more than {FOLDER_MB} MB into its folder, more than {DEPTH} folders deep, or made it unreadable"


class _Process(NamedTuple):
    pid: int
    parent: int
    threads: int
    resident: int
    """Bytes."""


def _descendants(pid: int) -> Iterator[_Process]:
    """Every process below `pid` that is alive; none where the system has no /proc."""
    children: dict[int, list[_Process]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not name.isdigit():
            continue
        try:
            fields = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[0] not in (b"Z", b"X"):
            process = _Process(int(name), int(fields[1]), int(fields[17]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
            children.setdefault(process.parent, []).append(process)
    waiting = [pid]
    while waiting:
        for process in children.get(waiting.pop(), []):
            yield process
            waiting.append(process.pid)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill all that is below the keeper, and the keeper last: while it lives, orphans become its children."""
    until = time.monotonic() + program_keeper.KILLING
    while process.poll() is None and (pids := [child.pid for child in _descendants(process.pid)]):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- its folder, by descriptor, because its path may lead elsewhere ------------------------------------------------------


def _size(folder: int, depth: int = 0) -> int:
    """Bytes on the disk of all that a folder holds; counting stops above the limit. No symbolic link is followed."""
    most, total = FOLDER_MB << 20, 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                facts = entry.stat(follow_symlinks=False)
                total += max(_BLOCK, facts.st_blocks * 512)
                if stat.S_ISDIR(facts.st_mode):
                    total += most + 1 if depth == DEPTH else _size_inside(folder, entry.name, depth + 1)
            except PermissionError:  # not readable, so that it cannot be counted
                return most + 1
            except OSError:  # gone, or another kind of file meanwhile
                continue
            if total > most:
                break
    return total


def _size_inside(folder: int, name: str, depth: int) -> int:
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        return _size(inner, depth)
    finally:
        os.close(inner)


def _is_at(folder: int, place: str) -> bool:
    """Whether the folder is still where it was created."""
    try:
        at_path, opened = os.lstat(place), os.fstat(folder)
    except OSError:
        return False
    return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)


def _remove(place: str, folder: int) -> str | None:
    """Remove the folder, wherever it was moved, and no other; returns what could not be removed, in words."""
    path = place
    try:
        _empty(folder)
        if os.path.islink(place):
            os.unlink(place)
        if os.path.isdir("/proc/self/fd"):
            path = os.readlink(f"/proc/self/fd/{folder}")
        if _is_at(folder, path):
            os.rmdir(path)
    except OSError as error:
        return f"left files that cannot be removed ({error.strerror})"
    return None


def _empty(folder: int) -> None:
    """Remove all that a folder holds. Inner folders are emptied upwards, one level at a time, so that no depth is too deep."""
    os.fchmod(folder, 0o700)
    while names := os.listdir(folder):
        for name in names:
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=folder)
                continue
            os.chmod(name, 0o700, dir_fd=folder)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            try:
                for deeper in os.listdir(inner):
                    os.rename(deeper, secrets.token_hex(16), src_dir_fd=inner, dst_dir_fd=folder)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=folder)
