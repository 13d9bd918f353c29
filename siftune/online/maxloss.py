"""MaxLoss: the candidates with the largest mean cross-entropy over their label tokens.

    CE = mean over label tokens t of ( logsumexp(L_t) - L_t[label_t] )

Higher = harder for the model as it is. The vocabulary is walked in blocks with a running logsumexp, so the logits of
all candidates never exist at once. Cost: one forward of the backbone plus the logits of the label tokens.
Source: Loshchilov & Hutter, arXiv 1511.06343, as the baseline of UDS (arXiv 2510.16882).

Axes: `B` candidates, `T` columns, `N` label tokens of some rows, `D` inputs of the head, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..models.hidden_states import exact_math, predicting_tokens
from ..models.layout import layout_of
from ..records import RowScores
from .base import Batch, Measured, ModelScored, one_of
from .logit_access import Seen, View

TOKENS = 1024
"""Label tokens that walk the vocabulary together: 1024 x 4464 float32 logits are 18 MB."""


@dataclass(kw_only=True, eq=False)
class MaxLoss(ModelScored):
    """Keeps the K candidates with the largest mean loss, the model's own: shifted by one, -100 left out.

    >>> MaxLoss(keep=2).select(model, batch).scores.total
    """

    name: ClassVar[str] = "maxloss"

    compat: Literal["paper"] | None = None
    """`paper`: the attention mask is dropped in the scoring forward, as the original does; changes left-padded rows."""

    def __post_init__(self) -> None:
        self._view = View()

    def check(self) -> None:
        super().check()
        if self.compat is not None:
            one_of("compat", self.compat, ("paper",))

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Columns `loss` `(B,)` (float64) and `tokens` `(B,)` (int64, label tokens)."""
        wanted = predicting_tokens(batch)
        if self.compat == "paper":
            batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        loss = over_labels(self._view, model, batch, wanted, cross_entropy, torch.mean, score_tokens=self.score_tokens)
        reasons = {
            row: "its loss is not finite" if bool(wanted[row].any()) else "no label tokens to score"
            for row in (~torch.isfinite(loss)).nonzero().flatten().tolist()
        }
        loss[list(reasons)] = torch.nan
        return Measured(len(wanted), {"loss": loss, "tokens": wanted.sum(dim=1)}, reasons)

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
    for start, stop, block in blocks:
        piece = torch.logsumexp(block, dim=1).double()
        aim = targets.to(block.device)
        inside = (aim >= start) & (aim < stop)
        own = block.gather(1, (aim - start).clamp(0, stop - start - 1)[:, None])[:, 0].double()
        if total is None or label is None:
            total, label = piece, torch.zeros_like(piece)
        else:
            total = torch.logaddexp(total, piece)
        label = torch.where(inside, own, label)
    assert total is not None, "a head without a vocabulary"
    assert label is not None
    return (total - label).cpu()


def over_labels(
    view: View,
    model: torch.nn.Module,
    batch: Batch,
    wanted: torch.Tensor,
    each: Callable[[Iterable[tuple[int, int, torch.Tensor]], torch.Tensor], torch.Tensor],
    join: Callable[[torch.Tensor], torch.Tensor],
    *,
    score_tokens: int | None,
) -> torch.Tensor:
    """One number per row from its label tokens, float64 `(B,)`, NaN for rows without any.

    `each` takes the logits in blocks and the targets `(N,)` of some rows and gives a number per position, `join` makes
    a row's numbers one; `wanted` is `predicting_tokens(batch)`.
    """
    labels = batch["labels"].detach().cpu()
    targets = torch.cat([labels[:, 1:], labels[:, :1]], dim=1)
    lines = [span.line for span in layout_of(batch).spans]
    result = torch.full((len(wanted),), torch.nan, dtype=torch.float64)
    for seen in view.rows(model, batch, wanted, score_tokens=score_tokens):
        device = seen.head.device if seen.head is not None else torch.device("cpu")
        with exact_math(device):
            for rows, part in shared_walks(seen):
                picked = [targets[lines[row]][wanted[row]] for row in rows]
                values = each(part, torch.cat(picked)).split([len(target) for target in picked])
                result[rows] = torch.stack([join(value) for value in values])
    return result


def shared_walks(seen: Seen) -> Iterable[tuple[list[int], Iterable[tuple[int, int, torch.Tensor]]]]:
    """Rows that share one walk over the vocabulary (about `TOKENS` positions), with their logits in blocks."""
    if seen.head is None:
        yield seen.rows, seen.blocks(0)
        return
    group: list[int] = []
    for index in range(len(seen.rows) + 1):
        held = sum(len(seen.inputs[i]) for i in group)
        if group and (index == len(seen.rows) or held + len(seen.inputs[index]) > TOKENS):
            joined = torch.cat([seen.inputs[i] for i in group])
            yield [seen.rows[i] for i in group], Seen([0], seen.head, [joined]).blocks(0)
            group = []
        group.append(index)
