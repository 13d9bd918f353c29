"""What processes say to each other during a selection: bytes that every rank gathers from all, nothing pickled.

A message is a safetensors file in memory, with one JSON note. Whole numbers travel in the narrowest type that holds
them, and come back as what they were. Cost: two collective calls per message, its length and its bytes; every rank
receives `world` times the longest one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save

_NOTE = "note"
_WHOLE = (torch.int8, torch.int16, torch.int32)


@dataclass(kw_only=True)
class Ranks:
    """This process among those that train together.

    >>> ranks = Ranks.current()
    >>> ranks.gather(b"mine")
    [b"rank 0's", b"mine"]
    """

    rank: int
    """This process, from 0."""
    world: int
    """Processes that train together, at least 1."""
    device: torch.device
    """Where tensors have to lie for the process group to send them."""
    received: int = 0
    """Bytes received so far, padding included."""
    choices: int = 0
    """Selections made together so far."""

    @staticmethod
    def current(device: torch.device | None = None) -> Ranks:
        """The default process group; without one, a world of one. `device` is the accelerator's, where there is one."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return Ranks(rank=0, world=1, device=torch.device("cpu"))
        on_host = any(name in str(torch.distributed.get_backend()) for name in ("gloo", "mpi"))
        where = torch.device("cpu") if on_host or device is None else device
        return Ranks(rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size(), device=where)

    def gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in rank order, on every rank. All ranks have to call it."""
        if self.world == 1:
            return [message]
        sizes = self.numbers(len(message))
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        if message:
            padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        mine = padded.to(self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(all_of_them, mine)
        self.received += self.world * len(padded)
        return [given[:size].cpu().numpy().tobytes() for given, size in zip(all_of_them, sizes, strict=True)]

    def numbers(self, number: int) -> list[int]:
        """Every rank's int64, in rank order, on every rank. All ranks have to call it."""
        if self.world == 1:
            return [number]
        mine = torch.tensor([number], dtype=torch.int64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(found, mine)
        self.received += 8 * self.world
        return [int(one) for one in found]


def pack(tensors: Mapping[str, torch.Tensor], note: Any = None) -> bytes:
    """Tensors of any device and a JSON value as one message. `unpack` gives both back, tensors on the CPU."""
    sent: dict[str, torch.Tensor] = {}
    was: dict[str, str] = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu()
        narrow = _narrow(whole)
        if narrow.dtype != whole.dtype:
            was[name] = str(whole.dtype).removeprefix("torch.")
        sent[f"t/{name}"] = narrow.contiguous()
    text = json.dumps({"note": note, "was": was}).encode()
    sent[_NOTE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    message: bytes = save(sent)
    return message


def unpack(message: bytes) -> tuple[dict[str, torch.Tensor], Any]:
    """What `pack` was given: tensors by name, and the note."""
    sent = load(message)
    text = json.loads(sent.pop(_NOTE).numpy().tobytes())
    tensors = {}
    for name, tensor in sent.items():
        name = name.removeprefix("t/")
        tensors[name] = tensor.to(getattr(torch, text["was"][name])) if name in text["was"] else tensor
    return tensors, text["note"]


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in (torch.int64, torch.int32) or tensor.numel() == 0:
        return tensor
    low, high = (int(bound) for bound in tensor.aminmax())
    for dtype in _WHOLE:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return tensor.to(dtype)
    return tensor
