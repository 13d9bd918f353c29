"""Acceptance of written rows: kept are those unlike every row kept before, `max_x cos(e(x'), e(x)) < tau` (DaaR, stage
1b).

`e` is the mean over tokens of the base model's last layer, where the authors' code tuned tau, or of its embedding
layer, as the paper's text says. Cost: one forward per written row, and as many products as rows are kept.

Axes: `S` rows kept of one domain, `N` rows of a call, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...models.backbone import Backbone, DType
from ...models.features import extract

Space = Literal["last-layer", "embedding"]
Embed = Callable[[Sequence[str]], NDArray[Any]]
"""Texts to features `(N, D)`; a row that has none is NaN."""

COPY = 1 - 1e-6
"""Rows with this cosine are copies, independent of tau."""


def embedder(
    model: str, space: Space, *, max_length: int, dtype: DType, device: str, token_budget: int | None = None
) -> Embed:
    """The features that tau is measured in; the model is loaded on first use, with all layers for `last-layer`.

    >>> embedder("Qwen/Qwen2.5-7B", "embedding", max_length=1024, dtype="auto", device="auto")(["a text"]).shape
    """
    loaded: list[Backbone] = []

    def embed(texts: Sequence[str]) -> NDArray[Any]:
        if not loaded:
            options: dict[str, Any] = {"max_length": max_length, "dtype": dtype, "device": device}
            layers = int(Backbone(model, layer=1, **options).config.num_hidden_layers) if space == "last-layer" else 1
            loaded.append(Backbone(model, layer=layers, **options))
        features = extract(loaded[0], list(texts), token_budget=token_budget)
        return features.hidden if space == "last-layer" else features.embedding

    return embed


@dataclass(eq=False)
class Candidate:
    """A written row and its place among the rows kept so far."""

    row: dict[str, str]
    request: str
    """The key of the request that it answers."""
    how: str
    """Where it comes from: `real`, `seed`, `further`; `relaxed` once tau was relaxed for it."""
    unit: NDArray[np.float64] | None
    """e(x) of length 1, shape `(D,)`; None without features."""
    similarity: float = -1.0
    """Its largest cosine to the rows kept when it was judged."""


@dataclass(eq=False)
class Kept:
    """The rows kept of one domain, in order, and those that only tau rejected."""

    threshold: float
    candidates: list[Candidate] = field(default_factory=list)
    near: list[Candidate] = field(default_factory=list)
    _units: list[NDArray[np.float64]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.candidates)

    def judge(self, candidate: Candidate, *, any_distance: bool = False) -> str | None:
        """Keep the row, or return the reason; with `any_distance` only copies are rejected."""
        if candidate.unit is None:
            return "no features: the text gives no token"
        if any(candidate.row == other.row for other in self.candidates):
            return "copy: the same row is there already"
        candidate.similarity = self.nearest(candidate.unit)
        if candidate.similarity >= COPY:
            return "copy: the features are those of a row that is there already"
        if not any_distance and candidate.similarity >= self.threshold:
            self.near.append(candidate)
            return f"too similar: cosine {candidate.similarity:.4f} is not below {self.threshold:g}"
        self.candidates.append(candidate)
        self._units.append(candidate.unit)
        return None

    def nearest(self, unit_D: NDArray[np.float64]) -> float:
        """The largest cosine to a kept row; -1 while there is none."""
        return float((np.stack(self._units) @ unit_D).max()) if self._units else -1.0

    def relax(self, count: int) -> list[Candidate]:
        """Keep the least similar of the rows that tau rejected until there are `count`; no row is written for it.

        Sets `threshold` to the largest cosine accepted. Ties go to the earlier row.
        """
        accepted: list[Candidate] = []
        while len(self) < count and self.near:
            for candidate in self.near:
                assert candidate.unit is not None
                candidate.similarity = self.nearest(candidate.unit)
            best = min(self.near, key=lambda candidate: candidate.similarity)
            self.near.remove(best)
            if self.judge(best, any_distance=True) is None:
                self.threshold = max(self.threshold, best.similarity)
                best.how = "relaxed"
                accepted.append(best)
        return accepted


def units(features_ND: NDArray[Any]) -> list[NDArray[np.float64] | None]:
    """Each row's features at length 1 in float64, None for a row without."""
    wide = np.asarray(features_ND, dtype=np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    return [
        row / length if np.isfinite(length) and length > 0 else None for row, length in zip(wide, lengths, strict=True)
    ]
