"""UDS against its naive definition for every kind of head: LoRA, trained copies, bias, multipliers, unknown formulas."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig

from siftune.errors import UserError
from siftune.models.head import Head, factorise, read_head
from siftune.models.hidden_states import iter_hidden_states, unwrap_model
from siftune.online.maxloss import MaxLoss
from siftune.online.nuclear import norms
from siftune.online.uds import UDS
from tests.parity.test_uds import HEADS, compare
from tests.reference_uds import NaiveUDS, naive_logits, naive_nuclear, tiny_batch, true_hidden
from tests.tiny import tiny_model

BATCHES = [tiny_batch([5, 40, 17, 33], seed=seed) for seed in range(2)]


def stir(model: nn.Module, *names: str, seed: int = 1) -> None:
    """Give the parameters whose name holds one of `names` random values: LoRA begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_lora(family: str, targets: list[str], **more: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, lora_dropout=0.2, task_type="CAUSAL_LM", **more)
    model = get_peft_model(tiny_model(family, tie_word_embeddings=False), config)
    stir(model, "lora_")
    return model.train()


def silent(action: Any) -> Any:
    """Run `action` with warnings as errors: the fast path must have been taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action()


def merged_head(model: Any, adapter: str = "default") -> torch.Tensor:
    """W + s B A of a LoRA head, by hand."""
    head = model.get_base_model().get_output_embeddings()
    update = head.lora_B[adapter].weight @ head.lora_A[adapter].weight
    return head.base_layer.weight.double() + head.scaling[adapter] * update.double()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_peft_in_training_mode(family: str) -> None:
    model = with_lora(family, ["q_proj", "v_proj"])
    evaluated = copy.deepcopy(model).eval()
    selector, naive = UDS(keep=1, alpha=0.5), NaiveUDS(alpha=0.5)
    for batch in BATCHES:
        kept = silent(lambda batch=batch: selector.select(model, batch))
        weight = evaluated.get_base_model().get_output_embeddings().weight
        rows = [naive_logits(h, weight, **HEADS.get(family, {})) for h in true_hidden(evaluated, batch)]
        total, intra, inter, sketches = naive.score(rows, selector.sketch)
        np.testing.assert_allclose(kept.scores.intra.numpy(), intra, rtol=1e-5)
        np.testing.assert_allclose(kept.scores.inter.numpy(), inter, rtol=1e-5)
        np.testing.assert_allclose(kept.scores.total.numpy(), total, rtol=1e-5)
        naive.push([sketches[row] for row in kept.indices.tolist()])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora_on_the_head_that_changes_between_selections(family: str) -> None:
    model = with_lora(family, ["lm_head", "q_proj"])
    selector, previous = UDS(keep=1, alpha=0.0), None
    for step, batch in enumerate(BATCHES):
        stir(model, "lm_head.lora_", seed=step)
        scores = silent(lambda batch=batch: selector.select(model, batch)).scores
        hidden = true_hidden(copy.deepcopy(model).eval(), batch)
        exact = [naive_nuclear(naive_logits(h, merged_head(model), **HEADS.get(family, {}))) for h in hidden]
        np.testing.assert_allclose(scores.intra.numpy(), exact, rtol=1e-5)
        assert previous is None or abs(previous - exact[0]) > 1e-3 * exact[0]
        previous = exact[0]


def test_adapters_switched_off_merged_and_switched() -> None:
    model = with_lora("llama", ["lm_head"]).eval()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    stir(model, "lora_", seed=3)
    base = model.get_base_model().get_output_embeddings().base_layer.weight
    plain, first, second = base.double().clone(), merged_head(model), merged_head(model, "second")
    selector, batch = UDS(keep=1, alpha=0.0), BATCHES[0]

    def check(weight: torch.Tensor) -> None:
        exact = [naive_nuclear(naive_logits(h, weight)) for h in true_hidden(model, batch)]
        np.testing.assert_allclose(silent(lambda: selector.score(model, batch)).intra.numpy(), exact, rtol=1e-5)

    check(first)
    model.set_adapter("second")
    check(second)
    with model.disable_adapter():
        check(plain)
    model.set_adapter("default")
    model.merge_adapter()
    check(first)


def test_a_trained_copy_of_the_head() -> None:
    model = with_lora("llama", ["q_proj"], modules_to_save=["lm_head"])
    stir(model, "modules_to_save")
    weight = model.get_base_model().get_output_embeddings().modules_to_save["default"].weight
    hidden = true_hidden(copy.deepcopy(model).eval(), BATCHES[0])
    scores = silent(lambda: UDS(keep=1, alpha=0.0).score(model, BATCHES[0]))
    np.testing.assert_allclose(
        scores.intra.numpy(), [naive_nuclear(naive_logits(h, weight)) for h in hidden], rtol=1e-5
    )


def test_prompt_tuning_lengthens_the_decoder_only() -> None:
    config = PromptTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM", tokenizer_name_or_path="none")
    model = get_peft_model(tiny_model("llama"), config)
    scores = UDS(keep=1, alpha=0.0).score(model, BATCHES[0])
    with torch.no_grad():
        batch = {name: BATCHES[0][name] for name in ("input_ids", "attention_mask")}
        logits = model.eval()(**batch).logits[:, 7:].double()
    exact = [naive_nuclear(row[mask.bool()].numpy()) for row, mask in zip(logits, batch["attention_mask"], strict=True)]
    np.testing.assert_allclose(scores.intra.numpy(), exact, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("unseen", [False, True])
def test_a_trained_head_is_never_stale(tied: bool, unseen: bool) -> None:
    """Also where the change hides from version counters, as sharded optimisers' does."""
    model = tiny_model("llama", tie_word_embeddings=tied).requires_grad_(True)
    selector, sketches = UDS(keep=1, alpha=0.5), []
    for batch in BATCHES:
        with torch.no_grad():
            weight = model.get_output_embeddings().weight
            (weight.data if unseen else weight).mul_(1.1)
            (weight.data if unseen else weight)[:50] += 0.1
        scores = silent(lambda batch=batch: selector.select(model, batch)).scores
        naive = NaiveUDS(alpha=0.5, memory=sketches)
        rows = [naive_logits(h, weight) for h in true_hidden(model, batch)]
        total, intra, inter, found = naive.score(rows, selector.sketch)
        np.testing.assert_allclose(scores.intra.numpy(), intra, rtol=1e-5)
        np.testing.assert_allclose(scores.inter.numpy(), inter, rtol=1e-5)
        sketches = [found[int(np.argmax(total))]]


