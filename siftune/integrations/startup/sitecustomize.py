"""Runs when a Python process starts under `siftune run`: waits for `transformers.trainer` and hands it to siftune.

Python imports the first `sitecustomize` on its path. `siftune run` puts this folder first on PYTHONPATH, so that every
process of the command, launched by whatever launcher, comes through here; a `sitecustomize` that the machine has already is
run afterwards. Cost: a few microseconds per process; nothing but the standard library is imported before a trainer is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

TRAINER = "transformers.trainer"


class _TrainerFinder:
    """Lets the other finders find `transformers.trainer`, and runs siftune's part once it is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _join(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _join(module: ModuleType) -> None:
    """Wrap the trainer's class. A Python that lacks siftune stops here, because it would train on every row."""
    try:
        from siftune.integrations.every_trainer import install_from_environment
    except ImportError as error:
        raise SystemExit(
            f"siftune run: {sys.executable} trains and cannot import siftune ({error}); install siftune in its environment"
        ) from error
    install_from_environment(module.Trainer)


def _run_next() -> None:
    """Run the `sitecustomize` that would have been imported without this one."""
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("sitecustomize", [place for place in sys.path if Path(place).resolve() != here])
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("SIFTUNE_RUN"):
    if TRAINER in sys.modules:
        _join(sys.modules[TRAINER])
    else:
        sys.meta_path.insert(0, _TrainerFinder())
_run_next()
