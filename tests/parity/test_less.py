"""less against its definition: explicit gradients one row at a time, Adam's step by torch's own optimiser, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from siftune.errors import UserError
from siftune.records import Shard
from tests.pools import make_pool
from tests.tiny import save_tiny

pytest.importorskip("trl")
pytest.importorskip("peft")

from siftune.models.store import Store
from siftune.models.tokenize_rows import Encoder, Tokens
from siftune.warmup.less import Less, span
from siftune.warmup.row_features import Moments, Projection, RowFeatures, adam_direction, collate
from siftune.warmup.tuning import checkpoint_file

ROWS: list[dict[str, Any]] = [
    {
        "instruction": f"Question {number} " + "about numbers " * (number % 4),
        "input": "",
        "output": f"answer {number * 7}",
    }
    for number in range(12)
]
TARGET = [
    {"instruction": f"Name a colour {number}", "input": "", "output": f"blue {number}", "subtask": "ab"[number % 2]}
    for number in range(4)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", width=16, layers=2)


@pytest.fixture(scope="module")
def settings(model: Path) -> dict[str, Any]:
    return {
        "model": str(model), "target": TARGET, "device": "cpu", "epochs": 2, "share": 0.5, "rank": 2, "batch": 2,
        "learning_rate": 1e-2, "dimension": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def built(settings: dict[str, Any], cache: Path, **changed: Any) -> Less:
    method = Less(**{**settings, **changed})
    method.cache = cache
    return method.fit(make_pool(ROWS))


def adapted(model: Path, folder: Path, epoch: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model under a checkpoint, in float64."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    network = PeftModel.from_pretrained(network, str(folder), is_trainable=True).double().eval()
    stored = load_file(str(checkpoint_file(folder, epoch)))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.requires_grad:
                weight.copy_(stored[f"weight.{name}"])
    return network, stored


def tokens_of(model: Path, rows: list[dict[str, Any]]) -> list[Tokens]:
    from transformers import AutoTokenizer

    encode = Encoder(AutoTokenizer.from_pretrained(model), "auto", 512)
    return [encode(row) for row in make_pool(rows).read(range(len(rows)))]


def explicit(network: Any, row: Tokens) -> dict[str, torch.Tensor]:
    """The definition: the gradient of the row's mean loss over its label tokens, by an ordinary backward pass."""
    network.zero_grad()
    network(**collate([row])).loss.backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.requires_grad}


def adam_step(gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor, step: float) -> torch.Tensor:
    """What torch's Adam subtracts at learning rate 1."""
    weight = nn.Parameter(torch.zeros_like(gradient))
    optimiser = torch.optim.Adam([weight], lr=1.0)
    optimiser.state[weight] = {
        "step": torch.tensor(step), "exp_avg": first.double().clone(), "exp_avg_sq": second.double().clone()
    }  # fmt: skip
    weight.grad = gradient
    optimiser.step()
    return -weight.detach()


def naive(model: Path, method: Less, preconditioner: str) -> np.ndarray[Any, Any]:
    """Scores by subtask, `(rows, 2)`, gradient by gradient in float64, without projection."""
    assert method.warmed is not None
    total = np.zeros((len(ROWS), 2))
    for epoch, rate in enumerate(method.warmed.facts["learning_rates"]):
        network, stored = adapted(model, method.warmed.folder, epoch)
        targets = [
            torch.cat([g.flatten() for g in explicit(network, row).values()]) for row in tokens_of(model, TARGET)
        ]
        means = [(targets[0] + targets[2]) / 2, (targets[1] + targets[3]) / 2]
        for index, row in enumerate(tokens_of(model, ROWS)):
            gradients = explicit(network, row)
            if preconditioner == "adam":
                gradients = {
                    name: adam_step(g, stored[f"first.{name}"], stored[f"second.{name}"], float(stored["step"]))
                    for name, g in gradients.items()
                }
            vector = torch.cat([g.flatten() for g in gradients.values()])
            for subtask, mean in enumerate(means):
                total[index, subtask] += rate * float(torch.cosine_similarity(vector, mean, dim=0))
    return total


@pytest.mark.parametrize("preconditioner", ["none", "adam"])
def test_scores_are_those_of_explicit_gradients(
    model: Path, settings: dict[str, Any], cache: Path, preconditioner: Any
) -> None:
    method = built(settings, cache, preconditioner=preconditioner)
    pool = make_pool(ROWS)
    found = method.shard_task(pool)(pool, Shard(0, 0, len(pool))).columns["similarity"]
    expected = naive(model, method, preconditioner)
    rates = sum(method.warmed.facts["learning_rates"])  # type: ignore[union-attr]
    np.testing.assert_allclose(found / rates, expected / rates, atol=1e-3)  # features of 2 bytes a number
    np.testing.assert_allclose(method.score(pool).values, found.max(axis=1), rtol=1e-6)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_features_in_float64_are_the_explicit_gradients_exactly(
    model: Path, settings: dict[str, Any], cache: Path, preconditioned: bool
) -> None:
    method = built(settings, cache)
    assert method.warmed is not None
    network, stored = adapted(model, method.warmed.folder, 1)
    rows = tokens_of(model, ROWS)
    names = [name for name, weight in network.named_parameters() if weight.requires_grad]
    step = float(stored["step"])
    moments = {name: Moments(stored[f"first.{name}"], stored[f"second.{name}"], step) for name in names}
    found, reasons = RowFeatures(network, Projection(None, 0), token_budget=120).of(
        rows, moments=moments if preconditioned else None
    )
    assert not reasons
    assert found.dtype == np.float64
    for index, row in enumerate(rows):
        gradients = explicit(network, row)
        if preconditioned:
            gradients = {
                name: adam_step(g, stored[f"first.{name}"], stored[f"second.{name}"], step)
                for name, g in gradients.items()
            }
        expected = torch.cat([g.flatten() for g in gradients.values()]).numpy()
        # the model's own norms round to float32 inside, whatever the dtype, and differently in a batch
        np.testing.assert_allclose(found[index], expected, rtol=0, atol=1e-6 * abs(expected).max())


