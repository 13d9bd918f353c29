"""Run folders to report on, made in seconds: selections of small pools, a 40,000-row one, a trainer's output."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from siftune.data.load import load_pool
from siftune.hook.ledger import Ledger
from siftune.runs.options import SelectOptions
from siftune.runs.select import select

DOMAINS = ("cooking", "sailing", "chess")
WORDS = {
    "cooking": ["flour", "butter", "oven", "dough", "yeast", "knead", "bake", "simmer", "salt", "pepper"],
    "sailing": ["mast", "hull", "tide", "anchor", "rudder", "jib", "harbour", "knot", "wind", "deck"],
    "chess": ["rook", "bishop", "castle", "pawn", "gambit", "endgame", "queen", "tempo", "check", "fork"],
}

HOSTILE = [
    {"instruction": "<script>window.hacked=1</script>", "output": "<img src=x onerror='window.hacked=2'>"},
    {"instruction": "</script><script>window.hacked=3</script>", "output": "</style><svg onload=window.hacked=4>"},
    {
        "instruction": "abc\u202edcba\u202c \u2066x\u2069 zero\u200bwidth",
        "output": "\u2028line\u2029 separators \x08\x1b[31m",
    },
    {"instruction": "M" * 1_000_000, "output": "one line of a megabyte"},
    {"instruction": "<!-- <script>", "output": "--> ]]> {{ 7*7 }} ${7*7} %s \\u003c &lt;b&gt;"},
    {"instruction": '<a href="javascript:window.hacked=5">press</a>', "output": "' onmouseover='window.hacked=6' x='"},
]


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of three made-up domains, told apart by their words; `topic` names the domain."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        topic = DOMAINS[number % len(DOMAINS)]
        words = [str(word) for word in draw.choice(WORDS[topic], 6 + number % 9)]
        asked = f"Question {number} on {topic}: {' '.join(words[:4])}?"
        rows.append({"instruction": asked, "input": "", "output": " ".join(words), "topic": topic})
    return rows


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def selected(
    pool: Path,
    run: Path,
    method: str = "length",
    *,
    cache: Path,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """The run folder of a selection."""
    options = SelectOptions(pool=[str(pool)], run=str(run), cache=str(cache), **{"keep": "20%", **more})
    folder = select(method, options, settings or {}).folder
    assert folder is not None
    return folder


def hostile_run(folder: Path, *, cache: Path) -> Path:
    """A selection whose pool tries everything, bad rows, label values and domain names included."""
    rows = [*HOSTILE, *rows_of(60)]
    for number, row in enumerate(rows):
        row["label</script><script>window.hacked=7</script>"] = (
            "<b>x</b>",
            "\u202e<img src=x onerror=window.hacked=8>",
        )[number % 2]
    path = write_jsonl(folder / "</style><script>" / "pool.jsonl", rows)
    with path.open("a", encoding="utf-8") as file:
        file.write("{<script>window.hacked=9</script>\n")
        file.write('["not an object", "<script>window.hacked=10</script>"]\n')
    return selected(path, folder / "run", "output-length", cache=cache, on_bad_row="skip")


def large_run(folder: Path, count: int, *, cache: Path) -> Path:
    """A finished DaaR-like run of `count` rows, its numbers invented: what such a run's page weighs."""
    draw = np.random.default_rng(0)
    rows = rows_of(count)
    for row in rows:
        row["output"] = " ".join([row["output"]] * 12)
    pool = load_pool(str(write_jsonl(folder / "pool.jsonl", rows)), cache=cache)
    shares = draw.dirichlet([0.4] * 3, count).astype(np.float32)
    score = -(shares * np.log(shares + 1e-9)).sum(axis=1).astype(np.float32)
    kept = np.zeros(count, dtype=bool)
    kept[np.argsort(-score)[: count // 5]] = True
    tokens = draw.lognormal(5, 0.8, count).astype(np.int32) + 1
    table = {
        "row": np.arange(count),
        "id": pool.source.ids(range(count)),
        "file": ["pool.jsonl"] * count,
        "line": np.arange(count) + 1,
        "tokens": tokens,
        "score": score,
        "kept": kept,
        "reason": pa.nulls(count, pa.string()),
        "pseudo_label": [DOMAINS[at] for at in shares.argmax(axis=1)],
        **{f"p_{name}": shares[:, at] for at, name in enumerate(DOMAINS)},
    }
    run = folder / "run"
    run.mkdir()
    pq.write_table(pa.table(table), run / "rows.parquet")
    manifest = {
        "siftune": "0",
        "status": "finished",
        "config": {"command": "select", "method": "daar", "pool": [str(folder / "pool.jsonl")], "keep": "20%"},
        "inputs": {"pool": pool.fingerprint},
        "stages": [],
        "versions": {},
        "info": {},
        "rows": {"read": count, "usable": count, "duplicates": 0, "kept": int(kept.sum())},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def trained_run(folder: Path, *, steps: int = 30, candidates: int = 8, rows: int = 60) -> Path:
    """A trainer's OUTPUT_DIR: a ledger written by the ledger itself, and a trainer's state."""
    draw = np.random.default_rng(1)
    ledger = Ledger(folder / "siftune")
    history = []
    for step in range(1, steps + 1):
        picked = draw.choice(rows, candidates, replace=False)
        intra, inter = draw.random(candidates) * 10, draw.random(candidates)
        total = intra + 2 * inter
        kept = total >= np.sort(total)[-2]
        ledger.add(
            step,
            [0] * candidates,
            token_ids=[f"{row:016d}".encode() for row in picked],
            rows=[int(row) for row in picked],
            total=total.tolist(),
            parts={"intra": intra.tolist(), "inter": inter.tolist(), "alpha": [2.0] * candidates},
            kept=kept.tolist(),
            reasons={},
        )
        if step % 3 == 0:
            history.append(
                {"step": step, "loss": 3 / step, "sift/scoring_share": 0.2, "sift/candidates_per_second": 50.0}
            )
    ledger.flush(steps)
    ledger.merge()
    state = {"global_step": steps, "log_history": [*history, {"step": steps, "train_runtime": 12.5}]}
    (folder / "checkpoint-30").mkdir(parents=True)
    (folder / "checkpoint-30" / "trainer_state.json").write_text(json.dumps(state))
    return folder


STUDY_VALUES = ("loss/maths", "loss/code", "loss/mean", "accuracy/maths")


def study_cells() -> list[dict[str, Any]]:
    """Three methods over three seeds; one value is missing."""
    draw = np.random.default_rng(4)
    lines = []
    for label in ("full", "random", "daar"):
        for seed in range(3):
            numbers = {value: float(draw.random()) for value in STUDY_VALUES}
            lines.append(
                {
                    "label": label,
                    "group": None if label == "full" else "20%",
                    "seed": seed,
                    **numbers,
                    "trained_rows": 160,
                }
                | {"train_seconds": 10.0, "measure_seconds": 2.0, "peak_memory_mb": 700, "judge_cost": None}
            )
    lines[-1]["loss/code"] = math.nan
    return lines


def study_run(folder: Path) -> Path:
    """A study's folder with its tables."""
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(study_cells()), folder / "cells.parquet")
    differences = [
        {"group": "20%", "label": label, "baseline": "random", "value": value, "mean": mean, "sd": 0.1, "low": low}
        | {"high": 2 * mean - low, "n": 3, "lower_is_better": value.startswith("loss")}
        for label, mean, low in (("full", -0.2, -0.3), ("daar", 0.1, -0.1))
        for value in STUDY_VALUES
    ]
    pq.write_table(pa.Table.from_pylist(differences), folder / "differences.parquet")
    (folder / "study.json").write_text(json.dumps({"equal": "rows", "model": "m<script>"}))
    (folder / "base.json").write_text(json.dumps({"values": {"loss/maths": 1.5, "loss/code": 2.5}}))
    return folder
