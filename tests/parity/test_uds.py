"""UDS against its naive definition (float64 SVD of the logits, literal FFT) on ten families of tiny models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from siftune.online.uds import UDS
from tests.reference_uds import NaiveUDS, naive_logits, tiny_batch, true_hidden
from tests.tiny import FAMILIES, tiny_model

HEADS: dict[str, dict[str, Any]] = {"gemma2": {"cap": 5.0}, "cohere": {"multiplier": 0.25}}
BAR = 1e-5


def compare(selector: UDS, naive: NaiveUDS, model: Any, batches: list[Any], **head: Any) -> None:
    """Select batch after batch with both; every part of every score within 1e-5 of the naive one."""
    for index, batch in enumerate(batches):
        kept = selector.select(model, batch)
        weight = model.get_output_embeddings().weight if "weight" not in head else head["weight"]
        rest = {name: value for name, value in head.items() if name != "weight"}
        rows = [naive_logits(hidden, weight, **rest) for hidden in true_hidden(model, batch)]
        total, intra, inter, sketches = naive.score(rows, selector.sketch)
        np.testing.assert_allclose(kept.scores.intra.numpy(), intra, rtol=BAR)
        np.testing.assert_allclose(kept.scores.inter.numpy(), inter, rtol=BAR, atol=0 if index else 1e-12)
        np.testing.assert_allclose(kept.scores.total.numpy(), total, rtol=BAR)
        best = sorted(np.argsort(-total, kind="stable")[: len(kept.indices)].tolist())
        assert kept.indices.tolist() == best
        naive.push([sketches[row] for row in kept.indices.tolist()])
    assert (inter > 0).all(), "the memory never took part"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_family(family: str, side: str) -> None:
    batches = [tiny_batch([5, 40, 17, 1, 60], side=side, seed=seed, extra=3) for seed in range(2)]
    compare(UDS(keep=2, alpha=0.5), NaiveUDS(alpha=0.5), tiny_model(family), batches, **HEADS.get(family, {}))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_authors_scaling_and_alpha(family: str) -> None:
    batches = [tiny_batch([12, 30, 7], seed=seed) for seed in range(3)]
    naive = NaiveUDS(alpha=1.5e-3, paper=True, capacity=2)
    selector = UDS(keep=1, compat="paper", memory=2)
    compare(selector, naive, tiny_model(family), batches, **HEADS.get(family, {}))


@pytest.mark.parametrize("side", ["right", "left"])
def test_walking_in_chunks_changes_nothing(side: str) -> None:
    batches = [tiny_batch([5, 40, 17, 1, 60, 33], side=side, seed=seed) for seed in range(2)]
    for family in ("llama", "gpt2"):
        selector = UDS(keep="1/3", alpha=0.1, score_tokens=70)
        compare(selector, NaiveUDS(alpha=0.1), tiny_model(family), batches)


def test_rows_longer_than_one_period_of_the_sketch() -> None:
    model = tiny_model("llama", layers=1, max_position_embeddings=1400)
    batches = [tiny_batch([1300, 600, 513, 9], seed=seed) for seed in range(2)]
    compare(UDS(keep=2, alpha=1.0), NaiveUDS(alpha=1.0), model, batches)


@pytest.mark.parametrize("width", [32, 40])
def test_a_vocabulary_smaller_than_the_width(width: int) -> None:
    """G is singular then."""
    assert width > 20
    model = tiny_model("llama", layers=2, width=width, vocabulary=20)
    batches = [tiny_batch([5, 40, 17], seed=seed, vocabulary=20) for seed in range(2)]
    compare(UDS(keep=1, alpha=1.0), NaiveUDS(alpha=1.0), model, batches)


def test_bf16_model_against_its_own_hidden_states() -> None:
    model = tiny_model("qwen2").to(torch.bfloat16)
    batches = [tiny_batch([30, 8, 45], seed=seed) for seed in range(2)]
    compare(UDS(keep=1, alpha=0.7), NaiveUDS(alpha=0.7), model, batches)


def test_answer_tokens_are_those_that_the_loss_reads() -> None:
    model, batch = tiny_model("qwen3"), tiny_batch([12, 30, 7, 2], side="left", extra=2)
    batch["labels"][3] = -100
    scores = UDS(keep=1, alpha=0.0, tokens="answer").score(model, batch)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    for row in range(3):
        own = logits[row, :-1][batch["labels"][row, 1:] != -100]
        assert len(own) < int(batch["attention_mask"][row].sum())
        np.testing.assert_allclose(
            float(scores.intra[row]), np.linalg.svd(own.numpy(), compute_uv=False).sum(), rtol=1e-5
        )
    assert torch.isnan(scores.total[3])
    assert "answer" in scores.reasons[3]
