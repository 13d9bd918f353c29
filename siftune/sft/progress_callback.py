"""The progress of a training run: the steps of a progress bar, and one line per line of the trainer's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..engines.shard import Progress

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class ProgressCallback(TrainerCallback):
    """Advances `progress`, if any, by one per step, and passes the log's numbers to `on_event` as a line."""

    def __init__(self, progress: Progress | None, on_event: Callable[[str], None]) -> None:
        self._progress = progress
        self._on_event = on_event

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress.start("training", state.max_steps, "steps")
            self._progress.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.advance(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            rate = f"  learning rate {logs['learning_rate']:.3g}" if "learning_rate" in logs else ""
            kept = f"  kept {logs['sift/kept_fraction']:.0%}" if "sift/kept_fraction" in logs else ""
            self._on_event(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}{rate}{kept}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress.close()
