"""A model folder (or hub id) as transformers saves it: located, checked to be a causal language model, and partly read.

Reading takes the embedding layer, the first `layer` decoder layers and the final norm; no other tensor's data, no
pickle, no Python code of the model's own unless the user allows it. Every failure is one sentence.
"""

from __future__ import annotations

import copy
import json
import logging as std_logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..data.chat_template import check_template
from ..errors import UserError, is_failure
from ..files import plain_errors, read_json, refuse_special
from ..redaction import shortened

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Result = TypeVar("Result")

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


def file_stamp(path: Path) -> list[str | int]:
    """Where a file is, its size, inode, and times of content and of change. A writer can set the time of the content
    back, the time of change only the system: weights rewritten in place have another stamp."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def find_folder(model: str, revision: str | None) -> Path:
    """The folder, or the hub id's folder in the hub's cache, downloaded if need be (safetensors and text files
    only)."""
    path = Path(model).expanduser()
    if path.is_dir():
        with plain_errors(path):
            for file in path.iterdir():
                refuse_special(file)
        _check_adapter(path, model)
        return path
    if path.exists():
        raise UserError(f"model={model!r} is a file; pass its folder")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(
            f"model={model!r} is not a folder here; check the path, or pass a hub id such as Qwen/Qwen2.5-7B"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        path = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"model={model!r} is not a folder here and the hub cannot be reached; download it first and pass its folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model={model!r} could not be fetched from the hub ({reason}); check the id and revision"
        ) from error
    _check_adapter(path, model)
    return path


def _check_adapter(folder: Path, model: str) -> None:
    """Raise `UserError` for an adapter whose configuration names a Python module, which PEFT would import."""
    if not (folder / "adapter_config.json").is_file():
        return
    stored = read_json(folder / "adapter_config.json")
    if isinstance(stored, dict) and stored.get("megatron_config"):
        raise UserError(
            f"model={model!r} has an adapter_config.json that names a Python module to import (megatron_core: "
            f"{stored.get('megatron_core')!r}); remove megatron_config from it"
        )


def _check_kernels(folder: Path, where: str) -> None:
    """Raise `UserError` for a configuration that names a repository of the hub as its attention: its code would be
    run."""
    stored = read_json(folder / "config.json")
    parts = [stored, *stored.values()] if isinstance(stored, dict) else []
    for part in (part for part in parts if isinstance(part, dict)):
        for key, value in part.items():
            if key.endswith("_implementation") and "/" in json.dumps(value):
                raise UserError(
                    f"{where} has a config.json that names code to run ({key}: {value!r}); remove {key} from it, or read "
                    "that code, then pass trust_remote_code=True"
                )


def read_config(folder: Path, *, model: str, layer: int, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration as stored; `UserError` unless it is a decoder-only language model of at least `layer`
    layers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    model_name = f"model={model!r}"
    if not (folder / "config.json").is_file():
        raise UserError(f"{model_name} has no config.json; pass the folder that save_pretrained wrote")
    if not trust_remote_code:
        _check_kernels(folder, model_name)
    config: PretrainedConfig = loading(
        f"{model_name} has a config.json that transformers cannot read",
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code),
    )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model_name} is an encoder-decoder ({config.model_type}); use a decoder-only language model")
    stored_config, config = config, _text_part(config, model_name)
    known, masked = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING, type(config) in MODEL_FOR_MASKED_LM_MAPPING
    bidirectional = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if bidirectional or (masked and not getattr(config, "is_decoder", False)):
        raise UserError(f"{model_name} is an encoder ({config.model_type}); use a decoder-only language model")
    if not known and not trust_remote_code and config is stored_config:
        raise UserError(f"{model_name} ({config.model_type}) is not a causal language model; use a decoder-only one")
    layers = int(config.num_hidden_layers)
    if layer > layers:
        raise UserError(f"layer={layer} exceeds the {layers} layers of {model_name}; set it to 1 to {layers}")
    return config


def _text_part(config: Any, model_name: str) -> Any:
    """The configuration of the language model inside a multimodal one; any other configuration as it is.

    Raises `UserError` where transformers has no such language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

    text = config.get_text_config()
    if text is config:
        return config
    inside = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(text) in MODEL_MAPPING
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and not inside:
        raise UserError(
            f"{model_name} is multimodal ({config.model_type}), and its language model ({text.model_type}) is not one that "
            "transformers reads; save its language model as a model of its own, and pass that folder"
        )
    if getattr(text, "dtype", None) is None:
        text.dtype = getattr(config, "dtype", None)
    if (tied := getattr(config, "tie_word_embeddings", None)) is not None:
        text.tie_word_embeddings = tied
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return text


