"""How good a cell's model is: held-out loss and token accuracy by domain, and an evaluation suite where one is asked.

Values are flat: `loss/DOMAIN` (nats per answer token), `accuracy/DOMAIN` (share of answer tokens), `TASK/METRIC`. The
study adds the means over domains and over tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.checkpoint import quiet, read_tokenizer
from .data import Data, model_folder
from .spec import Study


def load_model(folder: Path) -> Any:
    """A tuned model, an adapter merged into its base. In evaluation mode, on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        if (folder / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model: Any = AutoPeftModelForCausalLM.from_pretrained(str(folder)).merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def measured(study: Study, data: Data, model: Path, *, cache: str | None = None) -> dict[str, float]:
    """Every value of the model in the folder `model`. Raises `UserError`."""
    values: dict[str, float] = {}
    if study.held_out:
        values |= _held_out(study, data, model)
    if study.suite:
        values |= _suite(study, model)
    return values


def _held_out(study: Study, data: Data, model: Path) -> dict[str, float]:
    from ..evaluation.held_out import held_out

    tokenizer = read_tokenizer(model_folder(study), model=study.model, trust_remote_code=False)
    found = held_out(
        load_model(model),
        tokenizer,
        {name: str(path) for name, path in data.held_out.items()},
        text=study.text,
        max_length=study.max_length,
        columns=dict(study.columns) if study.columns else None,
        format=study.format,  # type: ignore[arg-type]
    )
    values = {f"loss/{name}": one.loss for name, one in found.items()}
    return values | {f"accuracy/{name}": one.token_accuracy for name, one in found.items()}


def _suite(study: Study, model: Path) -> dict[str, float]:
    """The suite's tasks, each metric a value."""
    raise NotImplementedError
