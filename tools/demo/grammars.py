"""The grammars of the demo's corpus: instruction rows of four domains, from grammars and tables written for siftune.

`tools/demo/make_corpus.py` writes the rows that the package ships; `train_model.py` trains the embedded model on others.

Every answer is computed or looked up, never guessed. Domains overlap deliberately (word problems, programs about numbers,
sums about everyday things), so inferred labels do not agree perfectly with the hidden ones. A row belongs
to exactly one of three parts (pool, seeds, held out) by the hash of its question, whatever the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import blake2b

from siftune.demo.corpus import Part, mix, shuffled

from .domains import coding, knowledge, maths, reasoning
from .domains.made import Kinds, Made

DOMAINS: dict[str, Kinds] = {
    "common_sense": knowledge.KINDS,
    "reasoning": reasoning.KINDS,
    "mathematics": maths.KINDS,
    "coding": coding.KINDS,
}
_PARTS: tuple[Part, ...] = ("held_out", "seeds", "pool", "pool", "pool", "pool", "pool", "pool", "pool", "pool")


def part_of(instruction: str, text: str) -> Part:
    """The part of a question: a tenth is held out, a tenth is for seeds, the rest is the pool."""
    digest = blake2b(f"{instruction}\x00{text}".encode(), digest_size=8).digest()
    return _PARTS[int.from_bytes(digest) % len(_PARTS)]


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """`count` distinct rows of the pool's part: `instruction`, `input`, `output`, `source` (the hidden domain), `kind`.

    Raises `ValueError` when the grammars hold fewer. The same seed gives the same rows on every machine.

    >>> grammars.rows(2, seed=0)[0].keys()
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


def _mixed(count: int, seed: int, part: Part) -> list[dict[str, str]]:
    written = [row for domain, number in mix(count).items() for row in distinct(domain, number, seed, part)]
    return shuffled(written, seed)


def stream(domain: str, seed: int) -> Iterator[tuple[str, Made]]:
    """Endless (kind, made row) of one domain, all parts, with repetitions."""
    kinds = DOMAINS[domain]
    weights = [often for _, often, _ in kinds]
    rng = random.Random(f"siftune corpus {seed} {domain}")
    while True:
        kind, _, maker = rng.choices(kinds, weights)[0]
        yield kind, maker(rng)


def distinct(domain: str, count: int, seed: int, part: Part) -> list[dict[str, str]]:
    """The first `count` distinct rows of one domain and part, in the order in which the grammar writes them."""
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
    raise ValueError(
        f"the grammars hold only about {len(distinct_rows)} different {domain} rows; ask for fewer than {count}"
    )
