"""A recipe's sections as the objects of the libraries they belong to: SFTConfig, LoraConfig, BitsAndBytesConfig.

The libraries check their own keys; what they would refuse late is refused here first. siftune sets two defaults: no
reporting service unless requested, and on a machine without an accelerator the CPU in float32. Cost: importing trl
(seconds, once).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra, UserError
from ..redaction import shortened
from .config_values import fitting, nearest
from .recipe import Recipe

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig  # type: ignore[attr-defined]

_TOKENS = "rows become tokens by `text`"
_REFUSED = {
    "output_dir": "the run folder holds it; pass --run",
    "resume_from_checkpoint": "a run resumes by itself; run the same command again",
    "save_only_model": "a run resumes from its checkpoints, which need the optimiser; raise save_steps to save space",
    "auto_find_batch_size": "budgets are counted in batches; set per_device_train_batch_size",
    "seed": "write seed: beside sft",
    "hub_token": "checkpoints would hold it; set HF_TOKEN in the environment",
    "push_to_hub_token": "checkpoints would hold it; set HF_TOKEN in the environment",
    "model_init_kwargs": "write model_kwargs: beside sft",
    "dataset_kwargs": _TOKENS,
    "dataset_text_field": f"{_TOKENS}; set columns:",
    "completion_only_loss": f"{_TOKENS}, and only answer tokens have labels",
    "assistant_only_loss": f"{_TOKENS}, and only answer tokens have labels",
    "eval_packing": "held-out rows are never packed into lines",
    "truncation_mode": f"{_TOKENS}, cut on the right",
    "chat_template_path": "save the template with the model's tokenizer instead",
    "eos_token": "save it with the model's tokenizer",
    "pad_token": "save it with the model's tokenizer",
}
"""Keys of SFTConfig that a recipe sets elsewhere, each with what to do instead."""


def sft_config(recipe: Recipe, output_dir: str | Path) -> SFTConfig:
    """The `trl.SFTConfig` of a recipe. Raises `UserError` for an unknown key, a value trl refuses, and packing that
    cuts rows.

    >>> sft_config(Recipe.read({"model": "m", "train": "t.jsonl", "sft": {"max_steps": 4}}), "out").max_steps
    4
    """
    if find_spec("trl") is None:
        raise MissingExtra("trl", extra="train", needed_for="siftune train")
    from trl import SFTConfig  # type: ignore[attr-defined]

    for key, way_out in _REFUSED.items():
        if key in recipe.sft:
            raise UserError(f"sft.{key} is not allowed in a recipe: {way_out}")
    keywords = fitting(SFTConfig, _warm_up(SFTConfig, recipe.sft), section="sft")
    if keywords.get("packing") and keywords.get("packing_strategy") == "wrapped":
        raise UserError(
            "sft.packing_strategy: wrapped cuts rows at the end of a line, so that they can be neither counted nor chosen; use "
            "bfd, or remove it"
        )
    keywords = {"report_to": "none", "disable_tqdm": True, **_machine(keywords), **keywords}
    keywords |= {"output_dir": str(output_dir), "seed": recipe.seed, "max_length": recipe.max_length}
    if keywords.get("padding_free") and not keywords.get("packing"):
        keywords["max_length"] = None  # rows are cut already, and trl refuses a length that it would not enforce
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4 leaves an earlier trainer's type behind
    try:
        return SFTConfig(**keywords, dataset_kwargs={"skip_prepare_dataset": True})
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"sft: {_short(error)}") from error


def _machine(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a machine without an accelerator."""
    import torch

    if torch.accelerator.is_available():
        return {}
    return {"use_cpu": True} | ({} if keywords.get("fp16") or "bf16" in keywords else {"bf16": False})


def _warm_up(cls: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A share of the steps as warm-up, under the name that this version has for it: 4 `warmup_ratio`, 5 `warmup_steps`."""
    keywords = dict(settings)
    names = inspect.signature(cls).parameters
    share = keywords.get("warmup_steps")
    if isinstance(share, float) and 0 < share < 1 and "float" not in str(names["warmup_steps"].annotation):
        keywords["warmup_ratio"] = keywords.pop("warmup_steps")
    if "warmup_ratio" in keywords and "warmup_ratio" not in names:
        keywords["warmup_steps"] = keywords.pop("warmup_ratio")
    return keywords


def lora_config(recipe: Recipe) -> LoraConfig | None:
    """The `peft.LoraConfig` of a recipe, or None for full fine-tuning. Raises `UserError`."""
    if recipe.peft is None:
        return None
    if find_spec("peft") is None:
        raise MissingExtra("peft", extra="train", needed_for="peft:")
    from peft import LoraConfig

    keywords = {"task_type": "CAUSAL_LM", **fitting(LoraConfig, recipe.peft, section="peft")}
    if isinstance(keywords.get("r"), int) and keywords["r"] < 1:
        raise UserError(f"peft.r must be >= 1, got {keywords['r']}")
    try:
        return LoraConfig(**keywords)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft: {_short(error)}") from error


def quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """The `transformers.BitsAndBytesConfig` of a recipe, or None. Raises `UserError`."""
    if recipe.quantization is None:
        return None
    if recipe.peft is None:
        raise UserError("quantization: weights of 4 or 8 bits cannot be trained themselves; set peft: as well")
    from transformers import BitsAndBytesConfig

    known_keys = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for key in recipe.quantization:
        if key not in known_keys:
            raise UserError(
                f"quantization.{key} is no key of transformers.BitsAndBytesConfig{nearest(key, known_keys)}"
            )
    if not recipe.quantization.get("load_in_4bit") and not recipe.quantization.get("load_in_8bit"):
        raise UserError(
            "quantization: neither load_in_4bit nor load_in_8bit is true; set one of them, or remove the section"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError("quantization needs bitsandbytes, which is not installed; run: pip install bitsandbytes")
    try:
        return BitsAndBytesConfig(**recipe.quantization)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"quantization: {_short(error)}") from error


def _short(error: Exception) -> str:
    return shortened(error, 300) or type(error).__name__
