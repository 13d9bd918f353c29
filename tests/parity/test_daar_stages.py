"""DaaR's stages against their naive definitions in float64; no code is shared with the fast path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from siftune.offline.daar.calibration import calibration_error, temperature
from siftune.offline.daar.centroids import centroids, cosines, mean_pairwise_distance
from siftune.offline.daar.clusters import cluster
from siftune.offline.daar.probes import Probe, apply, entropy, layer_sizes


def blobs(rows: int, domains: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, their domain, and rough centroids."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(domains, width)) * 2
    labels = rng.integers(0, domains, rows)
    points = (middles[labels] + rng.normal(size=(rows, width))).astype(np.float32)
    return points, labels, middles + rng.normal(size=middles.shape) * 0.7


def test_centroids_are_means_over_the_usable_seeds() -> None:
    points, labels, _ = blobs(30, 3, 5, 0)
    points[4] = np.nan
    found = centroids(points, labels, ["a", "b", "c"])
    for domain in range(3):
        for column in range(5):
            members = [float(points[i, column]) for i in range(30) if labels[i] == domain and i != 4]
            assert found[domain, column] == pytest.approx(math.fsum(members) / len(members), rel=1e-12)


def test_a_domain_without_usable_seeds_and_twin_domains_are_refused() -> None:
    with pytest.raises(UserError, match="no seed row of the domain 'b'"):
        centroids(np.array([[1.0], [np.nan]]), np.array([0, 1]), ["a", "b"])
    with pytest.raises(UserError, match="'a' and 'b' have the same centroid"):
        centroids(np.array([[1.0], [1.0]]), np.array([0, 1]), ["a", "b"])


def test_cosines_and_distances() -> None:
    first, second = np.random.default_rng(1).normal(size=(4, 6)), np.random.default_rng(2).normal(size=(3, 6))
    found = cosines(first.astype(np.float32), second.astype(np.float32))
    for a in range(4):
        for b in range(3):
            dot = sum(first[a][i] * second[b][i] for i in range(6))
            norms = math.sqrt(sum(v * v for v in first[a])) * math.sqrt(sum(v * v for v in second[b]))
            assert found[a, b] == pytest.approx(dot / norms, abs=1e-6)
    assert cosines(np.zeros((1, 2)), np.ones((1, 2))).tolist() == [[0.0]]
    pairs = [math.dist(second[i], second[j]) for i in range(3) for j in range(i)]
    assert mean_pairwise_distance(second) == pytest.approx(sum(pairs) / 3)


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_a_naive_lloyd(seed: int) -> None:
    points, _, starts = blobs(200, 4, 6, seed)
    centers = [list(map(float, start)) for start in starts]
    for _ in range(300):
        labels = [min(range(4), key=lambda k, p=point: math.dist(p, centers[k])) for point in points.tolist()]
        members = [[p for p, label in zip(points.tolist(), labels, strict=True) if label == k] for k in range(4)]
        moved = [[math.fsum(column) / len(group) for column in zip(*group, strict=True)] for group in members]
        if moved == centers:
            break
        centers = moved
    found = cluster(points, starts, ["a", "b", "c", "d"])
    assert found.labels.tolist() == labels
    np.testing.assert_allclose(found.centers, centers, rtol=1e-9)
    assert found.sizes.tolist() == [labels.count(k) for k in range(4)]


def test_a_domain_nearest_to_no_row_is_left_out_and_a_one_domain_pool_refused() -> None:
    points, _, _ = blobs(50, 2, 3, 5)
    starts = np.concatenate([points[:2].astype(float), np.full((1, 3), 99.0)])
    starts = starts[[0, 2, 1]]
    found = cluster(points, starts, ["a", "far", "b"])
    assert found.present.tolist() == [True, False, True]
    assert set(found.labels.tolist()) == {0, 2}
    np.testing.assert_array_equal(found.centers[1], [99.0] * 3)
    with pytest.raises(UserError, match="lie nearest to the seeds of 'near'"):
        cluster(points, np.array([points.mean(axis=0), np.full(3, 99.0)]), ["near", "far"])


@pytest.mark.parametrize("width", [5, 16])
def test_a_probe_is_the_papers_mlp_between_two_affine_maps(width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    probe = Probe(width, 3, generator=generator)
    rows = torch.randn(7, width, generator=generator) * 3 + 1
    probe.standardise(rows)
    probe.output_scale.fill_(0.5)
    probe.output_offset.copy_(torch.tensor([0.0, 1.0, -2.0]))
    layers = [m for m in probe.mlp if isinstance(m, torch.nn.Linear)]
    assert [layer.out_features for layer in layers] == [2 * width, width, width // 2, 256, 3]
    assert layer_sizes(width, 3)[0] == width
    for layer in layers:
        torch.nn.init.normal_(layer.bias, generator=generator)
    state = rows.double().numpy()
    state = (state - state.mean(axis=0)) / state.std(axis=0)
    for number, layer in enumerate(layers):
        weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        state = np.array([[float(np.dot(w, row)) + b for w, b in zip(weight, bias, strict=True)] for row in state])
        if number < len(layers) - 1:
            state = np.maximum(state, 0)
    np.testing.assert_allclose(apply(probe, rows).numpy(), state * 0.5 + [0.0, 1.0, -2.0], rtol=1e-4, atol=1e-5)


def test_entropy_is_in_nats_and_keeps_the_order_of_near_certain_rows() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [30.0, 0.0, 0.0], [31.0, 0.0, 0.0], [2.0, 1.0, -math.inf]])
    h, p = entropy(logits)
    for row, said in enumerate(logits.tolist()):
        weights = [math.exp(value) for value in said]
        naive = [weight / math.fsum(weights) for weight in weights]
        assert p[row] == pytest.approx(naive, rel=1e-12)
        expected = -math.fsum(value * math.log(value) for value in naive if value > 0)
        assert h[row] == pytest.approx(expected, rel=1e-3 if expected < 1e-10 else 1e-9, abs=1e-16)
    assert h[1] == pytest.approx(math.log(3))
    assert h[2] > h[3] > 0


def test_the_temperature_undoes_a_known_one_and_absent_domains_take_no_part() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(3, p=row) for row in p])
    assert temperature(logits * 2.5, labels) == pytest.approx(2.5, rel=0.1)
    wider = np.insert(logits, 1, -np.inf, axis=1)
    assert temperature(wider * 2.5, np.array([0, 2, 3])[labels]) == pytest.approx(2.5, rel=0.1)
    assert temperature(np.full((1, 2), [5.0, -np.inf]), np.array([0])) == 1.0
    certain = np.eye(2)[[0, 1] * 50] * 8
    assert 0.1 < temperature(certain, np.array([0, 1] * 50)) <= 2.0  # no mistake at all, and still not 0


def test_the_calibration_error_is_the_binned_gap() -> None:
    logits = np.log(np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10))
    labels = np.array([0] * 7 + [1] * 3 + [0] * 6 + [1] * 4)
    assert calibration_error(logits, labels) == pytest.approx(0.5 * 0.2 + 0.5 * 0.0, abs=1e-9)
