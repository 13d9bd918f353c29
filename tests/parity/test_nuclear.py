"""Norms from hidden states against a float64 SVD of the logits, on the rows that break float32."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from siftune.models.head import Factor, Head, factorise
from siftune.online.nuclear import (
    EXACT_TOLERANCE,
    NormRoute,
    exact_polar_traces,
    gram_of_rows,
    groups,
    lanczos_norms,
    norms,
    norms_of_grams,
    polar_traces,
)
from siftune.online.uds import UDS
from tests.reference_uds import naive_frobenius, naive_logits, naive_nuclear, tiny_batch
from tests.tiny import tiny_model

WIDTH = 96


def head_of(weight: torch.Tensor) -> Head:
    return Head(weight, None, None, None, 1.0, None, (), (), False, False)


def random_weight(seed: int = 0) -> torch.Tensor:
    """A head with a strong common direction, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(700, WIDTH, generator=generator) + 2 * torch.randn(WIDTH, generator=generator)


def rows() -> dict[str, torch.Tensor]:
    """Hidden states by what is hard about them."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    graded = np.linalg.qr(normal(64, 64).double().numpy())[0] * np.logspace(0, -16, 64)
    graded = graded @ np.linalg.qr(normal(WIDTH, 64).double().numpy())[0].T
    return {
        "ordinary": normal(50, WIDTH),
        "one token": normal(1, WIDTH),
        "one token 64 times": normal(1, WIDTH).repeat(64, 1),
        "one token 300 times": normal(1, WIDTH).repeat(300, 1),
        "two tokens in turn": normal(2, WIDTH).repeat(40, 1),
        "longer than wide": normal(3 * WIDTH + 5, WIDTH),
        "as long as wide": normal(WIDTH, WIDTH),
        "one dominant direction": normal(80, WIDTH) * 1e-4 + 100 * normal(80, 1) * normal(WIDTH),
        "singular values over 16 decades": torch.from_numpy(graded),
        "bf16": normal(60, WIDTH).bfloat16(),
        "huge": normal(30, WIDTH) * 1e15,
        "tiny": normal(30, WIDTH) * 1e-15,
    }


@pytest.fixture(scope="module")
def factor() -> Factor:
    return factorise(head_of(random_weight()))[0]


@pytest.mark.parametrize("kind", list(rows()))
@pytest.mark.parametrize("single", [False, True])
def test_norms(kind: str, single: bool, factor: Factor) -> None:
    if single:  # as large heads keep it
        factor = factorise(head_of(random_weight()))[0]
        factor.blocks = [block.float() for block in factor.blocks]
    states = rows()[kind]
    logits = naive_logits(states, random_weight())
    found = norms(states[None], [len(states)], factor)[0]
    np.testing.assert_allclose(found.nuclear, naive_nuclear(logits), rtol=1e-6)
    np.testing.assert_allclose(found.frobenius, naive_frobenius(logits), rtol=1e-6)
    assert found.error == 0


def degenerate_rows() -> dict[str, torch.Tensor]:
    """Further rows on which a polar iteration might stumble."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "rows of zeros among others": torch.cat([normal(40, WIDTH), torch.zeros(9, WIDTH)]),
        "nothing but zeros": torch.zeros(12, WIDTH),
        "rank 1": normal(60, 1) * normal(WIDTH),
        "rank 3": normal(60, 3) @ normal(3, WIDTH),
        "half repeated": normal(30, WIDTH).repeat(2, 1),
    }


SHOWN = {"ordinary", "one token", "longer than wide", "as long as wide", "bf16", "huge", "tiny"}
"""Rows of full rank: the float64 polar iteration has to manage them by itself."""


@pytest.mark.parametrize("kind", [*rows(), *degenerate_rows()])
def test_the_exact_polar_route(kind: str, factor: Factor) -> None:
    states = (rows() | degenerate_rows())[kind]
    result = norms(states[None], [len(states)], factor, route="polar")[0]
    reference = naive_nuclear(naive_logits(states, random_weight()))
    bar = 1e-6 if kind == "one token 300 times" else 1e-7  # what eigenvalues themselves reach there
    np.testing.assert_allclose(result.nuclear, reference, rtol=bar)
    assert result.error == 0
    if kind in SHOWN | {"rows of zeros among others"}:
        assert not result.fell_back
        np.testing.assert_allclose(result.nuclear, reference, rtol=1e-10)


