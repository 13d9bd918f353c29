"""MaxLoss: the candidates with the largest mean cross-entropy over their label tokens.

    CE = mean over label tokens t of ( logsumexp(L_t) - L_t[label_t] )

Higher = harder for the model as it is. The vocabulary is processed in blocks with a running logsumexp, so the logits of
all candidates never exist at once. Cost: one forward of the backbone plus the logits of the label tokens.
Source: Loshchilov & Hutter, arXiv 1511.06343, as the baseline of UDS (arXiv 2510.16882).

Axes: `B` candidates, `L` lines of the batch, `T` columns, `N` label tokens of some rows, `D` inputs of the head, `V`
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..models.hidden_states import exact_math, predicting_tokens
from ..models.layout import layout_of, with_layout
from ..records import RowScores
from .base import Batch, Measured, ModelScored, check_choice
from .logit_access import HeadInputs, LogitAccess

PASS_TOKENS = 1024
"""Label tokens that share one pass over the vocabulary: 1024 x 4464 float32 logits are 18 MB."""


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


def cross_entropy(blocks: Iterable[tuple[int, int, torch.Tensor]], targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each of N positions, float64 `(N,)` on the CPU, from logits in blocks of the vocabulary.

    `blocks` are (start, stop, float32 `(N, stop - start)`), `targets` int64 `(N,)`.

    >>> cross_entropy([(0, 3, torch.zeros(1, 3))], torch.tensor([2]))
    tensor([1.0986], dtype=torch.float64)
    """
    total: torch.Tensor | None = None
    label: torch.Tensor | None = None
    for start, stop, block_NV in blocks:
        piece = torch.logsumexp(block_NV, dim=1).double()
        block_targets = targets.to(block_NV.device)
        in_block = (block_targets >= start) & (block_targets < stop)
        target_logit = block_NV.gather(1, (block_targets - start).clamp(0, stop - start - 1)[:, None])[:, 0].double()
        if total is None or label is None:
            total, label = piece, torch.zeros_like(piece)
        else:
            total = torch.logaddexp(total, piece)
        label = torch.where(in_block, target_logit, label)
    assert total is not None, "a head without a vocabulary"
    assert label is not None
    return (total - label).cpu()


def reduce_over_labels(
    logit_access: LogitAccess,
    model: torch.nn.Module,
    batch: Batch,
    positions_BT: torch.Tensor,
    per_position: Callable[[Iterable[tuple[int, int, torch.Tensor]], torch.Tensor], torch.Tensor],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    *,
    score_tokens: int | None,
) -> torch.Tensor:
    """One number per row from its label tokens, float64 `(B,)`, NaN for rows without any.

    `reduce` maps a row's values, as `values_of_labels` gives them, to one number.
    """
    values = values_of_labels(logit_access, model, batch, positions_BT, per_position, score_tokens=score_tokens)
    result = torch.full((len(positions_BT),), torch.nan, dtype=torch.float64)
    for row, value in values.items():
        result[row] = reduce(value)
    return result


def values_of_labels(
    logit_access: LogitAccess,
    model: torch.nn.Module,
    batch: Batch,
    positions_BT: torch.Tensor,
    per_position: Callable[[Iterable[tuple[int, int, torch.Tensor]], torch.Tensor], torch.Tensor],
    *,
    score_tokens: int | None,
) -> dict[int, torch.Tensor]:
    """A value of each label token `(N,)` by row, in the order of the tokens; rows without any are left out.

    `per_position` maps the logits in blocks and the targets `(N,)` of some rows to one value per position;
    `positions_BT` is `predicting_tokens(batch)`.
    """
    targets = label_targets(batch, positions_BT)
    result: dict[int, torch.Tensor] = {}
    for head_inputs in logit_access.rows(model, batch, positions_BT, score_tokens=score_tokens):
        device = head_inputs.head.device if head_inputs.head is not None else torch.device("cpu")
        with exact_math(device):
            for rows, blocks in shared_vocabulary_passes(head_inputs):
                row_targets = [targets[row] for row in rows]
                values = per_position(blocks, torch.cat(row_targets)).split([len(target) for target in row_targets])
                result.update(zip(rows, values, strict=True))
    return result


def label_targets(batch: Batch, positions_BT: torch.Tensor) -> list[torch.Tensor]:
    """The labels that each candidate's `positions_BT` (`predicting_tokens(batch)`) predict, int64 `(N,)`, on the CPU."""
    labels_LT = batch["labels"].detach().cpu()
    targets_LT = torch.cat([labels_LT[:, 1:], labels_LT[:, :1]], dim=1)
    return [targets_LT[span.line][positions_BT[row]] for row, span in enumerate(layout_of(batch).spans)]


def shared_vocabulary_passes(
    head_inputs: HeadInputs,
) -> Iterable[tuple[list[int], Iterable[tuple[int, int, torch.Tensor]]]]:
    """Rows that share one pass over the vocabulary (about `PASS_TOKENS` positions), with their logits in blocks."""
    if head_inputs.head is None:
        yield head_inputs.rows, head_inputs.blocks(0)
        return
    group: list[int] = []
    for index in range(len(head_inputs.rows) + 1):
        tokens = sum(len(head_inputs.inputs[member]) for member in group)
        if group and (index == len(head_inputs.rows) or tokens + len(head_inputs.inputs[index]) > PASS_TOKENS):
            joined_ND = torch.cat([head_inputs.inputs[member] for member in group])
            yield (
                [head_inputs.rows[member] for member in group],
                HeadInputs([0], head_inputs.head, [joined_ND]).blocks(0),
            )
            group = []
        group.append(index)
