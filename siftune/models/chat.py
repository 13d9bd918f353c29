"""A chat model's folder: how a conversation is formatted, what ends its replies, its weights, its content hash.

Cost: the weights once; their hash once per file, cached by its stamp (see `load.file_stamp`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.chat_template import Refusal, apply_template
from ..data.formats import BadRow
from ..data.render import merged
from ..errors import UserError
from ..files import cache_folder, hash_file, hash_json
from .backbone import Backbone
from .load import TOKENIZER_FILES, file_stamp, loading, read_causal
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SENTINEL = "siftune-end"


def templated(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]) -> str:
    """The conversation in the model's own form; a system turn is joined to the user's where the template has none.

    Raises `BadRow` where the template refuses the conversation, or fails.
    """

    def render(conversation: list[dict[str, Any]]) -> str:
        # Models that reason by default answer at once; other templates ignore the option.
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(apply_template(tokenizer, conversation, **options))

    try:
        return render(turns)
    except Refusal:
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise
        return render(merged(turns))


def end_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a reply: those of the model's configuration, and the one its template writes after an answer."""
    configured = getattr(network, "siftune_eos", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, (list, tuple)) else [configured])}
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}]
        try:
            after = str(apply_template(tokenizer, turns, tokenize=False)).rpartition(SENTINEL)[2]
        except BadRow:  # a template for prompts alone
            after = ""
        first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
        special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        ends |= {int(token) for token in first if token in special}
    return sorted(int(token) for token in ends if token is not None)


def load(files: Backbone) -> PreTrainedModel:
    from transformers import GenerationConfig

    if not any(files.folder.glob("*.safetensors")):
        raise UserError(f"model={files.model!r} has no safetensors; convert it with save_pretrained")
    assert files.config is not None
    network: Any = loading(
        f"model={files.model!r} could not be loaded",
        lambda: read_causal(files.folder, dtype=files.torch_dtype, use_safetensors=True),
    )
    # The folder's sampling defaults must not mix with the request's; the end tokens are kept.
    network.siftune_eos = network.generation_config.eos_token_id
    network.generation_config = GenerationConfig()
    placed: PreTrainedModel = network.eval().requires_grad_(False).to(files.torch_device)
    return placed


def content_key(files: Backbone) -> str:
    """Hash of weights, configuration and tokenizer; a file's hash is cached while its stamp is the same."""
    import transformers

    names = {"config.json", "generation_config.json", *TOKENIZER_FILES}
    paths = sorted(path for path in files.folder.iterdir() if path.name in names or path.suffix == ".safetensors")
    content = [[path.name, _remembered_hash(path)] for path in paths]
    versions = [torch.__version__, transformers.__version__]
    return hash_json(["transformers", 1, content, str(files.torch_dtype), files.device_kind, versions])


def _remembered_hash(path: Path) -> str:
    name = hash_json(["file", 2, *file_stamp(path)])
    return Store(cache_folder() / "weights").digest(name, lambda: hash_file(path))