@pytest.mark.parametrize("size", [2, 40, 200])
def test_what_the_polar_route_shows_is_so(size: int) -> None:
    """Over spectra of every steepness: either within the tolerance or not shown, and gentle ones are shown."""
    generator = torch.Generator().manual_seed(size)
    left = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    decades = torch.arange(0, 17, dtype=torch.float64)
    values = 10 ** (-decades[:, None] * torch.linspace(0, 1, size, dtype=torch.float64))
    factors = left * values[:, None, :]
    traces, shown = exact_polar_traces(factors @ factors.mT)
    errors = (traces / values.sum(dim=1) - 1).abs()
    assert (errors[shown] < EXACT_TOLERANCE).all()
    assert shown[:6].all()
    assert size == 2 or not shown[-1], "a ridge on one direction alone is within the tolerance"


@pytest.mark.parametrize("kind", list(rows()))
def test_fast_keeps_its_tolerance_or_falls_back(kind: str, factor: Factor) -> None:
    states = rows()[kind]
    result = norms(states[None], [len(states)], factor, route="fast")[0]
    np.testing.assert_allclose(result.nuclear, naive_nuclear(naive_logits(states, random_weight())), rtol=1e-4)
    if kind in ("ordinary", "longer than wide", "as long as wide", "bf16"):
        assert not result.fell_back, "the fast route should manage an ordinary row"


def test_fast_never_answers_without_showing_it() -> None:
    broken = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)  # not positive semidefinite
    for traces in (polar_traces, exact_polar_traces):
        assert not traces(broken)[1].any()
        assert not traces(torch.zeros(1, 3, 3, dtype=torch.float64))[1].any()


def test_fast_falling_back_is_said() -> None:
    model = tiny_model("llama")
    batch = tiny_batch([30, 20])
    batch["input_ids"][0] = 7  # one token over and over, at any position
    model.model.layers = torch.nn.ModuleList()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fast = UDS(keep=1, precision="fast").score(model, batch).intra
    exact = UDS(keep=1).score(model, batch).intra
    np.testing.assert_allclose(fast.numpy(), exact.numpy(), rtol=1e-4)
    told = any("computed exactly" in str(warning.message) for warning in seen)
    assert told == bool((fast[0] == exact[0]).item())


def test_rows_padded_together_are_as_alone(factor: Factor) -> None:
    """What an accelerator does: zeros beyond a row's length, in one batch."""
    some = [rows()[kind] for kind in ("ordinary", "one token 64 times", "one token", "as long as wide", "bf16")]
    padded = torch.nn.utils.rnn.pad_sequence([states.float() for states in some], batch_first=True)
    bars: dict[NormRoute, float] = {"eigenvalues": 1e-7, "polar": 1e-7, "fast": 1e-4}
    for route, bar in bars.items():
        together = norms(padded, [len(states) for states in some], factor, route=route)
        for states, found in zip(some, together, strict=True):
            alone = norms(states[None], [len(states)], factor)[0]
            np.testing.assert_allclose(found.nuclear, alone.nuclear, rtol=bar)


def test_nan_stays_in_its_row(factor: Factor) -> None:
    states = torch.stack([rows()["ordinary"], torch.full((50, WIDTH), torch.nan), rows()["ordinary"]])
    first, broken, last = norms(states, [50, 50, 50], factor)
    assert np.isnan(broken.nuclear)
    assert np.isnan(broken.frobenius)
    np.testing.assert_allclose([first.nuclear, last.nuclear], norms(states[:1], [50], factor)[0].nuclear, rtol=1e-12)


