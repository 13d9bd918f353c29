"""The sketch against literal FFTs, and the law it is made for: distances are kept, the better the larger it is."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from siftune.models.head import Head
from siftune.online.sketch import PERIOD, Sketch
from siftune.online.uds import UDS
from tests.reference_uds import naive_sketch, tiny_batch
from tests.tiny import tiny_model


def bound(shape: tuple[int, int], vocabulary: int, *, seed: int = 0, paper: bool = False) -> Sketch:
    sketch = Sketch(shape, seed=seed, paper=paper)
    sketch.bind(vocabulary)
    return sketch


def sketched(sketch: Sketch, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    head = Head(weight, None, None, None, 1.0, None, (), (), False, False)
    return sketch.apply(states[None], head.project(sketch.columns)[0])[0]


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("length", [1, 7, 512, 513, 1500])
@pytest.mark.parametrize("vocabulary", [300, 6000])
def test_against_ffts(paper: bool, length: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(length)
    states, weight = torch.randn(length, 24, generator=generator), torch.randn(vocabulary, 24, generator=generator)
    sketch = bound((128, 8), vocabulary, paper=paper)
    naive = naive_sketch(states.double().numpy() @ weight.double().numpy().T, sketch, paper=paper)
    found = sketched(sketch, states, weight).numpy()
    np.testing.assert_allclose(found, naive, rtol=0, atol=1e-9 * np.abs(naive).max())


def test_an_odd_small_vocabulary_and_more_numbers_than_frequencies() -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(5, 8, generator=generator), torch.randn(21, 8, generator=generator)
    for paper in (False, True):
        sketch = bound((128, 8), 21, paper=paper)
        naive = naive_sketch(states.double().numpy() @ weight.double().numpy().T, sketch, paper=paper)
        np.testing.assert_allclose(sketched(sketch, states, weight).numpy(), naive, rtol=1e-8, atol=1e-8)


def test_a_longer_row_begins_as_the_shorter_one() -> None:
    """Positions after a row's end add to its sketch and change nothing before."""
    sketch = bound((16, 8), 100)
    assert torch.equal(sketch.rows(2000)[:, :100], bound((16, 8), 100).rows(100))
    assert torch.equal(sketch.time_signs(2000)[:PERIOD], sketch.signs.time)
    assert not torch.equal(sketch.time_signs(1024)[:PERIOD], sketch.time_signs(1024)[PERIOD:])


def test_the_draw() -> None:
    sketch = bound((128, 8), 1000)
    assert set(sketch.signs.vocabulary.tolist()) == {-1.0, 1.0} == set(sketch.signs.time.tolist())
    assert len(set(sketch.indices.vocabulary.tolist())) == 128
    assert 1 <= int(sketch.indices.vocabulary.min()) <= int(sketch.indices.vocabulary.max()) < 500
    other = bound((128, 8), 1000, seed=1)
    assert not torch.equal(sketch.signs.vocabulary, other.signs.vocabulary)
    assert not torch.equal(sketch.indices.vocabulary, other.indices.vocabulary)
    drawn = [bound((128, 8), 300, seed=seed, paper=True).indices.vocabulary for seed in range(20)]
    assert any(len(set(each.tolist())) < 128 for each in drawn), "the paper draws with replacement"


def test_it_is_the_shape_it_was_made_with() -> None:
    uds = UDS(keep=2, sketch=(16, 4))
    assert uds.sketch == (16, 4)
    with pytest.raises(UserError, match="bind"):
        _ = uds.sketch.signs  # type: ignore[attr-defined]
    uds.score(tiny_model("llama", layers=1), tiny_batch([4, 5]))
    assert uds.sketch.signs.vocabulary.shape == (261,)  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(uds.sketch))
    assert torch.equal(again.signs.vocabulary, uds.sketch.signs.vocabulary)  # type: ignore[attr-defined]
    assert copy.deepcopy(uds.sketch) == (16, 4)


def distortions(shape: tuple[int, int]) -> np.ndarray:
    """`‖z_i − z_j‖ / ‖L_i − L_j‖` over pairs of random low-rank logits and over draws of the sketch."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 16, generator=generator)
    rows = [torch.randn(60, 16, generator=generator) for _ in range(6)]
    ratios = []
    for seed in range(12):
        sketch = bound(shape, 500, seed=seed)
        z = [sketched(sketch, states, weight) for states in rows]
        for i in range(6):
            for j in range(i):
                ratios.append(float((z[i] - z[j]).norm() / ((rows[i] - rows[j]) @ weight.T).norm()))
    return np.array(ratios)


def test_johnson_lindenstrauss() -> None:
    """Distances are unbiased, and the spread of their distortion shrinks like 1/sqrt(d1 d2) or faster."""
    spreads = {}
    for shape in ((8, 2), (32, 8), (128, 32)):
        ratios = distortions(shape)
        assert abs(np.mean(ratios**2) - 1) < 4 * np.std(ratios**2) / np.sqrt(12) + 0.02, shape
        spreads[shape] = ratios.std()
    assert spreads[32, 8] < 0.6 * spreads[8, 2]
    assert spreads[128, 32] < 0.6 * spreads[32, 8]
    assert spreads[128, 32] < 0.06
