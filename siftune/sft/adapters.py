"""An adapter merged into its base, so that the tuned model is a model folder like any other.

Cost: the base's weights in memory, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.exports import check_export, place
from ..data.protect import refuse_overlap
from ..errors import MissingExtra, UserError
from ..files import hash_file, hash_json, read_json, remove, temporary_beside
from ..models.backbone import Backbone
from ..models.chat import content_key
from ..models.load import loading, quiet, read_causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model weights beside it."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def load_tuned(folder: Path, *, dtype: str = "auto") -> PreTrainedModel:
    """The model of a folder or hub id; an adapter comes merged into its base. Raises `UserError`.

    >>> model = load_tuned(tuned.model)
    """

    def load() -> PreTrainedModel:
        if not is_adapter(folder):
            plain: PreTrainedModel = read_causal(str(folder), dtype=dtype, use_safetensors=True)
            return plain
        if find_spec("peft") is None:
            raise MissingExtra("peft", extra="train", needed_for=f"the adapter {folder}")
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        return adapted(read_causal(base, dtype=dtype, use_safetensors=True), folder)

    return loading(f"{folder} could not be loaded", load)


def adapted(network: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`network` with the adapter merged into its weights; a weight that head and embeddings share is copied where needed."""
    from peft import PeftModel

    untie(network, tensor_shapes(adapter / ADAPTER_WEIGHTS))
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which are not tied any more
        with_adapter: Any = PeftModel.from_pretrained(network, str(adapter))
        merged: PreTrainedModel = with_adapter.merge_and_unload()
    return merged


def untie(network: PreTrainedModel, adapter: Mapping[str, tuple[int, ...]]) -> None:
    """Give head and embeddings a weight each, where they share one and the adapter changes either: merged into the
    shared weight, a change of the one would be a change of the other."""
    head: Any = network.get_output_embeddings()
    embeddings = network.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    names = [name for name, module in network.named_modules() if module is head or module is embeddings]
    if any(name.removeprefix(PREFIX).startswith(f"{module}.") for name in adapter for module in names):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        network.config.tie_word_embeddings = False


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes in a safetensors file's header, by name. Raises `UserError` where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); save the adapter again") from error


def model_key(folder: Path) -> str:
    """Content hash of a model's or an adapter's files, and of an adapter's base."""
    if not is_adapter(folder):
        return content_key(Backbone(str(folder), layer=1))
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    digests = {path.name: hash_file(path) for path in sorted(folder.glob("adapter_*"))}
    return hash_json([digests, content_key(Backbone(str(base), layer=1))])


def merge(adapter: Path, out: Path) -> Path:
    """Write the adapter, merged into its base, with its tokenizer, as the model folder `out`; complete or absent.

    An earlier export at `out` is replaced. Raises `UserError` where `adapter` is no adapter, where its base is missing, and where
    `out` holds anything else, is the adapter, its base or the working folder, or contains one of them.

    >>> merge(Path("run/model"), Path("run/merged"))
    """
    if not is_adapter(adapter):
        raise UserError(
            f"{adapter} holds no adapter ({ADAPTER}); it is a complete model or the wrong folder; pass the folder of an adapter"
        )
    check_export("out", out)
    refuse_overlap({"out": out}, {"the adapter": adapter})
    from transformers import AutoTokenizer

    network = load_tuned(adapter)
    temporary = temporary_beside(out.resolve())
    try:
        with quiet():
            network.save_pretrained(temporary, safe_serialization=True)
            AutoTokenizer.from_pretrained(adapter).save_pretrained(temporary)
        place(temporary, out)
    finally:
        remove(temporary)
    return out
