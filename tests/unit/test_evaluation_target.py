"""The model and its adapter, checked before any weight is read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from siftune.errors import UserError
from siftune.evaluation import target as target_module
from siftune.evaluation.target import Target
from siftune.sft.adapters import load_tuned, merge
from tests.tiny import save_tiny, tiny_model

peft = pytest.importorskip("peft")


def adapter(
    folder: Path, base: Path, *, family: str = "llama", names: tuple[str, ...] = ("q_proj", "down_proj"), **config: Any
) -> Path:
    """A LoRA adapter with random weights, as PEFT saves it, trained on `base`."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        made = peft.LoraConfig(r=2, target_modules=list(names), init_lora_weights=False)
        model = peft.get_peft_model(tiny_model(family, **config), made)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight is a failure."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(target_module.CausalLM, "parts", property(refuse))


@pytest.mark.usefixtures("no_weights")
def test_a_model_and_its_own_adapter_are_sound(base: Path, tmp_path: Path) -> None:
    found = Target.find(base, adapter=adapter(tmp_path / "a", base))
    assert found.length == 512
    assert found.key != Target.find(base).key


@pytest.mark.parametrize(("family", "names"), [("llama", ("q_proj", "lm_head")), ("gpt2", ("c_attn", "c_proj"))])
def test_an_adapter_is_merged_and_its_logits_are_pefts(tmp_path: Path, family: str, names: tuple[str, ...]) -> None:
    base = save_tiny(tmp_path / "base", family)
    folder = adapter(tmp_path / "a", base, family=family, names=names)
    merged = Target.find(base, adapter=folder).load()
    alone = Target.find(folder).load()  # a folder with an adapter alone stands for the base it names
    expected = peft.PeftModel.from_pretrained(tiny_model(family), str(folder)).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone(ids).logits, merged(ids).logits)
        assert not torch.allclose(merged(ids).logits, tiny_model(family)(ids).logits, atol=1e-2)
    assert not any("lora" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("names", [("lm_head",), ("q_proj",)])
def test_a_head_that_shares_its_weight_is_changed_alone(tmp_path: Path, names: tuple[str, ...]) -> None:
    base = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    folder = adapter(tmp_path / "a", base, names=names, tie_word_embeddings=True)
    merged = Target.find(base, adapter=folder).load()
    expected = peft.PeftModel.from_pretrained(tiny_model(tie_word_embeddings=True), str(folder)).eval()
    merged.tie_weights()  # as the harness does
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == (names == ("q_proj",))


@pytest.mark.parametrize("names", [("lm_head",), ("q_proj",)])
def test_a_tuned_model_is_merged_likewise_and_so_is_the_folder_that_is_written(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    base = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    folder = adapter(tmp_path / "a", base, names=names, tie_word_embeddings=True)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    expected = peft.PeftModel.from_pretrained(tiny_model(tie_word_embeddings=True), str(folder)).eval()
    ids = torch.arange(5, 25)[None]
    for merged in (load_tuned(folder), load_tuned(merge(folder, tmp_path / "merged"))):
        with torch.no_grad():
            torch.testing.assert_close(merged.eval()(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit .*base: its .*down_proj is 128 wide and that model's 64"):
        Target.find(base, adapter=adapter(tmp_path / "wide", base, width=64))
    with pytest.raises(UserError, match=r"it changes .*layers\.4.*, which that model does not have"):
        Target.find(base, adapter=adapter(tmp_path / "deep", base, layers=6))
    with pytest.raises(UserError, match=r"it changes .*c_attn"):
        Target.find(base, adapter=adapter(tmp_path / "gpt2", base, family="gpt2", names=("c_attn",)))


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(base: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"trained on .*other, whose weights are not those of .*base; pass .*other"):
        Target.find(base, adapter=adapter(tmp_path / "a", other))
    same = save_tiny(tmp_path / "moved")
    assert Target.find(base, adapter=adapter(tmp_path / "b", same)).adapter == tmp_path / "b"


@pytest.mark.usefixtures("no_weights")
def test_a_base_that_is_not_here_is_told_by_its_name(base: Path, tmp_path: Path) -> None:
    known = adapter(tmp_path / "a", Path("/gone/base"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Target.find(base, adapter=known)
    with pytest.warns(UserWarning, match="whether it is the same model is unknown"):
        Target.find(base, adapter=adapter(tmp_path / "b", Path("/gone/another")))


def rename(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "elsewhere")


def scribble(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)


def no_base(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("spoil", "as_model", "said"),
    [
        (rename, False, r"holds no adapter_model\.safetensors"),
        (scribble, False, "is no safetensors file"),
        (no_base, True, "names no base model"),
    ],
)
def test_broken_adapters_are_one_sentence(
    base: Path, tmp_path: Path, spoil: Callable[[Path], None], as_model: bool, said: str
) -> None:
    folder = adapter(tmp_path / "a", base)
    spoil(folder)
    with pytest.raises(UserError, match=said):
        Target.find(folder) if as_model else Target.find(base, adapter=folder)


def test_other_refusals(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter='.*nowhere' is not a folder"):
        Target.find(base, adapter=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is an adapter itself"):
        Target.find(adapter(tmp_path / "a", base), adapter=tmp_path / "a")
    with pytest.raises(UserError, match="not a folder here"):
        Target.find(str(tmp_path / "none"))
    with pytest.raises(UserError, match="is not a device"):
        Target.find(base, device="abacus")