def read_causal(folder: str | Path, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(folder, **options)`; of a multimodal checkpoint, its language model alone,
    or the complete model where transformers has no class for its language model alone (Qwen3-VL).

    >>> read_causal("./gemma-3-4b-it", dtype="auto", use_safetensors=True)
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    trusted = bool(options.get("trust_remote_code", False))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    if config.get_text_config() is config or trusted:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    name, with_facts = f"model={str(folder)!r}", bool(options.pop("output_loading_info", False))
    text = _text_part(config, name)
    options["output_loading_info"] = True
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        options |= {"config": text, **text_names(find_folder(str(folder), options.get("revision")))}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        loaded = AutoModelForImageTextToText.from_pretrained(folder, **options)
    network, facts = loaded
    if absent := sorted(facts["missing_keys"]):
        raise UserError(f"{name} lacks {len(absent)} tensors of its language model ({absent[0]}, ...); save it again")
    return (network, facts) if with_facts else network


def text_names(folder: Path) -> dict[str, Any]:
    """The option that gives the tensors of a multimodal checkpoint's language model the names of a model of its own;
    none where they have them."""
    names = _tensor_names(folder)
    ending = "embed_tokens.weight"
    prefixes = [name.removesuffix(ending) for name in names if name.endswith(ending)]
    prefix = min((name for name in prefixes if "vision" not in name and "audio" not in name), key=len, default="model.")
    if prefix == "model.":
        return {}
    renamed = {f"^{re.escape(prefix)}": "model."}
    if head := next((name for name in names if name.endswith("lm_head.weight") and name != "lm_head.weight"), None):
        renamed[f"^{re.escape(head)}$"] = "lm_head.weight"
    return {"key_mapping": renamed}


def text_names_of(folder: Path, config: Any) -> dict[str, Any]:
    """`text_names` where `config` is the language model of a folder whose own configuration is another one."""
    stored = read_json(folder / "config.json")
    inside = isinstance(stored, dict) and stored.get("model_type") not in (None, config.model_type)
    return text_names(folder) if inside else {}


def _tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in the safetensors files of a folder, without their data."""
    from safetensors import safe_open

    index = folder / WEIGHT_FILES[1]
    if index.is_file():
        return list(read_json(index).get("weight_map", {}))
    if not (folder / WEIGHT_FILES[0]).is_file():
        return []
    with safe_open(folder / WEIGHT_FILES[0], framework="pt") as file:
        return list(file.keys())


def read_tokenizer(folder: Path, *, model: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer, truncating and padding on the right; `UserError` also where its chat template cannot be used."""
    from transformers import AutoTokenizer

    model_name = f"model={model!r}"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES if not name.startswith("chat")):
        raise UserError(f"{model_name} has no tokenizer; save the model's tokenizer into the same folder")
    tokenizer: PreTrainedTokenizerBase = loading(
        f"{model_name} has a tokenizer that transformers cannot read",
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code),
    )
    tokenizer.truncation_side = tokenizer.padding_side = "right"
    check_template(tokenizer)
    if not len(tokenizer):
        raise UserError(f"{model_name} has a tokenizer without tokens; save the model's tokenizer into the same folder")
    return tokenizer


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-text token as text, if the tokenizer puts it before every text by itself; else empty."""
    token = tokenizer.bos_token
    return token if isinstance(token, str) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def truncated_config(config: PretrainedConfig, layer: int) -> PretrainedConfig:
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


def read_network(
    folder: Path, config: PretrainedConfig, *, model: str, layer: int, dtype: torch.dtype, trust_remote_code: bool
) -> torch.nn.Module:
    """The first `layer` layers of the model, in eval mode, on the CPU; `UserError` where a tensor of theirs is
    absent."""
    from transformers import AutoModel

    cut = truncated_config(config, layer)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(
            f"model={model!r} has no model.safetensors; other weight formats can hold code and are not read, "
            "convert it with save_pretrained"
        )

    def load() -> torch.nn.Module:
        names = {} if trust_remote_code else text_names_of(folder, config)
        network: torch.nn.Module
        network, facts = AutoModel.from_pretrained(
            folder,
            config=cut,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **names,
        )
        absent = sorted(facts["missing_keys"])
        if absent and absent[0].startswith("encoder."):
            raise UserError(
                f"model={model!r} is the decoder of an encoder-decoder ({config.model_type}), whose first layers cannot be "
                "read alone; use a decoder-only language model"
            )
        if absent:
            raise UserError(
                f"model={model!r} lacks {len(absent)} of the tensors of its first {layer} layers "
                f"({absent[0]}, ...); download or save it again"
            )
        return network

    network = loading(f"model={model!r} could not be loaded", load)
    return network.eval().requires_grad_(False)


def loading(what: str, load: Callable[[], Result]) -> Result:
    """`load()` without transformers' tables and bars; any failure becomes one sentence that starts with `what`.

    A file that was downloaded in part fails with an error of its library's own (`SafetensorError`), a damaged one may
    end in a panic, a large one in `MemoryError`: so no list of types is complete.
    """
    try:
        with quiet():
            return load()
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if type(error).__name__ == "SafetensorError":
            raise UserError(
                f"{what}: a safetensors file is incomplete or damaged ({error}); download it again"
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = shortened(lines[0], 300) if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs its own Python code; read that code, then pass trust_remote_code=True"
        raise UserError(f"{what}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' messages and progress bars; both settings are restored afterwards."""
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
