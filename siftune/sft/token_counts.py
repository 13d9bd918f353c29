"""What a training run cost, counted where it happens: rows, tokens, learnt tokens, loss, seconds; it outlives a kill.

`Tally` binds itself to a live trainer around two public methods: `get_batch_samples` once below the selection (every call:
candidates, then the kept rows again) and once above it (what is trained on), and `training_step` for the loss. The counts
go into every checkpoint (`siftune/tally.json`) and come back from the one that a run resumes from. `stop_at` ends training
at the first optimiser step that reaches a number of trained tokens. Cost: two sums a micro-batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..files import atomic_path
from ..hook.checkpoint import check, damaged, finish, folder_of, is_complete
from ..models.layout import layout_of

IGNORED = -100


@dataclass
class Counts:
    """Totals since the start of training."""

    trained_rows: int = 0
    trained_tokens: int = 0
    """Real (non-padding) tokens of the rows that were back-propagated."""
    trained_label_tokens: int = 0
    candidates: int = 0
    """Rows that were read; without a selection those that were trained on."""
    scored_tokens: int = 0
    """Real tokens of the candidates that went forward to be scored."""
    loss: float = 0.0
    """Sum over optimiser steps of the step's loss."""
    steps: int = 0
    seconds: float = 0.0
    """From the start of training to its end, interruptions left out."""

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
class Tally:
    """Counts of one trainer; a callback to give to it, then `below` and `above` around `siftune.attach`."""

    stop_at: Mapping[str, int] | None = None
    counts: Counts = field(default_factory=Counts)
    _loss: Any = None
    """Of the steps since the counts were last closed, on the trainer's device: no synchronisation a step."""
    _began: float = 0.0
    _below: tuple[int, int] = (0, 0)
    """Rows and tokens that the trainer has collated for the step so far."""

    @property
    def reached(self) -> bool:
        """Whether the number of tokens to stop at is there."""
        return any(getattr(self.counts, name) >= wanted for name, wanted in (self.stop_at or {}).items())

    # --- bound to a trainer -----------------------------------------------------------------------------------------

    def below(self, trainer: Any) -> None:
        """Count what the trainer's own method hands out; before a selector is attached."""
        previous = trainer.get_batch_samples

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, count = previous(*args, **kwargs)
            rows, tokens, _ = _sizes(batches)
            self._below = (self._below[0] + rows, self._below[1] + tokens)
            return batches, count

        trainer.get_batch_samples = get_batch_samples

    def above(self, trainer: Any, selector: Any) -> None:
        """Count what is trained on, and the loss; after a selector (or None) is attached."""
        selected, step = trainer.get_batch_samples, trainer.training_step

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            self._below = (0, 0)
            batches, count = selected(*args, **kwargs)
            self._count(batches, selector, trainer.state.global_step)
            return batches, count

        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            found = loss.detach().double() if loss.device.type != "mps" else loss.detach()
            self._loss = found if self._loss is None else self._loss + found
            return loss

        trainer.get_batch_samples, trainer.training_step = get_batch_samples, training_step

    def _count(self, batches: Any, selector: Any, step: int) -> None:
        rows, tokens, labels = _sizes(batches)
        counts = self.counts
        counts.trained_rows += rows
        counts.trained_tokens += tokens
        counts.trained_label_tokens += labels
        if selector is None:
            counts.candidates += rows
            return
        counts.candidates += self._below[0] - rows
        if selector.needs_forward and step >= selector.start_step:
            counts.scored_tokens += self._below[1] - tokens

    def close(self) -> None:
        """Bring loss and seconds up to now."""
        if self._loss is not None:
            self.counts.loss += float(self._loss)
            self._loss = None
        now = time.perf_counter()
        self.counts.seconds += now - self._began
        self._began = now

    # --- over interruptions -----------------------------------------------------------------------------------------

    def begin(self, checkpoint: Path | None) -> None:
        """Start, or take back what the checkpoint to resume from has counted."""
        self._began = time.perf_counter()
        if checkpoint is not None:
            path = _file(checkpoint)
            check(checkpoint, path.name)
            try:
                self.counts = Counts(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise damaged(path) from error

    def save(self, checkpoint: Path) -> None:
        """Into a checkpoint."""
        self.close()
        with atomic_path(_file(checkpoint)) as temporary:
            temporary.write_text(json.dumps(asdict(self.counts)) + "\n", encoding="utf-8")

    def callbacks(self) -> tuple[TrainerCallback, TrainerCallback]:
        """The first belongs before the selector's own callback, the second after it."""
        return _Counting(self), _Completing()


class _Counting(TrainerCallback):
    """Steps are counted, the end is called, counts go into checkpoints."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tally.counts.steps = state.global_step
        if self._tally.reached:
            control.should_training_stop = True
        _no_last_checkpoint(args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _no_last_checkpoint(args, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tally.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Completing(TrainerCallback):
    """Marks a checkpoint as whole once everything is in it, where no selector does."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not is_complete(checkpoint):
            finish(checkpoint, step=state.global_step)


def _no_last_checkpoint(args: Any, control: Any) -> None:
    """The last step's checkpoint would be the finished model again, and resuming from it trains a step too many."""
    if control.should_training_stop and not args.load_best_model_at_end:
        control.should_save = False


def _file(checkpoint: Path) -> Path:
    return folder_of(checkpoint) / "tally.json"


def _sizes(batches: Any) -> tuple[int, int, int]:
    """Rows (or segments), real tokens and label tokens of some micro-batches. Rows without a label token are not counted."""
    rows = tokens = learnt = 0
    for batch in batches:
        ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
        if (layout := layout_of(batch)).packed and isinstance(labels, torch.Tensor):
            per_segment = [
                (span.tokens, int((labels[span.line, span.start : span.stop] != IGNORED).sum()))
                for span in layout.spans
            ]
            rows += sum(count > 0 for _, count in per_segment)
            tokens += sum(size for size, count in per_segment if count > 0)
            learnt += sum(count for _, count in per_segment)
            continue
        wanted = (labels != IGNORED).sum(dim=1) if isinstance(labels, torch.Tensor) else torch.zeros(len(ids))
        real = mask.sum(dim=1) if isinstance(mask, torch.Tensor) else torch.full((len(ids),), ids.shape[1])
        counted = wanted > 0
        rows += int(counted.sum())
        tokens += int(real[counted].sum())
        learnt += int(wanted.sum())
    return rows, tokens, learnt
