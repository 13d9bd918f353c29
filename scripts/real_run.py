"""DaaR on real rows: four public pools mixed, their labels hidden from the method, three full runs -> docs/results/daar-real.md.

A full run draws its own seed rows (15 per domain, from held-out files), its own probe set and its own weights; the pool
stays the same. Every run is a process of its own. The first has a cold cache and keeps the pool's features, which do not
depend on a seed, so that the others score from them; the second reward (entropy of psi_dom) is cut from the same fit.
The true domain of a row stands in a column that no method reads.

    python scripts/real_run.py --data ../shared/data/pools --model ../shared/models/tiny-base

Cost: one pass of 38,969 rows through three layers of the model; about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from study_rows import read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DOMAINS = ("common_sense", "reasoning", "math", "code")
PER_DOMAIN = 15
MIX_SEED = 0
PAPER_OVERLAP, PAPER_ACCURACY, PAPER_COSINE = 96.4, 92.7, 0.98


@dataclass
class Run:
    """What one full run gave."""

    seed: int
    manifest: dict[str, Any]
    true: np.ndarray[Any, Any]
    """True domain of every row, `(n,)` text."""
    said: np.ndarray[Any, Any]
    """Pseudo-label of every row, `(n,)` text."""
    kept: np.ndarray[Any, Any]
    """Shape `(n,)` bool."""
    centroids: np.ndarray[Any, Any]
    """Seed centroids, `(K, D)`."""


def mix(data: Path, folder: Path, limit: int | None) -> Path:
    """The pool: every row of the four files (or the first `limit`), shuffled; `true_domain` is for this report alone."""
    rows = [{**row, "true_domain": name} for name in DOMAINS for row in read_rows(data / f"{name}.jsonl.gz")[:limit]]
    random.Random(MIX_SEED).shuffle(rows)
    return write_rows(folder / "pool.jsonl", rows)


def draw_seeds(data: Path, folder: Path, seed: int) -> Path:
    """Seed rows of one full run: `PER_DOMAIN` held-out rows of each domain."""
    rows = []
    for name in DOMAINS:
        drawn = random.Random(f"{seed} {name}").sample(read_rows(data / f"{name}_heldout.jsonl.gz"), PER_DOMAIN)
        rows += [
            {"domain": name, **{field: row[field] for field in ("instruction", "input", "output")}} for row in drawn
        ]
    return write_rows(folder / f"seeds-{seed}.jsonl", rows)


def select(folder: Path, model: Path, seed: int, reward: str, keep: str) -> Run:
    """`siftune select daar` in a process of its own, on the cache that all runs share."""
    run = folder / f"run-{seed}-{reward}"
    shutil.rmtree(run, ignore_errors=True)
    words = [sys.executable, "-m", "siftune", "select", "daar", "pool.jsonl", "--model", str(model)]
    words += ["--seeds", f"seeds-{seed}.jsonl", "--seed", str(seed), "--keep", keep, "--reward", reward]
    words += ["--run", run.name, "--cache", "cache", "--keep-features", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return read_run(run, json.loads(done.stdout), seed)


def read_run(run: Path, manifest: dict[str, Any], seed: int) -> Run:
    """A run folder, with the hidden labels beside it."""
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    table = pq.read_table(run / "rows.parquet", columns=["pseudo_label", "kept"])
    with open(run.parent / "pool.jsonl", encoding="utf-8") as pool:
        true = np.array([json.loads(line)["true_domain"] for line in pool])
    said = np.array([label or "" for label in table["pseudo_label"].to_pylist()])
    centroids = load_file(run / "centroids.safetensors")["seed_centroids"]
    return Run(seed, manifest, true, said, np.array(table["kept"].to_pylist()), centroids)


# --- the report -------------------------------------------------------------------------------------------------------


def overlaps(runs: list[Run]) -> list[float]:
    """Share of the chosen rows that two runs have in common, in percent, for every pair of runs."""
    return [
        100 * float((one.kept & other.kept).sum()) / float(max(one.kept.sum(), other.kept.sum()))
        for one, other in itertools.combinations(runs, 2)
    ]


def centroid_cosines(runs: list[Run]) -> list[float]:
    """Cosine between the same domain's centroids of two runs, for every pair and domain."""
    unit = [run.centroids / np.linalg.norm(run.centroids, axis=1, keepdims=True) for run in runs]
    return [float(cosine) for one, other in itertools.combinations(unit, 2) for cosine in (one * other).sum(axis=1)]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def quality(runs: list[Run], entropy: list[Run]) -> str:
    """One line per measure, one column per run."""
    info = [run.manifest["info"] for run in runs]
    lines = [["agreement of pseudo-labels with the true domain", *(percent((r.said == r.true).mean()) for r in runs)]]
    names = {
        "validation_accuracy": f"probe accuracy on held-out rows (paper, 7B models: {PAPER_ACCURACY} %)",
        "temperature": "temperature",
        "calibration_error_before": "calibration error before",
        "calibration_error_after": "calibration error after",
        "reward_r2": "reward variance that psi_div explains on held-out rows",
        "spearman_diversity_entropy": "rank correlation of psi_div and the entropy of psi_dom",
    }
    for name, words in names.items():
        shown = percent if name == "validation_accuracy" else "{:.3f}".format
        lines.append([words, *("-" if facts.get(name) is None else shown(facts[name]) for facts in info)])
    both = [float((r.kept & e.kept).sum()) / float(r.kept.sum()) for r, e in zip(runs, entropy, strict=True)]
    lines.append(["rows chosen by both rewards", *map(percent, both)])
    return table(["", *(f"run {run.seed}" for run in runs)], lines)


