"""WHERE IT RUNS: the same shard function in one process, in several, or on a Ray cluster.

shard (one attempt) -> retry (further attempts, failing rows left out) -> dispatch (many shards, many workers) -> local,
processes, ray. Nothing here imports torch or Ray before an engine is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError

if TYPE_CHECKING:
    from ..models.store import Store
    from .local import LocalEngine
    from .shard import Progress


class Where(Protocol):
    """What a user says of where shards run: the fields of `options.Running` that are read here."""

    engine: Any
    workers: int | None
    ray_address: str | None
    worker_cpus: float
    worker_gpus: float | None


def check_engine(said: Where) -> None:
    """Refuse what cannot run, before anything is read. Raises `UserError`."""
    if said.workers is not None and said.workers < 1:
        raise UserError(f"--workers {said.workers} is nobody; give at least 1")
    for name, value in (("cpus", said.worker_cpus), ("gpus", said.worker_gpus)):
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--worker-{name} {value:g} is no share; give 0 or more")
    if said.engine == "ray":
        from .ray import check_ray

        check_ray()
    elif said.ray_address is not None:
        raise UserError(f"--ray-address {said.ray_address} goes with --engine ray; add it, or leave the address out")


def make_engine(said: Where, store: Store, *, backbone: Any = None, progress: Progress | None = None) -> LocalEngine:
    """The engine that was asked for. `backbone` is the model that the shards read, None where they read none.

    >>> make_engine(SelectOptions(engine="local", workers=2), Store("cache/shards"))
    """
    from .local import LocalEngine

    if said.engine == "ray":
        from .ray import RayEngine

        return RayEngine(
            store,
            progress=progress,
            workers=said.workers or 0,
            address=said.ray_address,
            worker_cpus=said.worker_cpus,
            worker_gpus=said.worker_gpus,
        )
    return LocalEngine(store, progress=progress, workers=said.workers or gpus_for(backbone))


def gpus_for(backbone: Any) -> int:
    """Workers where none were asked for: a model on CUDA, on no GPU by number, gets all of them; else 1."""
    import torch

    device = getattr(backbone, "torch_device", None)
    every = device is not None and device.type == "cuda" and device.index is None
    return max(1, torch.cuda.device_count()) if every else 1
