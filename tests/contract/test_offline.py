"""What every offline method promises. The suite walks the registry: a method that needs no arguments joins by being
registered, one that needs some adds a line to `RECIPES`."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftune.engines.local import LocalEngine
from siftune.models.store import Store
from siftune.offline.base import OfflineMethod
from siftune.offline.daar.fitting import ProbeTraining
from siftune.records import Pool, Scores, Shard
from siftune.registry import Entry, methods
from siftune.runs.options import field_docs
from tests.judges import Stub, rate, tag
from tests.pools import make_pool
from tests.tiny import save_tiny

WORDS = {
    "mathematics": "add multiply integral number fraction equation solve sum digits prime",
    "coding": "def return python loop list function class print import compile",
    "history": "king empire war treaty century revolution queen battle crown city",
}


def rows_of(domain: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    """Distinct rows of words of one domain."""
    words = WORDS[domain].split()
    picked = random.Random(f"{domain} {start}")
    return [
        {
            "instruction": " ".join(picked.choices(words, k=4)) + "?",
            "input": "",
            "output": " ".join(picked.choices(words, k=picked.randint(3, 9))) + f" {start + number}",
            "source": domain,
        }
        for number in range(count)
    ]


SEEDS = {domain: rows_of(domain, 4, start=1000) for domain in WORDS}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model"), "llama", width=16))


QUICK = ProbeTraining(epochs=3)
TARGET = [row for domain in WORDS for row in rows_of(domain, 2, start=2000)]

RECIPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "daar": lambda model: {"model": model, "seeds": SEEDS, "max_length": 64, "device": "cpu", "training": QUICK},
    "alpagasus": lambda _: {"judge": Stub(rate)},
    "instag-c": lambda _: {"judge": Stub(tag)},
    "instag-d": lambda _: {"judge": Stub(tag)},
    "ifd": lambda model: {"model": model, "device": "cpu"},
    "deita-c": lambda model: {"scorer": model, "device": "cpu"},
    "deita-q": lambda model: {"scorer": model, "device": "cpu"},
    "deita-d": lambda model: {"complexity_scorer": model, "quality_scorer": model, "model": model, "device": "cpu"},
    "inter-diversity": lambda model: {"model": model, "label_column": "source", "device": "cpu"},
    "bm25": lambda _: {"target": TARGET},
    "rds": lambda model: {"target": TARGET, "model": model, "device": "cpu"},
    "intra-diversity": lambda model: {"model": model, "label_column": "source", "device": "cpu"},
}


@pytest.fixture(scope="module", params=list(methods("offline")), ids=lambda entry: entry.name)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


@pytest.fixture(scope="module")
def build(entry: Entry, model: str) -> Callable[[], OfflineMethod]:
    recipe = RECIPES.get(entry.name, lambda _: {})(model)
    method = entry.load()
    needed = {f.name for f in fields(method) if f.init and f.default is MISSING and f.default_factory is MISSING}
    if needed - set(recipe):
        pytest.fail(f"{entry.name} needs {', '.join(needed - set(recipe))}: add a line to RECIPES in this file")
    return lambda: method(**recipe)


@pytest.fixture(scope="module")
def pool() -> Pool:
    """120 rows of three domains, shuffled, two of them bad and two of them copies."""
    rows = [row for domain in WORDS for row in rows_of(domain, 40)]
    random.Random(0).shuffle(rows)
    rows[50] = rows[51] = dict(rows[7])
    return make_pool(rows, {3: "empty answer: output", 99: "missing field: output"})


@pytest.fixture(scope="module")
def fitted(build: Callable[[], OfflineMethod], pool: Pool) -> tuple[OfflineMethod, Scores]:
    method = build()
    return method.fit(pool), method.score(pool)


def test_init_only_stores_its_arguments(entry: Entry, model: str) -> None:
    recipe = RECIPES.get(entry.name, lambda _: {})(model)
    built = entry.load()(**recipe)
    assert {name: getattr(built, name) for name in recipe} == recipe
    broken = entry.load()(**{name: f"no such {name}" for name in recipe})  # nothing is opened, so nothing is missed
    assert all(getattr(broken, name) == f"no such {name}" for name in recipe)


def test_unknown_arguments_and_positions_are_refused(entry: Entry, model: str) -> None:
    recipe = RECIPES.get(entry.name, lambda _: {})(model)
    with pytest.raises(TypeError):
        entry.load()(**recipe, no_such_option=1)
    with pytest.raises(TypeError):
        entry.load()("positional")


def test_the_name_is_the_registrys_and_every_field_has_a_docstring(entry: Entry) -> None:
    method = entry.load()
    assert method.name == entry.name
    assert not [f.name for f in fields(method) if not field_docs(method).get(f.name)], "a field without a docstring"


def test_fit_returns_self(build: Callable[[], OfflineMethod], pool: Pool) -> None:
    method = build()
    assert method.fit(pool) is method


def test_scores_have_the_contracts_shape(fitted: tuple[OfflineMethod, Scores], pool: Pool) -> None:
    method, scores = fitted
    assert scores.pool is pool
    assert scores.method == method.name
    assert scores.values.shape == (len(pool),)
    assert scores.values.dtype == np.float32
    if scores.tokens is not None:
        assert scores.tokens.dtype == np.int32
        assert (scores.tokens[pool.eligible] > 0).all()
    if scores.domains:
        assert scores.pseudo_labels is not None
        if scores.probabilities is not None:  # known labels have none
            assert scores.probabilities.dtype == np.float32
            assert scores.probabilities.shape == (len(pool), len(scores.domains))
        assert scores.pseudo_labels.dtype == np.int16
        scored = ~np.isnan(scores.values)
        assert ((scores.pseudo_labels >= 0) == scored).all()


def test_a_row_has_a_score_or_a_reason_never_both(fitted: tuple[OfflineMethod, Scores], pool: Pool) -> None:
    _, scores = fitted
    assert set(np.flatnonzero(np.isnan(scores.values)).tolist()) == set(scores.reasons)
    assert dict(pool.reasons).items() <= dict(scores.reasons).items()


def test_a_second_run_gives_the_same_bits(
    build: Callable[[], OfflineMethod], fitted: tuple[OfflineMethod, Scores], pool: Pool
) -> None:
    again = build().fit(pool).score(pool)
    assert again.values.tobytes() == fitted[1].values.tobytes()


def test_permuting_the_rows_permutes_the_scores(
    build: Callable[[], OfflineMethod], fitted: tuple[OfflineMethod, Scores], pool: Pool
) -> None:
    order = np.random.default_rng(1).permutation(len(pool))
    place = {int(row): number for number, row in enumerate(order)}
    originals = pool.source.originals(range(len(pool)))
    permuted = make_pool([originals[row] for row in order], {place[row]: why for row, why in pool.reasons.items()})
    ids = pool.source.ids(range(len(pool)))
    single = [row for row in pool.eligible.tolist() if ids.count(ids[row]) == 1]
    there = build().fit(permuted).score(permuted).values[[place[row] for row in single]]
    np.testing.assert_allclose(there, fitted[1].values[single], rtol=1e-4, atol=1e-5)


def test_a_larger_budget_contains_a_smaller_one_and_no_bad_row(
    fitted: tuple[OfflineMethod, Scores], pool: Pool
) -> None:
    _, scores = fitted
    inside: set[int] = set()
    for fraction in (0.05, 0.2, 0.5, 1.0):
        kept = scores.keep(fraction=fraction).rows
        scored = int((~np.isnan(scores.values)).sum())
        assert len(kept) == min(scored, int(fraction * len(pool.eligible) + 0.5))
        assert (np.diff(kept) > 0).all()
        assert inside <= set(kept.tolist())
        assert not set(kept.tolist()) & set(pool.reasons)
        inside = set(kept.tolist())


def test_the_task_survives_pickling(fitted: tuple[OfflineMethod, Scores], pool: Pool) -> None:
    task = fitted[0].shard_task(pool)
    copy = pickle.loads(pickle.dumps(task))
    assert copy.key == task.key
    shard = Shard(0, 0, len(pool))
    first, second = task(pool, shard), copy(pool, shard)
    assert first.reasons == second.reasons
    for name, values in first.columns.items():
        assert len(values) == len(shard)
        np.testing.assert_array_equal(values, second.columns[name])


def test_the_engine_changes_nothing(
    fitted: tuple[OfflineMethod, Scores], build: Callable[[], OfflineMethod], pool: Pool, tmp_path: Path
) -> None:
    for expected in ("computed", "reused"):
        method = build()
        engine = method.engine = LocalEngine(Store(tmp_path / "shards"))
        method.store = Store(tmp_path / "fits")
        scores = method.fit(pool).score(pool)
        assert scores.values.tobytes() == fitted[1].values.tobytes()
        assert scores.reasons == fitted[1].reasons
        assert getattr(engine, expected) > 0
    assert engine.computed == 0


def test_the_global_random_states_are_left_alone(build: Callable[[], OfflineMethod], pool: Pool) -> None:
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    build().fit(pool).score(pool)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
