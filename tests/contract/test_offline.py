"""What every offline method promises: `siftune.testing.check_offline_method` over the registry, and what it leaves out.

A method that needs no arguments joins by being registered, one that needs some adds a line to `RECIPES`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftune.offline.base import OfflineMethod
from siftune.offline.daar.fitting import ProbeTraining
from siftune.records import Pool, Scores
from siftune.registry import Entry, methods
from siftune.runs.options import field_docs
from siftune.testing import check_offline_method
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


def like_of(model: str) -> str:
    """A file of rows whose lengths are matched, beside the model."""
    path = Path(model).parent / "like.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TARGET), encoding="utf-8")
    return str(path)


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
    "target-loss": lambda model: {"target": TARGET, "model": model, "device": "cpu", "steps": 4, "batch": 2},
    "less": lambda model: {
        "target": TARGET,
        "model": model,
        "device": "cpu",
        "epochs": 1,
        "share": 0.1,
        "rank": 2,
        "dimension": 64,
    },
    "kmeans": lambda model: {"model": model, "device": "cpu", "clusters": 5},
    "facility": lambda model: {"model": model, "device": "cpu", "reference": 40},
    "length-matched": lambda model: {"like": like_of(model)},
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


def test_it_holds_the_contract(build: Callable[[], OfflineMethod], pool: Pool) -> None:
    check_offline_method(build(), pool)


def test_scores_have_the_contracts_columns(fitted: tuple[OfflineMethod, Scores], pool: Pool) -> None:
    method, scores = fitted
    assert scores.pool is pool
    assert scores.method == method.name
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
