"""InsTag-D's walk: one pass over the tags against the definition, which walks the rows left again and again.

    ours     `siftune.offline.instag_walk.passes`, and the sort into its order
    naive    the definition: passes over the rows left, sets of tags, until all rows are taken

The bar: the same order, whole; 100,000 rows in seconds. Tags are drawn by a power law, as a tagger's are: few are in
thousands of rows, most in a handful. The fewer kinds of tags there are, the more passes the rows need.

Run: python benchmarks/instag_walk.py [--rows 100000] [--kinds 20000 200]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
from machine import describe

from siftune.offline.instag import MOST_TAGS
from siftune.offline.instag_walk import NO_TAG, passes


def tagged(rows: int, kinds: int) -> np.ndarray:
    """Distinct tags of each row, 1 to 12 draws, largest count first, as the walk takes them."""
    draw = np.random.default_rng(0)
    share = 1 / np.arange(1, kinds + 1)
    drawn = draw.choice(kinds, size=(rows, 12), p=share / share.sum()) + 1
    drawn[np.arange(12) >= draw.integers(1, 13, size=(rows, 1))] = NO_TAG
    drawn.sort(axis=1)
    drawn[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = NO_TAG
    tags = np.zeros((rows, MOST_TAGS), dtype=np.int64)
    tags[:, :12] = drawn
    return tags[np.argsort(-(tags != NO_TAG).sum(axis=1), kind="stable")]


def order(tags: np.ndarray) -> np.ndarray:
    """The rows in the order they are taken."""
    return np.argsort(passes(tags), kind="stable")


def naive(tags: np.ndarray) -> tuple[list[int], int]:
    """The definition; also the number of its passes."""
    own = [set(row[row != NO_TAG].tolist()) for row in tags]
    left, taken, count = [row for row in range(len(own)) if own[row]], [], 0
    while left:
        covered: set[int] = set()
        rest = []
        for row in left:
            if own[row] <= covered:
                rest.append(row)
            else:
                taken.append(row)
                covered |= own[row]
        left, count = rest, count + 1
    return taken + [row for row in range(len(own)) if not own[row]], count


def seconds(work: object, *arguments: np.ndarray) -> float:
    """Median of five."""
    assert callable(work)
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        work(*arguments)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def compare(rows: int, kinds: int) -> dict[str, object]:
    """Both ways over the same rows."""
    tags = tagged(rows, kinds)
    start = time.perf_counter()
    wanted, count = naive(tags)
    slow = time.perf_counter() - start
    return {
        "rows": rows,
        "kinds": kinds,
        "tags": int((tags != NO_TAG).sum()),
        "passes": count,
        "seconds": seconds(order, tags),
        "naive_seconds": slow,
        "same": order(tags).tolist() == wanted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kinds", type=int, nargs="*", default=[20_000, 200], help="tags there are, one line each")
    said = parser.parse_args()
    found = [compare(said.rows, kinds) for kinds in said.kinds]
    print(describe(), end="\n\n")
    print(
        "| rows | kinds of tags | tags in all | passes | ours | definition | same order |\n|---|---|---|---|---|---|---|"
    )
    for line in found:
        counts = " | ".join(f"{line[name]:,}" for name in ("rows", "kinds", "tags", "passes"))
        print(
            f"| {counts} | {line['seconds']:.2f} s | {line['naive_seconds']:.1f} s | {'yes' if line['same'] else 'NO'} |"
        )
    print("\n```json\n" + json.dumps(found) + "\n```")
    if not all(line["same"] for line in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
