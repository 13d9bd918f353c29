"""All-gather of variable-length buffers between the ranks of a selection; nothing is pickled.

A message is a safetensors file in memory, with one JSON note. Integers are sent in the narrowest type that holds them
and restored to their own. Cost: two collective calls per message, its length and its bytes; every rank receives `world`
times the longest one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save

_NOTE_KEY = "note"
_INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32)


@dataclass(kw_only=True)
class Ranks:
    """This process among those that share one selection.

    >>> ranks = Ranks.current()
    >>> ranks.gather(b"rank 1")
    [b"rank 0", b"rank 1"]
    """

    rank: int
    """This process, from 0."""
    world: int
    """Processes that share one selection, at least 1."""
    device: torch.device
    """The device from which the process group can send tensors."""
    received: int = 0
    """Bytes received so far, padding included."""
    choices: int = 0
    """Selections made across ranks so far."""

    @staticmethod
    def alone() -> Ranks:
        """A world of one, which exchanges nothing."""
        return Ranks(rank=0, world=1, device=torch.device("cpu"))

    @staticmethod
    def current(device: torch.device | None = None) -> Ranks:
        """The default process group; without one, a world of one. `device` is the accelerator's, where there is one."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return Ranks.alone()
        backend_on_cpu = any(name in str(torch.distributed.get_backend()) for name in ("gloo", "mpi"))
        exchange_device = torch.device("cpu") if backend_on_cpu or device is None else device
        return Ranks(
            rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size(), device=exchange_device
        )

    def gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in rank order, on every rank. All ranks have to call it."""
        if self.world == 1:
            return [message]
        sizes = self.gather_ints(len(message))
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        if message:
            padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        local = padded.to(self.device)
        buffers = [torch.empty_like(local) for _ in range(self.world)]
        torch.distributed.all_gather(buffers, local)
        self.received += self.world * len(padded)
        return [buffer[:size].cpu().numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]

    def gather_ints(self, number: int) -> list[int]:
        """Every rank's int64, in rank order, on every rank. All ranks have to call it."""
        if self.world == 1:
            return [number]
        local = torch.tensor([number], dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(local) for _ in range(self.world)]
        torch.distributed.all_gather(gathered, local)
        self.received += 8 * self.world
        return [int(value) for value in gathered]


def pack(tensors: Mapping[str, torch.Tensor], note: Any = None) -> bytes:
    """Tensors of any device and a JSON value as one message. `unpack` returns both, tensors on the CPU."""
    payload: dict[str, torch.Tensor] = {}
    dtypes: dict[str, str] = {}
    for name, tensor in tensors.items():
        on_cpu = tensor.detach().cpu()
        narrow = _narrowed(on_cpu)
        if narrow.dtype != on_cpu.dtype:
            dtypes[name] = str(on_cpu.dtype).removeprefix("torch.")
        payload[f"t/{name}"] = narrow.contiguous()
    header = json.dumps({"note": note, "dtypes": dtypes}).encode()
    payload[_NOTE_KEY] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    message: bytes = save(payload)
    return message


def unpack(message: bytes) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors, by name, and the note of a message that `pack` returned."""
    payload = load(message)
    header = json.loads(payload.pop(_NOTE_KEY).numpy().tobytes())
    tensors = {}
    for name, tensor in payload.items():
        name = name.removeprefix("t/")
        tensors[name] = tensor.to(getattr(torch, header["dtypes"][name])) if name in header["dtypes"] else tensor
    return tensors, header["note"]


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in (torch.int64, torch.int32) or tensor.numel() == 0:
        return tensor
    low, high = (int(bound) for bound in tensor.aminmax())
    for dtype in _INTEGER_DTYPES:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return tensor.to(dtype)
    return tensor
