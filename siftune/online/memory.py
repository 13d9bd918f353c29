"""The memory of kept rows' sketches, and a row's mean distance to it (UDS, arXiv 2510.16882, section 3.2).

Higher distance = more novel. First in, first out by default; `reservoir` keeps a uniform sample of all kept rows.
Cost: M*1024 float64 elements (8 MB at M = 1024) on the CPU; B*M*1024 operations per batch.

Axes: `M` capacity, `B` candidates, `S` elements of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..errors import UserError


class Memory:
    """Sketches of at most M kept rows. `policy` is `fifo` or `reservoir` (seeded by `seed` and the number of rows
    pushed).

    >>> memory = Memory(1024); memory.push(sketches)
    >>> memory.distances(sketches)
    """

    def __init__(self, capacity: int, *, policy: Literal["fifo", "reservoir"] = "fifo", seed: int = 0) -> None:
        self.capacity, self.policy, self.seed = capacity, policy, seed
        self.sketches = torch.empty(0, 0, dtype=torch.float64)
        """`(<= M, S)`; their order is that of the slots, not of time."""
        self.pushed = 0
        """Rows ever pushed."""

    def __len__(self) -> int:
        return len(self.sketches)

    def push(self, sketches_BS: torch.Tensor) -> None:
        """Add `(B, S)` sketches in order; the oldest are replaced (fifo), or random ones (reservoir)."""
        if self.capacity == 0 or len(sketches_BS) == 0:
            return
        size = min(self.capacity, self.pushed + len(sketches_BS))
        slots_MS = torch.zeros(size, sketches_BS.shape[1], dtype=torch.float64)
        if len(self):
            slots_MS[: len(self)] = self.sketches
        for offset, sketch in enumerate(sketches_BS):
            slot = self._slot(self.pushed + offset)
            if slot is not None:
                slots_MS[slot] = sketch
        self.sketches = slots_MS
        self.pushed += len(sketches_BS)

    def distances(self, sketches_BS: torch.Tensor) -> torch.Tensor:
        """Mean Euclidean distance of each of `(B, S)` sketches to the memory, float64 `(B,)`; 0 while it is empty."""
        if len(self) == 0:
            return torch.where(torch.isfinite(sketches_BS).all(dim=1), 0.0, torch.nan).double()
        return pairwise(sketches_BS, self.sketches).mean(dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {"sketches": self.sketches.clone(), "seen": self.pushed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sketches_MS = state["sketches"]
        if len(sketches_MS) > self.capacity:
            raise UserError(
                f"the saved memory holds {len(sketches_MS)} rows more than memory={self.capacity}; set memory as it was saved"
            )
        self.sketches, self.pushed = sketches_MS.to("cpu", torch.float64).clone(), int(state["seen"])

    def _slot(self, index: int) -> int | None:
        """Where the row that is pushed as the `index`-th (from 0) goes."""
        if index < self.capacity:
            return index
        if self.policy == "fifo":
            return index % self.capacity
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        slot = int(torch.randint(0, index + 1, (1,), generator=generator))
        return slot if slot < self.capacity else None


def pairwise(first_BS: torch.Tensor, second_MS: torch.Tensor) -> torch.Tensor:
    """Euclidean distances `(B, M)`, from differences: products would lose the distance between near-copies."""
    return torch.cdist(first_BS.double(), second_MS.double(), compute_mode="donot_use_mm_for_euclid_dist")
