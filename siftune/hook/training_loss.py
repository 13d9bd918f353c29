"""The loss of every trained row, read from the training forward itself: no forward of its own.

`Trainer.compute_loss` runs the model once per micro-batch. A hook on that call reads the model's logits, or the
per-token log-probabilities of trl's fused head, and gives the ledger the mean over each row's label tokens, dropout and
all, before the optimiser step. Models that return neither (other fused losses) leave no loss. Cost: one logsumexp over
the vocabulary per label token where the model returns logits, nothing but a sum where it returns log-probabilities; no
device waits for it.

Shapes: `B` lines of the batch, `C` rows (segments of a packed batch), `T` columns, `V` vocabulary, `N` label tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..models.hidden_states import predicting_tokens
from ..models.layout import candidates_of, layout_of, with_layout
from .ledger import Ledger

Batch = Mapping[str, Any]
ELEMENTS = 1 << 24
"""Logits in float32 at a time, at most."""


@dataclass(frozen=True, eq=False)
class LabelTokens:
    """Where a batch's label tokens are predicted, and of which row each is."""

    line_N: torch.Tensor
    column_N: torch.Tensor
    row_N: torch.Tensor
    target_N: torch.Tensor
    count_C: torch.Tensor
    """Label tokens of each row."""
    shape: tuple[int, ...]
    """`(B, T)`."""

    @classmethod
    def of(cls, batch: Batch) -> LabelTokens:
        """Of a batch with labels, on the labels' device. Raises `UserError` where it has none."""
        labels_BT = batch["labels"]
        positions_CT = predicting_tokens(batch)
        row_N, column_N = positions_CT.nonzero(as_tuple=True)
        layout = layout_of(batch)
        line_N = torch.tensor([span.line for span in layout.spans])[row_N] if layout.packed else row_N
        line_N, column_N, row_N, count_C = (
            value.to(labels_BT.device, non_blocking=True) for value in (line_N, column_N, row_N, positions_CT.sum(1))
        )
        target_N = labels_BT[line_N, column_N + 1]
        return cls(line_N, column_N, row_N, target_N, count_C, tuple(labels_BT.shape))

    def row_losses(self, outputs: Any) -> torch.Tensor | None:
        """Mean loss of each row `(C,)` (float32, NaN without a label token); None where the outputs do not show it."""
        loss_N = self._token_losses(outputs)
        if loss_N is None:
            return None
        sums_C = torch.zeros(len(self.count_C), device=loss_N.device).index_add_(0, self.row_N, loss_N)
        return sums_C / self.count_C

    def _token_losses(self, outputs: Any) -> torch.Tensor | None:
        width = self.shape[1]
        log_probs = getattr(outputs, "log_probs", None)
        if isinstance(log_probs, torch.Tensor) and log_probs.ndim == 2 and log_probs.shape[1] >= width - 1:
            # of virtual tokens (prompt tuning), which come first, there is no label
            return -log_probs.detach()[:, -(width - 1) :][self.line_N, self.column_N].float()
        logits_BTV = getattr(outputs, "logits", None)
        if not isinstance(logits_BTV, torch.Tensor) or logits_BTV.ndim != 3 or logits_BTV.shape[1] < width:
            return None
        logits_BTV = logits_BTV.detach()[:, -width:]
        step = max(1, ELEMENTS // logits_BTV.shape[2])
        parts = [
            torch.nn.functional.cross_entropy(logits_BTV[line, column].float(), target, reduction="none")
            for line, column, target in zip(
                self.line_N.split(step), self.column_N.split(step), self.target_N.split(step), strict=True
            )
        ]
        return torch.cat(parts) if parts else torch.zeros(0, device=logits_BTV.device)


class TrainingLosses:
    """Reads the losses of a step's micro-batches, in their order, into the ledger; without a ledger it does nothing."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger
        self._expected: list[tuple[LabelTokens, Sequence[int | None]]] = []

    def expect(self, batches: Sequence[Batch], lines: Sequence[Sequence[int | None]], *, packed: bool) -> None:
        """The micro-batches that are trained next, and the ledger's line of each of their rows (None: another rank's).

        A micro-batch without labels, or whose rows cannot be matched, leaves no loss.
        """
        self._expected = []
        for batch, lines_of_batch in zip(batches, lines, strict=True):
            readable = isinstance(batch.get("labels"), torch.Tensor) and bool(lines_of_batch)
            laid_out = with_layout(batch, packed=packed) if readable else batch
            if readable and candidates_of(laid_out) == len(lines_of_batch):
                self._expected.append((LabelTokens.of(laid_out), lines_of_batch))
            else:
                self._expected.append((_NO_TOKENS, ()))

    @contextmanager
    def reading(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Read the first forward inside: the training forward of the next micro-batch. Evaluation is not read."""
        if self._ledger is None or not model.training or not self._expected:
            yield
            return
        tokens, lines = self._expected.pop(0)
        ids = inputs.get("input_ids")
        if not lines or not isinstance(ids, torch.Tensor) or tuple(ids.shape) != tokens.shape:
            yield
            return
        ledger, forwards = self._ledger, [0]

        def read(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
            forwards[0] += 1
            if forwards[0] == 1:
                with torch.no_grad():
                    _store(ledger, lines, tokens.row_losses(outputs))

        handle = model.register_forward_hook(read)
        try:
            yield
        finally:
            handle.remove()


def _store(ledger: Ledger, lines: Sequence[int | None], loss_C: torch.Tensor | None) -> None:
    if loss_C is None:
        return
    own = [(row, line) for row, line in enumerate(lines) if line is not None]
    if len(own) < len(lines):
        loss_C = loss_C[torch.tensor([row for row, _ in own], dtype=torch.int64, device=loss_C.device)]
    ledger.add_losses([line for _, line in own], loss_C)


_NONE = torch.zeros(0, dtype=torch.int64)
_NO_TOKENS = LabelTokens(_NONE, _NONE, _NONE, _NONE, _NONE, ())
