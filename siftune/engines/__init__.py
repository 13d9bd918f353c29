"""Execution: the same shard function in one process, in several, or on a Ray cluster.

shard (one attempt) -> retry (further attempts, failing rows left out) -> dispatch (many shards, many workers) -> local,
processes, ray. Nothing here imports torch or Ray before an engine is created.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError

if TYPE_CHECKING:
    from ..models.store import Store
    from .local import LocalEngine
    from .shard import Progress


class EngineOptions(Protocol):
    """The settings of where shards run: the fields of `options.Running` that are read here."""

    engine: Any
    workers: int | None
    ray_address: str | None
    worker_cpus: float
    worker_gpus: float | None


def check_engine(options: EngineOptions) -> None:
    """Check the settings before anything is read. Raises `UserError`."""
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be >= 1, got {options.workers}")
    for name, value in (("cpus", options.worker_cpus), ("gpus", options.worker_gpus)):
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--worker-{name} must be >= 0, got {value:g}")
    if options.engine == "ray":
        from .ray import check_ray

        check_ray()
    elif options.ray_address is not None:
        raise UserError(f"--ray-address {options.ray_address} needs --engine ray; add it, or leave the address out")


def make_engine(
    options: EngineOptions, store: Store, *, backbone: Any = None, progress: Progress | None = None
) -> LocalEngine:
    """The requested engine. `backbone` is the model that the shards read, None where they read none.

    >>> make_engine(SelectOptions(engine="local", workers=2), Store("cache/shards"))
    """
    from .local import LocalEngine

    if options.engine == "ray":
        from .ray import RayEngine

        return RayEngine(
            store,
            progress=progress,
            workers=options.workers or 0,
            address=options.ray_address,
            worker_cpus=options.worker_cpus,
            worker_gpus=options.worker_gpus,
        )
    return LocalEngine(store, progress=progress, workers=options.workers or gpus_for(backbone))


def gpus_for(backbone: Any) -> int:
    """Default number of workers: all GPUs for a model on CUDA without a device index; else 1."""
    import torch

    device = getattr(backbone, "torch_device", None)
    every = device is not None and device.type == "cuda" and device.index is None
    return max(1, torch.cuda.device_count()) if every else 1
