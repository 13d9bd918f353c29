"""Laws of the online methods' own options: memory, alpha, diversity inside a choice, token budgets, windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from siftune.online.base import Measured
from siftune.online.memory import Memory
from siftune.online.simple import Random
from siftune.online.uds import SPREAD_DECAY, UDS
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model

BATCHES = [tiny_batch([12, 30, 7, 21, 3, 16], seed=seed) for seed in range(6)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", layers=2)


# --- memory ---------------------------------------------------------------------------------------------------------


def numbered(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_first_in_first_out() -> None:
    memory = Memory(3)
    for value in range(8):
        memory.push(numbered(value))
        held = sorted(memory.sketches[:, 0].tolist())
        assert held == list(range(max(0, value - 2), value + 1))
    memory.push(numbered(*range(8, 15)))
    assert sorted(memory.sketches[:, 0].tolist()) == [12, 13, 14]
    np.testing.assert_allclose(memory.distances(numbered(10, 13)).numpy(), [3, 2 / 3])


def test_an_empty_memory_is_no_distance_and_a_memory_of_none_stays_so() -> None:
    for memory in (Memory(4), Memory(0)):
        if memory.capacity == 0:
            memory.push(numbered(1, 2))
        assert memory.distances(numbered(5, 6)).tolist() == [0, 0]


def test_a_reservoir_is_a_uniform_sample_of_all() -> None:
    counts = np.zeros(60)
    for seed in range(400):
        memory = Memory(6, policy="reservoir", seed=seed)
        for start in range(0, 60, 4):
            memory.push(numbered(*range(start, start + 4)))
        held = memory.sketches[:, 0].long().tolist()
        assert len(set(held)) == 6
        counts[held] += 1
    assert abs(counts[:20].mean() - 40) < 4
    assert abs(counts[-20:].mean() - 40) < 4


def test_a_reservoir_does_not_depend_on_how_rows_arrive() -> None:
    one, many = Memory(5, policy="reservoir", seed=3), Memory(5, policy="reservoir", seed=3)
    one.push(numbered(*range(40)))
    for value in range(40):
        many.push(numbered(value))
    assert torch.equal(one.sketches, many.sketches)


def test_only_kept_rows_are_remembered(model: Any) -> None:
    uds = UDS(keep=2, memory=5)
    for count, batch in enumerate(BATCHES, start=1):
        kept = uds.select(model, batch)
        state = uds.state_dict()
        assert len(state["sketches"]) == min(5, 2 * count)
        mine = uds.measure(model, batch).columns["sketch"][kept.indices]
        assert all(bool((state["sketches"] == sketch).all(dim=1).any()) for sketch in mine)


def test_a_state_made_with_other_options_is_refused(model: Any) -> None:
    uds = UDS(keep=2)
    uds.select(model, BATCHES[0])
    for other, word in (
        (UDS(keep=2, seed=1), "seed"),
        (UDS(keep=2, sketch=(64, 8)), "sketch"),
        (UDS(keep=2, compat="paper"), "compat"),
        (UDS(keep=2, memory_policy="reservoir"), "memory_policy"),
        (UDS(keep=2, memory=1), "memory"),
    ):
        with pytest.raises(UserError, match=word):
            other.load_state_dict(uds.state_dict())
    UDS(keep=1, alpha=0.2).load_state_dict(uds.state_dict())


def test_a_model_with_another_vocabulary_is_refused(model: Any) -> None:
    uds = UDS(keep=2)
    uds.select(model, BATCHES[0])
    with pytest.raises(UserError, match="new selector"):
        uds.select(tiny_model("llama", layers=1, vocabulary=300), BATCHES[0])


# --- alpha ----------------------------------------------------------------------------------------------------------


def test_total_is_intra_plus_alpha_inter(model: Any) -> None:
    for options in ({}, {"alpha": 0.3}, {"alpha": 0}, {"compat": "paper"}, {"within": 0.5}):
        uds = UDS(keep=2, **options)  # type: ignore[arg-type]
        for batch in BATCHES[:3]:
            scores = uds.select(model, batch).scores
            assert torch.equal(scores.total, scores.intra + scores.alpha * scores.inter)
            assert len(set(scores.alpha.tolist())) == 1
        if options.get("compat"):
            assert float(scores.alpha[0]) == 1.5e-3
    assert float(UDS(keep=1, alpha=7.0, compat="paper").score(model, BATCHES[0]).alpha[0]) == 7.0


def test_auto_alpha_balances_the_running_spreads(model: Any) -> None:
    uds, spread_intra, spread_inter = UDS(keep=2), 0.0, 0.0
    assert float(uds.select(model, BATCHES[0]).scores.alpha[0]) == 0, "nothing is remembered yet"
    for batch in BATCHES[1:]:
        scores = uds.select(model, batch).scores
        spread_intra = SPREAD_DECAY * spread_intra + float(np.var(scores.intra.numpy(), ddof=1))
        spread_inter = SPREAD_DECAY * spread_inter + float(np.var(scores.inter.numpy(), ddof=1))
        np.testing.assert_allclose(float(scores.alpha[0]), np.sqrt(spread_intra / spread_inter), rtol=1e-12)


def test_auto_alpha_makes_the_choice_independent_of_the_sketchs_scale(model: Any) -> None:
    mine, paper = UDS(keep=2), UDS(keep=2)
    scale = 1000.0
    for batch in BATCHES:
        a = mine.select(model, batch)
        measured = paper.measure(model, batch)
        measured = Measured(measured.rows, {**measured.columns, "sketch": measured.columns["sketch"] * scale})
        scores = paper.combine(measured)
        kept = paper.choose(scores, measured, 2)
        paper.commit(measured, scores, kept)
        assert torch.equal(kept, a.indices)
        np.testing.assert_allclose(scores.total.numpy(), a.scores.total.numpy(), rtol=1e-9)


# --- diversity inside a choice --------------------------------------------------------------------------------------


def test_two_copies_are_not_both_kept(model: Any) -> None:
    batch = {name: value.clone() for name, value in BATCHES[0].items()}
    best = int(UDS(keep=1, alpha=0.0).score(model, batch).total.argmax())
    copy = (best + 2) % 6
    for value in batch.values():
        value[copy] = value[best]
    assert set(UDS(keep=2, alpha=0.0).select(model, batch).indices.tolist()) == {best, copy}
    kept = UDS(keep=2, alpha=0.0, apart=0.1).select(model, batch).indices.tolist()
    assert min(best, copy) in kept
    assert max(best, copy) not in kept
    for count in range(1, 7):
        kept = UDS(keep=count, alpha=0.0, apart=0.1).select(model, batch).indices.tolist()
        assert len(kept) == count
        assert (max(best, copy) in kept) == (count == 6), "a copy goes last"


def test_apart_keeps_rows_without_a_score_last(model: Any) -> None:
    batch = {name: value.clone() for name, value in BATCHES[0].items()}
    batch["attention_mask"][0] = 0
    assert 0 not in UDS(keep=5, apart=0.1).select(model, batch).indices.tolist()
    assert 0 not in UDS(keep=5, apart=1.0).select(model, batch).indices.tolist()


def test_apart_zero_is_the_plain_choice(model: Any) -> None:
    plain, greedy = UDS(keep=3, alpha=0.1), UDS(keep=3, alpha=0.1, apart=1e-9)
    for batch in BATCHES:
        assert torch.equal(plain.select(model, batch).indices, greedy.select(model, batch).indices)


def test_the_within_term_is_the_mean_distance_to_the_other_candidates(model: Any) -> None:
    uds = UDS(keep=2, alpha=1.0, within=0.5)
    uds.select(model, BATCHES[0])
    plain = UDS(keep=2, alpha=1.0)
    plain.load_state_dict(uds.state_dict())
    z = uds.measure(model, BATCHES[1]).columns["sketch"].numpy()
    extra = [np.mean([np.linalg.norm(z[i] - z[j]) for j in range(6) if j != i]) for i in range(6)]
    difference = uds.score(model, BATCHES[1]).inter - plain.score(model, BATCHES[1]).inter
    np.testing.assert_allclose(difference.numpy(), 0.5 * np.array(extra), rtol=1e-9)


# --- budgets and windows --------------------------------------------------------------------------------------------


def test_keep_tokens(model: Any) -> None:
    scores = UDS(keep=1, alpha=0.0).score(model, BATCHES[0]).total
    lengths = BATCHES[0]["attention_mask"].sum(dim=1)
    order = torch.argsort(-scores).tolist()
    for budget in (1, 30, 31, 50, 60, 10_000):
        kept = UDS(keep="all", alpha=0.0, keep_tokens=budget).select(model, BATCHES[0]).indices.tolist()
        wanted, used = [order[0]], int(lengths[order[0]])
        for row in order[1:]:
            used += int(lengths[row])
            if used > budget:
                break
            wanted.append(row)
        assert kept == sorted(wanted), budget
    assert len(UDS(keep=2, alpha=0.0, keep_tokens=10_000).select(model, BATCHES[0]).indices) == 2


def test_ties_go_to_the_lower_index(model: Any) -> None:
    batch = {name: value[[0, 0, 0, 0]] for name, value in BATCHES[0].items()}
    assert UDS(keep=2, alpha=0.0).select(model, batch).indices.tolist() == [0, 1]


def test_random_is_uniform_and_seeded() -> None:
    batch = {"input_ids": torch.zeros(8, 3, dtype=torch.int64)}
    counts, method = np.zeros(8), Random(keep=2, seed=1)
    nothing = torch.nn.Identity()
    drawn = [method.select(nothing, batch).indices for _ in range(800)]
    for kept in drawn:
        counts[kept.numpy()] += 1
    assert abs(counts - 200).max() < 50
    other = Random(keep=2, seed=2)
    assert any(not torch.equal(kept, other.select(nothing, batch).indices) for kept in drawn[:20])


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -1.0}, {"alpha": "half"}, {"memory": -1}, {"memory": 1.5}, {"sketch": (8,)}, {"sketch": (0, 8)},
        {"sketch": 9}, {"norm": "spectral"}, {"norm": 1.5}, {"tokens": "prompt"}, {"compat": "code"}, {"within": -0.1},
        {"apart": 2.0}, {"length_norm": "log"}, {"precision": "half"}, {"memory_policy": "lifo"},
        {"lanczos_above": 0}, {"score_tokens": 0}, {"keep_tokens": 0},
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        UDS(keep=2, **options).check_keep(8)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_masks_of_every_shape(model: Any) -> None:
    batch = tiny_batch([12, 30, 7])
    wanted = UDS(keep=1).score(model, batch).total
    columns = batch["input_ids"].shape[1]
    causal = torch.ones(columns, columns).tril().bool()
    square = (
        causal & batch["attention_mask"].bool()[:, None, None, :] & batch["attention_mask"].bool()[:, None, :, None]
    )
    additive = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    for mask in (batch["attention_mask"].bool(), batch["attention_mask"].float(), additive):
        found = UDS(keep=1).score(model, {**batch, "attention_mask": mask}).total
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-5)
        found = UDS(keep=1, score_tokens=31).score(model, {**batch, "attention_mask": mask}).total
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-5)
    full = tiny_batch([30, 30])
    found = UDS(keep=1).score(model, {name: full[name] for name in ("input_ids", "labels")}).total
    np.testing.assert_allclose(found.numpy(), UDS(keep=1).score(model, full).total.numpy(), rtol=1e-5)
    with pytest.raises(UserError, match="attention_mask"):
        UDS(keep=1).score(model, {**batch, "attention_mask": torch.ones(3, 4)})
    with pytest.raises(UserError, match="labels"):
        UDS(keep=1, tokens="answer").score(model, {"input_ids": batch["input_ids"]})


def test_what_else_a_batch_holds_passes_through(model: Any) -> None:
    batch = {**tiny_batch([12, 30, 7]), "source": ["a", "b", "c"], "position_ids": torch.arange(30).expand(3, 30)}
    kept = UDS(keep=2, score_tokens=31).select(model, {name: v for name, v in batch.items() if name != "source"})
    plain = UDS(keep=2).select(model, tiny_batch([12, 30, 7]))
    np.testing.assert_allclose(kept.scores.total.numpy(), plain.scores.total.numpy(), rtol=1e-5)
    assert kept.batch["position_ids"].shape == (2, 30)


def test_bf16_autocast_touches_the_forward_only(model: Any) -> None:
    """The scores are those of the hidden states that autocast gives, in full precision."""
    from siftune.online import logit_access

    batch, seen = BATCHES[0], []
    original = logit_access.iter_hidden_states

    def record(*args: Any, **options: Any) -> Any:
        for chunk in original(*args, **options):
            seen.extend(zip(chunk.rows, chunk.states, strict=True))
            yield chunk

    logit_access.iter_hidden_states = record  # type: ignore[assignment]
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = UDS(keep=1).score(model, batch)
    finally:
        logit_access.iter_hidden_states = original
    weight = model.get_output_embeddings().weight.detach().double().numpy()
    for row, states in seen:
        exact = np.linalg.svd(states.double().numpy() @ weight.T, compute_uv=False).sum()
        np.testing.assert_allclose(float(scores.intra[row]), exact, rtol=1e-5)
    plain = UDS(keep=1).score(model, batch)
    assert not torch.allclose(scores.intra, plain.intra, rtol=1e-6)
