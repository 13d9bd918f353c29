"""The memory of kept rows' sketches, and a row's mean distance to it (UDS, arXiv 2510.16882, section 3.2).

Higher distance = more novel. First in, first out by default; `reservoir` keeps a uniform sample of all kept rows.
Cost: M*1024 float64 numbers (8 MB at M = 1024) on the CPU; B*M*1024 operations per batch.

Axes: `M` capacity, `B` candidates, `S` numbers of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..errors import UserError


class Memory:
    """Sketches of at most M kept rows. `policy` is `fifo` or `reservoir` (seeded by `seed` and the rows seen alone).

    >>> memory = Memory(1024); memory.push(sketches)
    >>> memory.distances(sketches)
    """

    def __init__(self, capacity: int, *, policy: Literal["fifo", "reservoir"] = "fifo", seed: int = 0) -> None:
        self.capacity, self.policy, self.seed = capacity, policy, seed
        self.sketches = torch.empty(0, 0, dtype=torch.float64)
        """`(<= M, S)`; their order is that of the slots, not of time."""
        self.seen = 0
        """Rows ever pushed."""

    def __len__(self) -> int:
        return len(self.sketches)

    def push(self, sketches: torch.Tensor) -> None:
        """Take in `(B, S)` sketches in order; the oldest leave (fifo), or chance decides (reservoir)."""
        if self.capacity == 0 or len(sketches) == 0:
            return
        size = min(self.capacity, self.seen + len(sketches))
        slots = torch.zeros(size, sketches.shape[1], dtype=torch.float64)
        if len(self):
            slots[: len(self)] = self.sketches
        for offset, sketch in enumerate(sketches):
            slot = self._slot(self.seen + offset)
            if slot is not None:
                slots[slot] = sketch
        self.sketches = slots
        self.seen += len(sketches)

    def distances(self, sketches: torch.Tensor) -> torch.Tensor:
        """Mean Euclidean distance of each of `(B, S)` sketches to the memory, float64 `(B,)`; 0 while it is empty."""
        if len(self) == 0:
            return torch.where(torch.isfinite(sketches).all(dim=1), 0.0, torch.nan).double()
        return pairwise(sketches, self.sketches).mean(dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {"sketches": self.sketches.clone(), "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sketches = state["sketches"]
        if len(sketches) > self.capacity:
            raise UserError(
                f"the saved memory holds {len(sketches)} rows and memory={self.capacity} does not; use the same memory"
            )
        self.sketches, self.seen = sketches.to("cpu", torch.float64).clone(), int(state["seen"])

    def _slot(self, number: int) -> int | None:
        """Where the row that is pushed as the `number`-th (from 0) goes."""
        if number < self.capacity:
            return number
        if self.policy == "fifo":
            return number % self.capacity
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        slot = int(torch.randint(0, number + 1, (1,), generator=generator))
        return slot if slot < self.capacity else None


def pairwise(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Euclidean distances `(B, M)`, from differences: products would lose the distance between near-copies."""
    return torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist")
