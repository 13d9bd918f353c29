"""Row gradients of a LoRA model as short vectors: preconditioned by Adam's moments, projected weight by weight.

A row's gradient of a LoRA weight is the product of two thin factors (see `online.per_example.ghost`); it has `rank` rows
on one side, so one weight's gradients of a group of rows are formed, preconditioned, projected and dropped before the
next weight's. A complete gradient of a row never exists.

    f(x) = sum over the weights of  G_w(x) D_w P_d       G_w: (rank, d) the gradient with its rank on the left,
                                                         D_w: random signs of the weight, P_d: Gaussian (d, p), N(0, 1/p)

Inner products are kept on average, with a relative error of the order of sqrt(2/p) (Johnson-Lindenstrauss): weights of
one width share P_d, and their signs make the cross terms vanish on average. Without a projection f is G itself.
Cost per group of rows: one forward and backward pass without weight gradients, and `rank * d * p` products a weight.

Axes: `R` rows of a group, `d` the long side of a weight, `F` numbers of a feature.
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
from ..online.per_example.backward import Gradients, trained
from ..online.per_example.ghost import form

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
    return m / (v.sqrt() + EPSILON)


@dataclass(eq=False)
class Projection:
    """Projects one weight's gradients; `width` p numbers for each of the rank's rows, or nothing with None."""

    width: int | None
    seed: int
    _matrices: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, name: str, gradient_RKD: torch.Tensor) -> torch.Tensor:
        """`(R, rank, d)` to `(R, rank, p)`."""
        assert self.width is not None
        length, like = gradient_RKD.shape[2], gradient_RKD
        signs = self._once(("signs", name, length, like.dtype), lambda: self._signs(name, length, like))
        matrix = self._once(("matrix", length, like.dtype), lambda: self._matrix(length, like))
        return (gradient_RKD * signs) @ matrix

    def _signs(self, name: str, length: int, like: torch.Tensor) -> torch.Tensor:
        bits = torch.randint(0, 2, (length,), generator=seeded(self.seed, f"signs of {name}"))
        return (2 * bits - 1).to(like)

    def _matrix(self, length: int, like: torch.Tensor) -> torch.Tensor:
        assert self.width is not None
        drawn = torch.randn(length, self.width, generator=seeded(self.seed, f"projection of {length}"))
        return (drawn / self.width**0.5).to(like)

    def _once(self, key: Any, make: Any) -> torch.Tensor:
        if key not in self._matrices:
            self._matrices[key] = make()
        return self._matrices[key]


@dataclass(eq=False)
class RowFeatures:
    """Features of rows under one model with trained LoRA weights.

    >>> features = RowFeatures(peft_model, Projection(1024, seed=0))
    >>> vectors, failed = features.of(tokens, moments=None)
    """

    model: Any
    projection: Projection
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""
    gradients: Gradients = field(default_factory=Gradients, repr=False)

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
                for part in self.gradients.of(self.model, batch, group, width):
                    vectors = self._features(part.uses, len(part.rows), moments)
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
        return bool(trained(self.model)[0].dtype == torch.float64)

    def _features(self, uses: Mapping[int, Any], rows: int, moments: Mapping[str, Moments] | None) -> torch.Tensor:
        """`(R, F)`: the weights one after the other, each dropped before the next."""
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        total: torch.Tensor | None = None
        parts: list[torch.Tensor] = []
        with exact_math(named[0][1].device):
            for index, (name, weight) in enumerate(named):
                if index in uses:
                    gradient = form(uses[index]).right[:, 0].reshape(rows, *weight.shape)
                else:
                    gradient = weight.new_zeros(rows, *weight.shape)
                if moments is not None:
                    gradient = adam_direction(gradient, moments[name])
                if self.projection.width is None:
                    parts.append(gradient.flatten(1))
                    continue
                projected = self.projection(name, gradient.mT if "lora_B" in name else gradient)
                total = projected if total is None else total + projected
        return torch.cat(parts, dim=1) if total is None else total.flatten(1)


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
