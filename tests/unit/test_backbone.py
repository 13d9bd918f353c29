"""The truncated backbone: what it reads from disk, what its key depends on, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, BertConfig, BertModel, T5Config
from transformers.utils import logging as hf_logging

from siftune.errors import UserError
from siftune.models.backbone import Backbone
from siftune.models.load import truncated_config
from tests.tiny import save_tiny, tiny_config, tiny_model, tiny_tokenizer

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def scribble(folder: Path, layers: set[int]) -> int:
    """Overwrite the tensor bytes of the given layers with NaN, in place; returns how many tensors were hit."""
    hit = 0
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        size = int.from_bytes(data[:8], "little")
        for name, facts in json.loads(data[8 : 8 + size]).items():
            if any(f".{layer}." in name for layer in layers):
                start, stop = (8 + size + offset for offset in facts["data_offsets"])
                data[start:stop] = b"\xff" * (stop - start)
                hit += 1
        path.write_bytes(data)
    return hit


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_first_layers_are_kept(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family)
    network = Backbone(str(folder), layer=2).network
    names = list(network.state_dict())
    assert any(".1." in name for name in names)
    assert not any(f".{layer}." in name for layer in (2, 3) for name in names)
    assert not any("head" in name or "embed_out" in name for name in names)
    whole = tiny_model(family).base_model.state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("shards", ["one file", "many files"])
def test_other_layers_tensors_are_never_read(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = "5GB" if shards == "one file" else "20KB"
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size=size)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shards == "many files")
    expected = Backbone(str(tmp_path), layer=2).network.state_dict()
    asked = counting_reads(monkeypatch)
    Backbone(str(tmp_path), layer=2).network  # noqa: B018 - loading is the act
    assert asked
    assert not [name for name in asked if ".2." in name or ".3." in name or "lm_head" in name]
    assert scribble(tmp_path, {2, 3}) > 10
    for name, tensor in Backbone(str(tmp_path), layer=2).network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def counting_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors whose data transformers asks a safetensors file for."""
    import transformers.modeling_utils as loading

    asked: list[str] = []

    class Slice:
        def __init__(self, inner: Any, name: str) -> None:
            self.inner, self.name = inner, name

        def __getitem__(self, index: Any) -> Any:
            asked.append(self.name)
            return self.inner[index]

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = safe_open(*args, **kwargs)

        def __enter__(self) -> File:
            self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

        def get_slice(self, name: str) -> Slice:
            return Slice(self.inner.get_slice(name), name)

        def get_tensor(self, name: str) -> Any:
            asked.append(name)
            return self.inner.get_tensor(name)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

    monkeypatch.setattr(loading, "safe_open", File)
    return asked


def test_loading_is_silent_and_leaves_the_settings(
    llama: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    Backbone(str(llama)).network  # noqa: B018
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert before == (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled())


def test_per_layer_lists_are_cut() -> None:
    config = tiny_config("gemma2", layers=4)
    cut = truncated_config(config, 2)
    assert cut.num_hidden_layers == len(cut.layer_types) == 2
    assert config.num_hidden_layers == len(config.layer_types) == 4
    assert AutoModel.from_config(cut).config.num_hidden_layers == 2


def test_pickling_leaves_the_weights_behind(llama: Path) -> None:
    backbone = Backbone(str(llama), layer=2, max_length=77)
    backbone.network  # noqa: B018
    packed = pickle.dumps(backbone)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert (again.model, again.layer, again.max_length, again.key) == (str(llama), 2, 77, backbone.key)
    backbone.release()
    assert backbone.network is not None


# --- the key ----------------------------------------------------------------------------------------------------------


def test_key_follows_content_not_place(llama: Path, tmp_path: Path) -> None:
    key = Backbone(str(llama)).key
    shutil.copytree(llama, tmp_path / "elsewhere")
    assert Backbone(str(tmp_path / "elsewhere")).key == key
    others = [
        Backbone(str(llama), layer=2),
        Backbone(str(llama), dtype="bfloat16"),
        Backbone(str(llama), max_length=100),
    ]
    assert len({key, *(other.key for other in others)}) == 4


def test_key_changes_with_the_weights_used(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    key = Backbone(str(folder), layer=2).key
    scribble(folder, {3})
    assert Backbone(str(folder), layer=2).key == key, "a layer that is not read does not matter"
    scribble(folder, {1})
    assert Backbone(str(folder), layer=2).key != key


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json"])
def test_key_changes_with_the_files_that_matter(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    key = Backbone(str(folder)).key
    if name == "config.json":
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, "rms_norm_eps": 0.01}))
    else:
        (folder / name).write_text((folder / name).read_text() + "\n")
    assert Backbone(str(folder)).key != key


def test_key_is_remembered_without_reading_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Backbone(str(llama)).key
    asked = counting_reads(monkeypatch)
    assert Backbone(str(llama)).key == key
    assert not asked


# --- what it refuses --------------------------------------------------------------------------------------------------


def refused(model: Path | str, **options: Any) -> str:
    """The one sentence of the UserError that loading raises."""
    with pytest.raises(UserError) as caught:
        Backbone(str(model), **options).network  # noqa: B018
    sentence = str(caught.value)
    assert Path(model).name in sentence or "device" in options, "the sentence names the model"
    assert "\n" not in sentence
    return sentence


def test_wrong_places(tmp_path: Path, llama: Path) -> None:
    assert "not a folder" in refused(tmp_path / "missing")
    assert "is a file" in refused(llama / "config.json")
    assert "no config.json" in refused(tmp_path)
    assert "hub cannot be reached" in refused("nobody/never-uploaded")
    assert "hub cannot be reached" in refused("gpt2-not-here")


def test_wrong_numbers(llama: Path) -> None:
    assert "layer=5 exceeds the 4 layers" in refused(llama, layer=5)
    with pytest.raises(UserError, match="layer=0"):
        Backbone(str(llama), layer=0)
    with pytest.raises(UserError, match="max_length=0"):
        Backbone(str(llama), max_length=0)
    with pytest.raises(UserError, match="dtype='int4'"):
        Backbone(str(llama), dtype="int4")  # type: ignore[arg-type]
    assert "device='gpu'" in refused(llama, device="gpu")


def test_missing_tokenizer_or_weights(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        Backbone(str(tmp_path)).tokenizer  # noqa: B018
    os.rename(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    assert "no model.safetensors" in refused(tmp_path)


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "layers.1.mlp.up_proj.weight" in refused(folder)


def test_broken_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    assert "could not be loaded" in refused(folder)


def test_other_kinds_of_model(tmp_path: Path) -> None:
    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=300)
    ).save_pretrained(tmp_path / "bert")
    assert "is an encoder" in refused(tmp_path / "bert")
    T5Config(num_layers=4).save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in refused(tmp_path / "t5")
    tiny_config("gemma3", use_bidirectional_attention=True).save_pretrained(tmp_path / "both-ways")
    assert "is an encoder" in refused(tmp_path / "both-ways")
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path / "seeing")
    assert "multimodal" in refused(tmp_path / "seeing")


def test_foreign_code_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own-model", "auto_map": auto}))
    assert "trust_remote_code=True" in refused(folder)
    assert not ran.exists()
