"""The worked plan of docs/scaling.md for a large pool: what one process must do by itself, measured, and what GPUs do, computed.

Measured here, in microseconds of processor time per row: reading the pool, hashing its shards, cutting, writing. Computed:
the multiplications of a 7B model's first layers over the pool's tokens, and the hours of 8 GPUs at rates that the reader
puts in (`siftune plan` measures a machine's). Nothing about a GPU is measured by this script.

    python scripts/scaling_offline.py                  prints the plan
    python scripts/scaling_offline.py --write          puts it between its marks in docs/scaling.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_page import put

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MARKS = ("<!-- offline plan: scripts/scaling_offline.py -->", "<!-- end of offline plan -->")

# Qwen2.5-7B's published configuration: width, query heads' and key-value heads' widths, MLP width.
WIDTH, QUERY, KEY_VALUE, MLP, LAYERS = 3584, 3584, 512, 18_944, 3
VOCABULARY = 152_064
TOKENS_A_ROW = 205.6
"""Mean of the four real pools in docs/benchmarks.md: 420,984 tokens in 2,048 rows."""
POOL_ROWS, GPUS, DOMAINS = 10_000_000, 8, 4
RATES = (100, 200, 400)
"""TFLOP/s that one GPU sustains, to be replaced by the reader's own."""
TOKENISED = 5324.6
"""Rows per second that one process tokenises: docs/benchmarks.md, DaaR scoring."""


def layer_weights() -> int:
    """Weights of one decoder layer that are multiplied per token."""
    return WIDTH * QUERY * 2 + WIDTH * KEY_VALUE * 2 + 3 * WIDTH * MLP


def write_pool(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as pool:
        for row in range(rows):
            question = f"Question {row} " + "why " * 20
            pool.write(json.dumps({"instruction": question, "input": "", "output": f"{row} " * 20}) + "\n")


def measure(rows: int, folder: Path) -> dict[str, float]:
    """Microseconds of processor time per row of what one process does by itself."""
    import numpy as np

    import siftune
    from siftune.engines.shard import shard_key
    from siftune.records import Scores
    from siftune.runs.stored import write_rows, write_scores

    took: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        done = work()
        took[name] = (time.process_time() - start) / rows * 1e6
        return done

    write_pool(folder / "pool.jsonl", rows)
    pool = timed(
        "read the pool into the cache", lambda: siftune.load_pool(folder / "pool.jsonl", cache=folder / "cache")
    )
    timed("load it again", lambda: siftune.load_pool(folder / "pool.jsonl", cache=folder / "cache"))
    timed("hash the shards (in the workers)", lambda: [shard_key("k", pool, shard) for shard in pool.shards()])
    draw = np.random.default_rng(0)
    scores = Scores(pool=pool, method="made up", values=draw.random(rows, dtype=np.float32))
    subset = timed("cut at 20 %", lambda: scores.keep(fraction=0.2))
    timed("scores.safetensors", lambda: write_scores(folder / "scores.safetensors", scores))
    timed("rows.parquet", lambda: write_rows(folder / "rows.parquet", scores, subset.rows))
    timed("selected.jsonl", lambda: subset.write(folder / "selected.jsonl"))
    return took


def plan(took: dict[str, float], rows: int) -> str:
    """The plan as Markdown."""
    from benchmarks.machine import describe

    weights, tokens = layer_weights() * LAYERS, POOL_ROWS * TOKENS_A_ROW
    work = 2 * weights * tokens
    driver = {name: micros for name, micros in took.items() if "workers" not in name and "again" not in name}
    a_row = 3 * 4 + 1 + 4 * DOMAINS
    lines = [
        f"`python scripts/scaling_offline.py --rows {rows}`; {describe()}",
        "",
        f"| on one core, measured on {rows:,} rows of about 240 bytes | µs a row | {POOL_ROWS / 1e6:.0f} M rows |",
        "|---|---:|---:|",
        *(f"| {name} | {micros:.1f} | {micros * POOL_ROWS / 6e7:.1f} min |" for name, micros in took.items()),
        "",
        f"| computed for {POOL_ROWS / 1e6:.0f} M rows, {GPUS} GPUs, the first {LAYERS} layers of Qwen2.5-7B | |",
        "|---|---:|",
        f"| weights multiplied per token: {LAYERS} x {layer_weights() / 1e6:.0f} M | {weights / 1e6:.0f} M |",
        f"| memory per GPU for them and the embedding, bf16 | {2 * (weights + VOCABULARY * WIDTH) / 1e9:.1f} GB |",
        f"| tokens: {POOL_ROWS / 1e6:.0f} M rows x {TOKENS_A_ROW} (real pools, docs/benchmarks.md) | {tokens / 1e9:.2f} G |",
        f"| multiply-adds x 2 | {work:.2e} FLOP |",
        *(
            f"| {GPUS} GPUs that sustain {rate} TFLOP/s each (put in your own) | "
            f"{work / (GPUS * rate * 1e12) / 3600:.2f} h, {rate * 1e12 / (2 * weights) / TOKENS_A_ROW:,.0f} rows/s a GPU |"
            for rate in RATES
        ),
        f"| tokenising in each worker, at {TOKENISED:,.0f} rows/s (docs/benchmarks.md, 2 cores) | "
        f"{POOL_ROWS / GPUS / TOKENISED / 60:.0f} min |",
        f"| shards of 4,096 rows, the unit of work and of loss | {-(-POOL_ROWS // 4096):,} |",
        f"| results over the network: {a_row} bytes a row with {DOMAINS} domains | {a_row * POOL_ROWS / 1e6:.0f} MB |",
        f"| the driver's part on one core, in total | {sum(driver.values()) * POOL_ROWS / 6e7:.0f} min |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--write", action="store_true")
    said = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        text = plan(measure(said.rows, Path(folder)), said.rows)
    put(text, MARKS, write=said.write)


if __name__ == "__main__":
    main()
