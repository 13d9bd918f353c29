"""Tasks with dependencies, on one process or several; a failure stops only the tasks that depend on it.

Workers are fresh processes (`spawn`) that keep their imports between tasks, have their own thread count, and end with the
process that started them, so that a killed study leaves no process running. With one job all tasks run in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from ..errors import UserError
from ..progress import doing
from ..redaction import redact_text


@dataclass(frozen=True)
class Task:
    """One piece of work; `run()` is called once the tasks named in `needs` have succeeded."""

    name: str
    run: Callable[[], None]
    """Picklable: a `functools.partial` of a module's function."""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A task that failed."""

    name: str
    message: str
    """One sentence."""
    internal: bool
    """An internal error, not an error of the input."""
    trace: str = ""


def run_tasks(
    tasks: Iterable[Task], *, jobs: int, threads: int, on_event: Callable[[str, float], None] = lambda name, done: None
) -> list[Failure]:
    """Run all tasks, `jobs` at once with `threads` each; the failures, in the tasks' order. Those that wait for a
    failed one are left out silently. `on_event` is called with the name of each finished task and the share that is done.

    >>> run_tasks([Task("a", partial(print, "a")), Task("b", partial(print, "b"), needs=("a",))], jobs=1, threads=1)
    a
    b
    []
    """
    order = list(tasks)
    with (
        doing("study", len(order), unit="pieces") as study,
        _in_process(threads) if jobs == 1 else _workers(jobs, threads) as start,
    ):

        def ended(name: str, share: float) -> None:
            study.advance()
            on_event(name, share)

        failures = _schedule(order, start, ended, jobs)
    names = [task.name for task in order]
    return sorted(failures, key=lambda failure: names.index(failure.name))


def _schedule(
    order: list[Task], start: Callable[[Task], Future[Any]], on_event: Callable[[str, float], None], jobs: int
) -> list[Failure]:
    waiting = list(order)
    running: dict[Future[Any], Task] = {}
    ended: set[str] = set()
    failed: dict[str, Failure | None] = {}
    while waiting or running:
        for task in list(waiting):
            if any(name in failed for name in task.needs):
                waiting.remove(task)
                failed[task.name] = None
            elif len(running) < jobs and all(name in ended for name in task.needs):
                waiting.remove(task)
                running[start(task)] = task
        if not running:
            continue
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task = running.pop(future)
            failure = _result(future)
            if failure is None:
                ended.add(task.name)
            else:
                failed[task.name] = failure
            on_event(task.name, (len(ended) + len(failed)) / len(order))
    return [failure for failure in failed.values() if failure is not None]


def _result(future: Future[Any]) -> Failure | None:
    try:
        result: Failure | None = future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; lower jobs, and run the same command again: "
            "finished cells are kept"
        ) from error
    return result


def _guarded(task: Task) -> Failure | None:
    """Run one task; returns its failure as a record that can be passed between processes."""
    try:
        with doing(task.name):
            task.run()
    except UserError as error:
        return Failure(task.name, " ".join(str(error).split()), internal=False)
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(redact_text(str(error)).split())}"
        return Failure(task.name, message, internal=True, trace=redact_text(traceback.format_exc()))
    return None


@contextmanager
def _in_process(threads: int) -> Iterator[Callable[[Task], Future[Any]]]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def start(task: Task) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(_guarded(task))
        return future

    try:
        yield start
    finally:
        torch.set_num_threads(before)


@contextmanager
def _workers(jobs: int, threads: int) -> Iterator[Callable[[Task], Future[Any]]]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    before = {name: os.environ.get(name) for name in names}
    os.environ |= {names[0]: str(threads), names[1]: str(threads), names[2]: "false"}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads,))
    try:
        yield lambda task: pool.submit(_guarded, task)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _begin(threads: int) -> None:
    """In a new worker: set threads, silence warnings, and end with the parent."""
    import torch

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # a worker has no terminal of its own
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
