"""What a person sees of a training run: a bar's steps and one line per line of the trainer's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..engines.shard import Progress


class Shown(TrainerCallback):
    """Moves `progress`, where there is one, a step at a time, and hands the log's numbers to `told` as a line."""

    def __init__(self, progress: Progress | None, told: Callable[[str], None]) -> None:
        self._progress = progress
        self._told = told

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.start("training", state.max_steps, "steps")
            self._progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            rate = f"  learning rate {logs['learning_rate']:.3g}" if "learning_rate" in logs else ""
            kept = f"  kept {logs['sift/kept_fraction']:.0%}" if "sift/kept_fraction" in logs else ""
            self._told(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}{rate}{kept}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.close()
