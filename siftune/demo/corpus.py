"""The embedded corpus: instruction rows of four domains, made from grammars and tables written for this package.

Every answer is computed or looked up, never guessed. Domains overlap deliberately (word problems, programs about numbers,
sums about everyday things), so inferred labels do not agree perfectly with the hidden ones. A row belongs
to exactly one of three parts (pool, seeds, held out) by the hash of its question, whatever the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..files import atomic_path
from .domains import coding, knowledge, maths, reasoning
from .domains.made import Kinds, Made

DOMAINS: dict[str, Kinds] = {
    "common_sense": knowledge.KINDS,
    "reasoning": reasoning.KINDS,
    "mathematics": maths.KINDS,
    "coding": coding.KINDS,
}
SHARES = {"common_sense": 0.25, "reasoning": 0.25, "mathematics": 0.27, "coding": 0.23}
"""Share of each domain in the pool."""

Part = Literal["pool", "seeds", "held_out"]
_PARTS: tuple[Part, ...] = ("held_out", "seeds", "pool", "pool", "pool", "pool", "pool", "pool", "pool", "pool")


def part_of(instruction: str, text: str) -> Part:
    """The part of a question: a tenth is held out, a tenth is for seeds, the rest is the pool."""
    digest = blake2b(f"{instruction}\x00{text}".encode(), digest_size=8).digest()
    return _PARTS[int.from_bytes(digest) % len(_PARTS)]


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """`count` distinct rows of the pool's part: `instruction`, `input`, `output`, `source` (the hidden domain), `kind`.

    Raises `UserError` when the grammars hold fewer. The same seed gives the same rows on every machine.

    >>> corpus.rows(2, seed=0)[0].keys()
    dict_keys(['instruction', 'input', 'output', 'source', 'kind'])
    """
    return _mixed(count, seed, "pool")


def held_out(count: int, seed: int) -> list[dict[str, str]]:
    """`count` distinct rows that are in no pool and no seed set, with the same shares of the domains.

    >>> len(corpus.held_out(100, seed=0))
    100
    """
    return _mixed(count, seed, "held_out")


def seed_rows(per_domain: int, seed: int) -> list[dict[str, str]]:
    """Example rows for the seeds file, `per_domain` of each: `domain`, `instruction`, `input`, `output`.

    The kinds of a domain are taken in turn, so that the examples cover the domain.

    >>> len(corpus.seed_rows(5, seed=0))
    20
    """
    chosen = []
    for domain, kinds in DOMAINS.items():
        rng = random.Random(f"siftune seeds {seed} {domain}")
        order = rng.sample(range(len(kinds)), len(kinds))
        seen: set[tuple[str, str]] = set()
        while len(seen) < per_domain:
            _, _, maker = kinds[order[len(seen) % len(order)]]
            made = maker(rng)
            if part_of(made.instruction, made.input) == "seeds" and (made.instruction, made.input) not in seen:
                seen.add((made.instruction, made.input))
                chosen.append(
                    {"domain": domain, "instruction": made.instruction, "input": made.input, "output": made.output}
                )
    return chosen


def stream(domain: str, seed: int) -> Iterator[tuple[str, Made]]:
    """Endless (kind, made row) of one domain, all parts, with repetitions."""
    kinds = DOMAINS[domain]
    weights = [often for _, often, _ in kinds]
    rng = random.Random(f"siftune corpus {seed} {domain}")
    while True:
        kind, _, maker = rng.choices(kinds, weights)[0]
        yield kind, maker(rng)


def write(folder: str | Path, *, count: int = 6000, per_domain: int = 15, held: int = 400, seed: int = 0) -> Path:
    """Write `pool.jsonl`, `seeds.jsonl` and `held_out.jsonl` into a folder, replacing files of these names; returns the folder.

    The pool's `source` and `kind` columns are for reports only; no method reads them.

    >>> corpus.write("demo-data")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"pool": rows(count, seed), "seeds": seed_rows(per_domain, seed), "held_out": held_out(held, seed)}
    for name, made in files.items():
        with atomic_path(folder / f"{name}.jsonl") as temporary:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            temporary.write_text(lines, encoding="utf-8")
    return folder


def _mixed(count: int, seed: int, part: Part) -> list[dict[str, str]]:
    names = list(DOMAINS)
    counts = [int(count * SHARES[name]) for name in names]
    for index in range(count - sum(counts)):
        counts[index] += 1
    made = [row for name, number in zip(names, counts, strict=True) for row in _distinct(name, number, seed, part)]
    random.Random(f"siftune order {seed}").shuffle(made)
    return made


def _distinct(domain: str, count: int, seed: int, part: Part) -> list[dict[str, str]]:
    seen: set[tuple[str, str]] = set()
    distinct_rows: list[dict[str, str]] = []
    source = stream(domain, seed)
    for _ in range(200 * count + 2000):
        if len(distinct_rows) == count:
            return distinct_rows
        kind, made = next(source)
        question = (made.instruction, made.input)
        if question in seen or part_of(*question) != part:
            continue
        seen.add(question)
        distinct_rows.append(
            {
                "instruction": made.instruction,
                "input": made.input,
                "output": made.output,
                "source": domain,
                "kind": kind,
            }
        )
    if len(distinct_rows) == count:
        return distinct_rows
    raise UserError(
        f"the embedded corpus holds only about {len(distinct_rows)} different {domain} rows; ask for fewer than {count}"
    )
