"""The folder of the embedded tiny model: a Llama of 1.8 M weights with its tokenizer, trained by `tools/demo/train_model.py`."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError

MODEL = Path(__file__).parent / "assets" / "model"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def model_folder() -> Path:
    """The folder for `from_pretrained`. Raises `UserError` when files of the installation are missing.

    >>> AutoModelForCausalLM.from_pretrained(model_folder())
    """
    missing = [name for name in FILES if not (MODEL / name).is_file()]
    if missing:
        raise UserError(f"the embedded model at {MODEL} lacks {', '.join(missing)}; reinstall siftune")
    return MODEL
