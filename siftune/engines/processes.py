"""Worker processes of this machine: each holds the task, its own model, and the GPU of its number where there are GPUs.

A worker that dies is replaced, and its attempt is reported as lost. Workers end when this process ends, for any reason.
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

JOIN_SECONDS = 10.0
"""Seconds that a worker has to exit by itself."""


class Processes:
    """A `WorkerPool` of processes. Raises `UserError` for a task that cannot be sent to another process."""

    def __init__(self, work: Work, size: int) -> None:
        try:
            self._payload = pickle.dumps(work)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(f"this method cannot be sent to other processes ({error}); use 1 worker") from error
        self._context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = [None] * size
        self._workers: list[Any] = [None] * size
        self._busy: set[int] = set()
        for worker in range(size):
            self._spawn(worker)

    @property
    def size(self) -> int:
        """Workers, numbered from 0."""
        return len(self._workers)

    def _spawn(self, worker: int) -> None:
        parent_end, child_end = self._context.Pipe()
        process = self._context.Process(
            target=worker_main,
            args=(child_end, self._payload, gpu_of(worker)),
            name=f"siftune worker {worker}",
            daemon=True,
        )
        process.start()
        child_end.close()
        self._pipes[worker], self._workers[worker] = parent_end, process

    def submit(self, worker: int, shard: Shard, left_out: LeftOut) -> None:
        """Start an attempt on an idle worker."""
        self._busy.add(worker)
        try:
            self._pipes[worker].send((shard, dict(left_out)))
        except (BrokenPipeError, ConnectionResetError):  # already dead: `next` finds its pipe closed
            return

    def next(self) -> tuple[int, Outcome]:
        """Wait for any attempt to end; a worker that died in it has been replaced."""
        pipes = {self._pipes[worker]: worker for worker in self._busy}
        pipe = cast(Any, connection.wait(list(pipes))[0])
        worker = pipes[pipe]
        self._busy.discard(worker)
        try:
            return worker, cast(Outcome, pipe.recv())
        except (EOFError, ConnectionResetError):
            process = self._workers[worker]
            process.join(JOIN_SECONDS)
            pipe.close()
            self._spawn(worker)
            return worker, Failed(f"worker process ended with code {process.exitcode}", died=True)

    def close(self) -> None:
        """Stop the workers at once: attempts in progress are lost, finished shards are in the store."""
        for pipe, process in zip(self._pipes, self._workers, strict=True):
            pipe.close()
            process.terminate()
        for process in self._workers:
            process.join(JOIN_SECONDS)
            if process.is_alive():
                process.kill()


def gpu_of(worker: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a worker: the visible GPUs in turn; None where there are none."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return names[worker % count].strip()


def worker_main(pipe: Any, payload: bytes, gpu: str | None) -> None:
    """The main loop of a worker: receive attempts and send outcomes until the pipe closes or the parent ends."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work: Work = pickle.loads(payload)
    while True:
        try:
            shard, left_out = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(portable_outcome(work, shard, left_out))


def portable_outcome(work: Work, shard: Shard, left_out: LeftOut) -> Outcome:
    """An attempt's outcome in a form that can be pickled: an error as its text, a `UserError` as itself."""
    try:
        return work.attempt(shard, left_out)
    except BaseException as error:
        failed = Failed.of(error)
        user_error = UserError(str(error)) if isinstance(error, UserError) else None
        if failed.final and user_error is None and not failed.message.startswith(OUT_OF_MEMORY):
            user_error = UserError(f"a worker failed ({failed.message}); fix the cause, or use fewer workers")
        return Failed(failed.message, final=failed.final, error=user_error, trace=traceback.format_exc())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
