"""Do the engines write the same bytes on real rows? `siftune select daar` on four public pools, cold caches, file by file.

Each engine gets a cache and a process of its own: one local process, and a Ray cluster on this machine with two actors. The
files of the run folder that hold the result are compared byte by byte.

    python scripts/engines_equal.py --data ../shared/data/pools --model ../shared/models/tiny-base            prints the table
    python scripts/engines_equal.py --data ... --model ... --write      puts it between its marks in docs/scaling.md

Cost: two passes of the pools' 38,969 rows, cut to 128 tokens each, through three layers of the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scaling_page import put
from study_rows import DOMAINS, FIELDS, ROOT, read_rows, table

MARKS = ("<!-- engines: scripts/engines_equal.py -->", "<!-- end of engines -->")
ENGINES = {
    "local, 1 process": ["--engine", "local", "--workers", "1"],
    "Ray, 2 actors": ["--engine", "ray", "--workers", "2", "--worker-cpus", "0.5"],
}
SAME = (
    "selected.jsonl",
    "rows.parquet",
    "scores.safetensors",
    "centroids.safetensors",
    "domain_probe.safetensors",
    "reward_probe.safetensors",
)
SEEDS_PER_DOMAIN = 15


def write_inputs(data: Path, folder: Path) -> int:
    """pool.jsonl (every row of the four files, shuffled) and seeds.jsonl (held-out rows with their domain); the pool's rows."""
    rows = [row for name in DOMAINS for row in read_rows(data / f"{name}.jsonl.gz")]
    random.Random(0).shuffle(rows)
    seeds = [
        {"domain": name, **{field: row[field] for field in FIELDS}}
        for name in DOMAINS
        for row in read_rows(data / f"{name}_heldout.jsonl.gz")[:SEEDS_PER_DOMAIN]
    ]
    for path, lines in (("pool.jsonl", rows), ("seeds.jsonl", seeds)):
        (folder / path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(rows)


def select(folder: Path, model: Path, name: str, words: list[str]) -> dict[str, Any]:
    """One cold run; its manifest."""
    place = hashlib.sha256(name.encode()).hexdigest()[:8]
    command = [sys.executable, "-m", "siftune", "select", "daar", "pool.jsonl", "--model", str(model.resolve())]
    command += ["--seeds", "seeds.jsonl", "--keep", "20%", "--max-length", "128", *words]
    command += ["--run", f"run-{place}", "--cache", f"cache-{place}", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    manifest: dict[str, Any] = json.loads(done.stdout)
    stages = {stage["name"]: stage for stage in manifest["stages"]}
    digests = {file: hashlib.sha256((folder / f"run-{place}" / file).read_bytes()).hexdigest() for file in SAME}
    return {"manifest": manifest, "stages": stages, "digests": digests}


def report(rows: int, model: str, runs: dict[str, dict[str, Any]]) -> str:
    """The section of the page. Ends with the files that differ, where some do."""
    from benchmarks.machine import describe

    first = next(iter(runs.values()))
    for name, run in runs.items():
        if differ := [file for file in SAME if run["digests"][file] != first["digests"][file]]:
            raise SystemExit(f"{name} differs in {', '.join(differ)}")
    kept = first["manifest"]["rows"]["kept"]
    tokens = first["manifest"]["rows"]["tokens"]
    shards = first["stages"]["score"]["counts"]["shards_computed"]
    lines = [
        [name, str(run["stages"]["score"]["counts"]["shards_computed"]), f"{run['stages']['score']['seconds']:.0f} s"]
        for name, run in runs.items()
    ]
    digests = [[f"`{file}`", f"`{digest[:16]}`"] for file, digest in first["digests"].items()]
    return (
        f"`python scripts/engines_equal.py --data POOLS --model {model}`; {describe()}; every process 1 thread\n\n"
        f"{rows:,} rows of four public pools, {tokens:,} tokens, {kept:,} rows chosen by `daar`, {shards} shards, a cold cache each. "
        "All files of the result are equal, byte by byte.\n\n"
        + table(["engine", "shards computed", "score"], lines)
        + "\n\n"
        + table(["file, of both engines", "SHA-256 begins"], digests)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_inputs(said.data, folder)
        runs = {engine: select(folder, said.model, engine, words) for engine, words in ENGINES.items()}
        text = report(rows, said.model.name, runs)
    put(text, MARKS, write=said.write)


if __name__ == "__main__":
    main()
