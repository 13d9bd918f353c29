"""UDS of the residual against its naive definition: float64 softmax minus one-hot labels, SVD, FFT; padded and packed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from siftune.models import head as head_module
from siftune.online.maxloss import MaxLoss
from siftune.online.uds import UDS
from tests.packed import LAYOUTS, pack, padded, rows_of
from tests.parity.test_uds import BAR, HEADS
from tests.parity.test_uds_heads import Twisted, merged_head, stir, with_bias, with_lora
from tests.reference_uds import NaiveUDS, naive_logits, naive_nuclear, naive_sketch, tiny_batch, true_hidden
from tests.tiny import FAMILIES, tiny_model

Batch = dict[str, torch.Tensor]
NORMS: list[Any] = ["nuclear", "frobenius", "blend", 0.3, "head-gradient"]
READS_ALONE = ("trl", "positions", "block-mask")
"""Layouts whose segments a plain model on a CPU separates by itself."""


def naive_rows(model: Any, batch: Batch, **head: Any) -> list[dict[str, np.ndarray]]:
    """Logits `(N, V)`, residual `(N, V)` and the head's inputs of each row's label tokens, in float64."""
    weight = head.pop("weight", None)
    weight = model.get_output_embeddings().weight if weight is None else weight
    rows = []
    for row, hidden in enumerate(true_hidden(model, batch)):
        labels = batch["labels"][row][batch["attention_mask"][row].bool()]
        counted = labels[1:] != -100
        states = hidden[:-1][counted]
        logits = naive_logits(states, weight, **head)
        probabilities = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
        residual = probabilities - np.eye(logits.shape[1])[labels[1:][counted].numpy()]
        inputs = states.double().numpy()
        if head.get("bias") is not None:
            inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
        picked = probabilities[np.arange(len(labels[1:][counted])), labels[1:][counted].numpy()]
        rows.append({"logits": logits, "residual": residual, "inputs": inputs, "loss": -np.log(picked).mean()})
    return rows


def naive_intra(row: dict[str, np.ndarray], norm: Any, **head: Any) -> float:
    residual = row["residual"]
    if norm == "head-gradient":
        slope = 1 - (row["logits"] / head["cap"]) ** 2 if head.get("cap") else 1.0
        return naive_nuclear(head.get("multiplier", 1.0) * (residual * slope).T @ row["inputs"])
    share = {"nuclear": 1.0, "frobenius": 0.0, "blend": 0.5}.get(norm, norm)
    return share * naive_nuclear(residual) + (1 - share) * float(np.linalg.norm(residual))


def compare(selector: UDS, model: Any, batches: list[Batch], **head: Any) -> None:
    """Every part within 1e-5 of the naive one, over selections, so that the memory takes part."""
    memory: list[np.ndarray] = []
    divisor = {"none": lambda n: 1.0, "sqrt": np.sqrt, "tokens": float}[selector.length_norm]
    for index, batch in enumerate(batches):
        kept = selector.select(model, batch)
        rows = naive_rows(model, batch, **head)
        intra = [naive_intra(row, selector.norm, **head) / divisor(len(row["residual"])) for row in rows]
        sketches = [naive_sketch(row["residual"], selector.sketch) for row in rows]
        inter = [np.mean([np.linalg.norm(z - old) for old in memory]) if memory else 0.0 for z in sketches]
        np.testing.assert_allclose(kept.scores.intra.numpy(), intra, rtol=BAR)
        np.testing.assert_allclose(kept.scores.inter.numpy(), inter, rtol=BAR, atol=0 if index else 1e-12)
        np.testing.assert_allclose(kept.scores.loss.numpy(), [row["loss"] for row in rows], rtol=BAR)
        memory += [sketches[row] for row in kept.indices.tolist()]
    assert all(value > 0 for value in inter), "the memory never took part"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_family(family: str, side: str) -> None:
    batches = [tiny_batch([5, 40, 17, 3, 60], side=side, seed=seed, extra=3) for seed in range(2)]
    selector = UDS(keep=2, alpha=0.5, matrix="residual", length_norm="tokens")
    compare(selector, tiny_model(family), batches, **HEADS.get(family, {}))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_every_norm(family: str, norm: Any) -> None:
    batches = [tiny_batch([5, 40, 17], seed=seed) for seed in range(2)]
    selector = UDS(keep=1, alpha=0.5, matrix="residual", norm=norm, length_norm="sqrt")
    compare(selector, tiny_model(family), batches, **HEADS.get(family, {}))


@pytest.mark.parametrize("norm", ["nuclear", "head-gradient"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_a_head_with_bias(family: str, norm: Any) -> None:
    model = with_bias(family)
    head = {"bias": model.get_output_embeddings().bias, **HEADS.get(family, {})}
    batches = [tiny_batch([5, 40, 17], seed=seed) for seed in range(2)]
    compare(UDS(keep=1, alpha=0.5, matrix="residual", norm=norm), model, batches, **head)


@pytest.mark.parametrize("norm", ["nuclear", "head-gradient"])
def test_a_trained_lora_head_is_never_stale(norm: Any) -> None:
    model = with_lora("llama", ["lm_head", "q_proj"]).eval()
    selector = UDS(keep=1, alpha=0.0, matrix="residual", norm=norm)
    for step in range(2):
        stir(model, "lm_head.lora_", seed=step)
        batch = tiny_batch([5, 40, 17], seed=step)
        exact = [naive_intra(row, norm) for row in naive_rows(model, batch, weight=merged_head(model))]
        np.testing.assert_allclose(selector.select(model, batch).scores.intra.numpy(), exact, rtol=BAR)


def test_the_head_gradient_is_autograds() -> None:
    model = tiny_model("gemma2", tie_word_embeddings=False)
    batch = tiny_batch([20])
    scores = UDS(keep=1, matrix="residual", norm="head-gradient", alpha=0.0).score(model, batch)
    logits = model.double()(input_ids=batch["input_ids"]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=-100, reduction="sum")
    gradient = torch.autograd.grad(loss, model.get_output_embeddings().weight)[0]
    np.testing.assert_allclose(float(scores.intra[0]), naive_nuclear(gradient.numpy()), rtol=BAR)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_packed_rows_are_the_padded_rows(kind: str) -> None:
    model, rows = tiny_model("llama", layers=2), rows_of([9, 4, 12, 30, 6, 5])
    selector = UDS(keep=2, alpha=0.0, matrix="residual")
    alone = selector.score(model, padded(rows))
    packed = pack(rows, kind)
    scores = selector.score(model, packed)
    if kind in READS_ALONE:
        np.testing.assert_allclose(scores.intra.numpy(), alone.intra.numpy(), rtol=BAR)
    np.testing.assert_allclose(scores.loss.numpy(), MaxLoss(keep=1).score(model, packed).total.numpy(), rtol=1e-6)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_family(family: str) -> None:
    """Against the naive definition of every row by itself, in a line with a block-diagonal mask."""
    model, rows = tiny_model(family, layers=2), rows_of([9, 4, 12, 30])
    exact = [naive_intra(row, "nuclear") for row in naive_rows(model, padded(rows), **HEADS.get(family, {}))]
    scores = UDS(keep=2, alpha=0.0, matrix="residual").score(model, pack(rows, "block-mask"))
    np.testing.assert_allclose(scores.intra.numpy(), exact, rtol=BAR)


def test_the_loss_is_that_of_maxloss_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("gemma2"), tiny_batch([40, 8, 23, 31])
    selector = UDS(keep=1, alpha=0.0, matrix="residual", norm="head-gradient")
    complete = selector.score(model, batch)
    np.testing.assert_allclose(complete.loss.numpy(), MaxLoss(keep=1).score(model, batch).total.numpy(), rtol=1e-6)
    monkeypatch.setattr(head_module, "BLOCK", 1)  # 256 rows of 261
    monkeypatch.setattr("siftune.online.label_losses.PASS_TOKENS", 30)
    selector.score_tokens = 70
    blocks = selector.score(model, batch)
    np.testing.assert_allclose(blocks.intra.numpy(), complete.intra.numpy(), rtol=1e-6)
    np.testing.assert_allclose(blocks.loss.numpy(), complete.loss.numpy(), rtol=1e-6)


def test_rows_that_the_model_knows_by_heart_keep_their_digits() -> None:
    """1 - p of the label is about 1e-9: a residual from P - onehot in float32, or from 1 - 2p + p², would be noise."""
    model = tiny_model("llama", layers=1)
    batch = tiny_batch([12, 12])
    with torch.no_grad():
        states = true_hidden(model, batch)[0]
        targets = batch["labels"][0, 1:][batch["labels"][0, 1:] != -100]
        positions = (batch["labels"][0, 1:] != -100).nonzero().flatten()
        chosen = torch.linalg.lstsq(states[positions].double(), 25 * torch.nn.functional.one_hot(targets, 261).double())
        head = torch.nn.Linear(32, 261, bias=False)
        head.weight.copy_(chosen.solution.T)
        model.set_output_embeddings(head)
    rows = naive_rows(model, batch)
    assert rows[0]["loss"] < 1e-6
    scores = UDS(keep=1, alpha=0.0, matrix="residual").score(model, batch)
    np.testing.assert_allclose(float(scores.intra[0]), naive_nuclear(rows[0]["residual"]), rtol=1e-4)
    np.testing.assert_allclose(float(scores.loss[0]), rows[0]["loss"], rtol=1e-4)


def test_one_token_repeated() -> None:
    model, batch = tiny_model("gpt_neox"), tiny_batch([30, 20])
    batch["input_ids"][0] = 7
    batch["labels"][0, 1:] = 7
    compare(UDS(keep=1, alpha=1.0, matrix="residual"), model, [batch, tiny_batch([9, 20])])


def test_more_label_tokens_than_words() -> None:
    model = tiny_model("llama", layers=1, vocabulary=20)
    batches = [tiny_batch([60, 40], seed=seed, vocabulary=20) for seed in range(2)]
    compare(UDS(keep=1, alpha=1.0, matrix="residual"), model, batches)


def test_an_unknown_head_is_run_itself() -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head = Twisted(model.lm_head)
    batch = tiny_batch([5, 40, 17])
    selector = UDS(keep=1, alpha=0.0, matrix="residual")
    with pytest.warns(UserWarning, match="own logits"):
        scores = selector.score(model, batch)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    for row in range(3):
        counted = batch["labels"][row, 1:] != -100
        targets = batch["labels"][row, 1:][counted]
        residual = torch.softmax(logits[row, :-1][counted], dim=1) - torch.nn.functional.one_hot(targets, 261)
        np.testing.assert_allclose(float(scores.intra[row]), naive_nuclear(residual.numpy()), rtol=BAR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="head-gradient"):
            UDS(keep=1, matrix="residual", norm="head-gradient").score(model, batch)


def test_rows_without_a_residual_have_a_reason_and_leave_the_others_alone() -> None:
    model, batch = tiny_model("llama"), tiny_batch([40, 8, 23, 12])
    complete = UDS(keep=1, matrix="residual", norm="head-gradient").score(model, batch)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = torch.nan
    batch["labels"][1] = -100
    batch["input_ids"][batch["input_ids"] == 7] = 8
    batch["input_ids"][3, 0] = 7
    scores = UDS(keep=1, matrix="residual", norm="head-gradient").score(broken, batch)
    assert sorted(scores.reasons) == [1, 3]
    assert scores.reasons[1] == "no answer tokens to score"
    assert all(torch.isnan(part).tolist() == [False, True, False, True] for part in scores.parts.values())
    assert torch.isfinite(complete.total).all()
    with pytest.raises(UserError, match="no labels"):
        UDS(keep=1, matrix="residual").score(model, {"input_ids": batch["input_ids"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix": "logit"}, "matrix='logit'"),
        ({"norm": "head-gradient"}, "matrix='residual'"),
        ({"matrix": "residual", "compat": "paper"}, "compat='paper'"),
        ({"matrix": "residual", "lanczos_above": 10}, "lanczos_above=10"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UDS(keep=1, **options).check()


def test_sketches_of_another_matrix_are_refused() -> None:
    state = UDS(keep=1, matrix="residual").state_dict()
    with pytest.raises(UserError, match="matrix"):
        UDS(keep=1).load_state_dict(state)
    before_the_option = UDS(keep=1).state_dict()
    del before_the_option["drawn"]["matrix"]
    UDS(keep=1).load_state_dict(before_the_option)
    with pytest.raises(UserError, match="matrix"):
        UDS(keep=1, matrix="residual").load_state_dict(before_the_option)


def test_the_default_is_the_papers_matrix() -> None:
    model, batch = tiny_model("llama"), tiny_batch([5, 40])
    scores = UDS(keep=1, alpha=0.0).score(model, batch)
    _, intra, _, _ = NaiveUDS(alpha=0.0).score(
        [naive_logits(hidden, model.get_output_embeddings().weight) for hidden in true_hidden(model, batch)],
        _bound(261),
    )
    np.testing.assert_allclose(scores.intra.numpy(), intra, rtol=BAR)
    assert "loss" not in scores.parts


def _bound(vocabulary: int) -> Any:
    selector = UDS(keep=1)
    selector.sketch.bind(vocabulary)  # type: ignore[union-attr]
    return selector.sketch
