"""The same shards on a Ray cluster: an existing one by its address, or one that is started on this machine.

Workers are plain actors, each with its own model and its share of CPUs and GPUs. A shard goes to whichever worker is
free; results come back in order; a worker that is killed is replaced and its shard tried again (see `course`). Finished
shards lie in the cache folder, which every node must see under the same path, and are never computed twice.
Cost beyond the local engine: some seconds to start, and every result crosses the network once.
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
from .local import LocalEngine, here, stays
from .processes import portable
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

    Raises `MissingExtra` without Ray, `UserError` for a cluster that cannot be reached or has no room for a worker.

    >>> engine = RayEngine(Store("/shared/cache/shards"), address="auto", workers=8, worker_gpus=1)
    >>> method.engine = engine
    """

    _: KW_ONLY
    workers: int = 0
    """Actors; 0 is as many as the cluster has room for."""
    address: str | None = None
    """`auto`, HOST:PORT or ray://HOST:PORT; None starts a cluster on this machine."""
    worker_cpus: float = 1.0
    """CPUs that an actor reserves."""
    worker_gpus: float | None = None
    """GPUs that an actor reserves, 0.5 for two actors on one; None is 1 where the cluster has GPUs, else 0."""

    def _results(self, task: ShardTask, pool: Pool, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Done]]:
        threads = torch.get_num_threads() if self.threads is None else self.threads
        work = Work(task, pool, self.store, threads)
        if stays(task):
            for shard in shards:
                yield shard, here(work, shard)
        elif len(shards):
            ray = connect(self.address)
            gpus = self.worker_gpus if self.worker_gpus is not None else float(any(n[1] >= 1 for n in nodes(ray)))
            room = room_for(nodes(ray), self.worker_cpus, gpus)
            if not room:
                raise UserError(
                    f"no node of the Ray cluster has {self.worker_cpus:g} CPUs and {gpus:g} GPUs; lower --worker-cpus or "
                    "--worker-gpus, or start a node that has them"
                )
            size = min(self.workers or room, room, len(shards))
            with closing(Actors(ray, work, size, cpus=self.worker_cpus, gpus=gpus)) as crew:
                yield from dispatch(crew, work, shards)


# --- the cluster ------------------------------------------------------------------------------------------------------


def connect(address: str | None) -> Any:
    """The `ray` module, connected. A cluster started here ends with this process."""
    check_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = import_module("ray")
    if ray.is_initialized():
        return ray
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address is None else {}
    try:
        # "local" is never a cluster that happens to run here: that one is `auto`
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **own)
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
    return [(float(has.get("CPU", 0)), float(has.get("GPU", 0))) for has in living]


def room_for(places: Sequence[tuple[float, float]], cpus: float, gpus: float) -> int:
    """Workers of that size that the nodes hold; a worker that reserves nothing is counted as one per node.

    >>> room_for([(8, 2), (4, 0)], 1, 0.5)
    4
    """
    room = 0
    for has_cpus, has_gpus in places:
        by = [int(has / wanted + 1e-9) for has, wanted in ((has_cpus, cpus), (has_gpus, gpus)) if wanted > 0]
        room += min(by, default=1)
    return room


# --- the workers ------------------------------------------------------------------------------------------------------


class Actors:
    """A `Crew` of Ray actors."""

    def __init__(self, ray: Any, work: Work, size: int, *, cpus: float, gpus: float) -> None:
        self._ray = ray
        self._payload = ray.put(ray.cloudpickle.dumps(work))
        # a death is reported, not repaired: who dies, and how often, is the course's business
        self._made = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Actor)
        self._passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._actors = [self._hire() for _ in range(size)]
        self._under: dict[Any, int] = {}

    def _hire(self) -> Any:
        return self._made.remote(self._passed, self._payload)

    @property
    def size(self) -> int:
        """Workers, numbered from 0."""
        return len(self._actors)

    def give(self, worker: int, shard: Shard, left_out: LeftOut) -> None:
        """Begin an attempt on a worker that has none."""
        self._under[self._actors[worker].attempt.remote(shard, dict(left_out))] = worker

    def next(self) -> tuple[int, Outcome]:
        """Wait for any attempt to end; a worker that died in it has been replaced."""
        ended, _ = self._ray.wait(list(self._under), num_returns=1)
        worker = self._under.pop(ended[0])
        try:
            return worker, cast(Outcome, self._ray.get(ended[0]))
        except self._ray.exceptions.RayError as error:
            self._ray.kill(self._actors[worker])
            self._actors[worker] = self._hire()
            said = shortened(error, 300)
            return worker, Failed(f"{type(error).__name__}: {said}", died=True)

    def close(self) -> None:
        """Let the workers go, at once: what is under way is lost, what is finished is in the store."""
        for actor in self._actors:
            self._ray.kill(actor)


class _Actor:
    """A worker's life on its node."""

    def __init__(self, environment: dict[str, str], payload: bytes) -> None:
        os.environ.update(environment)
        self.payload = payload
        self.work: Work | None = None

    def attempt(self, shard: Shard, left_out: LeftOut) -> Outcome:
        """One attempt; the work is unpacked in the first, so that what fails there is said as any failure is."""
        try:
            if self.work is None:
                from ray import cloudpickle

                self.work = cast(Work, cloudpickle.loads(self.payload))
                len(self.work.pool)
        except BaseException as error:
            if not is_failure(error):
                raise
            said = " ".join(str(error).split())
            reach = UserError(
                f"a Ray worker cannot read the pool or the task ({said}); give a --cache folder that every node sees "
                "under the same path, and install the same siftune on every node"
            )
            return Failed(said, final=True, error=reach)
        return portable(self.work, shard, left_out)
