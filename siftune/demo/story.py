"""The demo with the real functions: a mixed pool, example rows that the model writes from one sentence per domain, DaaR's
selection of 20 % of the unlabelled pool, then a fine-tuning with UDS in every batch.

The hidden labels (`source`) are read only here, after the selection, to evaluate it. Cost: about a minute on two cores.
`run` receives the function that selects, since the import order places the pipeline below this folder.
"""

from __future__ import annotations

import json as jsonlib
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..data.protect import claim
from ..files import read_json, write_json
from ..output import as_json, say
from ..records import Subset
from . import corpus, show
from .embedded import model_folder

KEEP = "20%"
DOMAINS = Path(__file__).with_name("domains.yaml")
"""One sentence per domain, and the wording that the embedded model was trained on."""
BINS = 12


class Selected(Protocol):
    """The result of a selection (`siftune.runs.select.Selection`)."""

    @property
    def manifest(self) -> Mapping[str, Any]: ...
    @property
    def out(self) -> Path | None: ...
    @property
    def subset(self) -> Subset | None: ...


class Select(Protocol):
    """`siftune select daar POOL` as a function: choose `keep` of `pool` into the run folder `run`."""

    def __call__(
        self, pool: Path, *, run: Path, keep: str, seed: int, cache: str | None, settings: Mapping[str, Any]
    ) -> Selected: ...


def run(
    run_folder: str | Path,
    *,
    select: Select,
    quiet: bool = False,
    json: bool = False,
    cache: str | None = None,
    seed: int = 0,
    count: int = 6000,
    steps: int = 40,
) -> dict[str, Any]:
    """Run the demo into `run_folder`: `data/` (pool, seeds, held-out rows), `select/` (the run), `tune/`, `demo.json`.

    `count` is the number of pool rows, `steps` the optimiser steps of the fine-tuning (0 skips it). Prints the results, or
    only the selection's path (`quiet`), or one JSON object (`json`); returns that object. Raises `UserError`.

    >>> story.run("siftune-runs/demo", select=select)["offline"]["agreement"]
    """
    folder = Path(run_folder)
    claim(folder, "demo")
    screen = show.Screen(silent=quiet or json)
    started = perf_counter()
    data = corpus.write(folder / "data", count=count, seed=seed)
    seconds = {"write the pool": perf_counter() - started}
    screen.pool(data / "pool.jsonl", count)
    facts: dict[str, Any] = {"run": str(folder), "seconds": seconds}
    began = perf_counter()
    model = str(model_folder())
    settings = {"model": model, "generator": model, "domains": str(DOMAINS)}
    chosen = select(data / "pool.jsonl", run=folder / "select", keep=KEEP, seed=seed, cache=cache, settings=settings)
    assert chosen.subset is not None
    assert chosen.out is not None
    facts["written"] = written_rows(chosen.out.parent)
    screen.written(facts["written"])
    seconds |= stage_seconds(chosen.manifest, perf_counter() - began)
    facts |= {"selected": str(chosen.out), "offline": offline_facts(chosen.subset)}
    screen.offline(facts["offline"])
    if steps:
        began = perf_counter()
        facts["online"] = online_facts(chosen.out, data / "held_out.jsonl", folder / "tune", steps=steps, seed=seed)
        seconds["fine-tune, with and without UDS"] = perf_counter() - began
        screen.online(facts["online"])
    seconds["all"] = perf_counter() - started
    facts["seconds"] = {name: round(spent, 2) for name, spent in seconds.items()}
    write_json(folder / "demo.json", facts)
    screen.end(facts)
    if quiet or json:
        say(as_json(facts) if json else facts["selected"])
    return facts


def stage_seconds(manifest: Mapping[str, Any], total: float) -> dict[str, float]:
    """Seconds of each stage of the selection; the remaining time is its start-up (imports, locks, hashes)."""
    stages = {f"select: {stage['name']}": float(stage["seconds"]) for stage in manifest.get("stages", [])}
    return {"select: start": max(0.0, total - sum(stages.values())), **stages}


def written_rows(run: Path) -> dict[str, Any]:
    """The generator's rows from the selection's run folder: rows and requests per domain, the first row."""
    folder = run / "domains"
    counts = read_json(run / "written.json")["domains"]
    domains = {}
    for name, facts in counts.items():
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
            first = jsonlib.loads(next(lines))
        domains[name] = {
            "rows": facts["rows"],
            "requests": facts["requests"],
            "relaxed": facts["relaxed"],
            "first": {field: first[field] for field in ("instruction", "input", "output")},
        }
    return {"folder": str(folder), "domains": domains}


def offline_facts(subset: Subset) -> dict[str, Any]:
    """DaaR's selection, compared with the hidden labels."""
    scores = subset.scores
    labels = hidden_labels(subset)
    rows = scores.pool.eligible
    kept = np.zeros(len(scores.pool), dtype=bool)
    kept[subset.rows] = True
    assert scores.pseudo_labels is not None
    pseudo_labels = np.array([scores.domains[index] if index >= 0 else "" for index in scores.pseudo_labels])
    agree = (pseudo_labels == labels)[rows]
    in_pool, in_kept = Counter(labels[rows].tolist()), Counter(labels[subset.rows].tolist())
    scored = rows[~np.isnan(scores.values[rows])]
    edges = np.histogram_bin_edges(scores.values[scored], bins=BINS)
    return {
        "rows": len(rows),
        "kept": len(subset),
        "composition": {
            name: {
                "pool": in_pool[name],
                "kept": in_kept[name],
                "agreement": float(agree[labels[rows] == name].mean()),
            }
            for name in sorted(in_pool)
        },
        "agreement": float(agree.mean()),
        "probe_accuracy": scores.info.get("validation_accuracy"),
        "reward": {
            "edges": [round(float(edge), 4) for edge in edges],
            "pool": np.histogram(scores.values[scored], edges)[0].tolist(),
            "kept": np.histogram(scores.values[kept], edges)[0].tolist(),
        },
    }


def hidden_labels(subset: Subset) -> NDArray[Any]:
    """The `source` column of every row of the pool, shape `(n,)`."""
    pool = subset.scores.pool
    return np.array([row["source"] for row in pool.source.originals(range(len(pool)))])


def online_facts(selected: Path, held_out: Path, folder: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """A short fine-tuning of the embedded model on the chosen rows, with and without UDS; the reason where none ran."""
    if find_spec("accelerate") is None:
        return {"left_out": "fine-tuning needs accelerate, which is not installed; run: pip install 'siftune[demo]'"}
    from . import tuning

    return tuning.compare(
        model_folder(), tuning.read_rows(selected), tuning.read_rows(held_out), folder, steps=steps, seed=seed
    )
