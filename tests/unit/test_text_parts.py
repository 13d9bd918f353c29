"""Multimodal checkpoints as text models: their language model is read, with the numbers that the checkpoint gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from siftune.errors import UserError
from siftune.models.backbone import Backbone
from siftune.models.causal_lm import CausalLM
from siftune.models.hidden_states import unwrap_model
from siftune.models.load import read_causal
from tests.tiny import VOCABULARY, tiny_tokenizer

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _config(kind: str) -> Any:
    if kind == "gemma3":
        return transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    if kind == "mistral3":
        return transformers.Mistral3Config(
            text_config={"model_type": "mistral", **TEXT},
            vision_config={"model_type": "pixtral", **VISION, "head_dim": 16},
        )
    if kind == "llama4":
        text = {
            **TEXT,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 64,
        }
        vision = {**VISION, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
        return transformers.Llama4Config(text_config=text, vision_config=vision)
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    if kind == "qwen3_5":
        return transformers.Qwen3_5Config(text_config={**TEXT, **linear}, vision_config=vision)
    return transformers.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)


def _save(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_config(kind)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "llama4", "qwen3_5", "qwen3_vl"])
def test_the_language_model_of_a_multimodal_checkpoint_is_read(kind: str, tmp_path: Path) -> None:
    complete = _save(kind, tmp_path)
    ids = torch.tensor([[5, 9, 70, 33, 21]])
    with torch.no_grad():
        expected = complete(input_ids=ids).logits
        network = read_causal(tmp_path, dtype="float32", use_safetensors=True).eval()
        assert torch.allclose(network(input_ids=ids).logits, expected, atol=1e-5)
        lm = CausalLM(str(tmp_path), device="cpu")
        lm.check()
        assert torch.allclose(lm.parts.causal(input_ids=ids).logits, expected, atol=1e-5)
        features = Backbone(str(tmp_path), layer=4, device="cpu").network(input_ids=ids).last_hidden_state
        assert torch.allclose(lm.parts.head(features), expected, atol=1e-4)
    if kind != "qwen3_vl":  # transformers has no class for its language model alone
        assert not any("vision" in name for name, _ in network.named_parameters())


def test_a_language_model_that_transformers_does_not_know_is_refused_with_the_way_out(tmp_path: Path) -> None:
    transformers.CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"is multimodal \(clip\), and its language model \(clip_text_model\) is not one"
    ):
        _ = Backbone(str(tmp_path), layer=1).config


def test_an_encoder_is_refused_where_it_is_scored_or_attached() -> None:
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 30,
    }
    both_ways = transformers.BertLMHeadModel(transformers.BertConfig(**small))
    with pytest.raises(UserError, match="BertLMHeadModel is an encoder, whose tokens see those after them"):
        unwrap_model(both_ways)
    assert (
        unwrap_model(transformers.BertLMHeadModel(transformers.BertConfig(**small, is_decoder=True))).head is not None
    )


def test_the_decoder_of_an_encoder_decoder_is_refused_as_features(tmp_path: Path) -> None:
    small = {"d_model": 16, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 2, "vocab_size": 300}
    transformers.BartForCausalLM(transformers.BartConfig(**small)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is the decoder of an encoder-decoder \(bart\)"):
        _ = Backbone(str(tmp_path), layer=1, device="cpu").network
