"""Ghost gradients against explicit ones: every kind of weight, every way it is used, and what must be left alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from siftune.errors import UserError
from siftune.online.greats import Greats
from siftune.online.maxgrad import MaxGrad, logit_gradients
from siftune.online.per_example import ghost
from siftune.online.per_example.backward import PerExampleGradients
from tests.reference_gradients import naive_gradients, naive_greedy, naive_norms
from tests.reference_uds import naive_logits, tiny_batch, true_hidden
from tests.tiny import FAMILIES, tiny_config, tiny_model

LENGTHS = [40, 8, 23, 3]
SHORT = [12, 30, 7]


@pytest.fixture(autouse=True)
def _no_warning_is_expected(request: pytest.FixtureRequest) -> Any:
    """The explicit way is right for every model, so a test of factors fails where it was taken instead."""
    if "explicit" in request.keywords or "explicit" in request.node.name:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one row at a time.*")
        yield


def lora(model: Any, targets: Any = "all-linear", **more: Any) -> Any:
    """Adapters that are not zero, on the model's linear layers."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **more)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return wrapped


def check(model: Any, batch: dict[str, torch.Tensor], *, rtol: float = 1e-5, **options: Any) -> None:
    scores = MaxGrad(keep=1, **options).score(model, batch)
    np.testing.assert_allclose(scores.total.numpy(), naive_norms(model, batch), rtol=rtol)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_weights(family: str, side: str) -> None:
    """Full training: tied embeddings (gemma, gpt2, cohere), biases, norms, Conv1D, learned positions."""
    model = tiny_model(family, layers=2)
    if family in ("gpt2", "gpt_neox") and side == "left":
        return  # learned positions and padding on the left: another position, not another gradient
    check(model, tiny_batch(LENGTHS, side=side, extra=2))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_lora(family: str) -> None:
    model = lora(tiny_model(family, layers=2))
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)
    check(model, tiny_batch(LENGTHS))


def test_lora_with_a_head_and_trained_copies() -> None:
    model = lora(tiny_model("llama", layers=2), ["q_proj", "lm_head"], modules_to_save=["norm"])
    check(model, tiny_batch(LENGTHS))


@pytest.mark.parametrize("vocabulary", [261, 3000])
def test_a_tied_embedding_has_its_cross_term(vocabulary: int) -> None:
    """Alone, so that nothing else hides it; the larger one is compared in factors, the smaller one formed."""
    model = tiny_model("llama", layers=1, tie_word_embeddings=True, vocabulary=vocabulary)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batch = tiny_batch([6, 5, 3] if vocabulary == 3000 else LENGTHS)
    check(model, batch)
    gradients = PerExampleGradients()
    ((rows, width),) = gradients.plan(model, batch)
    ((uses,),) = [part.factors.values() for part in gradients.compute(model, batch, rows, width)]
    assert len(uses) == (2 if vocabulary == 3000 else 1)
    if vocabulary == 3000:
        apart = ghost.squares(uses[:1]) + ghost.squares(uses[1:])
        assert (ghost.squares(uses) / apart - 1).abs().max() > 1e-3, "the cross term is nothing here"


@pytest.mark.parametrize("kind", ["bias", "norm", "embed", "lm_head", "c_attn.weight", "wpe"])
def test_one_kind_of_weight_alone(kind: str) -> None:
    family = "gpt2" if kind in ("c_attn.weight", "wpe", "bias") else "llama"
    model = tiny_model(family, layers=2)
    for name, weight in model.named_parameters():
        weight.requires_grad_(kind in name)
    assert any(weight.requires_grad for weight in model.parameters())
    check(model, tiny_batch(LENGTHS))


def test_learned_positions_do_not_part_a_group() -> None:
    """They are looked up once for all rows; each row has a gradient of its own all the same."""
    model, batch, gradients = tiny_model("gpt2", layers=1), tiny_batch(LENGTHS), PerExampleGradients()
    ((rows, width),) = gradients.plan(model, batch)
    assert [part.rows for part in gradients.compute(model, batch, rows, width)] == [rows]


def test_biases_everywhere_and_a_soft_capped_head() -> None:
    check(tiny_model("llama", layers=2, attention_bias=True, mlp_bias=True), tiny_batch(LENGTHS))
    check(tiny_model("gemma2", layers=2, tie_word_embeddings=False), tiny_batch(LENGTHS))


