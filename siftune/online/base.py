"""The contract of an online method: `score(model, batch)` changes no state, `select(model, batch)` does.

A selection has four steps, so that the trainer hook can choose across several micro-batches (and, later, ranks):

    measure   the forward pass: what each candidate says by itself (norms, a sketch, a loss); reads no memory
    combine   measurements + memory -> RowScores
    choose    RowScores -> indices to keep
    commit    memory, counters and statistics take the kept rows in

Shapes: `B` candidates, `T` columns of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..budget import Keep, parse_keep
from ..errors import UserError
from ..records import Kept, RowScores

Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Measured:
    """What the forward pass says of `rows` candidates, before any memory is read.

    `columns` are CPU tensors whose first axis is the candidates; a candidate that cannot be scored holds NaN and
    stands in `reasons`.
    """

    rows: int
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)

    @staticmethod
    def join(parts: Sequence[Measured]) -> Measured:
        """Several micro-batches' candidates as one, in order."""
        reasons: dict[int, str] = {}
        start = 0
        for part in parts:
            reasons |= {start + index: reason for index, reason in part.reasons.items()}
            start += part.rows
        names = parts[0].columns if parts else {}
        return Measured(start, {name: torch.cat([part.columns[name] for part in parts]) for name in names}, reasons)


class OnlineMethod(ABC):
    """Base of every online method. Selectors use only their own generators, never the global random state."""

    name: ClassVar[str]
    """The registry's name."""

    keep: Keep
    """Rows kept per micro-batch (int), or a fraction of the candidates: `8`, `1/8`, `20%`."""
    start_step: int = 0
    """Optimiser steps before the first selection; until then every row is kept."""

    # --- the four steps -------------------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Look at the candidates with `model` as it stands. Changes no state; leaves training flags, RNG and
        gradients as they were."""

    @abstractmethod
    def combine(self, measured: Measured) -> RowScores:
        """Scores of the measured candidates, with the memory as it stands. Changes no state."""

    def choose(self, scores: RowScores, measured: Measured, count: int) -> torch.Tensor:
        """Indices of the `count` best candidates, ascending; ties go to the lower index.

        Candidates without a score (NaN) are taken last, in order, only where `count` cannot be met without them.
        """
        total = torch.where(torch.isnan(scores.total), -torch.inf, scores.total)
        order = torch.argsort(-total, stable=True)
        return order[: min(count, len(total))].sort().values

    @abstractmethod
    def commit(self, measured: Measured, scores: RowScores, kept: torch.Tensor) -> None:
        """Take the kept candidates into memory and count the selection."""

    # --- the public two -------------------------------------------------------------------------------------------

    def score(self, model: torch.nn.Module, batch: Batch) -> RowScores:
        """Scores of the batch's B rows; no state changes.

        >>> scores = siftune.UDS(keep=2).score(model, batch)
        >>> scores.total, scores.intra, scores.inter
        """
        return self.combine(self.measure(model, batch))

    def select(self, model: torch.nn.Module, batch: Batch) -> Kept:
        """Score, keep the best, remember them. `kept.batch` is the batch cut to the kept rows.

        >>> kept = siftune.UDS(keep=2).select(model, batch)
        >>> loss = model(**kept.batch).loss
        """
        measured = self.measure(model, batch)
        scores = self.combine(measured)
        kept = self.choose(scores, measured, self.count(measured.rows))
        self.commit(measured, scores, kept)
        return Kept(kept, scores, cut(batch, kept))

    # --- how many -------------------------------------------------------------------------------------------------

    def count(self, candidates: int) -> int:
        """Rows to keep of `candidates`: the contract's K, and at least one on a short batch."""
        if candidates == 0:
            return 0
        return min(candidates, max(1, parse_keep(self.keep).rows(candidates)))

    def check_keep(self, candidates: int) -> None:
        """Refuse, before training, a fraction that is less than one row of a full micro-batch."""
        if parse_keep(self.keep).rows(candidates) < 1:
            raise UserError(
                f"keep={self.keep!r} is less than one row of a micro-batch of {candidates} candidates; "
                "raise keep or per_device_train_batch_size"
            )

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to keep the same rows: tensors and plain JSON values, nothing else."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave. Raises `UserError` when it belongs to another configuration."""
        if state:
            raise UserError(
                f"{self.name} keeps no state, and this one holds {', '.join(state)}; it is another method's"
            )


def cut(batch: Batch, kept: torch.Tensor) -> dict[str, Any]:
    """The batch's kept rows: every tensor or list whose first axis is the batch is indexed, the rest is passed on.

    Trimming of columns that are padding in every kept row belongs to the trainer hook, not here.
    """
    rows = len(batch["input_ids"])
    if len(kept) == rows:
        return dict(batch)
    result: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows:
            result[name] = value[kept.to(value.device)]
        elif isinstance(value, (list, tuple)) and len(value) == rows:
            result[name] = type(value)(value[index] for index in kept.tolist())
        else:
            result[name] = value
    return result
