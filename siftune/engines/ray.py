"""The same shards on a Ray cluster: an existing one by its address, or one that is started on this machine.

Workers are plain actors, each with its own model and its share of CPUs and GPUs. A shard goes to whichever worker is
free; results come back in order; a worker that is killed is replaced and its shard is retried (see `retry_policy`).
Finished shards are stored in the cache folder, which every node must reach under the same path, and are never computed
twice. Cost beyond the local engine: some seconds to start, and every result crosses the network once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch

from ..errors import MissingExtra, UserError, is_failure
from ..records import Pool, Shard, ShardTask
from ..redaction import shortened
from .dispatch import dispatch
from .local import LocalEngine, needs_one_process, run_in_process
from .processes import portable_outcome
from .retry import Done, Failed, LeftOut, Outcome
from .shard import Work

OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""Of a cluster started here: results are small, features of one shard at most some dozens of megabytes."""
PASSED_ON = ("SIFTUNE_CACHE", "HF_HUB_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
"""Environment variables that a worker gets as they are here. No key, no token."""


def check_ray() -> None:
    """Raises `MissingExtra` where Ray is not installed."""
    if find_spec("ray") is None:
        raise MissingExtra("ray", extra="ray", needed_for="--engine ray")


@dataclass(eq=False)
class RayEngine(LocalEngine):
    """Runs shards on a Ray cluster, with the local engine's results.

    Raises `MissingExtra` without Ray, `UserError` for a cluster that cannot be reached or has too few resources for a
    worker.

    >>> engine = RayEngine(Store("/shared/cache/shards"), address="auto", workers=8, worker_gpus=1)
    >>> method.engine = engine
    """

    _: KW_ONLY
    workers: int = 0
    """Actors; 0 is as many as the cluster has resources for."""
    address: str | None = None
    """`auto`, HOST:PORT or ray://HOST:PORT; None starts a cluster on this machine."""
    worker_cpus: float = 1.0
    """CPUs that an actor reserves."""
    worker_gpus: float | None = None
    """GPUs that an actor reserves, 0.5 for two actors on one; None is 1 where the cluster has GPUs, else 0."""

    def _results(self, task: ShardTask, pool: Pool, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Done]]:
        threads = torch.get_num_threads() if self.threads is None else self.threads
        work = Work(task, pool, self.store, threads)
        if needs_one_process(task):
            for shard in shards:
                yield shard, run_in_process(work, shard)
        elif len(shards):
            ray = connect(self.address)
            gpus = self.worker_gpus if self.worker_gpus is not None else float(any(n[1] >= 1 for n in nodes(ray)))
            capacity = room_for(nodes(ray), self.worker_cpus, gpus)
            if not capacity:
                raise UserError(
                    f"no node of the Ray cluster has {self.worker_cpus:g} CPUs and {gpus:g} GPUs; lower --worker-cpus or "
                    "--worker-gpus, or start a node that has them"
                )
            size = min(self.workers or capacity, capacity, len(shards))
            with closing(Actors(ray, work, size, cpus=self.worker_cpus, gpus=gpus)) as workers:
                yield from dispatch(workers, work, shards)


# --- the cluster ------------------------------------------------------------------------------------------------------


def connect(address: str | None) -> Any:
    """The `ray` module, connected. A cluster started here ends with this process."""
    check_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = import_module("ray")
    if ray.is_initialized():
        return ray
    options = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address is None else {}
    try:
        # "local" never joins a cluster that already runs on this machine: that is `auto`
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise UserError(
            f"no Ray cluster could be reached {where} ({shortened(error, 200)}); check --ray-address, "
            "or leave it out to start one here"
        ) from error
    return ray


def nodes(ray: Any) -> list[tuple[float, float]]:
    """(CPUs, GPUs) of every living node."""
    living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(float(available.get("CPU", 0)), float(available.get("GPU", 0))) for available in living]


def room_for(node_resources: Sequence[tuple[float, float]], cpus: float, gpus: float) -> int:
    """Number of such workers that fit on the nodes; a worker that reserves nothing is counted as one per node.

    >>> room_for([(8, 2), (4, 0)], 1, 0.5)
    4
    """
    capacity = 0
    for has_cpus, has_gpus in node_resources:
        by = [
            int(available / requested + 1e-9)
            for available, requested in ((has_cpus, cpus), (has_gpus, gpus))
            if requested > 0
        ]
        capacity += min(by, default=1)
    return capacity


# --- the workers ------------------------------------------------------------------------------------------------------


class Actors:
    """A `WorkerPool` of Ray actors."""

    def __init__(self, ray: Any, work: Work, size: int, *, cpus: float, gpus: float) -> None:
        self._ray = ray
        self._payload = ray.put(ray.cloudpickle.dumps(work))
        # a death is reported, not repaired: the retry policy decides what follows
        self._actor_class = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Actor)
        self._environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._actors = [self._spawn() for _ in range(size)]
        self._attempts: dict[Any, int] = {}

    def _spawn(self) -> Any:
        return self._actor_class.remote(self._environment, self._payload)

    @property
    def size(self) -> int:
        """Workers, numbered from 0."""
        return len(self._actors)

    def submit(self, worker: int, shard: Shard, left_out: LeftOut) -> None:
        """Start an attempt on an idle worker."""
        self._attempts[self._actors[worker].attempt.remote(shard, dict(left_out))] = worker

    def next(self) -> tuple[int, Outcome]:
        """Wait for any attempt to end; a worker that died in it has been replaced."""
        ended, _ = self._ray.wait(list(self._attempts), num_returns=1)
        worker = self._attempts.pop(ended[0])
        try:
            return worker, cast(Outcome, self._ray.get(ended[0]))
        except self._ray.exceptions.RayError as error:
            self._ray.kill(self._actors[worker])
            self._actors[worker] = self._spawn()
            message = shortened(error, 300)
            return worker, Failed(f"{type(error).__name__}: {message}", died=True)

    def close(self) -> None:
        """Stop the workers at once: attempts in progress are lost, finished shards are in the store."""
        for actor in self._actors:
            self._ray.kill(actor)


class _Actor:
    """A worker on its node."""

    def __init__(self, environment: dict[str, str], payload: bytes) -> None:
        os.environ.update(environment)
        self.payload = payload
        self.work: Work | None = None

    def attempt(self, shard: Shard, left_out: LeftOut) -> Outcome:
        """One attempt; the work is unpacked in the first, so that a failure there is reported like any other."""
        try:
            if self.work is None:
                from ray import cloudpickle

                self.work = cast(Work, cloudpickle.loads(self.payload))
                len(self.work.pool)
        except BaseException as error:
            if not is_failure(error):
                raise
            message = " ".join(str(error).split())
            user_error = UserError(
                f"a Ray worker cannot read the pool or the task ({message}); pass a --cache folder that every node can read "
                "under the same path, and install the same siftune on every node"
            )
            return Failed(message, final=True, error=user_error)
        return portable_outcome(self.work, shard, left_out)
