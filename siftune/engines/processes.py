"""Worker processes of this machine: each holds the task, its own model, and the GPU of its number where there are GPUs.

A worker that dies is replaced, and its attempt reported as lost. Workers end when this process does, whatever ended it.
Processes are spawned, not forked (CUDA and threads do not survive a fork), so a script that uses several workers needs
the usual `if __name__ == "__main__"`. Pickle crosses a pipe between this process and its own children, never a file.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import traceback
from multiprocessing import connection
from typing import Any, cast

from ..errors import UserError
from ..records import Shard
from .retry import OUT_OF_MEMORY, Failed, LeftOut, Outcome
from .shard import Work

PATIENCE = 10.0
"""Seconds that a worker is given to leave by itself."""


class Processes:
    """A `Crew` of processes. Raises `UserError` for a task that cannot be sent to another process."""

    def __init__(self, work: Work, size: int) -> None:
        try:
            self._payload = pickle.dumps(work)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(f"this method cannot be sent to other processes ({error}); use 1 worker") from error
        self._context = multiprocessing.get_context("spawn")
        self._lines: list[Any] = [None] * size
        self._workers: list[Any] = [None] * size
        self._busy: set[int] = set()
        for worker in range(size):
            self._hire(worker)

    @property
    def size(self) -> int:
        """Workers, numbered from 0."""
        return len(self._workers)

    def _hire(self, worker: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=live, args=(theirs, self._payload, gpu_of(worker)), name=f"siftune worker {worker}", daemon=True
        )
        process.start()
        theirs.close()
        self._lines[worker], self._workers[worker] = ours, process

    def give(self, worker: int, shard: Shard, left_out: LeftOut) -> None:
        """Begin an attempt on a worker that has none."""
        self._busy.add(worker)
        try:
            self._lines[worker].send((shard, dict(left_out)))
        except (BrokenPipeError, ConnectionResetError):  # dead already: `next` finds its line closed
            return

    def next(self) -> tuple[int, Outcome]:
        """Wait for any attempt to end; a worker that died in it has been replaced."""
        lines = {self._lines[worker]: worker for worker in self._busy}
        line = cast(Any, connection.wait(list(lines))[0])
        worker = lines[line]
        self._busy.discard(worker)
        try:
            return worker, cast(Outcome, line.recv())
        except (EOFError, ConnectionResetError):
            process = self._workers[worker]
            process.join(PATIENCE)
            line.close()
            self._hire(worker)
            return worker, Failed(f"worker process ended with code {process.exitcode}", died=True)

    def close(self) -> None:
        """Let the workers go, at once: what is under way is lost, what is finished is in the store."""
        for line, process in zip(self._lines, self._workers, strict=True):
            line.close()
            process.terminate()
        for process in self._workers:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()


def gpu_of(worker: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a worker: the visible GPUs in turn; None where there are none."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return None
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = said.split(",") if said else [str(index) for index in range(count)]
    return names[worker % count].strip()


def live(line: Any, payload: bytes, gpu: str | None) -> None:
    """A worker's life: attempts come in, outcomes go out, until the line closes or the parent is gone."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work: Work = pickle.loads(payload)
    while True:
        try:
            shard, left_out = line.recv()
        except (EOFError, OSError):
            return
        line.send(portable(work, shard, left_out))


def portable(work: Work, shard: Shard, left_out: LeftOut) -> Outcome:
    """An attempt's outcome as it can cross to another process: an error as its words, a user's error as itself."""
    try:
        return work.attempt(shard, left_out)
    except BaseException as error:
        failed = Failed.of(error)
        kept = UserError(str(error)) if isinstance(error, UserError) else None
        if failed.final and kept is None and not failed.said.startswith(OUT_OF_MEMORY):
            kept = UserError(f"a worker could not go on ({failed.said}); mend that, or use fewer workers")
        return Failed(failed.said, final=failed.final, error=kept, trace=traceback.format_exc())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
