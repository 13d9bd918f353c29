"""Row gradients of a LoRA model as short vectors: preconditioned by Adam's moments, projected weight by weight.

A row's gradient of a LoRA weight is the product of two thin factors (see `online.per_example.ghost`); it has `rank` rows
on one side, so one weight's gradients of a group of rows are formed, preconditioned, projected and dropped before the
next weight's. A complete gradient of a row never exists.

    f_j(x) = sum over the elements e of all weights with bucket(e) = j of  sign(e) g_e(x)

Buckets and signs are random and fixed (count sketch, Charikar et al. 2002: the sparsest Johnson-Lindenstrauss projection):
inner products are kept on average, and the mean square error of that of two unit vectors is at most 2 / F, as for a dense
random matrix, which would have as many numbers as F complete gradients. Without a projection f is g itself.
Cost per group of rows: one forward and backward pass without weight gradients, and one addition per element.

Axes: `R` rows of a group, `E` elements of a weight, `F` numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..models.features import TOKEN_BUDGET, batches
from ..models.hidden_states import exact_math
from ..models.tokenize_rows import IGNORED, Tokens
from ..offline.daar.fitting import seeded
from ..online.per_example.backward import PerExampleGradients, trained_weights
from ..online.per_example.ghost import form_gradients

Preconditioner = Literal["none", "adam"]
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of torch's and transformers' AdamW by default, with which the warm-up run is made."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Adam's state of one weight."""

    first: torch.Tensor
    second: torch.Tensor
    step: float
    """Optimiser steps taken."""


def adam_direction(gradient: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Adam's next step for a gradient, without the learning rate: m / (sqrt(v) + epsilon), both bias-corrected.

    `gradient` has any leading axes before the weight's own.
    """
    first, second = (moment.to(gradient) for moment in (moments.first, moments.second))
    m = BETAS[0] * first + (1 - BETAS[0]) * gradient
    v = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
    step = moments.step + 1
    m, v = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
    direction: torch.Tensor = m / (v.sqrt() + EPSILON)
    return direction


@dataclass(eq=False)
class Projection:
    """Adds one weight's gradients to the features: to `dimension` numbers a row, or to none with None (not projected)."""

    dimension: int | None
    seed: int
    _drawn: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def add(self, total_RF: torch.Tensor, name: str, gradient_RE: torch.Tensor) -> None:
        """Add the gradients of the weight `name` to the features of their rows, in place."""
        if name not in self._drawn:
            self._drawn[name] = self._draw(name, gradient_RE.shape[1], total_RF.device)
        bucket_E, sign_E = self._drawn[name]
        total_RF.index_add_(1, bucket_E, gradient_RE * sign_E)

    def _draw(self, name: str, elements: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Buckets and signs of a weight's elements."""
        assert self.dimension is not None
        generator = seeded(self.seed, f"projection of {name}")
        bucket_E = torch.randint(0, self.dimension, (elements,), generator=generator, dtype=torch.int32)
        sign_E = 2 * torch.randint(0, 2, (elements,), generator=generator, dtype=torch.int8) - 1
        return bucket_E.to(device), sign_E.to(device)


@dataclass(eq=False)
class RowFeatures:
    """Features of rows under one model with trained LoRA weights.

    >>> features = RowFeatures(peft_model, Projection(8192, seed=0))
    >>> vectors, failed = features.of(tokens, moments=None)
    """

    model: Any
    projection: Projection
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""
    gradients: PerExampleGradients = field(default_factory=PerExampleGradients, repr=False)

    def of(
        self, rows: Sequence[Tokens], *, moments: Mapping[str, Moments] | None
    ) -> tuple[NDArray[Any], dict[int, str]]:
        """Features `(R, F)` in the caller's order, and why a row has none; with `moments` (by weight) preconditioned."""
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int32)
        device = next(self.model.parameters()).device
        budget = self.token_budget or TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"]) // 2
        done: dict[int, torch.Tensor] = {}
        for members in batches(lengths, budget):
            batch = collate([rows[index] for index in members])
            for group, width in self.gradients.plan(self.model, batch):
                for part in self.gradients.compute(self.model, batch, group, width):
                    vectors = self._features(part.factors, len(part.rows), moments)
                    done.update({members[row]: vector for row, vector in zip(part.rows, vectors, strict=True)})
        size = len(next(iter(done.values()))) if done else 0
        reasons = dict.fromkeys(range(len(rows)), "the row's gradient is NaN or infinite")
        features = np.full((len(rows), size), np.nan, dtype=np.float64 if self._wide else np.float32)
        for index, vector in done.items():
            if bool(torch.isfinite(vector).all()):
                features[index] = vector.cpu().numpy()
                del reasons[index]
        return features, reasons

    @property
    def _wide(self) -> bool:
        return bool(trained_weights(self.model)[0].dtype == torch.float64)

    def _features(self, factors: Mapping[int, Any], rows: int, moments: Mapping[str, Moments] | None) -> torch.Tensor:
        """`(R, F)`: the weights one after the other, each dropped before the next."""
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        parts: list[torch.Tensor] = []
        first = named[0][1]
        total_RF = None
        if self.projection.dimension is not None:
            dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
            total_RF = torch.zeros(rows, self.projection.dimension, dtype=dtype, device=first.device)
        with exact_math(first.device):
            for index, (name, weight) in enumerate(named):
                if index in factors:
                    gradient = form_gradients(factors[index]).right[:, 0].reshape(rows, *weight.shape)
                else:
                    gradient = weight.new_zeros(rows, *weight.shape)
                if moments is not None:
                    gradient = adam_direction(gradient, moments[name])
                if total_RF is None:
                    parts.append(gradient.flatten(1))
                else:
                    self.projection.add(total_RF, name, gradient.flatten(1).to(total_RF))
        return torch.cat(parts, dim=1) if total_RF is None else total_RF


def collate(rows: Sequence[Tokens]) -> dict[str, torch.Tensor]:
    """Rows as one batch, padded on the right."""
    longest = max(len(row.input_ids) for row in rows)
    shape = (len(rows), longest)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length], mask[index, :length] = torch.tensor(row.input_ids), 1
        labels[index, :length] = torch.tensor(row.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
