"""Micro-batches that keep no row: allowed where a fully masked one adds exactly nothing, else refused with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer

import siftune
from siftune import UserError
from siftune.hook.batching import dummy_batch
from siftune.hook.checks import allows_dummies
from siftune.online.simple import Random
from tests.trainers import kept_rows, rows, trainer


class OwnLoss(Trainer):
    """As LLaMA-Factory, ms-swift and Axolotl: a loss of its own around the library's."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def experts(**more: Any) -> MixtralForCausalLM:
    """A mixture of four experts with random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **shape, **more)
    )


def router_gradient(model: MixtralForCausalLM) -> float:
    """The size of the routers' gradient from one fully masked micro-batch."""
    row = rows(1)[0]
    batch = dummy_batch({name: torch.tensor([value]) for name, value in row.items()}, 0)
    model.train()
    model(**batch, num_items_in_batch=torch.tensor(10)).loss.backward()
    gradients = [value.grad for name, value in model.named_parameters() if "gate" in name and value.grad is not None]
    return max((float(gradient.abs().max()) for gradient in gradients), default=0.0)


@pytest.mark.parametrize("window", ["micro", "step"])
def test_one_row_a_micro_batch_names_the_shape_that_works(tmp_path: Path, window: str) -> None:
    live = trainer(tmp_path, cls=OwnLoss, per_device_train_batch_size=1, gradient_accumulation_steps=16)
    with pytest.raises(UserError, match=r"per_device_train_batch_size=16 .* gradient_accumulation_steps=1") as refused:
        siftune.attach(live, Random(keep="1/8", window=window))
    assert 'window="step"' not in str(refused.value)
    assert "\n" not in str(refused.value)
    same = trainer(tmp_path, cls=OwnLoss, per_device_train_batch_size=16, max_steps=1)
    siftune.attach(same, Random(keep="1/8", window=window))
    same.train()
    assert len(kept_rows(tmp_path, 1)) == 2


def test_the_librarys_own_loss_may_choose_over_the_step(tmp_path: Path) -> None:
    shape = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "max_steps": 1}
    with pytest.raises(UserError, match='choose over the step with window="step"'):
        siftune.attach(trainer(tmp_path, **shape), Random(keep="1/8"))
    live = trainer(tmp_path, **shape)
    siftune.attach(live, Random(keep="1/8", window="step"))
    live.train()
    assert len(kept_rows(tmp_path, 1)) == 2


def test_a_budget_below_one_row_of_the_step_names_no_shape(tmp_path: Path) -> None:
    live = trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    with pytest.raises(UserError, match="raise keep, per_device_train_batch_size or gradient_accumulation_steps"):
        siftune.attach(live, Random(keep="1/16"))


def test_a_balancing_loss_trains_on_a_fully_masked_micro_batch(tmp_path: Path) -> None:
    """The reason for the rule, measured: with the balancing loss the routers get a gradient, without it none."""
    assert router_gradient(experts(output_router_logits=True)) > 0
    assert router_gradient(experts(output_router_logits=False)) == 0


def test_every_micro_batch_of_a_balancing_loss_keeps_a_row(tmp_path: Path) -> None:
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    live = trainer(tmp_path / "balanced", model=experts(output_router_logits=True), **shape)
    assert not allows_dummies(live)
    with pytest.raises(UserError, match="2 rows for 4 micro-batches, and the balancing loss of the model's experts"):
        siftune.attach(live, Random(keep="1/8", window="step"))
    siftune.attach(live, Random(keep="1/4", window="step"))
    live.train()
    assert len(kept_rows(tmp_path / "balanced", 1)) == 4
    assert allows_dummies(trainer(tmp_path / "plain", model=experts(output_router_logits=False), **shape))


def test_experts_in_code_of_their_own_may_have_such_a_loss(tmp_path: Path) -> None:
    model = experts(output_router_logits=False)
    model.__class__ = type("OwnForCausalLM", (MixtralForCausalLM,), {"__module__": "transformers_modules.own.modeling"})
    assert not allows_dummies(trainer(tmp_path, model=model))