def test_a_frozen_head_is_factorised_once_and_again_after_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", tie_word_embeddings=False).requires_grad_(False)
    calls = []
    monkeypatch.setattr("siftune.online.logit_access.factorise", lambda *a: calls.append(1) or factorise(*a))
    selector = UDS(keep=1, alpha=0.0)
    for batch in BATCHES * 2:
        selector.select(model, batch)
    assert len(calls) == 1
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    exact = [naive_nuclear(naive_logits(h, model.lm_head.weight)) for h in true_hidden(model, BATCHES[0])]
    np.testing.assert_allclose(selector.score(model, BATCHES[0]).intra.numpy(), exact, rtol=1e-5)
    other = tiny_model("llama", seed=5, tie_word_embeddings=False).requires_grad_(False)
    exact = [naive_nuclear(naive_logits(h, other.lm_head.weight)) for h in true_hidden(other, BATCHES[0])]
    np.testing.assert_allclose(selector.score(other, BATCHES[0]).intra.numpy(), exact, rtol=1e-5)


def test_the_hooks_rhythm_refreshes_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").requires_grad_(True)
    calls = []
    monkeypatch.setattr("siftune.online.logit_access.factorise", lambda *a: calls.append(1) or factorise(*a))
    selector = UDS(keep=1)
    for _ in range(3):
        selector.new_step()
        for batch in BATCHES:
            selector.measure(model, batch)
    assert len(calls) == 3


