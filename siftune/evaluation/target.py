"""The model that is evaluated: a folder or hub id, with or without a LoRA adapter, checked before its weights are read.

An adapter is merged into its base before anything is measured, so that likelihoods are those of one plain model. Whether
the adapter fits the base is decided by the shapes in the adapter's header, the base's configuration, and the base that
the adapter names. Cost of the checks: headers and configurations; the base's hash where its name differs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MissingExtra, UserError
from ..files import hash_file, hash_json, read_json
from ..models import chat
from ..models.backbone import Backbone, DType
from ..models.causal_lm import CausalLM
from ..models.load import find_folder, quiet
from ..sft.adapters import ADAPTER, ADAPTER_WEIGHTS, PREFIX, adapted, is_adapter, tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_LENGTH = 2048
"""Tokens of a prompt and its answer where the model's configuration has no limit."""


@dataclass(frozen=True)
class Target:
    """A checked model to evaluate; its weights are read by `load`.

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
        """The model, checked. A folder that holds only an adapter is read as the base it names with that adapter.

        Raises `UserError` for what is no causal language model, and for an adapter of another base.
        """
        folder = Path(model).expanduser()
        if is_adapter(folder):
            if adapter is not None:
                raise UserError(
                    f"model={str(model)!r} is an adapter itself; pass its base as the model, or no --adapter"
                )
            base = read_json(folder / ADAPTER).get("base_model_name_or_path")
            if not base:
                raise UserError(
                    f"adapter {folder} names no base model; pass the base as the model and the adapter as --adapter"
                )
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
    def tokenizer(self) -> PreTrainedTokenizerBase:
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

    def load(self) -> PreTrainedModel:
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
            raise UserError(f"adapter={adapter!r} holds no {name}; pass the folder that PEFT's save_pretrained wrote")
    return folder


def check_adapter(adapter: Path, base: Backbone) -> None:
    """Raise `UserError` unless the adapter's shapes and the base it names fit; warn where that cannot be decided."""
    named = read_json(adapter / ADAPTER).get("base_model_name_or_path")
    origin = f"adapter {adapter} was trained on {named or 'a base it does not name'}"
    if (misfit := _misfit(tensor_shapes(adapter / ADAPTER_WEIGHTS), _skeleton(base))) is not None:
        raise UserError(f"{origin}, and does not fit {base.model}: {misfit}; pass the base it was trained on")
    if not named or str(named) == base.model:
        return
    named_path, base_path = Path(str(named)).expanduser(), Path(base.model).expanduser()
    if named_path.is_dir():
        if not base_path.is_dir() or named_path.resolve() != base_path.resolve():
            named_base = Backbone(str(named_path), layer=1, device=base.device, dtype=base.dtype)
            if chat.content_key(named_base) != chat.content_key(base):
                raise UserError(f"{origin}, whose weights are not those of {base.model}; pass {named} as the model")
    elif named_path.name.lower() != base_path.name.lower():
        if not base_path.is_dir():  # two names of the hub
            raise UserError(f"{origin}, not on {base.model}; pass {named} as the model")
        warnings.warn(
            f"{origin}; its shapes fit {base.model}, but whether it is the same model is unknown", stacklevel=2
        )


def _skeleton(base: Backbone) -> torch.nn.Module:
    """The base's modules with shapes and no weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    with quiet(), torch.device("meta"):
        if base.trust_remote_code or type(base.config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            skeleton: torch.nn.Module = AutoModelForCausalLM.from_config(base.config)
        else:  # a multimodal checkpoint that is loaded complete (see `read_causal`)
            skeleton = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base.folder))
    return skeleton


def _misfit(shapes: dict[str, tuple[int, ...]], skeleton: torch.nn.Module) -> str | None:
    """The first tensor of a LoRA adapter that does not fit the base, in words; None where all fit."""
    modules = dict(skeleton.named_modules())
    for name, shape in shapes.items():
        path, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        matrix = rest.split(".")[0]
        if matrix not in ("A", "B"):
            continue  # copies of whole modules, embeddings, other kinds of adapter: PEFT itself reports the error
        module = modules.get(path)
        weight = getattr(module, "weight", None)
        if weight is None:
            return f"it changes {path}, which that model does not have"
        outputs, inputs = weight.shape if isinstance(module, torch.nn.Linear) else reversed(weight.shape)
        expected, actual = (inputs, shape[-1]) if matrix == "A" else (outputs, shape[0])
        if expected != actual:
            return f"its {path} is {actual} wide and that model's {expected}"
    return None
