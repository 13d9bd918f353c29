"""How an online method reads a model's logits without forming them: one forward, one head formula, one check.

The head is read as a linear map (siftune.models.head) and compared, at first use, with the logits that the model itself
returns for the last column of the scoring forward. Where they disagree, or the head is no linear map, the model's own
head is run one row at a time, and a warning says so once.
Cost: one forward of the backbone; the check takes 8 tokens' logits, once.

Axes: `B` rows, `T` columns, `N` scored positions of a row, `D` inputs of the head, `V` vocabulary, `F` = d₁
frequencies of a sketch.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.head import Factor, Gram, Head, factorise, read_head
from ..models.hidden_states import Chunk, ModelParts, exact_math, iter_hidden_states, iter_logits, unwrap_model
from ..models.sharded import gather_head, is_sharded, largest_of_all
from .sketch import Sketch

Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """Some rows at the head: the `inputs` of its formula, or, where no formula holds, the model's own `logits`."""

    rows: list[int]
    """Positions in the batch."""
    head: Head | None
    inputs: list[torch.Tensor]
    """Per row `(N, D)`; empty without a formula."""
    logits: torch.Tensor | None = None
    """`(N, V)` of the single row in `rows`, without a formula."""

    def blocks(self, index: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The logits of `rows[index]` in blocks of the vocabulary: (start, stop, float32 `(N, stop - start)`)."""
        if self.head is not None:
            for start, stop in self.head.blocks():
                yield start, stop, self.head.logits(self.inputs[index], start, stop)
            return
        assert self.logits is not None
        for start in range(0, self.logits.shape[1], 4096):
            block_NV = self.logits[:, start : start + 4096]
            yield start, start + block_NV.shape[1], block_NV.float()

    @property
    def device(self) -> torch.device:
        """Where the mathematics of these rows run."""
        if self.head is not None:
            return self.head.device
        assert self.logits is not None
        return self.logits.device

    @property
    def vocabulary(self) -> int:
        if self.head is not None:
            return self.head.vocabulary
        assert self.logits is not None
        return self.logits.shape[1]


class LogitAccess:
    """Access to one model's logits over many batches: whether the head's formula holds, and what is derived from it.

    >>> for head_inputs in LogitAccess().rows(model, batch, real_tokens(batch)): ...
    """

    def __init__(self) -> None:
        self._checked_model: tuple[Any, ...] | None = None
        """The model whose formula was compared with its logits."""
        self._formula_holds = True
        self._gathered_head: tuple[tuple[Any, ...], Head | None] | None = None
        """The head of a model that is sharded over processes, gathered."""
        self._head_weight: weakref.ref[torch.Tensor] | None = None
        """The weight that all below was derived from: another tensor may have the same address later."""
        self._factor: tuple[tuple[Any, ...], Factor] | None = None
        self._gram: tuple[tuple[Any, ...], Gram | None] | None = None
        self._projected: tuple[tuple[Any, ...], torch.Tensor] | None = None
        self._base_projected: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def rows(
        self,
        model: nn.Module,
        batch: Batch,
        positions_BT: torch.Tensor,
        *,
        score_tokens: int | None = None,
        gather_again: bool = True,
    ) -> Iterator[HeadInputs]:
        """Every row of the batch with a position to score (`positions_BT` is bool `(B, T)`), in groups, in any order.

        A row is returned twice where the check fails after some rows: the later one counts. For a model that is sharded
        over processes all of them have to iterate to the end; with `gather_again` a trained head is gathered again.
        """
        parts = unwrap_model(model)
        identity = (id(parts.causal), id(parts.head))
        passes = largest_of_all if is_sharded(parts.called) else None
        head = read_head(parts) if passes is None else self._gather(identity, parts, gather_again=gather_again)
        if head is None:
            self._fall_back_to_logits(identity, f"{type(parts.head).__name__} is no plain linear head")
        if head is not None and (self._formula_holds or self._checked_model != identity):
            for chunk in iter_hidden_states(parts, batch, positions_BT, score_tokens=score_tokens, passes=passes):
                if self._checked_model != identity and self._formula_fails(
                    head, parts, chunk, together=passes is not None
                ):
                    break
                if chunk.rows:
                    yield HeadInputs(chunk.rows, head, [head.inputs(states) for states in chunk.states])
            else:
                return
        for row, logits_NV in iter_logits(parts, batch, positions_BT, passes=passes):
            yield HeadInputs([row], None, [], logits_NV)

    def _gather(self, identity: tuple[Any, ...], parts: ModelParts, *, gather_again: bool) -> Head | None:
        cached = self._gathered_head
        if cached is None or cached[0] != identity or (gather_again and cached[1] is not None and cached[1].trained):
            self._gathered_head = (identity, gather_head(parts))
        assert self._gathered_head is not None
        return self._gathered_head[1]

    def _formula_fails(self, head: Head, parts: ModelParts, chunk: Chunk, *, together: bool) -> bool:
        identity = (id(parts.causal), id(parts.head))
        with exact_math(head.device):
            verdict = head.agrees(chunk.probe_states, chunk.probe_logits)
        status = {None: 0, True: 1, False: 2}[verdict]
        if together:  # where the formula fails on one process, all use the logits
            status = largest_of_all(status)
        if status == 0:
            return False
        if status == 1:
            self._checked_model, self._formula_holds = identity, True
            return False
        self._fall_back_to_logits(identity, "its logits are not those of hidden states times head")
        return True

    def _fall_back_to_logits(self, identity: tuple[Any, ...], reason: str) -> None:
        if self._checked_model == identity and not self._formula_holds:
            return
        self._checked_model, self._formula_holds = identity, False
        warnings.warn(
            f"scores are taken from the model's own logits, one row at a time and more slowly: {reason}", stacklevel=4
        )

    # --- once per version of the weights ------------------------------------------------------------------------------

    def drop_stale(self, head: Head, *, stale: bool) -> None:
        """Drop what was derived from another model's head, and, at a new step (`stale`), from weights that training
        may have moved: version counters do not show every change."""
        if self._head_weight is None or self._head_weight() is not head.weight:
            self._head_weight = weakref.ref(head.weight)
            self._factor = self._projected = self._gram = self._base_projected = None
        if stale and head.trained:
            self._factor = self._projected = None
        if stale and head.base_trained:
            self._gram = self._base_projected = None

    def factor(self, head: Head) -> Factor:
        """C of the head (`factorise`), formed again only when the weights differ."""
        if self._factor is None or self._factor[0] != head.key:
            base = self._gram[1] if self._gram is not None and self._gram[0] == head.base_key else None
            factor, base = factorise(head, base)
            self._factor, self._gram = (head.key, factor), (head.base_key, base)
        return self._factor[1]

    def projected(self, head: Head, sketch: Sketch) -> torch.Tensor:
        """Γ₁ W `(F, D)`, float64, formed again only when the weights or the sketch differ."""
        key = (*head.key, id(sketch), sketch.vocabulary)
        if self._projected is None or self._projected[0] != key:
            base_key = (*head.base_key, id(sketch), sketch.vocabulary)
            cached = self._base_projected
            base_FD = cached[1] if cached is not None and cached[0] == base_key else None
            projected_FD, base_FD = head.project(sketch.columns, base_FD)
            self._projected, self._base_projected = (key, projected_FD), (base_key, base_FD)
        return self._projected[1]
