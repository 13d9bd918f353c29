"""Values of label tokens from logits in blocks of the vocabulary: no array of all tokens times the vocabulary exists.

    CE_n = logsumexp(L_n) - L_n[target_n]

The running logsumexp is float64. Rows share a pass over the vocabulary, about `PASS_TOKENS` positions at a time.
Cost: one forward of the backbone plus the logits of the label tokens.

Axes: `B` candidates, `L` lines of the batch, `T` columns, `N` label tokens of some rows, `D` inputs of the head, `V`
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from ..models.grouping import consecutive_groups
from ..models.hidden_states import exact_math
from ..models.layout import layout_of
from .base import Batch
from .logit_access import HeadInputs, LogitAccess

PASS_TOKENS = 1024
"""Label tokens that share one pass over the vocabulary: 1024 x 4464 float32 logits are 18 MB."""

Blocks = Iterable[tuple[int, int, torch.Tensor]]
"""Logits as (start, stop, float32 `(N, stop - start)`) of the vocabulary, in order."""


class LabelPass(NamedTuple):
    """Some rows that share one pass over the vocabulary."""

    rows: list[int]
    """Positions in the batch."""
    lengths: list[int]
    """Label tokens of each row: values of `N` positions are split by these."""
    targets: torch.Tensor
    """Int64 `(N,)`, on the CPU."""
    blocks: Blocks


def label_passes(
    logit_access: LogitAccess,
    model: torch.nn.Module,
    batch: Batch,
    positions_BT: torch.Tensor,
    *,
    score_tokens: int | None = None,
) -> Iterator[LabelPass]:
    """Every row of the batch with a label token; `positions_BT` is `predicting_tokens(batch)`.

    A row is returned twice where the head's formula fails after some rows: the later one counts. Exact mathematics are
    in force while a pass is read.
    """
    targets = label_targets(batch, positions_BT)
    for head_inputs in logit_access.rows(model, batch, positions_BT, score_tokens=score_tokens):
        with exact_math(head_inputs.device):
            for rows, blocks in shared_vocabulary_passes(head_inputs):
                row_targets = [targets[row] for row in rows]
                yield LabelPass(rows, [len(target) for target in row_targets], torch.cat(row_targets), blocks)


def label_targets(batch: Batch, positions_BT: torch.Tensor) -> list[torch.Tensor]:
    """The labels that each candidate's `positions_BT` (`predicting_tokens(batch)`) predict, int64 `(N,)`, on the CPU."""
    labels_LT = batch["labels"].detach().cpu()
    targets_LT = torch.cat([labels_LT[:, 1:], labels_LT[:, :1]], dim=1)
    return [targets_LT[span.line][positions_BT[row]] for row, span in enumerate(layout_of(batch).spans)]


def shared_vocabulary_passes(head_inputs: HeadInputs) -> Iterator[tuple[list[int], Blocks]]:
    """Rows that share one pass over the vocabulary (about `PASS_TOKENS` positions), with their logits in blocks."""
    if head_inputs.head is None:
        yield head_inputs.rows, head_inputs.blocks(0)
        return
    lengths = [len(inputs_ND) for inputs_ND in head_inputs.inputs]

    def fits(group: list[int], index: int) -> bool:
        return sum(lengths[member] for member in group) + lengths[index] <= PASS_TOKENS

    for group in consecutive_groups(range(len(lengths)), fits):
        joined_ND = torch.cat([head_inputs.inputs[member] for member in group])
        rows = [head_inputs.rows[member] for member in group]
        yield rows, HeadInputs([0], head_inputs.head, [joined_ND]).blocks(0)


def reduce_over_labels(
    logit_access: LogitAccess,
    model: torch.nn.Module,
    batch: Batch,
    positions_BT: torch.Tensor,
    per_position: Callable[[Blocks, torch.Tensor], torch.Tensor],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    *,
    score_tokens: int | None,
) -> torch.Tensor:
    """One number per row from its label tokens, float64 `(B,)`, NaN for rows without any.

    `reduce` maps a row's values, as `values_of_labels` gives them, to one number.
    """
    values = values_of_labels(logit_access, model, batch, positions_BT, per_position, score_tokens=score_tokens)
    result = torch.full((len(positions_BT),), torch.nan, dtype=torch.float64)
    if values:
        result[list(values)] = torch.stack([reduce(value) for value in values.values()]).to(result)
    return result


def values_of_labels(
    logit_access: LogitAccess,
    model: torch.nn.Module,
    batch: Batch,
    positions_BT: torch.Tensor,
    per_position: Callable[[Blocks, torch.Tensor], torch.Tensor],
    *,
    score_tokens: int | None,
) -> dict[int, torch.Tensor]:
    """A value of each label token `(N,)` by row, in the order of the tokens; rows without any are left out.

    `per_position` maps the logits in blocks and the targets `(N,)` of some rows to one value per position;
    `positions_BT` is `predicting_tokens(batch)`.
    """
    values: dict[int, torch.Tensor] = {}
    for part in label_passes(logit_access, model, batch, positions_BT, score_tokens=score_tokens):
        by_row = per_position(part.blocks, part.targets).split(part.lengths)
        values.update(zip(part.rows, by_row, strict=True))
    return values


def cross_entropy(blocks: Blocks, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each of N positions, float64 `(N,)` on the CPU, from logits in blocks of the vocabulary.

    `targets` is int64 `(N,)`.

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


class MostLikely:
    """The place of each position's first largest logit, read from blocks on their way to another reader.

    >>> most_likely = MostLikely()
    >>> loss = cross_entropy(most_likely.observe(blocks), targets)
    >>> most_likely.tokens == targets
    """

    def __init__(self) -> None:
        self._best: torch.Tensor | None = None
        self._place: torch.Tensor | None = None

    def observe(self, blocks: Blocks) -> Blocks:
        """The same blocks."""
        for start, stop, block_NV in blocks:
            best, place = block_NV.max(dim=1)
            place = place + start
            if self._best is not None and self._place is not None:
                better = best > self._best
                best, place = torch.where(better, best, self._best), torch.where(better, place, self._place)
            self._best, self._place = best, place
            yield start, stop, block_NV

    @property
    def tokens(self) -> torch.Tensor:
        """Int64 `(N,)` on the CPU, once all blocks were read."""
        assert self._place is not None, "no block was read"
        return self._place.cpu()
