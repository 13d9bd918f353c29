"""The script that runs a program written by a model and reaps all processes that it starts. Imports nothing of siftune.

    keeper          started by `programs`; a subreaper: what a double fork orphans becomes its child
      first         where the system allows it, process 1 of a PID namespace: when it ends, the kernel ends all others
        program     runs program.py in the folder that it was started in, within its limits

Exit codes: 0 the program ended well and left nothing running, 1 it failed, 3 it left a process running. Linux; on other
systems neither namespace nor subreaper exists and what is left in the process group is killed by `programs`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import signal
import sys
import time
from typing import Any

FAILED, LEFT = 1, 3
GRACE = 0.5
"""Seconds that helpers of the program's own (multiprocessing's) have to end after it."""
KILLING = 2.0
"""Seconds in which what is left is killed."""
_PDEATHSIG, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 36, 38
_NEW_USER, _NEW_PID = 0x10000000, 0x20000000
_COUNTED_BY_NAMESPACE = (5, 14)
"""Linux from which RLIMIT_NPROC counts the processes of a user namespace and not all of the user's."""


def main(options: dict[str, Any]) -> int:
    """Run the program; in the process that is the program, this does not return."""
    _prctl(_PDEATHSIG, signal.SIGKILL)
    _prctl(_NO_NEW_PRIVILEGES, 1)
    _prctl(_SUBREAPER, 1)
    isolated = "" if not options["namespaces"] else _new_namespace()
    if isolated:
        first = os.fork()
        if first:
            return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        _prctl(_PDEATHSIG, signal.SIGKILL)
    program = os.fork()
    if program == 0:
        _prctl(_PDEATHSIG, signal.SIGKILL)
        _limit(options, counted_apart=isolated == "user")
        runpy.run_path("program.py", run_name="__main__")
        os.write(options["pipe"], options["word"].encode())
        sys.exit(0)
    code = _wait(program)
    if not isolated:
        _kill_children()
    return code


def _prctl(option: int, value: int) -> int:
    with contextlib.suppress(OSError, AttributeError):
        return int(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0))
    return -1


def _new_namespace() -> str:
    """A PID namespace for the children of this process: `user` with a user namespace around it, `pid` alone, or empty."""
    uid, gid = os.getuid(), os.getgid()
    try:
        unshare = ctypes.CDLL(None, use_errno=True).unshare
    except (OSError, AttributeError):
        return ""
    if unshare(_NEW_USER | _NEW_PID) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return "user"
    return "pid" if unshare(_NEW_PID) == 0 else ""


def _limit(options: dict[str, Any], *, counted_apart: bool) -> None:
    import resource  # absent on Windows, where `programs` imports this module and runs nothing

    limits = {
        resource.RLIMIT_CPU: options["cpu"],
        resource.RLIMIT_AS: options["memory"],
        resource.RLIMIT_FSIZE: options["file"],
        resource.RLIMIT_CORE: 0,
    }
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2] if part.isdigit())
    if counted_apart and release >= _COUNTED_BY_NAMESPACE:
        limits[resource.RLIMIT_NPROC] = options["processes"]
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # a system that knows the limit and does not set it
            resource.setrlimit(kind, (most, most))
    sys.argv = ["program.py"]


def _wait(program: int) -> int:
    """Wait for the program, then a moment for what it started; orphans become children of this process and are reaped here."""
    code, until = None, 0.0
    while True:
        try:
            pid, status = os.waitpid(-1, 0 if code is None else os.WNOHANG)
        except ChildProcessError:
            return 0 if code == 0 else FAILED
        if pid == program:
            code, until = os.waitstatus_to_exitcode(status), time.monotonic() + GRACE
        elif pid == 0:
            if time.monotonic() > until or code != 0:
                return LEFT if code == 0 else FAILED
            time.sleep(0.01)


def _kill_children() -> None:
    """Kill until none is left: the children of a killed process become children of this one."""
    until = time.monotonic() + KILLING
    while time.monotonic() < until:
        for pid in _children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        time.sleep(0.005)


def _children() -> list[int]:
    children = []
    parent = str(os.getpid()).encode()
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[1] == parent:
                    children.append(int(name))
    return children


if __name__ == "__main__":
    os._exit(main(json.loads(sys.argv[1])))
