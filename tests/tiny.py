"""Tiny random models and a tokenizer made on the spot, one per architecture family, so that no test needs the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHAT_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else %}{{ m['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = len(SPECIAL) + 256

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
    "cohere": CohereConfig,
    "gpt2": GPT2Config,
    "gpt_neox": GPTNeoXConfig,
}


def tiny_config(family: str, *, layers: int = 4, width: int = 32, vocabulary: int = VOCABULARY, **more: Any) -> Any:
    """A configuration of `family` with a few thousand weights."""
    common: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if family == "gpt2":
        shape = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 512}
    else:
        shape = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": 2 * width,
            "max_position_embeddings": 512,
        }
        if family != "gpt_neox":
            shape["num_key_value_heads"] = 2
        if family in ("qwen3", "gemma2", "gemma3", "mistral"):
            shape["head_dim"] = width // 4
        if family in ("gemma2", "gemma3"):
            shape |= {"query_pre_attn_scalar": width // 4, "sliding_window": 64}
        if family == "gemma2":
            shape["final_logit_softcapping"] = 5.0
        if family == "cohere":
            shape["logit_scale"] = 0.25
    return FAMILIES[family](**common, **(shape | more))


def tiny_model(family: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A causal LM with random float32 weights, in eval mode. The global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **config))
        for parameter in model.parameters():  # the default initialisation is too small to tell rows apart
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_tokenizer(*, template: bool = True, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token per byte, plus the special ones: any text at all can be encoded, and lengths are easy to foresee."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side=padding_side
    )
    if template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(folder: Path, family: str = "llama", *, template: bool = True, **config: Any) -> Path:
    """A tiny model with its tokenizer in a folder, as `from_pretrained` wants it."""
    tiny_model(family, **config).save_pretrained(folder)
    tiny_tokenizer(template=template).save_pretrained(folder)
    return folder
