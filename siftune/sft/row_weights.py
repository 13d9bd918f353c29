"""A row's own `weight` in training: its tokens' losses count that many times in the step's loss.

The loss of a step is the sum over its label tokens of weight * loss, divided by the number of label tokens, so that all
weights 1 give the trainer's own loss, and weight 0 is a row that is left out. Cost: nothing without weights; with them
the logits of every token, as in any trainer without a fused head.

Shapes: `B` rows of a batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.bad_row import BadRow, shown
from ..errors import UserError
from ..models.tokenize_rows import IGNORED

COLUMN = "row_weight"


def weight_of(value: Any) -> float:
    """The weight that a row's column holds; 1 where it is absent. Raises `BadRow` for 0 and for what is no weight.

    >>> weight_of("0.5"), weight_of(None)
    (0.5, 1.0)
    """
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0:
        raise BadRow(f"wrong type: weight is {shown(value)}, not a number of 0 or more")
    if weight == 0:
        raise BadRow("not to imitate: weight is 0")
    return weight


def check_weights(arguments: Any, *, online: bool) -> None:
    """Raise `UserError` where a trainer with these arguments cannot honour weights other than 0 and 1."""
    way_out = "remove the column weight, or set it to 0 or 1"
    if online:
        raise UserError(f"the rows have a weight, and online selection trains kept rows alike; {way_out}")
    if getattr(arguments, "packing", False) or getattr(arguments, "padding_free", False):
        raise UserError(
            f"the rows have a weight, and sft.packing joins rows into one line; set packing: false, or {way_out}"
        )


@dataclass(frozen=True)
class WeightedCollator:
    """A trainer's collator that keeps the rows' weights as a tensor `(B,)`."""

    collator: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        weights = [float(row.get(COLUMN, 1.0)) for row in rows]
        batch = dict(self.collator([{key: row[key] for key in row if key != COLUMN} for row in rows]))
        return {**batch, COLUMN: torch.tensor(weights, dtype=torch.float32)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["collator"], name)


def honour_weights(trainer: Any) -> None:
    """Make a live trainer, whose rows hold `row_weight`, scale each row's loss by it."""
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, COLUMN]
    trainer.data_collator = WeightedCollator(trainer.data_collator)
    plain = trainer.compute_loss

    def compute_loss(
        model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight_B = inputs.pop(COLUMN, None)
        if weight_B is None or not model.training:
            return plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        loss = weighted_loss(outputs.logits, inputs["labels"], weight_B, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss


def weighted_loss(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, weight_B: torch.Tensor, items: torch.Tensor | int | None
) -> torch.Tensor:
    """Sum of weight * cross-entropy over the label tokens, divided by `items`, else by their number."""
    shifted_BT = labels_BT[:, 1:]
    loss_BT = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().transpose(1, 2), shifted_BT, ignore_index=IGNORED, reduction="none"
    )
    total = (loss_BT * weight_B.to(loss_BT.device)[:, None]).sum()
    count = (shifted_BT != IGNORED).sum() if items is None else items
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
