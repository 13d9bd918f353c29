"""The model that is evaluated: a folder or hub id, with or without a LoRA adapter, checked before its weights are read.

An adapter is merged into its base before anything is measured, so that likelihoods are those of one plain model. Whether
the two belong together is told from the shapes in the adapter's header against the base's configuration, and from the
base that the adapter names. Cost of the checks: headers and configurations; the base's hash where its name differs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingExtra, UserError
from ..files import hash_file, hash_json, read_json
from ..models import chat
from ..models.backbone import Backbone, DType
from ..models.causal_lm import CausalLM
from ..models.load import find_folder, quiet
from ..sft.adapters import ADAPTER, ADAPTER_WEIGHTS, PREFIX, adapted, is_adapter, tensor_shapes

DEFAULT_LENGTH = 2048
"""Tokens of a prompt and its answer where the model's configuration does not say."""


@dataclass(frozen=True)
class Target:
    """A model to evaluate, known to be sound; its weights are read by `load`.

    >>> Target.find("./base", adapter="./adapter").load()
    """

    model: str
    """Folder or hub id of the base."""
    adapter: Path | None
    device: str
    dtype: DType

    @classmethod
    def find(
        cls, model: str | Path, *, adapter: str | Path | None = None, device: str = "auto", dtype: DType = "auto"
    ) -> Target:
        """The model, checked. A folder that holds an adapter and no model stands for the base it names, adapted.

        Raises `UserError` for what is no causal language model, and for an adapter of another base.
        """
        folder = Path(model).expanduser()
        if is_adapter(folder):
            if adapter is not None:
                raise UserError(
                    f"model={str(model)!r} is an adapter itself; give its base as the model, or no --adapter"
                )
            base = read_json(folder / ADAPTER).get("base_model_name_or_path")
            if not base:
                raise UserError(f"adapter {folder} names no base model; give the base as the model and it as --adapter")
            model, adapter = str(base), folder
        target = cls(str(model), None if adapter is None else _adapter_folder(str(adapter)), device, dtype)
        target.lm.check()
        _ = target.files.torch_device
        if target.adapter is not None:
            check_adapter(target.adapter, target.files)
        return target

    @cached_property
    def lm(self) -> CausalLM:
        """The base model, not loaded yet."""
        return CausalLM(self.model, device=self.device, dtype=self.dtype, max_length=1 << 30)

    @property
    def files(self) -> Backbone:
        """Configuration, tokenizer and device of the base."""
        return self.lm.files

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.files.tokenizer

    @property
    def length(self) -> int:
        """Tokens of a sequence at most."""
        positions = getattr(self.files.config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else DEFAULT_LENGTH

    @property
    def key(self) -> str:
        """Content hash of all weights, configuration, tokenizer, types and versions."""
        parts = [chat.content_key(self.files)]
        if self.adapter is not None:
            parts += [hash_file(self.adapter / name) for name in (ADAPTER, ADAPTER_WEIGHTS)]
        return hash_json(parts)

    def load(self) -> torch.nn.Module:
        """The model on its device, in eval mode, any adapter merged."""
        network: Any = self.lm.parts.causal
        if self.adapter is None:
            return network  # type: ignore[no-any-return]
        return adapted(network, self.adapter).eval().requires_grad_(False)  # type: ignore[no-any-return]


# --- does the adapter belong to the base? -----------------------------------------------------------------------------


def _adapter_folder(adapter: str) -> Path:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtra("peft", extra="train", needed_for="an adapter") from error
    try:
        folder = find_folder(adapter, None)
    except UserError as error:
        raise UserError(str(error).replace("model=", "adapter=", 1)) from error
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"adapter={adapter!r} holds no {name}; give the folder that PEFT's save_pretrained wrote")
    return folder


def check_adapter(adapter: Path, base: Backbone) -> None:
    """Raise `UserError` unless the adapter's shapes and the base it names fit; warn where that cannot be told."""
    named = read_json(adapter / ADAPTER).get("base_model_name_or_path")
    said = f"adapter {adapter} was trained on {named or 'a base it does not name'}"
    if (misfit := _misfit(tensor_shapes(adapter / ADAPTER_WEIGHTS), _skeleton(base))) is not None:
        raise UserError(f"{said}, and does not fit {base.model}: {misfit}; give the base it was trained on")
    if not named or str(named) == base.model:
        return
    known, here = Path(str(named)).expanduser(), Path(base.model).expanduser()
    if known.is_dir():
        if not here.is_dir() or known.resolve() != here.resolve():
            other = Backbone(str(known), layer=1, device=base.device, dtype=base.dtype)
            if chat.content_key(other) != chat.content_key(base):
                raise UserError(f"{said}, whose weights are not those of {base.model}; give {named} as the model")
    elif known.name.lower() != here.name.lower():
        if not here.is_dir():  # two names of the hub
            raise UserError(f"{said}, not on {base.model}; give {named} as the model")
        warnings.warn(f"{said}; its shapes fit {base.model}, and whether it is the same cannot be told", stacklevel=2)


def _skeleton(base: Backbone) -> torch.nn.Module:
    """The base's modules with shapes and no weights."""
    from transformers import AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        made: torch.nn.Module = AutoModelForCausalLM.from_config(base.config)
    return made


def _misfit(shapes: dict[str, tuple[int, ...]], skeleton: torch.nn.Module) -> str | None:
    """The first tensor of a LoRA adapter that has no place in the base, in words; None where all fit."""
    modules = dict(skeleton.named_modules())
    for name, shape in shapes.items():
        path, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        which = rest.split(".")[0]
        if which not in ("A", "B"):
            continue  # copies of whole modules, embeddings, other kinds of adapter: PEFT itself says what is wrong
        module = modules.get(path)
        weight = getattr(module, "weight", None)
        if weight is None:
            return f"it changes {path}, which that model does not have"
        outputs, inputs = weight.shape if isinstance(module, torch.nn.Linear) else reversed(weight.shape)
        wanted, found = (inputs, shape[-1]) if which == "A" else (outputs, shape[0])
        if wanted != found:
            return f"its {path} is {found} wide and that model's {wanted}"
    return None
