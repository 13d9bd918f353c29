"""Models sharded over several processes (FSDP, ZeRO-3): the gathered head, and forward passes in lock-step.

A forward pass of such a model gathers weights from all processes, so all have to make equally many passes, also those
with fewer candidates. The head is gathered as for a forward pass (of FSDP the unit it belongs to, of ZeRO-3 its own
weights), and is copied. Cost: that gathering and a copy of V*D elements, once for a frozen head, once per optimiser
step for a trained one.

Axes: `V` vocabulary, `D` hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .head import Head, read_head
from .hidden_states import ModelParts


def is_sharded(model: nn.Module) -> bool:
    """Whether a module of the model is an FSDP unit, or a weight is partitioned by ZeRO-3. False without a process
    group."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    first, second = _kinds()
    units = any(isinstance(module, (first, second)) for module in model.modules())
    return units or any(hasattr(weight, "ds_id") for weight in model.parameters())


def largest_of_all(number: int) -> int:
    """The largest of all processes' numbers. Every process has to call it."""
    on_host = any(name in str(torch.distributed.get_backend()) for name in ("gloo", "mpi"))
    device = torch.device("cpu") if on_host else torch.accelerator.current_accelerator()
    largest = torch.tensor([number], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def gather_head(parts: ModelParts) -> Head | None:
    """`read_head` of a sharded model: copies of the full weights. Every process has to call it.

    >>> head = gather_head(unwrap_model(fully_sharded_model))
    """
    with _unsharded(parts):
        head = read_head(parts)
        if head is None:
            return None
        return replace(
            head,
            weight=head.weight.detach().clone(),
            bias=_copy(head.bias),
            down=_copy(head.down),
            up=_copy(head.up),
        )


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


@contextmanager
def _unsharded(parts: ModelParts) -> Iterator[None]:
    """Gather the head's own weights in this process; shard them again afterwards."""
    first, second = _kinds()
    units = [unit for unit in parts.called.modules() if isinstance(unit, (first, second)) and _owns(unit, parts.head)]
    with ExitStack() as stack:
        if isinstance(parts.called, first) and parts.called not in units:
            with first.summon_full_params(parts.called, recurse=False, writeback=False):
                pass  # else the first unit that is unsharded becomes the root
        pieces = [weight for weight in parts.head.parameters() if hasattr(weight, "ds_id")]
        if pieces:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(pieces))
        for unit in units:
            if isinstance(unit, first):
                stack.enter_context(first.summon_full_params(unit, recurse=False, writeback=False))
            else:
                unit.unshard()
                stack.callback(unit.reshard)
        yield


def _owns(unit: nn.Module, head: nn.Module) -> bool:
    """Whether the head's weights are the unit's own: it is in the unit and in no unit inside that."""
    kinds = _kinds()

    def search(module: nn.Module) -> bool:
        if module is head:
            return True
        return any(not isinstance(child, kinds) and search(child) for child in module.children())

    return search(unit)


def _kinds() -> tuple[Any, Any]:
    """The classes of an FSDP 1 and an FSDP 2 unit."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return FullyShardedDataParallel, FSDPModule
