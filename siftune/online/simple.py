"""Regular and random selection: the full-data reference and the reference at equal budget.

Neither looks at the model. `Regular` gives every row the score 0 and keeps all; `Random` gives every row a seeded
uniform number and keeps the largest. Cost: none. Source: the baselines of UDS (arXiv 2510.16882, Table 1).

Shapes: `B` candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..budget import Keep, parse_keep
from ..errors import UserError
from ..records import RowScores
from .base import Batch, Measured, OnlineMethod, rows_of


@dataclass(kw_only=True, eq=False)
class Regular(OnlineMethod):
    """Keeps every candidate, in order: training as it would be without selection. Every score is 0.

    >>> Regular().select(model, batch).indices
    tensor([0, 1, 2, 3])
    """

    name: ClassVar[str] = "regular"
    needs_forward: ClassVar[bool] = False

    keep: Keep = "all"
    """All rows. Another value is refused: a smaller equal-score cut would silently keep the first rows."""

    def check(self) -> None:
        super().check()
        if parse_keep(self.keep).fraction != 1.0:
            raise UserError(
                f"keep={self.keep!r} is not all rows, and regular keeps all; use random for a smaller budget"
            )

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        return Measured(rows_of(batch))

    def combine(self, measured: Measured) -> RowScores:
        return RowScores(torch.zeros(measured.rows, dtype=torch.float64))

    def count(self, candidates: int) -> int:
        return candidates


@dataclass(kw_only=True, eq=False)
class Random(OnlineMethod):
    """Keeps K candidates drawn uniformly, seeded. The draw of selection t depends on `seed` and t alone.

    >>> Random(keep=2, seed=1).select(model, batch).indices.shape
    torch.Size([2])
    """

    name: ClassVar[str] = "random"
    needs_forward: ClassVar[bool] = False

    seed: int = 0
    """Seed of the draw."""

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        return Measured(rows_of(batch))

    def combine(self, measured: Measured) -> RowScores:
        # A new generator from (seed, selections so far): scoring twice gives the same numbers, and no
        # generator state has to be stored in a checkpoint.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._selections) % 2**63)
        return RowScores(torch.rand(measured.rows, dtype=torch.float64, generator=generator))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("seed", self.seed) != self.seed:
            raise UserError(f"the state was saved with seed={state['seed']}, this selector has seed={self.seed}")
        super().load_state_dict(state)
