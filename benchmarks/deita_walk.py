"""Deita-D's walk: ours in blocks against the naive loop, which must keep the same rows.

    floor    the products alone: every row against the rows kept before it, in the same blocks, nothing looked at
    ours     `siftune.offline.deita_walk.unlike`
    naive    one row at a time against all kept ones, a matrix-vector product each (a Python loop over pairs would take
             days); on the first rows of the order only

The bar: the same rows kept; 100,000 rows of 1,024 numbers in minutes on two cores. Rows lie around a number of centres,
so that a share of them is too like an earlier one; without centres every row is kept, the worst case.

Run: python benchmarks/deita_walk.py [--rows 100000] [--width 1024] [--centres N] [--naive 5000]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from machine import describe

from siftune.offline import deita_walk
from siftune.offline.deita_walk import unit, unlike

THRESHOLD = 0.9


def clumped(rows: int, width: int, centres: int) -> np.ndarray:
    """Float32 rows around `centres` directions, about half of the pairs of one centre above the threshold; 0 centres:
    all directions at random."""
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(rows, width)).astype(np.float32)
    if not centres:
        return noise
    middles = draw.normal(size=(centres, width)).astype(np.float32)
    spread = draw.uniform(0.1, 0.6, size=(rows, 1)).astype(np.float32)
    return middles[draw.integers(centres, size=rows)] + spread * noise


def naive(vectors: np.ndarray, order: np.ndarray) -> list[int]:
    """The definition, with the kept rows in one array."""
    wide = unit(vectors[order])
    held = np.empty_like(wide)
    kept: list[int] = []
    for index, row in enumerate(order.tolist()):
        if not len(kept) or (held[: len(kept)] @ wide[index]).max() < THRESHOLD:
            held[len(kept)] = wide[index]
            kept.append(row)
    return kept


def products(vectors: np.ndarray, order: np.ndarray, kept: np.ndarray) -> None:
    """The floor: the matrix products of the walk, given what it keeps."""
    rows = unit(vectors[order]).astype(np.float32)
    held = rows[kept]
    before = np.concatenate([[0], np.cumsum(kept)])
    for start in range(0, len(rows), deita_walk.BLOCK):
        block = rows[start : start + deita_walk.BLOCK]
        for left in range(0, int(before[start]), deita_walk.COLUMNS):
            block @ held[left : min(left + deita_walk.COLUMNS, int(before[start]))].T
        block @ block.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--centres", type=int, nargs="+", default=[20_000, 0])
    parser.add_argument("--naive", type=int, default=5000)
    asked = parser.parse_args()
    print(describe())
    print(f"\n{asked.rows:,} rows of {asked.width:,} numbers, threshold {THRESHOLD}\n")
    print(
        f"| centres | kept | ours s | floor s | ours / floor | first {asked.naive:,}: ours s | naive s | the same rows |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---|")
    results = []
    for centres in asked.centres:
        vectors = clumped(asked.rows, asked.width, centres)
        order = np.random.default_rng(1).permutation(asked.rows)
        start = time.perf_counter()
        kept, _ = unlike(vectors, order, threshold=THRESHOLD)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        products(vectors, order, kept)
        floor = time.perf_counter() - start
        first = order[: asked.naive]
        start = time.perf_counter()
        small, _ = unlike(vectors, first, threshold=THRESHOLD)
        ours_first = time.perf_counter() - start
        start = time.perf_counter()
        expected = naive(vectors, first)
        naive_first = time.perf_counter() - start
        same = first[small].tolist() == expected
        print(
            f"| {centres:,} | {int(kept.sum()):,} | {ours:.1f} | {floor:.1f} | {ours / floor:.2f} | {ours_first:.2f} "
            f"| {naive_first:.2f} | {'yes' if same else 'NO'} |",
            flush=True,
        )
        assert same, "the walk must keep what the naive loop keeps"
        results.append(
            {"centres": centres, "kept": int(kept.sum()), "ours": ours, "floor": floor, "naive": naive_first}
        )
    print(f"\n```json\n{json.dumps(results)}\n```")


if __name__ == "__main__":
    main()
