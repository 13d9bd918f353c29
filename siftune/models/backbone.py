"""The first layers of a decoder-only language model, and nothing else of it: what text looks like to the model early on.

A `Backbone` holds the embedding layer, the first `layer` decoder layers and the final norm, so its last hidden state is
what `hidden_states[-1]` of a `layer`-layer model gives (DaaR, arXiv 2502.04380, stage 4). The other layers' tensors are
never read. Cost: the embedding table and `layer` layers of memory; one content hash of them, remembered by the files'
size, time and inode.

Shapes: `B` rows, `T` tokens, `D` hidden width.
"""

from __future__ import annotations

import copy
import json
import logging as std_logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ..data.files import cache_folder
from ..errors import UserError
from .store import Store

DType = Literal["auto", "float32", "bfloat16"]
Made = TypeVar("Made")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


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
    """Run Python code that comes with the model. Off unless the user says so."""
    max_length: int = 1024
    """Tokens of a row that are read (DaaR's constant); lowered to the model's own number of positions."""
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise UserError(f"layer={self.layer} is not a decoder layer; give 1 or more")
        if self.max_length < 1:
            raise UserError(f"max_length={self.max_length} leaves no token; give 1 or more")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"dtype={self.dtype!r} is not known; give auto, float32 or bfloat16")

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_loaded": {}}.items():
            object.__setattr__(self, name, value)

    # --- what it is, known without the weights ------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where the model's files are; a hub id is downloaded (or found in the hub's cache) on first use."""
        return self._once("folder", lambda: _find_folder(self.model, self.revision))

    @property
    def config(self) -> Any:
        """The model's configuration as stored, checked to be a causal language model with `layer` layers."""
        return self._once("config", lambda: _read_config(self))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, truncating and padding on the right."""
        return self._once("tokenizer", lambda: _read_tokenizer(self))

    @property
    def opening(self) -> str:
        """The beginning-of-text token as text, if the tokenizer puts it before every text by itself; else empty."""
        return self._once("opening", lambda: _opening(self.tokenizer))

    @property
    def torch_device(self) -> torch.device:
        """The device in use."""
        return self._once("device", lambda: _pick_device(self.device))

    @property
    def device_kind(self) -> str:
        """`cpu`, `mps`, or the CUDA device's name: numbers are repeated bit for bit only on the same kind."""
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
        return self._once("network", lambda: _read_network(self))

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        self._loaded.pop("network", None)

    def _once(self, name: str, make: Callable[[], Made]) -> Made:
        if name not in self._loaded:
            self._loaded[name] = make()
        made: Made = self._loaded[name]
        return made


# --- finding and reading the files ------------------------------------------------------------------------------------


def _find_folder(model: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"model={model!r} is a file; give the folder that holds it")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(
            f"model={model!r} is not a folder here; check the path, or give a hub id such as Qwen/Qwen2.5-7B"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"])
        )
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"model={model!r} is not a folder here and the hub cannot be reached; download it first and give its folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model={model!r} could not be fetched from the hub ({reason}); check the id and revision"
        ) from error


def _read_config(backbone: Backbone) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    said = f"model={backbone.model!r}"
    if not (backbone.folder / "config.json").is_file():
        raise UserError(f"{said} holds no config.json; give the folder that save_pretrained wrote")
    config = _asking(
        f"{said} has a config.json that transformers cannot read",
        lambda: AutoConfig.from_pretrained(backbone.folder, trust_remote_code=backbone.trust_remote_code),
    )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{said} is an encoder-decoder ({config.model_type}); give a decoder-only language model")
    if config.get_text_config() is not config:
        raise UserError(f"{said} is a multimodal wrapper ({config.model_type}); give its text-only language model")
    known, masked = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING, type(config) in MODEL_FOR_MASKED_LM_MAPPING
    bidirectional = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if bidirectional or (masked and not getattr(config, "is_decoder", False)):
        raise UserError(f"{said} is an encoder ({config.model_type}); give a decoder-only language model")
    if not known and not backbone.trust_remote_code:
        raise UserError(f"{said} ({config.model_type}) is not a causal language model; give a decoder-only one")
    layers = int(config.num_hidden_layers)
    if backbone.layer > layers:
        raise UserError(f"layer={backbone.layer} exceeds the {layers} layers of {said}; give 1 to {layers}")
    return config