def test_the_padding_token_in_the_text_has_no_gradient_in_its_embedding() -> None:
    model = tiny_model("llama", layers=1, tie_word_embeddings=False)
    assert model.model.embed_tokens.padding_idx == 0
    batch = tiny_batch(LENGTHS)
    batch["input_ids"][0, 20:] = 0
    check(model, batch)


@pytest.mark.parametrize("budget", [1, 33, 60, None])
def test_groups_change_nothing(budget: int | None) -> None:
    check(tiny_model("llama", layers=2), tiny_batch(LENGTHS), score_tokens=budget)


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghost, "SLICE_ELEMENTS", 1)
    monkeypatch.setattr(ghost, "COLUMNS", 1000)
    check(tiny_model("llama", layers=1, tie_word_embeddings=True, vocabulary=3000), tiny_batch([6, 5, 3]))


def test_bf16_keeps_its_own_tolerance() -> None:
    model = tiny_model("llama", layers=2).bfloat16()
    check(model, tiny_batch(LENGTHS), rtol=5e-2)
    plain = tiny_model("llama", layers=2)
    batch = tiny_batch(LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = MaxGrad(keep=1).score(plain, batch)
    np.testing.assert_allclose(scores.total.numpy(), naive_norms(plain, batch), rtol=5e-2)


def test_layers_that_are_recomputed_count_once() -> None:
    """The library's checkpointing is off in eval mode; a wrapper that recomputes all the same fires its hooks twice."""
    from torch.utils.checkpoint import checkpoint

    model = tiny_model("llama", layers=2)
    for layer in model.model.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    batch = tiny_batch(LENGTHS)
    scores = MaxGrad(keep=1).score(model, batch)
    np.testing.assert_allclose(scores.total.numpy(), naive_norms(tiny_model("llama", layers=2), batch), rtol=1e-5)
    library = tiny_model("llama", layers=2).train()
    library.gradient_checkpointing_enable()
    assert torch.equal(MaxGrad(keep=1).score(library, batch).total, scores.total)


def test_reentrant_recomputation_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model = tiny_model("llama", layers=2)
    for layer in model.model.layers:
        inner = layer.forward
        layer.forward = lambda x, inner=inner, **k: checkpoint(lambda y: inner(y, **k), x, use_reentrant=True)
    with pytest.raises(UserError, match="use_reentrant=False"):
        MaxGrad(keep=1).score(model, tiny_batch(LENGTHS))


class Shared(nn.Module):
    """A toy causal LM whose single layer runs three times."""

    def __init__(self, *, flat: bool = False, past: bool = False) -> None:
        super().__init__()
        self.flat, self.past = flat, past
        self.config = LlamaConfig(vocab_size=261, hidden_size=16, num_attention_heads=2)
        self.base_model = nn.Sequential()
        self.embed, self.layer, self.lm_head = nn.Embedding(261, 16), nn.Linear(16, 16), nn.Linear(16, 261)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        state = self.embed.weight[input_ids] if self.past else self.embed(input_ids)
        for _ in range(3):
            given = state.cumsum(1) / 10
            given = given.view(-1, 16) if self.flat else given
            state = state + torch.tanh(self.layer(given)).view(state.shape)
        return type("Output", (), {"logits": self.lm_head(state)})()


def test_a_layer_that_is_used_several_times() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared()
    check(model, tiny_batch(LENGTHS))


def experts(trained: str) -> Any:
    shape = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MixtralConfig(**{**tiny_config("llama", layers=1).to_dict(), **shape, "model_type": "mixtral"})
        model = AutoModelForCausalLM.from_config(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the faster ones know no float64, which the definition is in
    for name, weight in model.named_parameters():
        weight.requires_grad_(trained in name)
    return model.eval()


def test_experts() -> None:
    """Layers beside the experts are right; fused expert weights are refused (transformers 4 has them apart)."""
    check(experts("self_attn"), tiny_batch(LENGTHS))
    everything = experts("")
    if any(weight.ndim == 3 for weight in everything.parameters()):
        with pytest.raises(UserError, match=r"experts.*freeze it"):
            MaxGrad(keep=1).score(everything, tiny_batch(LENGTHS))
    else:
        check(everything, tiny_batch(LENGTHS))


def test_a_layer_that_sees_all_rows_in_one_axis_sends_rows_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared(flat=True)
    gradients, batch = PerExampleGradients(), tiny_batch(LENGTHS)
    ((rows, width),) = gradients.plan(model, batch)
    assert [part.rows for part in gradients.compute(model, batch, rows, width)] == [[0], [1], [2], [3]]
    check(model, batch)


def test_explicit_gradients_where_factors_do_not_hold() -> None:
    """DoRA reads its weights without running their layers."""
    model, batch = lora(tiny_model("llama", layers=1), ["q_proj", "o_proj"], use_dora=True), tiny_batch(SHORT)
    with pytest.warns(UserWarning, match="one row at a time"):
        scores = MaxGrad(keep=1).score(model, batch)
    np.testing.assert_allclose(scores.total.numpy(), naive_norms(model, batch), rtol=1e-5)


def test_explicit_gradients_where_a_weight_is_read_past_its_layer() -> None:
    """A silent miss: the self-check sees it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = Shared(past=True), tiny_batch(SHORT)
    with pytest.warns(UserWarning, match="one row at a time"):
        scores = MaxGrad(keep=1).score(model, batch)
    np.testing.assert_allclose(scores.total.numpy(), naive_norms(model, batch), rtol=1e-5)


def test_explicit_gradients_where_no_layer_is_seen_at_all() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = Shared(past=True).requires_grad_(False), tiny_batch(SHORT)
    model.embed.requires_grad_(True)
    with pytest.warns(UserWarning, match="one row at a time"):
        scores = MaxGrad(keep=1).score(model, batch)
    np.testing.assert_allclose(scores.total.numpy(), naive_norms(model, batch), rtol=1e-5)


def test_adapters_switched_off_are_said() -> None:
    model = lora(tiny_model("llama", layers=1))
    with model.disable_adapter(), pytest.raises(UserError, match=r"switched off|requires gradients"):
        MaxGrad(keep=1).score(model, tiny_batch(SHORT))


def test_nothing_is_left_behind() -> None:
    model, batch = tiny_model("llama", layers=2).train(), tiny_batch(LENGTHS)
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 3.0)
    for method in (MaxGrad(keep=1), Greats(keep=1, validation=batch, learning_rate=0.1)):
        with torch.no_grad():
            method.select(model, batch)
        assert bool((model.lm_head.weight.grad == 3).all())
        assert all(weight.grad is None for name, weight in model.named_parameters() if name != "lm_head.weight")
        assert not any(module._forward_hooks for module in model.modules())
        assert all(module.training for module in model.modules())


def test_ddp_does_not_notice() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        inner = tiny_model("llama", layers=1)
        model, batch = nn.parallel.DistributedDataParallel(inner), tiny_batch(SHORT)
        passed: list[None] = []
        model.register_forward_pre_hook(lambda *_: passed.append(None))
        for _ in range(2):
            scores = MaxGrad(keep=1).select(model, batch).scores
            model(**batch).loss.backward()
        assert len(passed) == 2, "scoring went through DDP, which exchanges buffers with other ranks"
        np.testing.assert_allclose(scores.total.numpy(), naive_norms(inner, batch), rtol=1e-5)
    finally:
        dist.destroy_process_group()


def test_sharded_and_frozen_models_are_refused() -> None:
    model = tiny_model("llama", layers=1)
    model.lm_head.weight.ds_id = 3
    with pytest.raises(UserError, match="ZeRO-3"):
        MaxGrad(keep=1).score(model, tiny_batch(SHORT))
    with pytest.raises(UserError, match="requires gradients"):
        MaxGrad(keep=1).score(tiny_model("llama", layers=1).requires_grad_(False), tiny_batch(SHORT))


# --- last-layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_last_layer(family: str) -> None:
    model, batch = tiny_model(family, layers=2), tiny_batch(LENGTHS)
    config = model.config
    head = {"multiplier": getattr(config, "logit_scale", 1.0), "cap": getattr(config, "final_logit_softcapping", None)}
    wanted = []
    for row, states in enumerate(true_hidden(model, batch)):
        logits = naive_logits(states, model.get_output_embeddings().weight, **head)
        labels = batch["labels"][row][batch["attention_mask"][row].bool()].numpy()
        total = 0.0
        for position in range(len(labels) - 1):
            if labels[position + 1] != -100:
                p = np.exp(logits[position] - logits[position].max())
                p /= p.sum()
                p[labels[position + 1]] -= 1
                total += np.linalg.norm(p)
        wanted.append(total)
    scores = MaxGrad(keep=1, variant="last-layer").score(model, batch)
    np.testing.assert_allclose(scores.total.numpy(), wanted, rtol=1e-5)


def test_the_gradient_at_the_logits_of_a_sure_model_is_not_rounded_away() -> None:
    logits = torch.tensor([[30.0, 0.0, 1.0, -2.0], [0.0, 30.0, 0.0, 0.0]])
    exact = torch.softmax(logits.double(), dim=1)
    targets = torch.tensor([0, 2])
    for size in (4, 3, 1):
        blocks = [(at, min(at + size, 4), logits[:, at : at + size]) for at in range(0, 4, size)]
        found = logit_gradients(blocks, targets)
        small = float((exact[0, 1:].sum() ** 2 + (exact[0, 1:] ** 2).sum()).sqrt())
        np.testing.assert_allclose(found.numpy(), [small, np.sqrt(2)], rtol=1e-6)


# --- greats ---------------------------------------------------------------------------------------------------------


VALIDATION = tiny_batch([15, 6, 22], seed=9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "lora"])
@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.3])
def test_greats(family: str, rate: float) -> None:
    model = lora(tiny_model("llama", layers=1)) if family == "lora" else tiny_model(family, layers=1)
    batch = tiny_batch([20, 9, 31, 14, 5, 12])
    rows, held_out = naive_gradients(model, batch), naive_gradients(model, VALIDATION)
    wanted, first = naive_greedy(rows, held_out, rate or 1e-12, 4)  # type: ignore[arg-type]
    kept = Greats(keep=4, validation=VALIDATION, learning_rate=rate).select(model, batch)
    assert torch.argsort(-kept.scores.total).tolist()[:4] == wanted
    assert kept.indices.tolist() == sorted(wanted)
    found = kept.scores.influence.numpy()
    np.testing.assert_allclose(found, np.array(first) / (rate or 1e-12), rtol=1e-4, atol=1e-5 * np.abs(found).max())


def test_greedy_removal_matters() -> None:
    """A copy of the best row comes at once without removal, and late with it."""
    model, batch = tiny_model("llama", layers=1), tiny_batch([20, 9, 31, 14, 5, 12])
    best = int(Greats(keep=1, validation=VALIDATION, learning_rate=0.0).select(model, batch).indices[0])
    twin = (best + 1) % 6
    for values in batch.values():
        values[twin] = values[best]
    plain = Greats(keep=2, validation=VALIDATION, learning_rate=0.0).select(model, batch).indices.tolist()
    assert plain == sorted([best, twin])
    assert Greats(keep=2, validation=VALIDATION, learning_rate=5.0).select(model, batch).indices.tolist() != plain


@pytest.mark.parametrize(
    ("budget", "hold", "size_factor"), [(25, 2048, 4.0), (25, 0, 0.0), (70, 0, 0.6), (31, 0, 1.0), (1, 0, 4.0)]
)
def test_groups_and_recomputation_change_no_product(budget: int, hold: int, size_factor: float) -> None:
    """In factors (`size_factor` 0), formed, and groups of one kind against groups of the other."""
    model, batch = tiny_model("llama", layers=1, vocabulary=3000), tiny_batch([20, 9, 31, 14, 5])
    whole = Greats(keep=2, validation=VALIDATION, learning_rate=0.1).measure(model, batch)
    method = Greats(keep=2, validation=VALIDATION, learning_rate=0.1, score_tokens=budget, hold_mb=hold)
    method._gradients = PerExampleGradients(size_factor=size_factor)
    parts = method.measure(model, batch)
    for name in ("products", "influence"):
        truth = whole.columns[name]
        np.testing.assert_allclose(parts.columns[name], truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))
    explicit = torch.stack(naive_gradients(model, batch))  # type: ignore[arg-type]
    truth = explicit @ explicit.T
    np.testing.assert_allclose(parts.columns["products"], truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("size_factor", [0.0, 4.0])
def test_slices_change_no_product(size_factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In factors and formed, walked in many slices: against explicit gradients, the validation rows' mean included."""
    model, batch = tiny_model("llama", layers=1, vocabulary=3000), tiny_batch([20, 9, 31])
    monkeypatch.setattr(ghost, "SLICE_ELEMENTS", 1)
    monkeypatch.setattr(ghost, "COLUMNS", 1000)
    method = Greats(keep=2, validation=VALIDATION, learning_rate=0.1)
    method._gradients = PerExampleGradients(size_factor=size_factor)
    found = method.measure(model, batch).columns
    explicit = torch.stack(naive_gradients(model, batch))  # type: ignore[arg-type]
    held_out = torch.stack(naive_gradients(model, VALIDATION))  # type: ignore[arg-type]
    for name, truth in (("products", explicit @ explicit.T), ("influence", explicit @ held_out.mean(dim=0))):
        np.testing.assert_allclose(found[name], truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


def test_rows_without_labels_poison_nothing() -> None:
    model, batch = tiny_model("llama", layers=1), tiny_batch([20, 9, 31, 14, 5, 12])
    good = [0, 2, 3, 5]
    alone = Greats(keep=2, validation=VALIDATION, learning_rate=0.1).score(
        model, {name: values[good] for name, values in batch.items()}
    )
    batch["labels"][[1, 4]] = -100
    held_out = {name: torch.cat([values, values[:2]]) for name, values in VALIDATION.items()}
    held_out["labels"][3:] = -100
    kept = Greats(keep=4, validation=held_out, learning_rate=0.1).select(model, batch)
    assert kept.scores.reasons == {1: "no label tokens to score", 4: "no label tokens to score"}
    assert kept.indices.tolist() == good
    assert torch.equal(kept.scores.total[good], alone.total)
    np.testing.assert_allclose(kept.scores.influence[good], alone.influence, rtol=1e-4)


def test_a_validation_row_that_overflows_is_left_out() -> None:
    model, batch = tiny_model("llama", layers=1), tiny_batch([20, 9, 14])
    batch["input_ids"][batch["input_ids"] == 7] = 8
    wanted = Greats(keep=2, validation={n: v[:2] for n, v in VALIDATION.items()}, learning_rate=0.1)
    sound = wanted.score(model, batch).influence
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = torch.nan
    held_out = {name: values.clone() for name, values in VALIDATION.items()}
    held_out["input_ids"][held_out["input_ids"] == 7] = 8
    held_out["input_ids"][2, 3] = 7
    found = Greats(keep=2, validation=held_out, learning_rate=0.1).score(broken, batch).influence
    np.testing.assert_allclose(found, sound, rtol=1e-4, atol=1e-7)
    held_out["input_ids"][:, 0] = 7
    scores = Greats(keep=2, validation=held_out, learning_rate=0.1).score(broken, batch)
    assert set(scores.reasons.values()) == {"no validation row has a finite gradient"}


def test_validation_in_every_form_and_in_turn() -> None:
    model, batch = tiny_model("llama", layers=1), tiny_batch([20, 9, 14])
    rows = [
        {"input_ids": ids[mask.bool()].tolist(), "labels": labels[mask.bool()].tolist()}
        for ids, mask, labels in zip(*(VALIDATION[n] for n in ("input_ids", "attention_mask", "labels")), strict=True)
    ]
    whole = Greats(keep=1, validation=VALIDATION, learning_rate=0.1).score(model, batch).influence
    found = Greats(keep=1, validation=rows, learning_rate=0.1).score(model, batch).influence
    np.testing.assert_allclose(found, whole, rtol=1e-4)
    turns = Greats(keep=1, validation=rows, validation_rows=2, learning_rate=0.1)
    first = turns.select(model, batch).scores.influence
    second = turns.select(model, batch).scores.influence
    np.testing.assert_allclose((2 * first + second) / 3, whole, rtol=1e-4, atol=1e-7)
    assert torch.equal(turns.select(model, batch).scores.influence, first)
    for wrong, said in (([], "no row"), ([1, 2], "int"), ({"input_ids": VALIDATION["input_ids"]}, "labels")):
        with pytest.raises(UserError, match=said):
            Greats(keep=1, validation=wrong, learning_rate=0.1).score(model, batch)


def test_the_learning_rate_is_asked_for_and_handed_over() -> None:
    model, batch = tiny_model("llama", layers=1), tiny_batch([20, 9, 14])
    method = Greats(keep=1, validation=VALIDATION)
    with pytest.raises(UserError, match="learning_rate="):
        method.score(model, batch)
    method.new_step(learning_rate=0.3)
    wanted = Greats(keep=1, validation=VALIDATION, learning_rate=0.3).score(model, batch)
    assert torch.equal(method.score(model, batch).gain, wanted.gain)
    with pytest.raises(UserError, match="window='micro'"):
        Greats(keep=1, validation=VALIDATION, window="step").check_keep(4)
