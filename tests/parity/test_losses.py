"""MaxLoss against the model's own loss, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from siftune.models import head as head_module
from siftune.online.label_losses import cross_entropy
from siftune.online.maxloss import MaxLoss
from tests.reference_uds import tiny_batch
from tests.tiny import FAMILIES, tiny_model


def own_losses(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """What the model itself says of each row."""
    with torch.no_grad():
        return [
            float(model(**{name: value[row : row + 1] for name, value in batch.items()}).loss)
            for row in range(len(batch["input_ids"]))
        ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_models_own_loss(family: str, side: str) -> None:
    model, batch = tiny_model(family), tiny_batch([40, 8, 23], side=side, extra=2)
    scores = MaxLoss(keep=1).score(model, batch)
    np.testing.assert_allclose(scores.total.numpy(), own_losses(model, batch), rtol=1e-5)
    kept = MaxLoss(keep=1).select(model, batch)
    assert kept.indices.tolist() == [int(scores.total.argmax())]


def test_blocks_chunks_and_lora_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("gemma2", tie_word_embeddings=False), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))
    batch = tiny_batch([40, 8, 23, 31])
    monkeypatch.setattr(head_module, "BLOCK", 1)  # 256 rows of 261
    monkeypatch.setattr("siftune.online.label_losses.PASS_TOKENS", 30)
    scores = MaxLoss(keep=1, score_tokens=70).score(model, batch)
    np.testing.assert_allclose(scores.total.numpy(), own_losses(model, batch), rtol=1e-5)


def test_rows_without_labels_have_a_reason_and_harm_nobody() -> None:
    model, batch = tiny_model("llama"), tiny_batch([40, 8, 23])
    whole = MaxLoss(keep=1).score(model, batch).total
    batch["labels"][1] = -100
    scores = MaxLoss(keep=1).score(model, batch)
    assert scores.reasons == {1: "no label tokens to score"}
    assert torch.isnan(scores.total).tolist() == [False, True, False]
    assert torch.equal(scores.total[[0, 2]], whole[[0, 2]])
    assert MaxLoss(keep=2).select(model, batch).indices.tolist() == [0, 2]
    assert MaxLoss(keep=3).select(model, batch).indices.tolist() == [0, 1, 2]


def test_all_candidates_logits_never_exist_at_once() -> None:
    """The largest tensor made while scoring is far below B x T x V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.most = max(Largest.most, out.numel())
            return out

    model = tiny_model("llama", layers=1, width=512, vocabulary=12_000)
    batch = tiny_batch([60] * 16, vocabulary=12_000)
    with Largest():
        MaxLoss(keep=1).score(model, batch)
    assert 0 < Largest.most <= 16 * 60 * 8000
    assert Largest.most < 16 * 60 * 12_000


def test_the_papers_forward_without_a_mask() -> None:
    model = tiny_model("llama")
    left, right = tiny_batch([40, 8], side="left"), tiny_batch([40, 8])
    unmasked = {name: value for name, value in left.items() if name != "attention_mask"}
    scores = MaxLoss(keep=1, compat="paper").score(model, left).total
    np.testing.assert_allclose(scores.numpy(), own_losses(model, unmasked), rtol=1e-5)
    assert abs(float(scores[1] - MaxLoss(keep=1).score(model, left).total[1])) > 1e-4
    assert torch.allclose(
        MaxLoss(keep=1, compat="paper").score(model, right).total, MaxLoss(keep=1).score(model, right).total
    )


def test_cross_entropy_in_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 100, generator=generator) * 30
    targets = torch.randint(0, 100, (50,), generator=generator)
    blocks = [(start, min(start + 33, 100), logits[:, start : start + 33]) for start in range(0, 100, 33)]
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    np.testing.assert_allclose(cross_entropy(blocks, targets).numpy(), exact.numpy(), atol=1e-5)
