"""The embedded corpus: instruction rows of four domains in three parts (pool, seeds, held out) that share no question.

`assets/corpus.jsonl.gz` holds the rows, domain by domain; `tools/demo/` in the repository holds the grammars that wrote
them, with every answer computed. Domains overlap deliberately (word problems, programs about numbers, sums about everyday
things), so inferred labels do not agree perfectly with the hidden ones. Cost: reading the file once, a tenth of a second.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..files import atomic_path

FILE = Path(__file__).parent / "assets" / "corpus.jsonl.gz"
SHARES = {"common_sense": 0.25, "reasoning": 0.25, "mathematics": 0.27, "coding": 0.23}
"""Share of each domain in the pool and in the held-out rows."""
DOMAINS = tuple(SHARES)

Part = Literal["pool", "seeds", "held_out"]
Row = dict[str, str]


def rows(count: int, seed: int) -> list[Row]:
    """`count` rows of the pool: `instruction`, `input`, `output`, `source` (the hidden domain), `kind`.

    Seed 0 takes the first rows of each domain in the file's order, another seed a draw; the seed also shuffles the domains.
    Raises `UserError` when the pool holds fewer.

    >>> corpus.rows(2, seed=0)[0].keys()
    dict_keys(['instruction', 'input', 'output', 'source', 'kind'])
    """
    return _mixed("pool", count, seed)


def held_out(count: int, seed: int) -> list[Row]:
    """`count` rows that are in no pool and no seed set, with the same shares of the domains.

    >>> len(corpus.held_out(100, seed=0))
    100
    """
    return _mixed("held_out", count, seed)


def seed_rows(per_domain: int, seed: int) -> list[Row]:
    """Example rows for the seeds file, `per_domain` of each: `domain`, `instruction`, `input`, `output`.

    >>> len(corpus.seed_rows(5, seed=0))
    20
    """
    return _drawn("seeds", dict.fromkeys(DOMAINS, per_domain), seed)


def write(folder: str | Path, *, count: int = 6000, per_domain: int = 15, held: int = 400, seed: int = 0) -> Path:
    """Write `pool.jsonl`, `seeds.jsonl` and `held_out.jsonl` into a folder, replacing files of these names; returns the folder.

    The pool's `source` and `kind` columns are for reports only; no method reads them.

    >>> corpus.write("demo-data")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"pool": rows(count, seed), "seeds": seed_rows(per_domain, seed), "held_out": held_out(held, seed)}
    for name, part in files.items():
        with atomic_path(folder / f"{name}.jsonl") as temporary:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            temporary.write_text(lines, encoding="utf-8")
    return folder


def mix(count: int) -> dict[str, int]:
    """The rows of each domain among `count` rows."""
    counts = {domain: int(count * share) for domain, share in SHARES.items()}
    for domain in DOMAINS[: count - sum(counts.values())]:
        counts[domain] += 1
    return counts


def shuffled(part: list[Row], seed: int) -> list[Row]:
    """The rows of all domains in the order of a seed."""
    order = list(part)
    random.Random(f"siftune order {seed}").shuffle(order)
    return order


def _mixed(part: Part, count: int, seed: int) -> list[Row]:
    return shuffled(_drawn(part, mix(count), seed), seed)


def _drawn(part: Part, counts: Mapping[str, int], seed: int) -> list[Row]:
    """The first rows of each domain, in the file's order for seed 0 and shuffled for another."""
    stored = _stored()
    if any(count > len(stored[part, domain]) for domain, count in counts.items()):
        total = sum(len(stored[part, domain]) for domain in DOMAINS)
        raise UserError(
            f"{sum(counts.values()):,} rows exceed the {total:,} of the embedded corpus ({part.replace('_', ' ')}); "
            f"ask for at most {total:,}"
        )
    drawn: list[Row] = []
    for domain, count in counts.items():
        domain_rows = list(stored[part, domain])
        if seed:
            random.Random(f"siftune corpus {seed} {part} {domain}").shuffle(domain_rows)
        drawn += [dict(row) for row in domain_rows[:count]]
    return drawn


@cache
def _stored() -> Mapping[tuple[str, str], list[Row]]:
    """The rows of the file by part and domain. Raises `UserError` when the installation lacks the file."""
    if not FILE.is_file():
        raise UserError(f"the embedded corpus {FILE} is missing; reinstall siftune")
    stored: dict[tuple[str, str], list[Row]] = {}
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            part = row.pop("part")
            stored.setdefault((part, row["domain"] if part == "seeds" else row["source"]), []).append(row)
    return stored