def test_the_adam_direction_is_the_optimisers_own_step() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, first = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    second = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    for step in (1.0, 7.0, 500.0):
        expected = adam_step(gradient, first, second, step)
        torch.testing.assert_close(adam_direction(gradient, Moments(first, second, step)), expected, rtol=1e-10, atol=0)


def sketched(projection: Projection, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(1, projection.dimension or 0, dtype=torch.float64)
    for name, gradient in gradients.items():
        projection.add(total, name, gradient.flatten(1))
    return total[0]


def test_projected_inner_products_are_within_the_bound() -> None:
    """Mean square error of the inner product of unit vectors over 200 projections: at most 2 / F (Johnson-Lindenstrauss)."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.lora_A": (4, 30), "b.lora_A": (4, 30), "c.lora_B": (50, 4)}
    drawn = [torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in [*shapes.values()] * 2]
    first = dict(zip(shapes, drawn[:3], strict=True))
    second = {name: first[name] + other for name, other in zip(shapes, drawn[3:], strict=True)}

    def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients.values()])

    norms = float(flat(first).norm() * flat(second).norm())
    exact = float(flat(first) @ flat(second)) / norms
    errors = np.array(
        [
            float(sketched(projection, first) @ sketched(projection, second)) / norms - exact
            for projection in (Projection(64, seed) for seed in range(200))
        ]
    )
    assert np.mean(errors**2) <= 2 / 64
    assert abs(errors.mean()) <= 3 * errors.std() / 200**0.5, "inner products are kept on average"


def test_the_projection_separates_weights_and_is_the_same_each_time() -> None:
    gradient = torch.ones(1, 2, 16, dtype=torch.float64)
    one = sketched(Projection(8, 0), {"one": gradient})
    assert torch.equal(one, sketched(Projection(8, 0), {"one": gradient}))
    assert not torch.equal(one, sketched(Projection(8, 0), {"other": gradient}))
    assert not torch.equal(one, sketched(Projection(8, 1), {"one": gradient}))


def test_projected_scores_are_near_the_exact_ones(model: Path, settings: dict[str, Any], cache: Path) -> None:
    pool = make_pool(ROWS)
    exact = built(settings, cache).score(pool).values
    near = built(settings, cache, dimension=4096).score(pool).values
    assert np.corrcoef(exact, near)[0, 1] > 0.9


def test_gist_compares_inside_the_span_of_the_targets_gradients(settings: dict[str, Any], cache: Path) -> None:
    pool = make_pool(ROWS)
    method = built(settings, cache, subspace="gist")
    assert method.directions is not None
    assert len(method.directions.basis) == 2
    task = method.shard_task(pool)
    features = task.features(pool, Shard(0, 0, len(pool))).columns["hidden"].astype(np.float64)
    expected = np.zeros((len(ROWS), 2))
    for checkpoint, rate in enumerate(method.directions.rates):
        basis = method.directions.basis[checkpoint]
        assert basis.shape[1] <= len(TARGET)
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-10)
        projector = basis @ basis.T
        for row in range(len(ROWS)):
            for subtask in range(2):
                one, other = (
                    projector @ features[row, checkpoint],
                    projector @ method.directions.mean_CSF[checkpoint, subtask],
                )
                expected[row, subtask] += rate * one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    np.testing.assert_allclose(method.score(pool).values, expected.max(axis=1), rtol=1e-4, atol=1e-8)


def test_the_span_holds_the_requested_share() -> None:
    gradients = np.diag([3.0, 1.0, 0.1])
    assert span(gradients, 0.89).shape == (3, 1)
    assert span(gradients, 0.95).shape == (3, 2)
    assert span(gradients, 1.0).shape == (3, 3)


def test_kept_features_serve_another_target(
    settings: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pool = make_pool(ROWS)
    first = Less(**settings, keep_features=True)
    first.store, first.cache = Store(tmp_path), cache
    first.fit(pool).score(pool)
    second = Less(**{**settings, "target": TARGET[:2]}, keep_features=True)
    second.store, second.cache = Store(tmp_path), cache
    second.fit(pool)
    monkeypatch.setattr(RowFeatures, "of", lambda *_, **__: pytest.fail("features of the pool are kept"))
    assert np.isfinite(second.score(pool).values).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"share": 0.0}, "share=0.0 must be above 0 and at most 1"),
        ({"preconditioner": "sgd"}, "preconditioner='sgd' is not known; use none or adam"),
        ({"subspace": "svd"}, "subspace='svd' is not known; use gist"),
        ({"dimension": 0}, "dimension=0 must be at least 1"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    settings: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Less(**{**settings, **changed}).check()
