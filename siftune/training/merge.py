"""An adapter folded into its base, so that what was tuned is a model folder like any other.

Cost: the base's weights in memory, once.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..data.files import read_json, remove, temporary_beside
from ..errors import MissingExtra, UserError
from ..models.checkpoint import quiet

ADAPTER = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def load_tuned(folder: Path, *, dtype: str = "auto") -> Any:
    """The model of a folder or hub id; an adapter comes merged into its base. Raises `UserError`.

    >>> model = load_tuned(tuned.model)
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            if not is_adapter(folder):
                return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
            if find_spec("peft") is None:
                raise MissingExtra("peft", extra="train", needed_for=f"the adapter {folder}")
            from peft import PeftModel

            base = read_json(folder / ADAPTER).get("base_model_name_or_path")
            network = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True)
            return PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    except UserError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder} could not be loaded: {' '.join(str(error).split())[:300]}") from error


def merge(adapter: Path, out: Path) -> Path:
    """Write the adapter, folded into its base, with its tokenizer, as the model folder `out`; whole or absent.

    Raises `UserError` where `adapter` is none, or its base is not there.

    >>> merge(Path("run/model"), Path("run/merged"))
    """
    if not is_adapter(adapter):
        raise UserError(f"{adapter} holds no adapter ({ADAPTER}); it is a model already, or the wrong folder")
    from transformers import AutoTokenizer

    network = load_tuned(adapter)
    temporary = temporary_beside(out)
    try:
        with quiet():
            network.save_pretrained(temporary, safe_serialization=True)
            AutoTokenizer.from_pretrained(adapter).save_pretrained(temporary)
        remove(out)
        temporary.rename(out)
    finally:
        remove(temporary)
    return out