def with_bias(family: str) -> Any:
    model = tiny_model(family, tie_word_embeddings=False)
    head = nn.Linear(32, 261)
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.copy_(torch.linspace(-2, 2, 261))
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_a_head_with_bias(family: str) -> None:
    model = with_bias(family)
    head = {"bias": model.get_output_embeddings().bias, **HEADS.get(family, {})}
    silent(lambda: compare(UDS(keep=1, alpha=0.5), NaiveUDS(alpha=0.5), model, BATCHES, **head))


def test_lora_on_a_head_with_bias() -> None:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head"], lora_bias=True, task_type="CAUSAL_LM")
    model = get_peft_model(with_bias("llama"), config).eval()
    stir(model, "lora_")
    head = model.get_base_model().get_output_embeddings()
    bias = head.base_layer.bias + head.lora_B["default"].bias * head.scaling["default"]
    hidden = true_hidden(model, BATCHES[0])
    exact = [naive_nuclear(naive_logits(h, merged_head(model), bias=bias)) for h in hidden]
    scores = silent(lambda: UDS(keep=1, alpha=0.0).score(model, BATCHES[0]))
    np.testing.assert_allclose(scores.intra.numpy(), exact, rtol=1e-5)


def test_a_multiplier_that_divides() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GraniteConfig(
            vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logits_scaling=4.0, pad_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
    silent(lambda: compare(UDS(keep=1, alpha=1.0), NaiveUDS(alpha=1.0), model, BATCHES, multiplier=0.25))


def test_the_same_name_multiplies_in_hyperclovax() -> None:
    """`logits_scaling` divides in Granite; here it multiplies, and a reading that divides would be off by its square."""
    kind = getattr(transformers, "HyperCLOVAXConfig", None)
    if kind is None:
        pytest.skip("this transformers knows no HyperCLOVA X")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = kind(
            vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            logits_scaling=0.25, pad_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
    silent(lambda: compare(UDS(keep=1, alpha=1.0), NaiveUDS(alpha=1.0), model, BATCHES, multiplier=0.25))
    parts = unwrap_model(model)
    head = read_head(parts)
    assert head is not None
    for chunk in iter_hidden_states(parts, BATCHES[0], BATCHES[0]["attention_mask"].bool()):
        assert chunk.probe_logits is not None
        assert head.agrees(chunk.probe_states, chunk.probe_logits) is True


class Twisted(nn.Module):
    """A head that no formula knows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(states)
        return out.sin() + out


@pytest.mark.parametrize("kind", ["module", "hook", "dora"])
def test_an_unknown_head_is_run_itself_and_said_once(kind: str) -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=False)
    if kind == "module":
        model.lm_head = Twisted(model.lm_head)
    elif kind == "hook":
        model.lm_head.register_forward_hook(lambda _m, _i, out: out.sin() + out)
    else:
        config = LoraConfig(r=4, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
        model = get_peft_model(model, config).eval()
        stir(model, "lora_")
    selector, batch = UDS(keep=1, alpha=1.0), BATCHES[0]
    with pytest.warns(UserWarning, match="own logits"):
        kept = selector.select(model, batch)
    silent(lambda: selector.score(model, batch))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    rows = [row[mask.bool()].numpy() for row, mask in zip(logits, batch["attention_mask"], strict=True)]
    _, intra, _, sketches = NaiveUDS(alpha=1.0).score(rows, selector.sketch)
    np.testing.assert_allclose(kept.scores.intra.numpy(), intra, rtol=1e-5)
    inter = [np.linalg.norm(z - sketches[int(kept.indices[0])]) for z in sketches]
    np.testing.assert_allclose(selector.score(model, batch).inter.numpy(), inter, rtol=1e-5, atol=1e-4)
    with pytest.warns(UserWarning, match="own logits"):
        loss = MaxLoss(keep=1).score(model, batch).total
    shifted = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
    np.testing.assert_allclose(float(loss[0]), float(shifted), rtol=1e-5)


def test_a_wrong_cap_or_multiplier_in_the_configuration_is_noticed() -> None:
    for family, name, value in (("gemma2", "final_logit_softcapping", 9.0), ("cohere", "logit_scale", 0.5)):
        model = tiny_model(family)
        head = read_head(unwrap_model(model))
        assert head is not None
        states, logits = torch.randn(4, 32), None
        logits = model.lm_head(states) * (model.logit_scale if family == "cohere" else 1.0)
        if family == "gemma2":
            logits = 5.0 * torch.tanh(logits / 5.0)
        assert head.agrees(states, logits.detach()) is True
        setattr(model.config, name, value)
        wrong = read_head(unwrap_model(model))
        assert wrong is not None
        assert wrong.agrees(states, logits.detach()) is False


def test_g_in_float32_products_and_a_float32_factor() -> None:
    """What a large head gets: float32 products summed in float64; and a factor kept in float32 (forced here)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 200, generator=generator) + torch.randn(200, generator=generator)
    head = Head(weight, None, None, None, 1.0, None, (), (), True, True)
    factor, _ = factorise(head)  # 1.2e8 products of a trained head: still float64
    states = torch.randn(50, 200, generator=generator)
    exact = naive_nuclear(naive_logits(states, weight))
    np.testing.assert_allclose(norms(states[None], [50], factor)[0].nuclear, exact, rtol=1e-12)
    from siftune.models import head as module

    gram = module.Gram.of_head(head, torch.float32)
    assert gram.cholesky() > 1e-5
    single = module.Factor(gram)
    np.testing.assert_allclose(norms(states[None], [50], single)[0].nuclear, exact, rtol=1e-6)
    single.blocks = [block.float() for block in single.blocks]
    np.testing.assert_allclose(norms(states[None], [50], single)[0].nuclear, exact, rtol=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_dependent_columns_of_a_large_head(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 G of a singular head would be rounding noise in some directions; it is formed again in float64."""
    monkeypatch.setattr("siftune.models.head.exact_products", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(900, 200, generator=generator)
    weight[:, 150:] = weight[:, :50]
    head = Head(weight, None, None, None, 1.0, None, (), (), trained, trained)
    factor, _ = factorise(head)
    # states that live where the head is blind, but for one direction
    states = torch.zeros(60, 200)
    states[:, 150:] = torch.randn(60, 50, generator=generator)
    states[:, :50] = -states[:, 150:]
    states[:, 70] = torch.randn(60, generator=generator)
    exact = naive_nuclear(naive_logits(states, weight))
    np.testing.assert_allclose(norms(states[None], [60], factor)[0].nuclear, exact, rtol=1e-5)


def test_models_that_cannot_be_scored_say_so() -> None:
    from transformers import AutoModel, AutoModelForSeq2SeqLM, T5Config

    batch = BATCHES[0]
    seq2seq = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=261, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UserError, match="encoder-decoder"):
        UDS(keep=1).score(seq2seq, batch)
    with pytest.raises(UserError, match="output embeddings"):
        UDS(keep=1).score(AutoModel.from_config(tiny_model("llama").config), batch)
    with pytest.raises(UserError, match="AutoModelForCausalLM"):
        UDS(keep=1).score(nn.Linear(2, 2), batch)


def test_compiled_and_wrapped_models() -> None:
    model = tiny_model("llama")
    plain = UDS(keep=1).score(model, BATCHES[0]).intra
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(UDS(keep=1).score(compiled, BATCHES[0]).intra, plain)  # type: ignore[arg-type]
