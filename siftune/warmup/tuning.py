"""A short LoRA run through siftune's own recipe, before a pool is scored; finished ones are kept and never run twice.

    warmups/<key>/   the adapter as PEFT saves it; per epoch, on request, its weights and the optimiser's moments; facts.json

The key is the content of model, rows and settings. An interrupted run starts again: it is short. Cost: that of the run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback

from ..data.exports import refill
from ..data.sums import are_intact, read_checked_json, sums_of, write_checked_json
from ..errors import MissingExtra, UserError
from ..files import cache_folder, hash_json, lock_file, plain_errors, remove, temporary_beside
from ..hook.row_index import preserved_random_state
from ..models.backbone import Backbone
from ..models.chat import content_key
from ..offline.daar.probe_set import PickedRows
from ..records import Pool
from ..sft.recipe import Recipe
from ..sft.trainer import prepare

FACTS = "facts.json"
HELD_OUT = "held-out"


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """The settings of a warm-up run."""

    model: str
    max_length: int
    learning_rate: float
    rank: int
    batch: int
    """Rows of an optimiser step."""
    epochs: int | None = None
    steps: int | None = None
    """Exactly one of `epochs` and `steps` is set."""
    seed: int
    device: str
    dtype: str

    def check(self) -> None:
        """Refuse values that cannot be used. Raises `UserError`."""
        least = {"rank": 1, "batch": 1, "max_length": 2} | {"epochs": 1} | {"steps": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name}={value} must be at least {lowest}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"learning_rate={self.learning_rate} must be above 0; 2e-4 is common with LoRA")

    def recipe(self, files: Backbone, *, watched: bool) -> Recipe:
        """The run as a recipe; with `watched` it ends with the adapter of the lowest held-out loss."""
        sft: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": 1,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.03,
            "max_length": self.max_length,
            "save_strategy": "no",
            "logging_strategy": "no",
            "use_cpu": files.torch_device.type == "cpu",
            "bf16": files.torch_dtype == torch.bfloat16,
        }
        sft |= {"num_train_epochs": self.epochs} if self.epochs is not None else {"max_steps": self.steps}
        if watched:
            assert self.steps is not None
            every = max(1, self.steps // 10)
            sft |= {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True, "save_strategy": "steps"}
            sft |= {"save_steps": every, "save_total_limit": 2, "load_best_model_at_end": True}
            sft |= {"metric_for_best_model": f"eval_{HELD_OUT}_loss", "greater_is_better": False}
            sft |= {"per_device_eval_batch_size": self.batch}
        peft = {"r": self.rank, "lora_alpha": 2 * self.rank, "lora_dropout": 0.0, "target_modules": "all-linear"}
        dtype = {"dtype": str(files.torch_dtype).removeprefix("torch.")}
        return Recipe(model=self.model, train=("the rows",), sft=sft, peft=peft, model_kwargs=dtype, seed=self.seed)


def subset(pool: Pool, rows: NDArray[np.int64]) -> Pool:
    """Some rows of a pool, in the order given, as a pool of their own."""
    source = PickedRows(pool.source, rows)
    return Pool(source=source, format=pool.format, fingerprint=hash_json(source.ids(range(len(source)))))


@dataclass(frozen=True)
class WarmedUp:
    """A finished warm-up run."""

    folder: Path
    """Holds the adapter as PEFT saves it."""
    facts: Mapping[str, Any]


def warm_up(
    settings: WarmUp, train: Pool, held_out: Pool | None, *, cache: str | Path | None, moments: bool = False
) -> WarmedUp:
    """Run, or find the run in the cache. With `held_out` the adapter is the one with the lowest held-out loss; with
    `moments` every epoch's weights and Adam moments are kept beside it (`checkpoint_file`).

    Raises `UserError` for settings or rows that cannot be trained on.
    """
    _need_libraries()
    settings.check()
    files = Backbone(settings.model, layer=1, device=settings.device, dtype=settings.dtype)  # type: ignore[arg-type]
    content = [train.fingerprint, None if held_out is None else held_out.fingerprint, content_key(files)]
    values = {name: value for name, value in asdict(settings).items() if name not in ("model", "device")}
    key = hash_json(["warm-up", 1, content, values, files.torch_device.type, moments])
    folder = cache_folder(cache) / "warmups" / key
    with plain_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder.with_suffix(".lock"), wait=True)
    try:
        facts = read_checked_json(folder / FACTS)
        if facts is None or not are_intact(folder, facts["sums"]):
            facts = _run(settings, files, train, held_out, folder, cache, moments)
    finally:
        if lock is not None:
            lock.release()
    return WarmedUp(folder, {name: value for name, value in facts.items() if name != "sums"})


def _need_libraries() -> None:
    from importlib.util import find_spec

    for package in ("trl", "peft"):
        if find_spec(package) is None:
            raise MissingExtra(package, extra="train", needed_for="a warm-up run")


def _run(
    settings: WarmUp,
    files: Backbone,
    train: Pool,
    held_out: Pool | None,
    folder: Path,
    cache: str | Path | None,
    moments: bool,
) -> dict[str, Any]:
    temporary, checkpoints = temporary_beside(folder), temporary_beside(folder)
    with plain_errors(folder.parent):
        temporary.mkdir()
    watched = {} if held_out is None else {HELD_OUT: held_out}
    try:
        with preserved_random_state():
            prepared = prepare(settings.recipe(files, watched=bool(watched)), cache=cache, pool=train, held_out=watched)
            trainer: Any = prepared.trainer(checkpoints)
            recorder = Recorder(temporary if moments else None)
            trainer.add_callback(recorder)
            trainer.train()
            trainer.model.save_pretrained(str(temporary))
        facts: dict[str, Any] = {
            "steps": int(trainer.state.global_step),
            "train_rows": int(prepared.rows.meta["rows"]),
            "learning_rates": recorder.means,
            "held_out_losses": [
                [int(entry["step"]), float(entry[f"eval_{HELD_OUT}_loss"])]
                for entry in trainer.state.log_history
                if f"eval_{HELD_OUT}_loss" in entry
            ],
        }
        facts["sums"] = sums_of(temporary)
        write_checked_json(temporary / FACTS, facts)
        with plain_errors(folder.parent):
            if folder.exists():  # damaged: a finished one was taken from the cache
                refill(folder, temporary, last=FACTS)
            else:
                os.rename(temporary, folder)
    finally:
        remove(temporary)
        remove(checkpoints)
    return facts


def checkpoint_file(folder: Path, epoch: int) -> Path:
    """Where the weights and moments after an epoch (from 0) are: tensors `weight.NAME`, `first.NAME`, `second.NAME`, and
    `step`."""
    return folder / f"epoch-{epoch}.safetensors"


class Recorder(TrainerCallback):
    """Keeps the mean learning rate of every epoch and, with a folder, the trained weights and Adam moments after it."""

    def __init__(self, folder: Path | None) -> None:
        self.means: list[float] = []
        self._folder = folder
        self._rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._rates:
            return
        self.means.append(sum(self._rates) / len(self._rates))
        self._rates = []
        if self._folder is None:
            return
        from safetensors.torch import save_file

        optimizer, tensors = kwargs["optimizer"], {}
        for name, weight in kwargs["model"].named_parameters():
            if not weight.requires_grad:
                continue
            moment = optimizer.state[weight]
            tensors[f"weight.{name}"] = weight.detach().cpu().clone()
            tensors[f"first.{name}"] = moment["exp_avg"].detach().cpu().clone()
            tensors[f"second.{name}"] = moment["exp_avg_sq"].detach().cpu().clone()
            tensors["step"] = torch.tensor([float(moment["step"])], dtype=torch.float64)
        save_file(tensors, str(checkpoint_file(self._folder, len(self.means) - 1)))
