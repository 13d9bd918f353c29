"""The cost of a training run: rows, tokens, label tokens, loss and seconds, kept over interruptions.

`TokenCounts` wraps two public methods of a live trainer: `get_batch_samples` once below the selection (every call:
candidates, then the kept rows again) and once above it (what is trained on), and `training_step` for the loss. The totals
are written into every checkpoint (`siftune/tally.json`) and read from the one that a run resumes from. `stop_at` ends
training at the first optimiser step that reaches a number of trained tokens. Cost: two sums per micro-batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..files import atomic_path
from ..hook.checkpoint import check, damaged, finish, folder_of, is_complete
from ..models.layout import with_layout

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from ..online.base import OnlineMethod

IGNORED = -100


@dataclass
class Totals:
    """Totals since the start of training."""

    trained_rows: int = 0
    trained_tokens: int = 0
    """Real (non-padding) tokens of the rows that were back-propagated."""
    trained_label_tokens: int = 0
    candidates: int = 0
    """Rows that the selection chose from; without a selection the trained rows."""
    scored_tokens: int = 0
    """Real tokens of the forward passes that score candidates."""
    loss: float = 0.0
    """Sum over optimiser steps of the step's loss."""
    steps: int = 0
    seconds: float = 0.0
    """From the start of training to its end, without interruptions."""

    @property
    def tokens(self) -> dict[str, int]:
        """For the manifest."""
        return {
            "trained_rows": self.trained_rows,
            "trained_label_tokens": self.trained_label_tokens,
            "trained_tokens": self.trained_tokens,
            "forward_tokens": self.scored_tokens + self.trained_tokens,
            "candidates": self.candidates,
        }

    @property
    def train_loss(self) -> float | None:
        """Mean over optimiser steps."""
        return self.loss / self.steps if self.steps else None


@dataclass(eq=False)
class TokenCounts:
    """Counts of one trainer: add its callbacks to it, and call `below` before and `above` after `siftune.attach`."""

    stop_at: Mapping[str, int] | None = None
    totals: Totals = field(default_factory=Totals)
    _loss: Any = None
    """Sum over the steps since the last `close`, on the trainer's device, so that no step synchronises."""
    _began: float = 0.0
    _below: tuple[int, int] = (0, 0)
    """Rows and tokens that the trainer has collated for the step so far."""

    @property
    def reached(self) -> bool:
        """Whether the number of tokens to stop at is reached."""
        return any(getattr(self.totals, name) >= limit for name, limit in (self.stop_at or {}).items())

    # --- bound to a trainer -----------------------------------------------------------------------------------------

    def below(self, trainer: Trainer) -> None:
        """Count what the trainer's own method returns; call before a selector is attached."""
        previous = trainer.get_batch_samples

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, count = previous(*args, **kwargs)
            rows, tokens, _ = _sizes(batches)
            self._below = (self._below[0] + rows, self._below[1] + tokens)
            return batches, count

        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]

    def above(self, trainer: Trainer, selector: OnlineMethod | None) -> None:
        """Count what is trained on, and the loss; call after a selector (or None) is attached."""
        selected, step = trainer.get_batch_samples, trainer.training_step

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            self._below = (0, 0)
            batches, count = selected(*args, **kwargs)
            self._count(batches, selector, trainer.state.global_step)
            return batches, count

        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            step_loss = loss.detach().double() if loss.device.type != "mps" else loss.detach()
            self._loss = step_loss if self._loss is None else self._loss + step_loss
            return loss

        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
        trainer.training_step = training_step  # type: ignore[method-assign]

    def _count(self, batches: Any, selector: OnlineMethod | None, step: int) -> None:
        rows, tokens, labels = _sizes(batches)
        totals = self.totals
        totals.trained_rows += rows
        totals.trained_tokens += tokens
        totals.trained_label_tokens += labels
        if selector is None:
            totals.candidates += rows
            return
        totals.candidates += self._below[0] - rows
        if selector.needs_forward and step >= selector.start_step:
            totals.scored_tokens += self._below[1] - tokens

    def close(self) -> None:
        """Update loss and seconds to the present."""
        if self._loss is not None:
            self.totals.loss += float(self._loss)
            self._loss = None
        now = time.perf_counter()
        self.totals.seconds += now - self._began
        self._began = now

    # --- over interruptions -----------------------------------------------------------------------------------------

    def begin(self, checkpoint: Path | None) -> None:
        """Start from zero, or from the totals of the checkpoint to resume from."""
        self._began = time.perf_counter()
        if checkpoint is not None:
            path = _file(checkpoint)
            check(checkpoint, path.name)
            try:
                self.totals = Totals(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise damaged(path) from error

    def save(self, checkpoint: Path) -> None:
        """Write the totals into a checkpoint."""
        self.close()
        with atomic_path(_file(checkpoint)) as temporary:
            temporary.write_text(json.dumps(asdict(self.totals)) + "\n", encoding="utf-8")

    def callbacks(self) -> tuple[TrainerCallback, TrainerCallback]:
        """The first belongs before the selector's own callback, the second after it."""
        return _Counting(self), _Completing()


class _Counting(TrainerCallback):
    """Counts steps, stops training at the limit, and writes the totals into checkpoints."""

    def __init__(self, token_counts: TokenCounts) -> None:
        self._token_counts = token_counts

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._token_counts.totals.steps = state.global_step
        if self._token_counts.reached:
            control.should_training_stop = True
        _no_last_checkpoint(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _no_last_checkpoint(args, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._token_counts.save(_checkpoint(args, state))


class _Completing(TrainerCallback):
    """Marks a checkpoint as complete once everything is in it, where no selector does."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = _checkpoint(args, state)
        if not is_complete(checkpoint):
            finish(checkpoint, step=state.global_step)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that the trainer has just written."""
    assert args.output_dir is not None, "TrainingArguments sets it"
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _no_last_checkpoint(args: TrainingArguments, control: TrainerControl) -> None:
    """The last step's checkpoint would be the finished model again, and resuming from it trains a step too many."""
    if control.should_training_stop and not args.load_best_model_at_end:
        control.should_save = False


def _file(checkpoint: Path) -> Path:
    return folder_of(checkpoint) / "tally.json"


def _sizes(batches: Any) -> tuple[int, int, int]:
    """Rows (or segments), real tokens and label tokens of micro-batches. Rows without a label token are not counted."""
    rows = tokens = labelled = 0
    for batch in batches:
        ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
        joined = mask is None and batch.get("position_ids") is not None  # where each line may hold a single row
        if (layout := with_layout(batch, packed=joined).layout).packed and isinstance(labels, torch.Tensor):
            per_segment = [
                (span.tokens, int((labels[span.line, span.start : span.stop] != IGNORED).sum()))
                for span in layout.spans
            ]
            rows += sum(count > 0 for _, count in per_segment)
            tokens += sum(size for size, count in per_segment if count > 0)
            labelled += sum(count for _, count in per_segment)
            continue
        label_counts = (labels != IGNORED).sum(dim=1) if isinstance(labels, torch.Tensor) else torch.zeros(len(ids))
        real = mask.sum(dim=1) if isinstance(mask, torch.Tensor) else torch.full((len(ids),), ids.shape[1])
        counted = label_counts > 0
        rows += int(counted.sum())
        tokens += int(real[counted].sum())
        labelled += int(label_counts.sum())
    return rows, tokens, labelled
