"""A recipe's sections as the objects of the libraries they belong to: SFTConfig, LoraConfig, BitsAndBytesConfig.

The libraries check their own keys; what they would find out late is found here first. Two defaults are ours: no reporting
service unless asked, and on a machine without an accelerator the CPU in float32. Cost: importing trl (seconds, once).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MissingExtra, UserError
from ..redaction import shortened
from .config_values import fitting, nearest
from .recipe import Recipe

_TOKENS = "rows become tokens by `text`"
_REFUSED = {
    "output_dir": "the run folder holds it; give --run",
    "resume_from_checkpoint": "a run goes on by itself; run the same command again",
    "save_only_model": "a run goes on from its checkpoints, which need the optimiser; raise save_steps to save space",
    "auto_find_batch_size": "budgets are counted in batches; set per_device_train_batch_size",
    "seed": "write seed: beside sft",
    "hub_token": "checkpoints would hold it; set HF_TOKEN in the environment",
    "push_to_hub_token": "checkpoints would hold it; set HF_TOKEN in the environment",
    "model_init_kwargs": "write model_kwargs: beside sft",
    "dataset_kwargs": _TOKENS,
    "dataset_text_field": f"{_TOKENS}; give columns:",
    "completion_only_loss": f"{_TOKENS}, and only answers are learnt",
    "assistant_only_loss": f"{_TOKENS}, and only answers are learnt",
    "truncation_mode": f"{_TOKENS}, cut on the right",
    "chat_template_path": "save the template with the model's tokenizer",
    "eos_token": "save it with the model's tokenizer",
    "pad_token": "save it with the model's tokenizer",
}
"""Keys of SFTConfig that a recipe says elsewhere."""


def sft_config(recipe: Recipe, output_dir: str | Path) -> Any:
    """The `trl.SFTConfig` of a recipe. Raises `UserError` for an unknown key, a value trl refuses, and packing.

    >>> sft_config(Recipe.read({"model": "m", "train": "t.jsonl", "sft": {"max_steps": 4}}), "out").max_steps
    4
    """
    if find_spec("trl") is None:
        raise MissingExtra("trl", extra="train", needed_for="siftune train")
    from trl import SFTConfig  # type: ignore[attr-defined]

    for key, way_out in _REFUSED.items():
        if key in recipe.sft:
            raise UserError(f"sft.{key} has no place in a recipe: {way_out}")
    given = fitting(SFTConfig, _warm_up(SFTConfig, recipe.sft), section="sft")
    for key in ("packing", "padding_free"):
        if given.get(key):
            raise UserError(f"sft.{key} joins rows, so that they can be neither counted nor chosen; leave it out")
    given = {"report_to": "none", "disable_tqdm": True, **_machine(given), **given}
    given |= {"output_dir": str(output_dir), "seed": recipe.seed, "max_length": recipe.max_length}
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4 leaves an earlier trainer's type behind
    try:
        return SFTConfig(**given, dataset_kwargs={"skip_prepare_dataset": True})
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"sft: {_short(error)}") from error


def _machine(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a machine without an accelerator."""
    import torch

    if torch.accelerator.is_available():
        return {}
    return {"use_cpu": True} | ({} if given.get("fp16") or "bf16" in given else {"bf16": False})


def _warm_up(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A share of the steps as warm-up, under the name that this version has for it: 4 `warmup_ratio`, 5 `warmup_steps`."""
    found = dict(given)
    names = inspect.signature(cls).parameters
    share = found.get("warmup_steps")
    if isinstance(share, float) and 0 < share < 1 and "float" not in str(names["warmup_steps"].annotation):
        found["warmup_ratio"] = found.pop("warmup_steps")
    if "warmup_ratio" in found and "warmup_ratio" not in names:
        found["warmup_steps"] = found.pop("warmup_ratio")
    return found


def lora_config(recipe: Recipe) -> Any:
    """The `peft.LoraConfig` of a recipe, or None for full fine-tuning. Raises `UserError`."""
    if recipe.peft is None:
        return None
    if find_spec("peft") is None:
        raise MissingExtra("peft", extra="train", needed_for="peft:")
    from peft import LoraConfig

    given = {"task_type": "CAUSAL_LM", **fitting(LoraConfig, recipe.peft, section="peft")}
    if isinstance(given.get("r"), int) and given["r"] < 1:
        raise UserError(f"peft.r={given['r']} gives an adapter of no rank; give at least 1")
    try:
        return LoraConfig(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft: {_short(error)}") from error


def quantization_config(recipe: Recipe) -> Any:
    """The `transformers.BitsAndBytesConfig` of a recipe, or None. Raises `UserError`."""
    if recipe.quantization is None:
        return None
    if recipe.peft is None:
        raise UserError("quantization: weights of 4 or 8 bits cannot be trained themselves; give peft: as well")
    from transformers import BitsAndBytesConfig

    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for key in recipe.quantization:
        if key not in known:
            raise UserError(f"quantization.{key} is no key of transformers.BitsAndBytesConfig{nearest(key, known)}")
    if not recipe.quantization.get("load_in_4bit") and not recipe.quantization.get("load_in_8bit"):
        raise UserError(
            "quantization: neither load_in_4bit nor load_in_8bit is true; give one, or leave the section out"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError("quantization needs bitsandbytes, which is not installed; run: pip install bitsandbytes")
    try:
        return BitsAndBytesConfig(**recipe.quantization)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"quantization: {_short(error)}") from error


def _short(error: Exception) -> str:
    return shortened(error, 300) or type(error).__name__
