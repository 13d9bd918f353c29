"""For `scripts/frameworks.py`: saves the micro-batches of the first step that a framework trains on, as its trainer gets them.

It is an ordinary `sitecustomize`, behind the one of `siftune run`, and so also shows that an existing one still runs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

TRAINER = "transformers.trainer"


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _record(module.Trainer)

        spec.loader.exec_module = exec_module
        return spec


def _record(trainer_class) -> None:
    original = trainer_class.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 0:
            import torch

            folder = Path(os.environ["FRAMEWORKS_RECORD"])
            folder.mkdir(parents=True, exist_ok=True)
            number = len(list(folder.glob("*.pt")))
            tensors = {name: value.cpu() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            torch.save(tensors, folder / f"rank{self.args.process_index}-{number}.pt")
        return original(self, model, inputs, *args, **kwargs)

    trainer_class.training_step = training_step


if os.environ.get("FRAMEWORKS_RECORD"):
    sys.meta_path.insert(0, _Finder())
