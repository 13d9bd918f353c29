"""How an online method looks at a model's logits without forming them: one forward, one head formula, one check.

The head is read as a linear map (siftune.models.head) and held, at first use, against the logits that the model itself
gives for the last column of the scoring forward. Where they disagree, or the head is no linear map, the model's own
head is run one row at a time, and a warning says so once.
Cost: one forward of the backbone; the check takes 8 tokens' logits, once.

Axes: `B` rows, `T` columns, `N` positions wanted of a row, `D` inputs of the head, `V` vocabulary.
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
class Seen:
    """Some rows as the head sees them: `inputs` of a head formula, or, where none holds, the model's own `logits`."""

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
            block = self.logits[:, start : start + 4096]
            yield start, start + block.shape[1], block.float()

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


class View:
    """What a method knows of one model's head between batches: whether its formula holds, and what follows from it.

    >>> for seen in View().rows(model, batch, real_tokens(batch)): ...
    """

    def __init__(self) -> None:
        self._checked: tuple[Any, ...] | None = None
        """The model whose formula was held against its logits."""
        self._holds = True
        self._whole: tuple[tuple[Any, ...], Head | None] | None = None
        """The head of a model that is sharded over processes, gathered."""
        self._weight: weakref.ref[torch.Tensor] | None = None
        """The weight that all below was derived from: another one may lie at the same address later."""
        self._factor: tuple[tuple[Any, ...], Factor] | None = None
        self._gram: tuple[tuple[Any, ...], Gram | None] | None = None
        self._projected: tuple[tuple[Any, ...], torch.Tensor] | None = None
        self._base_projected: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def rows(
        self,
        model: nn.Module,
        batch: Batch,
        wanted: torch.Tensor,
        *,
        score_tokens: int | None = None,
        fresh: bool = True,
    ) -> Iterator[Seen]:
        """Every row of the batch that wants a position (`wanted` is bool `(B, T)`), in groups, in any order.

        A row may come twice, when the check fails after some rows: the later one holds. Of a model that is sharded over
        processes all have to walk, to the end; with `fresh` its head is gathered again where training moves it.
        """
        parts = unwrap_model(model)
        identity = (id(parts.causal), id(parts.head))
        passes = largest_of_all if is_sharded(parts.called) else None
        head = read_head(parts) if passes is None else self._gathered(identity, parts, fresh=fresh)
        if head is None:
            self._distrust(identity, f"{type(parts.head).__name__} is no plain linear head")
        if head is not None and (self._holds or self._checked != identity):
            for chunk in iter_hidden_states(parts, batch, wanted, score_tokens=score_tokens, passes=passes):
                if self._checked != identity and self._fails(head, parts, chunk, together=passes is not None):
                    break
                if chunk.rows:
                    yield Seen(chunk.rows, head, [head.inputs(states) for states in chunk.states])
            else:
                return
        for row, logits in iter_logits(parts, batch, wanted, passes=passes):
            yield Seen([row], None, [], logits)

    def _gathered(self, identity: tuple[Any, ...], parts: ModelParts, *, fresh: bool) -> Head | None:
        known = self._whole
        if known is None or known[0] != identity or (fresh and known[1] is not None and known[1].trained):
            self._whole = (identity, gather_head(parts))
        assert self._whole is not None
        return self._whole[1]

    def _fails(self, head: Head, parts: ModelParts, chunk: Chunk, *, together: bool) -> bool:
        identity = (id(parts.causal), id(parts.head))
        with exact_math(head.device):
            verdict = head.agrees(chunk.probe_states, chunk.probe_logits)
        told = {None: 0, True: 1, False: 2}[verdict]
        if together:  # one process that cannot trust the formula makes all walk the other way
            told = largest_of_all(told)
        if told == 0:
            return False
        if told == 1:
            self._checked, self._holds = identity, True
            return False
        self._distrust(identity, "its logits are not those of hidden states times head")
        return True

    def _distrust(self, identity: tuple[Any, ...], why: str) -> None:
        if self._checked == identity and not self._holds:
            return
        self._checked, self._holds = identity, False
        warnings.warn(
            f"scores are taken from the model's own logits, one row at a time and more slowly: {why}", stacklevel=4
        )

    # --- once per version of the weights ------------------------------------------------------------------------------

    def forget(self, head: Head, *, stale: bool) -> None:
        """Drop what was derived from another model's head, and, at a new step (`stale`), from weights that training
        may have moved: version counters do not see all of it."""
        if self._weight is None or self._weight() is not head.weight:
            self._weight = weakref.ref(head.weight)
            self._factor = self._projected = self._gram = self._base_projected = None
        if stale and head.trained:
            self._factor = self._projected = None
        if stale and head.base_trained:
            self._gram = self._base_projected = None

    def factor(self, head: Head) -> Factor:
        """C of the head (`factorise`), formed again only when the weights are others."""
        if self._factor is None or self._factor[0] != head.key:
            base = self._gram[1] if self._gram is not None and self._gram[0] == head.base_key else None
            factor, base = factorise(head, base)
            self._factor, self._gram = (head.key, factor), (head.base_key, base)
        return self._factor[1]

    def projected(self, head: Head, sketch: Sketch) -> torch.Tensor:
        """Γ₁ W `(d₁, D)`, float64, formed again only when the weights or the sketch are others."""
        key = (*head.key, id(sketch), sketch.vocabulary)
        if self._projected is None or self._projected[0] != key:
            base_key = (*head.base_key, id(sketch), sketch.vocabulary)
            known = self._base_projected
            base = known[1] if known is not None and known[0] == base_key else None
            projected, base = head.project(sketch.columns, base)
            self._projected, self._base_projected = (key, projected), (base_key, base)
        return self._projected[1]
