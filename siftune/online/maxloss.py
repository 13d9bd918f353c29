"""MaxLoss: the candidates with the largest mean cross-entropy over their label tokens.

    CE = mean over label tokens t of ( logsumexp(L_t) - L_t[label_t] )

Higher = harder for the model as it is. The vocabulary is processed in blocks (siftune.online.label_losses), so the logits
of all candidates never exist at once. Cost: one forward of the backbone plus the logits of the label tokens.
Source: Loshchilov & Hutter, arXiv 1511.06343, as the baseline of UDS (arXiv 2510.16882).

Axes: `B` candidates, `T` columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..models.hidden_states import predicting_tokens
from ..models.layout import layout_of, with_layout
from ..records import RowScores
from .base import Batch, Measured, ModelScored, check_choice
from .label_losses import cross_entropy, reduce_over_labels
from .logit_access import LogitAccess


@dataclass(kw_only=True, eq=False)
class MaxLoss(ModelScored):
    """Keeps the K candidates with the largest mean loss, the model's own: shifted by one, -100 left out.

    >>> MaxLoss(keep=2).select(model, batch).scores.total
    """

    name: ClassVar[str] = "maxloss"

    compat: Literal["paper"] | None = None
    """`paper`: the attention mask is dropped in the scoring forward, as the original does; changes left-padded rows."""

    def __post_init__(self) -> None:
        self._logit_access = LogitAccess()

    def check(self) -> None:
        super().check()
        if self.compat is not None:
            check_choice("compat", self.compat, ("paper",))

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Columns `loss` `(B,)` (float64) and `tokens` `(B,)` (int64, label tokens)."""
        positions_BT = predicting_tokens(batch)
        if self.compat == "paper":
            kept = {name: value for name, value in batch.items() if name != "attention_mask"}
            batch = with_layout(kept, layout_of(batch))
        loss = reduce_over_labels(
            self._logit_access, model, batch, positions_BT, cross_entropy, torch.mean, score_tokens=self.score_tokens
        )
        reasons = {
            row: "its loss is not finite" if bool(positions_BT[row].any()) else "no label tokens to score"
            for row in (~torch.isfinite(loss)).nonzero().flatten().tolist()
        }
        loss[list(reasons)] = torch.nan
        return Measured(len(positions_BT), {"loss": loss, "tokens": positions_BT.sum(dim=1)}, reasons)

    def combine(self, measured: Measured) -> RowScores:
        return RowScores(measured.columns["loss"], {}, dict(measured.reasons))
