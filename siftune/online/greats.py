"""GREATS: the candidates whose gradients lower the loss of validation rows most, and do not repeat each other.

    influence_i = mean_v ⟨g_i, g_v⟩ = ⟨g_i, mean_v g_v⟩
    gain        = influence − η Σ_{j kept before} ⟨g_j, ·⟩          η the current learning rate

K times the candidate with the largest gain is taken. The published scores are these times η > 0, which changes no order
and are all zero at η = 0, where a warm-up begins. Higher = better; the total is minus the position in the greedy order.
Cost: a plain forward and backward pass over the validation rows, whose mean gradient is all that counts; one over the
candidates with their own gradients, and B(B + 1)/2 + B products per weight; gradients beyond `hold_mb` are computed
again for each group that they are multiplied with. Source: Wang et al., GREATS, NeurIPS 2024, as the baseline of UDS
(arXiv 2510.16882).

Axes: `B` candidates, `T` columns, `R` and `S` candidates of two groups, `V` validation rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..data.load import load_pool
from ..errors import UserError
from ..models.hidden_states import predicting_tokens
from ..models.layout import candidates_of
from ..records import RowScores
from .base import Batch, Measured, ModelScored, check_choice, check_minimum
from .per_example.backward import PerExampleGradients, RowGradients
from .per_example.ghost import PAIRS_SIZE_FACTOR

RowGroup = tuple[list[int], int]
"""(rows, columns)."""


@dataclass(kw_only=True, eq=False)
class Greats(ModelScored):
    """Keeps K candidates, greedily, by what their gradients do to the validation rows' loss.

    >>> Greats(keep=2, validation=held_out_batch, learning_rate=1e-4).select(model, batch).scores.influence
    """

    name: ClassVar[str] = "greats"
    across_ranks: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True

    validation: Any
    """Rows that are not trained on: a batch with labels, a sequence of batches (one per selection, in turn), tokenised
    rows (a data set or a list of dicts, `validation_rows` per selection, in turn), or a file of rows as `load_pool`
    reads them, which `attach` tokenises as the trainer's."""
    validation_rows: int = 8
    """Rows of `validation` used by one selection, where rows and not batches are given."""
    validation_text: Literal["auto", "chat", "prompt"] = "auto"
    """How a row of a file becomes tokens: by the chat template, as question and answer, or by the template where the
    tokenizer has one."""
    learning_rate: float | None = None
    """η, >= 0. None is the current one, which the trainer hook passes; in your own loop, set it or call
    `new_step(learning_rate=...)`."""
    hold_mb: int = 2048
    """Megabytes of gradients held while groups of rows are compared; the rest is computed again when it is needed."""
    window: Literal["micro", "step"] = "micro"
    """`micro` only: inner products are between the candidates of one micro-batch."""

    def __post_init__(self) -> None:
        self._gradients = PerExampleGradients(size_factor=PAIRS_SIZE_FACTOR)
        self._announced_rate: float | None = None
        self._batches: list[Batch] | None = None

    def check(self) -> None:
        super().check()
        check_minimum("validation_rows", self.validation_rows, 1)
        check_choice("validation_text", self.validation_text, ("auto", "chat", "prompt"))
        check_minimum("hold_mb", self.hold_mb, 0)
        if self.learning_rate is not None:
            check_minimum("learning_rate", self.learning_rate, 0.0)
        if self.window == "step":
            raise UserError(
                "window='step' would need the inner products between all micro-batches of greats; use window='micro' "
                "and a larger per_device_train_batch_size"
            )

    @property
    def validation_file(self) -> str | None:
        """The file whose rows `use_validation` needs; None where `validation` holds rows itself."""
        return str(self.validation) if isinstance(self.validation, (str, Path)) else None

    def check_files(self) -> None:
        if self.validation_file is not None:
            load_pool(self.validation_file)

    def use_validation(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Use the tokenised rows of the file. Raises `UserError` where none has a label token."""
        self._batches = validation_batches(rows, self.validation_rows)

    def new_step(self, *, learning_rate: float | None = None) -> None:
        super().new_step()
        if learning_rate is not None:
            self._announced_rate = learning_rate

    @property
    def _current_rate(self) -> float:
        rate = self.learning_rate if self.learning_rate is not None else self._announced_rate
        if rate is None:
            raise UserError(
                "greats weights its candidates by the learning rate, which is unknown; set learning_rate=, or call "
                "new_step(learning_rate=...) before select"
            )
        return rate

    # --- measure ------------------------------------------------------------------------------------------------------

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Columns `influence` `(B,)`, `products` `(B, B)` (float64, ⟨g_i, g_j⟩) and `tokens` `(B,)` (int64)."""
        rate = self._current_rate
        assert rate >= 0, "a learning rate"
        positions_BT = predicting_tokens(batch)
        rows = len(positions_BT)
        products_BB, influence = self._products(model, batch, self._validation())
        finite = torch.isfinite(influence) & torch.isfinite(products_BB.diagonal())
        reasons = {}
        for row in (~finite).nonzero().flatten().tolist():
            reasons[row] = "its gradient is not finite" if bool(positions_BT[row].any()) else "no label tokens to score"
            if bool(torch.isfinite(products_BB[row, row])):
                reasons[row] = "no validation row has a finite gradient"
            influence[row] = torch.nan
        return Measured(
            rows, {"influence": influence, "products": products_BB, "tokens": positions_BT.sum(dim=1)}, reasons
        )

    def _products(self, model: torch.nn.Module, batch: Batch, held_out: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """⟨g_i, g_j⟩ `(B, B)` and ⟨g_i, mean_v g_v⟩ `(B,)`, NaN where a row has no label token."""
        groups = self._gradients.plan(model, batch, self.score_tokens)
        count = candidates_of(batch)
        products_BB = torch.full((count, count), torch.nan, dtype=torch.float64)
        influence = torch.full((count,), torch.nan, dtype=torch.float64)
        cache = _GradientCache(self._gradients, model, batch, groups, self.hold_mb * 2**20)
        validation_gradient: dict[int, torch.Tensor] | None = None
        for first in range(len(groups)):
            first_parts = cache.get(first)
            if first == 0:  # after the candidates, whose error explains why a model has no row gradients
                validation_gradient = self._gradients.mean(model, held_out, self.score_tokens)
            if validation_gradient is not None:
                for first_part in first_parts:
                    influence[first_part.rows] = first_part.inner_with_gradient(validation_gradient)
            for second in range(first, len(groups)):
                for first_part in first_parts:
                    for second_part in first_parts if second == first else cache.get(second):
                        products_RS = first_part.inner(second_part)
                        products_BB[torch.tensor(first_part.rows)[:, None], torch.tensor(second_part.rows)] = (
                            products_RS
                        )
                        products_BB[torch.tensor(second_part.rows)[:, None], torch.tensor(first_part.rows)] = (
                            products_RS.T
                        )
            cache.drop(first)
        return products_BB, influence

    def _validation(self) -> Batch:
        """The validation batch of this selection."""
        if self._batches is None:
            if (file := self.validation_file) is not None:
                raise UserError(
                    f"validation={file!r} is a file, which attach tokenises with the trainer's tokenizer; in your "
                    "own loop pass tokenised rows: input_ids and labels"
                )
            self._batches = validation_batches(self.validation, self.validation_rows)
        return self._batches[self._selections % len(self._batches)]

    # --- combine --------------------------------------------------------------------------------------------------------

    def combine(self, measured: Measured) -> RowScores:
        """Total: minus the position in the greedy order. Parts `influence`, and `gain` at the row's turn."""
        influence, products_BB = measured.columns["influence"], measured.columns["products"]
        total = torch.full_like(influence, torch.nan)
        gain = torch.full_like(influence, torch.nan)
        remaining = torch.where(torch.isnan(influence), -torch.inf, influence)
        for position in range(int(torch.isfinite(remaining).sum())):
            best = int(remaining.argmax())
            total[best], gain[best] = -position, remaining[best]
            remaining = remaining - self._current_rate * products_BB[best].nan_to_num(0.0)
            remaining[best] = -torch.inf
        return RowScores(total, {"influence": influence, "gain": gain}, dict(measured.reasons))


class _GradientCache:
    """Gradients of groups of rows, held up to a number of bytes and computed again beyond it."""

    def __init__(
        self,
        gradients: PerExampleGradients,
        model: torch.nn.Module,
        batch: Batch,
        groups: Sequence[RowGroup],
        max_bytes: int,
    ) -> None:
        self._gradients, self._model, self._batch, self._groups, self._free_bytes = (
            gradients,
            model,
            batch,
            groups,
            max_bytes,
        )
        self._cached: dict[int, list[RowGradients]] = {}

    def get(self, index: int) -> list[RowGradients]:
        if index in self._cached:
            return self._cached[index]
        rows, width = self._groups[index]
        gradients = self._gradients.compute(self._model, self._batch, rows, width)
        size = sum(part.bytes for part in gradients)
        if size <= self._free_bytes:
            self._cached[index] = gradients
            self._free_bytes -= size
        return gradients

    def drop(self, index: int) -> None:
        self._free_bytes += sum(part.bytes for part in self._cached.pop(index, []))


def validation_batches(validation: Any, rows: int) -> list[Batch]:
    """The user's validation rows as batches, without those that hold no label token. Raises `UserError` where none is
    left.

    >>> validation_batches([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}], 8)[0]["attention_mask"]
    tensor([[1, 1, 1]])
    """
    parts = [validation] if isinstance(validation, Mapping) else list(validation)
    for part in parts:
        if not isinstance(part, Mapping) or not {"input_ids", "labels"} <= set(part):
            content = ", ".join(map(str, part)) if isinstance(part, Mapping) else type(part).__name__
            raise UserError(
                f"validation holds {content or 'nothing'}, and greats needs tokenised rows: input_ids and labels"
            )
    if any(torch.as_tensor(part["input_ids"]).ndim != 2 for part in parts):
        labelled = [part for part in parts if (torch.as_tensor(part["labels"])[1:] != -100).any()]
        parts = [_collate(labelled[start : start + rows]) for start in range(0, len(labelled), rows)]
    batches = [part for part in parts if bool(predicting_tokens(part).any())]
    if not batches:
        raise UserError("validation holds no row with a label token; add rows with answers")
    return batches


def _collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows padded on the right into one batch."""
    columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids = torch.as_tensor(row["input_ids"])
        columns["input_ids"].append(ids)
        columns["labels"].append(torch.as_tensor(row["labels"]))
        columns["attention_mask"].append(torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))))
    fill = {"labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
        for name, values in columns.items()
    }