def test_groups_hold_every_row_once_with_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 600, (200,), generator=generator).tolist()
    found = list(groups(lengths, torch.device("cuda"), width=300, tokens=4096))
    assert sorted(index for group in found for index in group) == list(range(200))
    assert len(found) < 100
    for group in found:
        most = max(lengths[index] for index in group)
        assert most * len(group) <= 4096
        assert min(lengths[index] for index in group) >= 0.75 * most
        assert len({lengths[index] <= 300 for index in group}) == 1, "Gram matrices of both sides in one group"
    long = list(groups([4000] * 6 + [10], torch.device("cuda"), width=8000))
    assert long == [[0], [1], [2], [3], [4], [5], [6]], "one Gram matrix of 4,000 is a group"
    assert list(groups(lengths, torch.device("cpu"))) == [[index] for index in range(200)]


def test_the_norm_lies_between_its_bounds(factor: Factor) -> None:
    for states in rows().values():
        found = norms(states[None], [len(states)], factor)[0]
        assert found.frobenius * (1 - 1e-9) <= found.nuclear
        assert found.nuclear <= np.sqrt(min(len(states), WIDTH)) * found.frobenius * (1 + 1e-9)


def test_rows_longer_than_wide_take_the_smaller_side(factor: Factor) -> None:
    assert gram_of_rows(torch.zeros(1, 200, WIDTH), factor).shape == (1, WIDTH, WIDTH)
    assert gram_of_rows(torch.zeros(1, 20, WIDTH), factor).shape == (1, 20, 20)
    assert norms_of_grams(torch.eye(3, dtype=torch.float64)[None] * 4, [3])[0].nuclear == 6


@pytest.mark.parametrize(
    "kind", ["ordinary", "longer than wide", "one token 300 times", "one token", "as long as wide"]
)
def test_lanczos_states_its_error(kind: str, factor: Factor) -> None:
    states = rows()[kind]
    exact = naive_nuclear(naive_logits(states, random_weight()))
    estimates = [lanczos_norms(states, factor, seed=seed) for seed in range(8)]
    for found in estimates:
        assert abs(found.nuclear - exact) <= 5 * found.error * exact + 1e-6 * exact
        assert found.error < 0.05
    again = lanczos_norms(states, factor, seed=3)
    assert again == estimates[3]
    spread = np.std([found.nuclear for found in estimates]) / exact
    assert spread <= 3 * np.mean([found.error for found in estimates]) + 1e-9


def test_lanczos_with_more_probes_is_closer(factor: Factor) -> None:
    states = rows()["longer than wide"]
    few, many = lanczos_norms(states, factor, probes=8), lanczos_norms(states, factor, probes=512)
    assert many.error < few.error / 4


def test_lanczos_in_uds_touches_long_rows_only() -> None:
    model, batch = tiny_model("llama"), tiny_batch([50, 9])
    exact = UDS(keep=1, alpha=0.0).score(model, batch)
    scores = UDS(keep=1, alpha=0.0, lanczos_above=20).score(model, batch)
    assert scores.intra[1] == exact.intra[1]
    assert scores.intra_error[1] == 0
    assert scores.intra[0] != exact.intra[0]
    assert abs(float(scores.intra[0] / exact.intra[0]) - 1) < 5 * float(scores.intra_error[0])


@pytest.mark.parametrize(("norm", "share"), [("nuclear", 1.0), ("frobenius", 0.0), ("blend", 0.5), (0.25, 0.25)])
@pytest.mark.parametrize(("length_norm", "power"), [("none", 0.0), ("sqrt", 0.5), ("tokens", 1.0)])
def test_blends_and_length_norms(norm: str | float, share: float, length_norm: str, power: float) -> None:
    model, batch = tiny_model("cohere"), tiny_batch([21, 9])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().numpy()
    scores = UDS(keep=1, norm=norm, length_norm=length_norm).score(model, batch)  # type: ignore[arg-type]
    for row, length in enumerate((21, 9)):
        own = logits[row, :length]
        wanted = (share * naive_nuclear(own) + (1 - share) * naive_frobenius(own)) / length**power
        np.testing.assert_allclose(float(scores.intra[row]), wanted, rtol=1e-5)
