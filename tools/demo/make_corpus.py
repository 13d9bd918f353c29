"""Writes the demo's corpus, `siftune/demo/assets/corpus.jsonl.gz`, from the grammars beside this file.

    python -m tools.demo.make_corpus [--out FILE]

Domain by domain: the pool, the seeds, the held-out rows, each in the order in which the grammar writes them. The same bytes
on every machine. Cost: seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from siftune.demo.corpus import FILE, mix

from . import grammars

SEED = 0
POOL_ROWS, HELD_OUT_ROWS, SEEDS_PER_DOMAIN = 10_000, 1_000, 20


def corpus_rows() -> Iterator[dict[str, str]]:
    """Every row of the file, with its part."""
    for part, count in (("pool", POOL_ROWS), ("held_out", HELD_OUT_ROWS)):
        for domain, number in mix(count).items():
            for row in grammars.distinct(domain, number, SEED, part):
                yield {"part": part, **row}
    for row in grammars.seed_rows(SEEDS_PER_DOMAIN, SEED):
        yield {"part": "seeds", **row}


def text() -> str:
    """The file's text, one JSON object on each line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in corpus_rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    out = parser.parse_args().out
    out.write_bytes(gzip.compress(text().encode(), mtime=0))
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