def _read_tokenizer(backbone: Backbone) -> Any:
    from transformers import AutoTokenizer

    said = f"model={backbone.model!r}"
    if not any((backbone.folder / name).is_file() for name in TOKENIZER_FILES if not name.startswith("chat")):
        raise UserError(f"{said} holds no tokenizer; save the model's tokenizer into the same folder")
    tokenizer = _asking(
        f"{said} has a tokenizer that transformers cannot read",
        lambda: AutoTokenizer.from_pretrained(backbone.folder, trust_remote_code=backbone.trust_remote_code),
    )
    tokenizer.truncation_side = tokenizer.padding_side = "right"
    if not len(tokenizer):
        raise UserError(f"{said} holds a tokenizer without tokens; save the model's tokenizer into the same folder")
    return tokenizer


def _opening(tokenizer: Any) -> str:
    token = tokenizer.bos_token
    return token if isinstance(token, str) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def truncated_config(config: Any, layer: int) -> Any:
    """A copy of `config` for its first `layer` decoder layers; lists with one entry per layer are cut to match."""
    cut = copy.deepcopy(config)
    layers = int(cut.num_hidden_layers)
    for name, value in config.to_dict().items():
        if (
            isinstance(value, (list, tuple))
            and len(value) == layers
            and "token" not in name
            and name != "architectures"
        ):
            setattr(cut, name, list(value[:layer]))
    cut.num_hidden_layers = layer
    return cut


def _read_network(backbone: Backbone) -> torch.nn.Module:
    from transformers import AutoModel

    config = truncated_config(backbone.config, backbone.layer)
    if not any((backbone.folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(
            f"model={backbone.model!r} holds no model.safetensors; other weight formats can hold code and are not read, "
            "convert it with save_pretrained"
        )

    def load() -> torch.nn.Module:
        network: torch.nn.Module
        network, facts = AutoModel.from_pretrained(
            backbone.folder,
            config=config,
            dtype=backbone.torch_dtype,
            use_safetensors=True,
            trust_remote_code=backbone.trust_remote_code,
            output_loading_info=True,
        )
        if absent := sorted(facts["missing_keys"]):
            raise UserError(
                f"model={backbone.model!r} lacks {len(absent)} of the tensors of its first {backbone.layer} layers "
                f"({absent[0]}, ...); download or save it again"
            )
        return network

    device = backbone.torch_device  # a wrong one is better known before gigabytes are read
    network = _asking(f"model={backbone.model!r} could not be loaded", load)
    return network.eval().requires_grad_(False).to(device=device)


def _asking(what: str, load: Callable[[], Made]) -> Made:
    """`load()` without transformers' tables and bars; what goes wrong becomes one sentence."""
    try:
        with quiet():
            return load()
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own; read that code, then pass trust_remote_code=True"
        raise UserError(f"{what}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing and draws no bar inside; both settings come back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(std_logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _pick_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is not a device; give auto, cpu, cuda, cuda:0 or mps") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device!r} is not on this machine; give device=cpu or install a CUDA build of torch")
    if picked.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={device!r} is not on this machine; give device=cpu")
    return picked


# --- what its results depend on ---------------------------------------------------------------------------------------


def _content_key(backbone: Backbone) -> str:
    """Hash of the parts; the weights' own hash is remembered for files whose size, time and inode are unchanged."""
    import transformers

    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    said = f"{backbone.layer}|{backbone.torch_dtype}|{backbone.device_kind}|{backbone.length}|{libraries}"
    digest = blake2b(f"backbone 1|{said}|".encode(), digest_size=16)
    digest.update(json.dumps(_config_facts(backbone), sort_keys=True, default=str).encode())
    for name in TOKENIZER_FILES:
        path = backbone.folder / name
        if path.is_file():
            digest.update(f"|{name}|".encode() + blake2b(path.read_bytes()).digest())
    digest.update(_weights_digest(backbone).encode())
    return digest.hexdigest()


def _config_facts(backbone: Backbone) -> dict[str, Any]:
    volatile = ("_name_or_path", "transformers_version")
    stored = json.loads((backbone.folder / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in stored.items() if name not in volatile}


def _weights_digest(backbone: Backbone) -> str:
    """Hash of the tensors that were read, by name. Reading them again is avoided while their files are untouched."""
    stamps = []
    for path in sorted(backbone.folder.glob("*.safetensors*")):
        stat = path.stat()
        stamps.append(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}")
    asked = f"{backbone.layer}|{backbone.torch_dtype}|{_config_facts(backbone)}"
    name = blake2b("\n".join(["weights 1", asked, *stamps]).encode(), digest_size=16).hexdigest()
    memory = Store(cache_folder() / "weights")
    if found := memory.get(name):
        return str(found[1]["digest"])
    digest = blake2b(digest_size=16)
    for title, tensor in sorted(backbone.network.state_dict().items()):
        digest.update(f"{title}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    memory.put(name, {}, {"digest": digest.hexdigest()})
    return digest.hexdigest()
