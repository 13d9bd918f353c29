"""Budgets: amounts as said, rankings, tokens, quotas and target mixes, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune import budget
from siftune.errors import UserError
from siftune.records import Scores
from tests.pools import make_pool

DOMAINS = ("maths", "code", "chat")


def scores_of(values: list[float], **more: object) -> Scores:
    pool = make_pool([{"text": f"row {number}"} for number in range(len(values))])
    reasons = {row: "no score" for row, value in enumerate(values) if math.isnan(value)}
    return Scores(pool=pool, method="test", values=np.array(values, np.float32), reasons=reasons, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "of_10"),
    [
        (2, 2),
        ("2", 2),
        (0.2, 2),
        ("0.2", 2),
        ("20%", 2),
        ("1/5", 2),
        (" 20 % ", 2),
        ("all", 10),
        ("100%", 10),
        (99, 10),
    ],
)
def test_an_amount_reads_the_same_in_every_spelling(said: budget.Keep, of_10: int) -> None:
    assert budget.parse_keep(said).rows(10) == of_10


@pytest.mark.parametrize(
    "said", [0, -1, "0", 0.0, 1.5, "150%", "1/0", "half", "", True, None, "-2", "nan", math.nan, 1.0, "1.0"]
)
def test_what_is_no_amount_is_refused_with_its_value(said: budget.Keep) -> None:
    with pytest.raises(UserError, match="keep="):
        budget.parse_keep(said)


def test_half_rows_round_up() -> None:
    assert [budget.Amount(fraction=0.5).rows(n) for n in (1, 3, 5)] == [1, 2, 3]


@given(
    st.lists(st.one_of(st.just(math.nan), st.floats(-3, 3, width=16)), max_size=30),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_top_is_the_sorted_prefix_of_a_naive_ranking(values: list[float], small: int, more: int) -> None:
    naive = sorted((row for row, value in enumerate(values) if value == value), key=lambda row: (-values[row], row))
    array = np.array(values, np.float32)
    assert budget.ranking(array).tolist() == naive
    assert budget.top(array, small).tolist() == sorted(naive[:small])
    assert set(budget.top(array, small)) <= set(budget.top(array, small + more))


@given(st.lists(st.tuples(st.floats(0, 1, width=16), st.integers(1, 50)), min_size=1, max_size=30), st.integers(1, 300))
def test_tokens_keep_the_longest_prefix_that_fits(rows: list[tuple[float, int]], allowed: int) -> None:
    values, tokens = np.array([v for v, _ in rows], np.float32), np.array([t for _, t in rows], np.int32)
    kept, used = [], 0
    for row in budget.ranking(values).tolist():
        used += int(tokens[row])
        if used > allowed:
            break
        kept.append(row)
    if kept:
        assert budget.within_tokens(values, tokens, allowed).tolist() == sorted(kept)
    else:
        with pytest.raises(UserError, match="less than the best row alone"):
            budget.within_tokens(values, tokens, allowed)


def test_unknown_token_counts_are_refused() -> None:
    with pytest.raises(UserError, match="needs token counts"):
        budget.within_tokens(np.array([1.0]), np.array([-1], np.int32), 5)


def test_the_papers_customised_quota_takes_half_of_one_domain_and_a_tenth_of_the_others() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300).astype(np.int16)
    values = rng.normal(size=300).astype(np.float32)
    values[:5] = np.nan
    rows = (
        scores_of(values.tolist(), domains=DOMAINS, pseudo_labels=labels).keep(quota={"maths": "50%", "*": "10%"}).rows
    )
    wanted: list[int] = []
    for index, share in ((0, 0.5), (1, 0.1), (2, 0.1)):
        members = [row for row in range(5, 300) if labels[row] == index]
        members.sort(key=lambda row: -values[row])
        wanted += members[: math.floor(share * len(members) + 0.5)]
    assert rows.tolist() == sorted(wanted)


def test_a_domain_without_a_quota_keeps_nothing() -> None:
    labels = np.array([0, 1, 2, 0], np.int16)
    assert budget.by_quota(np.ones(4), labels, DOMAINS, {"maths": 1}).tolist() == [0]
    with pytest.raises(UserError, match=r"'math', which is not one of maths, code, chat"):
        budget.by_quota(np.ones(4), labels, DOMAINS, {"math": 1})


def simplex(rows: int, domains: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(domains, 0.5), size=rows)


def test_importance_weights_are_the_formula_and_average_to_one() -> None:
    p = simplex(50, 3, 1)
    mix = {"maths": 2.0, "code": 1.0, "chat": 1.0}
    w = budget.importance_weights(p, DOMAINS, mix)
    for row in range(50):
        expected = sum(
            (mix[name] / 4) / (sum(p[i][k] for i in range(50)) / 50) * p[row][k] for k, name in enumerate(DOMAINS)
        )
        assert w[row] == pytest.approx(expected, rel=1e-12)
    assert w.mean() == pytest.approx(1.0)  # E_p[w] = sum_k q(k) = 1


def test_the_pools_own_mix_weighs_every_row_alike() -> None:
    p = simplex(40, 3, 2)
    w = budget.importance_weights(p, DOMAINS, dict(zip(DOMAINS, p.mean(axis=0).tolist(), strict=True)))
    np.testing.assert_allclose(w, 1.0, rtol=1e-12)


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_a_hard_assignment_errs_as_proposition_c1_says(seed: int, domains: int) -> None:
    """(w - lambda_k*)^2 = (sum over k != k* of p_k (lambda_k - lambda_k*))^2."""
    names = tuple(f"d{k}" for k in range(domains))
    p = simplex(20, domains, seed)
    q = simplex(1, domains, seed + 1)[0]
    priorities = q / p.mean(axis=0)
    w = budget.importance_weights(p, names, dict(zip(names, q.tolist(), strict=True)))
    for row in range(20):
        best = int(p[row].argmax())
        others = sum(p[row][k] * (priorities[k] - priorities[best]) for k in range(domains) if k != best)
        assert (w[row] - priorities[best]) ** 2 == pytest.approx(others**2, rel=1e-6, abs=1e-12)


def test_a_domain_that_no_row_can_be_gets_no_weight() -> None:
    p = np.array([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]])
    np.testing.assert_array_equal(budget.importance_weights(p, DOMAINS, {"chat": 1.0}), [0.0, 0.0])


@pytest.mark.parametrize("mix", [{"math": 1.0}, {"maths": -1.0}, {"maths": 0.0}, {}, {"maths": math.inf}])
def test_target_mixes_that_mean_nothing_are_refused(mix: dict[str, float]) -> None:
    with pytest.raises(UserError, match="target_mix"):
        budget.importance_weights(simplex(3, 3, 0), DOMAINS, mix)


def test_target_mix_replaces_the_ranking_but_scores_no_row_that_has_none() -> None:
    p = np.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [np.nan] * 3], np.float32)
    scores = scores_of([1.0, 5.0, 9.0, math.nan], domains=DOMAINS, probabilities=p)
    assert scores.keep(count=1).rows.tolist() == [2]
    assert scores.keep(count=1, target_mix={"maths": 1.0}).rows.tolist() == [0]
    assert scores.keep(fraction=1.0, target_mix={"maths": 1.0}).rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "exactly one"),
        ({"count": 1, "fraction": 0.5}, "exactly one"),
        ({"count": 9}, "exceeds the 3 usable rows"),
        ({"count": 0}, "count=0"),
        ({"fraction": "3"}, "number of rows"),
        ({"tokens": 5}, "has none"),
        ({"quota": {"*": 1}}, "has none"),
        ({"count": 1, "target_mix": {"maths": 1}}, "has none"),
        ({"quota": {"*": 1}, "target_mix": {"maths": 1}}, "two budgets"),
    ],
)
def test_a_budget_that_does_not_fit_is_one_sentence(asked: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scores_of([1.0, 2.0, 3.0]).keep(**asked)  # type: ignore[arg-type]
