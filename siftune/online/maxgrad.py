"""MaxGrad: the candidates whose loss has the largest gradient.

    exact        ‖∇_θ CE_i‖₂ over all trained weights, CE_i the row's mean loss over its label tokens
    last-layer   Σ_t ‖softmax(z_t) − onehot(label_t)‖₂ over the row's label tokens: the gradient at the logits z

Higher = a larger step for the model as it is. Cost: `exact` a forward and a backward pass without weight gradients,
plus the ghost products (`siftune.online.per_example.ghost`); `last-layer` a forward pass and the logits of the label
tokens. Source: the baseline of UDS (arXiv 2510.16882); the last-layer form follows Katharopoulos & Fleuret, arXiv
1803.00942.

Axes: `B` candidates, `T` columns, `N` label tokens, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..models.hidden_states import predicting_tokens
from ..records import RowScores
from .base import Batch, Measured, ModelScored, check_choice
from .label_losses import Blocks, reduce_over_labels
from .logit_access import LogitAccess
from .per_example.backward import PerExampleGradients


@dataclass(kw_only=True, eq=False)
class MaxGrad(ModelScored):
    """Keeps the K candidates with the largest gradient norm.

    >>> MaxGrad(keep=2).select(model, batch).scores.total
    """

    name: ClassVar[str] = "maxgrad"
    needs_gradients: ClassVar[bool] = True

    variant: Literal["exact", "last-layer"] = "exact"
    """`exact`: over all trained weights. `last-layer`: at the logits, summed over label tokens; no backward pass."""

    def __post_init__(self) -> None:
        self._logit_access = LogitAccess()
        self._gradients = PerExampleGradients()

    def check(self) -> None:
        super().check()
        check_choice("variant", self.variant, ("exact", "last-layer"))

    def needs_complete_weights(self) -> bool:
        return self.variant == "exact"

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Columns `gradient` `(B,)` (float64) and `tokens` `(B,)` (int64, label tokens)."""
        positions_BT = predicting_tokens(batch)
        if self.variant == "exact":
            norms = torch.full((len(positions_BT),), torch.nan, dtype=torch.float64)
            for rows, width in self._gradients.plan(model, batch, self.score_tokens):
                for part in self._gradients.compute(model, batch, rows, width):
                    norms[part.rows] = part.squares().sqrt()
        else:
            norms = reduce_over_labels(
                self._logit_access,
                model,
                batch,
                positions_BT,
                logit_gradients,
                torch.sum,
                score_tokens=self.score_tokens,
            )
        reasons = {
            row: "its gradient is not finite" if bool(positions_BT[row].any()) else "no label tokens to score"
            for row in (~torch.isfinite(norms)).nonzero().flatten().tolist()
        }
        norms[list(reasons)] = torch.nan
        return Measured(len(positions_BT), {"gradient": norms, "tokens": positions_BT.sum(dim=1)}, reasons)

    def combine(self, measured: Measured) -> RowScores:
        return RowScores(measured.columns["gradient"], {}, dict(measured.reasons))


def logit_gradients(blocks: Blocks, targets: torch.Tensor) -> torch.Tensor:
    """`‖softmax(z) − onehot(target)‖₂` of each of N positions, float64 `(N,)` on the CPU.

    `blocks` are the logits z as (start, stop, float32 `(N, stop - start)`), `targets` int64 `(N,)`. Summed without the
    target's own probability, so that nothing cancels where the model is sure of it.

    >>> logit_gradients([(0, 2, torch.zeros(1, 2))], torch.tensor([1]))
    tensor([0.7071], dtype=torch.float64)
    """
    others_2N: torch.Tensor | None = None
    for start, stop, block_NV in blocks:
        block_targets = targets.to(block_NV.device)
        if others_2N is None:
            others_2N = torch.full((2, len(block_NV)), -torch.inf, dtype=torch.float64, device=block_NV.device)
            target_logit = torch.full((len(block_NV),), -torch.inf, dtype=torch.float64, device=block_NV.device)
        in_block = ((block_targets >= start) & (block_targets < stop)).nonzero().flatten()
        place = (in_block, block_targets[in_block] - start)
        target_logit[in_block] = block_NV[place].double()
        block_NV = block_NV.index_put(place, block_NV.new_tensor(-torch.inf))
        pieces = torch.stack([torch.logsumexp(block_NV, dim=1).double(), torch.logsumexp(2 * block_NV, dim=1).double()])
        others_2N = torch.logaddexp(others_2N, pieces)
    assert others_2N is not None, "a head without a vocabulary"
    log_normaliser = torch.logaddexp(others_2N[0], target_logit)
    one_minus_p = torch.exp(others_2N[0] - log_normaliser)  # 1 - p(target)
    return (one_minus_p**2 + torch.exp(others_2N[1] - 2 * log_normaliser)).sqrt().cpu()
