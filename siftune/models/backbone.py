"""The first layers of a decoder-only language model as a feature extractor.

A `Backbone` holds the embedding layer, the first `layer` decoder layers and the final norm, so its last hidden state is
what `hidden_states[-1]` of a `layer`-layer model gives (DaaR, arXiv 2502.04380, stage 4). The other layers' tensors are
never read. Cost: the embedding table and `layer` layers of memory; one content hash of them, cached by the files'
stamps (see `load.file_stamp`).

Shapes: `B` rows, `T` tokens, `D` hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import UserError
from ..files import cache_folder
from . import load
from .load import Result, file_stamp
from .store import Store

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A truncated model and its tokenizer, loaded on first use and never pickled.

    Raises `UserError`, on first use, for a folder that is missing or holds no safetensors or no tokenizer, for a
    `layer` the model does not have, for encoders and multimodal wrappers, and for a hub that cannot be reached.

    >>> backbone = Backbone("Qwen/Qwen2.5-7B", layer=3)
    >>> features = extract(backbone, ["one text", "another"])
    """

    model: str
    """A folder, or a hub id."""
    _: KW_ONLY
    layer: int = 3
    """Decoder layers kept, 1 .. the model's own number. 3 is DaaR's; 1 to 10 probe about equally well (table 9)."""
    device: str = "auto"
    """`auto` takes CUDA, else MPS, else the CPU; or any torch device."""
    dtype: DType = "auto"
    """`auto` is bfloat16 for a 16-bit checkpoint on CUDA, float32 everywhere else."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off by default."""
    max_length: int = 1024
    """Tokens of a row that are read (DaaR's constant); lowered to the model's own number of positions."""
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise UserError(f"layer={self.layer} is not a decoder layer; set it to 1 or more")
        if self.max_length < 1:
            raise UserError(f"max_length={self.max_length} leaves no token; set it to 1 or more")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"dtype={self.dtype!r} is not known; use auto, float32 or bfloat16")

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_loaded": {}}.items():
            object.__setattr__(self, name, value)

    # --- what it is, known without the weights ------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where the model's files are; a hub id is downloaded (or taken from the hub's cache) on first use."""
        return self._once("folder", lambda: load.find_folder(self.model, self.revision))

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration as stored, checked to be a causal language model with `layer` layers."""
        return self._once(
            "config",
            lambda: load.read_config(
                self.folder, model=self.model, layer=self.layer, trust_remote_code=self.trust_remote_code
            ),
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, truncating and padding on the right."""
        return self._once(
            "tokenizer",
            lambda: load.read_tokenizer(self.folder, model=self.model, trust_remote_code=self.trust_remote_code),
        )

    @property
    def opening(self) -> str:
        """The beginning-of-text token as text, if the tokenizer puts it before every text by itself; else empty."""
        return self._once("opening", lambda: load.opening(self.tokenizer))

    @property
    def torch_device(self) -> torch.device:
        """The device in use."""
        return self._once("device", lambda: _pick_device(self.device))

    @property
    def device_kind(self) -> str:
        """`cpu`, `mps`, or the CUDA device's name: results are bitwise reproducible only on the same kind."""
        device = self.torch_device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @property
    def torch_dtype(self) -> torch.dtype:
        """The floating type in use."""
        if self.dtype != "auto":
            return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        stored = getattr(self.config, "dtype", None) or getattr(self.config, "torch_dtype", None)
        half = str(stored).removeprefix("torch.") in ("float16", "bfloat16")
        return torch.bfloat16 if half and self.torch_device.type == "cuda" else torch.float32

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def length(self) -> int:
        """Tokens of a row that are read: `max_length`, or fewer where the model has fewer positions."""
        positions = getattr(self.config, "max_position_embeddings", None)
        return min(self.max_length, positions) if isinstance(positions, int) and positions > 0 else self.max_length

    @property
    def key(self) -> str:
        """Content hash of all that determines a row's features: the weights read, configuration, tokenizer, layer, type
        of number, type of device, length, library versions. A changed model has another key, a moved one the same."""
        return self._once("key", lambda: _content_key(self))

    # --- the weights --------------------------------------------------------------------------------------------------

    @property
    def network(self) -> torch.nn.Module:
        """The truncated model, in eval mode, on its device."""
        return self._once("network", lambda: _load(self))

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        self._loaded.pop("network", None)

    def _once(self, name: str, make: Callable[[], Result]) -> Result:
        if name not in self._loaded:
            self._loaded[name] = make()
        result: Result = self._loaded[name]
        return result


def _pick_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is not a device; use auto, cpu, cuda, cuda:0 or mps") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device!r} is not on this machine; set device=cpu or install a CUDA build of torch")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={device!r} is not on this machine; set device=cpu")
    return chosen


def _load(backbone: Backbone) -> torch.nn.Module:
    device = backbone.torch_device  # fails before gigabytes are read
    return load.read_network(
        backbone.folder,
        backbone.config,
        model=backbone.model,
        layer=backbone.layer,
        dtype=backbone.torch_dtype,
        trust_remote_code=backbone.trust_remote_code,
    ).to(device=device)


# --- what its results depend on ---------------------------------------------------------------------------------------


def _content_key(backbone: Backbone) -> str:
    """Hash of the parts; the weights' own hash is remembered for files whose stamps are unchanged.

    Of the tensors of the truncated model, where `chat.content_key` is of the files of the complete one: layers that are
    not read, and how the weights are divided into files, change no feature and so no key.
    """
    import transformers

    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    settings = f"{backbone.layer}|{backbone.torch_dtype}|{backbone.device_kind}|{backbone.length}|{libraries}"
    digest = blake2b(f"backbone 1|{settings}|".encode(), digest_size=16)
    digest.update(json.dumps(_config_facts(backbone), sort_keys=True, default=str).encode())
    texts = [backbone.folder / name for name in load.TOKENIZER_FILES]
    if backbone.trust_remote_code:
        texts += sorted(backbone.folder.glob("*.py"))
    for path in texts:
        if path.is_file():
            digest.update(f"|{path.name}|".encode() + blake2b(path.read_bytes()).digest())
    digest.update(_weights_digest(backbone).encode())
    return digest.hexdigest()


def _config_facts(backbone: Backbone) -> dict[str, Any]:
    volatile = ("_name_or_path", "transformers_version")
    stored = json.loads((backbone.folder / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in stored.items() if name not in volatile}


def _weights_digest(backbone: Backbone) -> str:
    """Hash of the tensors that were read, by name. They are not read again while their files are unchanged."""
    files = sorted(backbone.folder.glob("*.safetensors*"))
    stamps = ["|".join(map(str, file_stamp(path))) for path in files]
    settings = f"{backbone.layer}|{backbone.torch_dtype}|{_config_facts(backbone)}"
    name = blake2b("\n".join(["weights 2", settings, *stamps]).encode(), digest_size=16).hexdigest()

    def of_tensors() -> str:
        digest = blake2b(digest_size=16)
        for title, tensor in sorted(backbone.network.state_dict().items()):
            digest.update(f"{title}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    return Store(cache_folder() / "weights").digest(name, of_tensors)