def composition(runs: list[Run]) -> str:
    """Pool and chosen rows by true domain."""
    pool = Counter(runs[0].true.tolist())
    lines = []
    for name in DOMAINS:
        kept = [int((run.kept & (run.true == name)).sum()) for run in runs]
        shares = [f"{count:,} ({percent(count / int(run.kept.sum()))})" for count, run in zip(kept, runs, strict=True)]
        lines.append([name, f"{pool[name]:,} ({percent(pool[name] / len(runs[0].true))})", *shares])
    return table(["true domain", "pool", *(f"chosen, run {run.seed}" for run in runs)], lines)


def confusion(run: Run) -> str:
    """Of each true domain, the share given each pseudo-label."""
    lines = []
    for name in DOMAINS:
        inside = run.said[run.true == name]
        lines.append([name, *(percent((inside == said).mean()) for said in DOMAINS)])
    return table(["true domain", *(f"labelled {name}" for name in DOMAINS)], lines)


def stages(runs: list[Run]) -> str:
    """Seconds per stage, peak memory, speed."""
    names = [stage["name"] for stage in runs[0].manifest["stages"]]
    seconds = [{s["name"]: s["seconds"] for s in run.manifest["stages"]} for run in runs]
    lines = [[name, *(f"{spent[name]:.1f} s" for spent in seconds)] for name in names]
    inner = [run.manifest["info"].get("seconds", {}) for run in runs]
    for name in inner[0]:
        words = f"- of the fit: {name.replace('_', ' ')}"
        lines.insert(2 + list(inner[0]).index(name), [words, *(f"{spent[name]:.1f} s" for spent in inner)])
    lines.append(["all stages", *(f"{sum(spent.values()):.1f} s" for spent in seconds)])
    rates = [r.manifest["rows"]["usable"] / s["score"] for r, s in zip(runs, seconds, strict=True)]
    tokens = [r.manifest["rows"]["tokens"] / s["score"] for r, s in zip(runs, seconds, strict=True)]
    lines.append(
        ["scoring speed", *(f"{r:,.0f} rows/s, {t:,.0f} tokens/s" for r, t in zip(rates, tokens, strict=True))]
    )
    lines.append(["peak memory of the process", *(f"{run.manifest['peak_memory_mb']:,} MB" for run in runs)])
    return table(["stage", *(f"run {run.seed}" for run in runs)], lines)


def spread(values: list[float], digits: int = 1) -> str:
    return f"{np.mean(values):.{digits}f} (from {min(values):.{digits}f} to {max(values):.{digits}f})"


def report(runs: list[Run], entropy: list[Run], *, model: str, keep: str, command: str) -> str:
    """The whole page."""
    from benchmarks import machine

    rows = runs[0].manifest["rows"]
    chance = 100 * rows["kept"] / rows["usable"]
    seeds = ", ".join(str(run.seed) for run in runs)
    return f"""# DaaR on real rows

Written by `{command}`. Nothing here is typed by hand.

{machine.describe()}

Pool: {rows["read"]:,} rows of four public pools ({", ".join(DOMAINS)}), mixed and shuffled; {rows["duplicates"]:,} exact
duplicates, kept; {rows["tokens"]:,} tokens. Their labels are hidden from the method. Model: `{model}`, a real Llama of 6.8 M weights, of which the
first 3 layers are read. Seeds: {PER_DOMAIN} held-out rows per domain. Kept: {keep}, {rows["kept"]:,} rows. Runs {seeds} are full
runs: own seed rows, own probe set, own weights, a process each. Run {runs[0].seed} started from a cold cache; the
others scored from the features that it kept, which do not depend on a seed.

## Stability: the chosen rows of the runs

| | this pool, {len(runs)} runs | paper, 7B model, 3 runs |
|---|---:|---:|
| overlap of the chosen rows, reward `diversity` (%) | {spread(overlaps(runs))} | {PAPER_OVERLAP} |
| overlap of the chosen rows, reward `entropy` (%) | {spread(overlaps(entropy))} | - |
| overlap of random draws (%) | {chance:.1f} | 20.0 |
| cosine of the same domain's centroids | {spread(centroid_cosines(runs), 4)} | > {PAPER_COSINE} |

## Pseudo-labels and probes

{quality(runs, entropy)}

Run {runs[0].seed}, every row of the pool:

{confusion(runs[0])}

## What was chosen

Reward `diversity`:

{composition(runs)}

Reward `entropy`:

{composition(entropy)}

## Cost

{stages(runs)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four pools and their held-out files")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path("siftune-runs/daar-real"), help="folder for pool and runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "daar-real.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", default="20%")
    parser.add_argument("--limit", type=int, help="rows of each pool file, for trying the script")
    said = parser.parse_args()
    said.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(said.work / "cache", ignore_errors=True)
    mix(said.data, said.work, said.limit)
    runs, entropy = [], []
    for seed in said.seeds:
        draw_seeds(said.data, said.work, seed)
        runs.append(select(said.work, said.model.resolve(), seed, "diversity", said.keep))
        entropy.append(select(said.work, said.model.resolve(), seed, "entropy", said.keep))
        sys.stderr.write(f"run {seed}: {json.dumps(runs[-1].manifest['stages'][2]['counts'])}\n")
    command = f"python scripts/real_run.py --data POOLS --model {said.model.name}"
    page = report(runs, entropy, model=said.model.name, keep=said.keep, command=command)
    said.out.parent.mkdir(parents=True, exist_ok=True)
    said.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
