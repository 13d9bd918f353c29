"""What DaaR promises beyond the contract: fitted once and used anywhere, honest rewards, clear words when it cannot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from siftune.models.store import Store
from siftune.offline.daar import fitting
from siftune.offline.daar.fitting import ProbeTraining, fit_probes
from siftune.offline.daar.probe_set import draw_probe_set
from siftune.offline.daar.seeds import read_seeds
from siftune.offline.daar.selector import DaaR
from siftune.records import Pool, Shard, ShardResult
from tests.pools import make_pool

DOMAINS = ("left", "right", "up")
WIDTH = 32


def row(domain: str, number: int) -> dict[str, Any]:
    return {"instruction": domain, "input": "", "output": f"{number}"}


SEEDS = {name: [row(name, 10_000 + number) for number in range(3)] for name in DOMAINS}


class Directions:
    """Features that point along the row's domain, with noise that hangs on the row's text; 'void' rows have none."""

    key = "directions"
    calls = 0

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        type(self).calls += 1
        columns: dict[str, Any] = {
            "hidden": np.full((len(shard), WIDTH), np.nan, np.float32),
            "tokens": np.full(len(shard), -1, np.int32),
            "truncated": np.zeros(len(shard), np.bool_),
        }
        reasons = {}
        for place in range(shard.start, shard.stop):
            if place in pool.reasons:
                continue
            said = pool.read([place])[0]
            columns["tokens"][place - shard.start] = 5
            if said.instruction == "void":
                reasons[place] = "no tokens in the text"
                continue
            noise = np.random.default_rng([int(said.output), DOMAINS.index(said.instruction)]).normal(size=WIDTH)
            columns["hidden"][place - shard.start] = 3.0 * np.eye(WIDTH)[DOMAINS.index(said.instruction)] + 0.6 * noise
        columns["embedding"] = columns["hidden"]
        return ShardResult(columns, reasons)


class StubDaaR(DaaR):
    def _training(self) -> ProbeTraining:
        return self.training or ProbeTraining(epochs=5)  # enough for directions, and quick

    def feature_task(self, *, for_fit: bool) -> Directions:
        return Directions()


@pytest.fixture(scope="module")
def pool() -> Pool:
    rows = [row(name, number) for number in range(100) for name in DOMAINS]
    random.Random(0).shuffle(rows)
    rows[5] = row("void", 1)
    return make_pool(rows, {9: "missing field: output"})


@pytest.fixture
def method() -> StubDaaR:
    return StubDaaR(model="stub", seeds=SEEDS, device="cpu")


@pytest.fixture(scope="module")
def fitted(pool: Pool) -> StubDaaR:
    return StubDaaR(model="stub", seeds=SEEDS, device="cpu").fit(pool)


def test_pseudo_labels_find_the_domains_and_every_fact_is_json(fitted: StubDaaR, pool: Pool) -> None:
    scores = fitted.score(pool)
    assert scores.domains == DOMAINS
    assert scores.reasons == {5: "no tokens in the text", 9: "missing field: output"}
    assert scores.pseudo_labels is not None
    truth = [
        DOMAINS.index(said["instruction"]) for said in pool.source.originals([r for r in range(300) if r not in (5, 9)])
    ]
    assert (np.delete(scores.pseudo_labels, [5, 9]) == truth).mean() > 0.9
    assert scores.pseudo_labels[[5, 9]].tolist() == [-1, -1]
    assert scores.probabilities is not None
    np.testing.assert_allclose(np.delete(scores.probabilities, [5, 9], axis=0).sum(axis=1), 1, atol=1e-5)
    info = json.loads(json.dumps(dict(scores.info)))
    assert info["seed_rows"] == dict.fromkeys(DOMAINS, 3)
    assert info["validation_accuracy"] > 0.8
    assert info["rows_scored"] == 298
    assert info["probe_rows"] <= 256
    assert -1 <= info["spearman_diversity_entropy"] <= 1


def test_the_entropy_reward_is_the_entropy_of_the_probabilities(fitted: StubDaaR, pool: Pool) -> None:
    diversity = fitted.score(pool)
    fitted.reward = "entropy"
    scores = fitted.score(pool)
    fitted.reward = "diversity"
    p = np.delete(scores.probabilities, [5, 9], axis=0).astype(np.float64)
    expected = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
    np.testing.assert_allclose(np.delete(scores.values, [5, 9]), expected, atol=1e-5)
    assert not np.array_equal(scores.values, diversity.values, equal_nan=True)
    assert scores.info["reward"] == "entropy"


def test_a_saved_fit_scores_without_seeds_and_without_a_refit(fitted: StubDaaR, pool: Pool, tmp_path: Path) -> None:
    fitted.save(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "daar.json",
        "domain_probe.safetensors",
        "reward_probe.safetensors",
        "centroids.safetensors",
    }
    loaded = StubDaaR.load(tmp_path / "run", model="elsewhere", device="cpu")
    assert loaded.model == "elsewhere"
    assert loaded.seeds is None
    assert loaded.score(pool).values.tobytes() == fitted.score(pool).values.tobytes()
    other = make_pool([row(name, 5_000 + number) for number in range(4) for name in DOMAINS])
    assert not np.isnan(loaded.score(other).values).any()
    loaded.save(tmp_path / "again")
    for path in (tmp_path / "run").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut", "mixed", "version"])
def test_a_damaged_folder_is_refused(fitted: StubDaaR, tmp_path: Path, damage: str) -> None:
    fitted.save(tmp_path)
    target = tmp_path / "reward_probe.safetensors"
    if damage == "missing":
        target.unlink()
    elif damage == "cut":
        target.write_bytes(target.read_bytes()[:100])
    elif damage == "mixed":
        content = bytearray(target.read_bytes())
        content[-1] ^= 1
        target.write_bytes(content)
    else:
        (tmp_path / "daar.json").write_text(
            json.dumps(json.loads((tmp_path / "daar.json").read_text()) | {"version": 0})
        )
    with pytest.raises(UserError, match="fit it again"):
        StubDaaR.load(tmp_path)


def test_unfitted_and_empty_folders_are_one_sentence(method: StubDaaR, pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"call fit\(pool\) first"):
        method.score(pool)
    with pytest.raises(UserError, match="nothing to save"):
        method.save(tmp_path)
    with pytest.raises(UserError, match=r"holds no daar\.json"):
        DaaR.load(tmp_path)


def test_a_fit_in_the_store_is_taken_from_it_and_another_seed_is_another_fit(
    method: StubDaaR, fitted: StubDaaR, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method.store = Store(tmp_path)
    first = method.fit(pool).learned
    assert first is not None
    assert method.seconds.keys() == {"seed_features", "probe_features", "clusters", "probes"}
    calls = Directions.calls
    again = method.fit(pool).learned
    assert again is not None
    assert Directions.calls == calls
    assert again.key == first.key == fitted.learned.key  # type: ignore[union-attr]
    monkeypatch.setattr(Directions, "key", "another model")
    method.fit(pool)
    assert Directions.calls > calls
    calls, method.seed = Directions.calls, 1
    assert method.fit(pool).learned.key != first.key  # type: ignore[union-attr]
    assert Directions.calls > calls


def test_kept_features_are_reused_by_another_score(fitted: StubDaaR, pool: Pool, tmp_path: Path) -> None:
    keeping = StubDaaR(model="stub", keep_features=True)
    keeping.learned, keeping.store = fitted.learned, Store(tmp_path)
    first, calls = keeping.score(pool), Directions.calls
    second = keeping.score(pool)
    assert Directions.calls == calls
    assert first.values.tobytes() == second.values.tobytes() == fitted.score(pool).values.tobytes()
    assert second.reasons == first.reasons


def test_the_callers_thread_count_changes_no_bit(method: StubDaaR, fitted: StubDaaR, pool: Pool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        learned = method.fit(pool).learned
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert learned is not None
    assert fitted.learned is not None
    assert learned.key == fitted.learned.key


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": None}, "set seeds=FILE"),
        ({"seeds": None, "domains": {"a": "x", "b": "y"}}, "set generator=MODEL"),
        ({"seeds": {"left": [row("left", 1)]}}, "1 domain"),
        ({"seeds": {}}, "no row"),
        ({"seeds": {"left": "text"}}, "not a list of rows"),
        ({"reward": "loss"}, "reward='loss'"),
        ({"compat": "authors"}, "compat='authors'"),
        ({"probe_rows": 1}, "probe_rows=1"),
        ({"training": ProbeTraining(batch=0)}, "batch=0"),
        ({"training": ProbeTraining(validation=1.0)}, r"validation=1\.0"),
        ({"layer": 0}, "layer=0"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(changed: dict[str, Any], said: str, pool: Pool) -> None:
    with pytest.raises(UserError, match=said):
        DaaR(**({"model": "no/such/model", "seeds": SEEDS} | changed)).fit(pool)


def test_a_seeds_file_is_read_by_line(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    good = [json.dumps({"domain": name, **row(name, 1)}) for name in DOMAINS]
    path.write_text("\n".join(good))
    assert read_seeds(path).counts == dict.fromkeys(DOMAINS, 1)
    path.write_text("\n".join([*good, json.dumps(row("left", 2))]))
    with pytest.raises(UserError, match=r"seeds\.jsonl line 4 has domain=None"):
        read_seeds(path)
    path.write_text("\n".join([*good, "{"]))
    with pytest.raises(UserError, match=r"seeds: .*seeds\.jsonl.*4"):
        read_seeds(path)


def test_a_domain_the_pool_does_not_hold_gets_probability_zero(pool: Pool) -> None:
    some = [said for said in pool.source.originals(range(300)) if said["instruction"] in DOMAINS[:2]]
    with pytest.warns(UserWarning, match="no row of the probe set is nearest to the seeds of up"):
        scores = StubDaaR(model="stub", seeds=SEEDS).fit(smaller := make_pool(some)).score(smaller)
    assert scores.info["absent_domains"] == ["up"]
    assert scores.probabilities is not None
    assert (scores.probabilities[:, 2] == 0).all()
    assert not np.isnan(scores.values).any()


def test_a_one_domain_pool_is_refused(pool: Pool) -> None:
    some = make_pool([said for said in pool.source.originals(range(300)) if said["instruction"] == "left"])
    with pytest.raises(UserError, match="lie nearest to the seeds of 'left'"):
        StubDaaR(model="stub", seeds=SEEDS).fit(some)


def test_a_pool_of_a_handful_of_rows_is_fitted_and_one_row_is_refused() -> None:
    tiny = make_pool([row(name, number) for name in DOMAINS for number in range(2)])
    assert not np.isnan(StubDaaR(model="stub", seeds=SEEDS).fit(tiny).score(tiny).values).any()
    with pytest.raises(UserError, match="1 usable rows"):
        StubDaaR(model="stub", seeds=SEEDS).fit(make_pool([row("left", 1)]))


def test_the_probe_set_is_half_the_pool_at_most_and_does_not_hang_on_the_order() -> None:
    rows = [row("left", number) for number in range(1200)]
    drawn = draw_probe_set(make_pool(rows), 5000, seed=0)
    assert len(drawn) == 600
    assert len(set(drawn.source.ids(range(600)))) == 600
    assert len(draw_probe_set(make_pool(rows[:100]), 5000, seed=0)) == 100
    shuffled = random.Random(3).sample(rows, k=len(rows))
    again = draw_probe_set(make_pool(shuffled, {shuffled.index(rows[0]): "bad"}), 300, seed=0)
    expected = [i for i in drawn.source.ids(range(310)) if i != make_pool(rows).source.ids([0])[0]][:300]
    assert again.source.ids(range(300)) == expected
    assert draw_probe_set(make_pool(rows), 300, seed=1).fingerprint != again.fingerprint


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unlearnable() -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator)
    return hidden, np.random.default_rng(0).integers(0, 2, 300), np.array([True, True])


def test_cross_fitted_targets_do_not_learn_the_over_fit(
    unlearnable: tuple[torch.Tensor, np.ndarray, np.ndarray],
) -> None:
    """Labels that are pure noise: a probe that saw them is sure of itself, one that did not must not be."""
    keep_going: dict[str, Any] = {"epochs": 10, "patience": 10, "calibrate": False, "lr": 3e-3, "batch": 32}
    keep_going["weight_decay"] = 0.01  # the default would keep the probe from over-fitting at all
    hidden, labels, present = unlearnable
    seen, unseen = [], []
    train = torch.arange(300)
    with fitting.fixed_threads(1):
        fit = fitting._Fit(hidden, ProbeTraining(folds=3, **keep_going), 0, torch.device("cpu"))
        truth = torch.from_numpy(labels)
        probe, _ = fit.domain(truth, present, train, train[:0], name="domain", epochs=10)
        seen.append(float(fitting.entropy(fitting.apply(probe, hidden))[0].mean()))
        calibrated = fitting._Fit(hidden, ProbeTraining(folds=3, **(keep_going | {"calibrate": True})), 0, fit.device)
        target, folds = fitting._targets(calibrated, probe, truth, present, 10)
        unseen.append(float(target.mean()))
    assert folds == 3
    assert seen[0] < 0.1
    assert unseen[0] > 0.6 * np.log(2)


def test_training_stops_early_and_keeps_the_best_epoch(
    unlearnable: tuple[torch.Tensor, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, labels, present = unlearnable
    rounds: list[int] = []
    inner = fitting._Fit._round
    monkeypatch.setattr(fitting._Fit, "_round", lambda fit, rows, order: rounds.append(1) or inner(fit, rows, order))
    info = fit_probes(hidden, labels, present, ProbeTraining(patience=1, epochs=20, folds=1), seed=0).info
    assert info["epochs"] < 10
    assert len(rounds) == info["epochs"] + 1 + info["reward_epochs"] + 1
    assert info["validation_rows"] == 30


def test_the_reward_probe_learns_a_learnable_reward() -> None:
    """Rows between two domains are the ambiguous ones; psi_div must find them on rows it did not see."""
    generator = torch.Generator().manual_seed(1)
    place = torch.rand(2000, generator=generator) * 4 - 2
    hidden = torch.sin(place[:, None] * torch.rand(1, WIDTH, generator=generator) + torch.arange(WIDTH))
    noisy = place + torch.randn(2000, generator=generator) * 0.4 > 0
    fitted = fit_probes(hidden, noisy.long().numpy(), np.array([True, True]), ProbeTraining(), seed=0)
    assert fitted.info["reward_r2"] > 0.8
    reward = fitting.apply(fitted.reward, hidden).squeeze(1)
    assert reward[place.abs() < 0.1].min() > 0.4 > 0.2 > reward[place.abs() > 1.7].max()


def test_the_papers_settings_are_the_published_ones() -> None:
    paper = ProbeTraining.paper()
    assert (paper.lr, paper.weight_decay, paper.batch, paper.epochs, paper.validation) == (1e-5, 0.0, 1, 1, 0.03)
    assert (paper.standardise, paper.folds, paper.calibrate) == (False, 1, False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 8, generator=generator)
    fitted = fit_probes(hidden, np.arange(200) % 2, np.array([True, True]), paper, seed=0)
    assert (fitted.domain.input_mean == 0).all()
    assert (fitted.domain.output_scale == 1).all()
    assert fitted.info["folds"] == fitted.info["epochs"] == 1
    assert fitted.info["validation_rows"] == 6
    h, _ = fitting.entropy(fitting.apply(fitted.domain, hidden))
    assert fitted.info["target_mean"] == pytest.approx(h.mean())
