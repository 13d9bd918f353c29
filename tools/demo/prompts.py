"""The embedded model's prompts for example rows, and the form of its answers: a sentence per domain in, triples out.

The model was trained on this wording (`train_model.py`), so use this wording with it. A chat model of any size can
read the requests; only the form of the answer is fixed:

    1.
    Instruction: ...
    Input: ...        (empty where the question needs none)
    Output: ...
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from .grammars import DOMAINS, part_of, stream

DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "common_sense": (
        "Short questions about the everyday world, answered from knowledge without any steps.",
        "General knowledge: a question about the world and its answer, with no reasoning.",
        "Common sense facts about animals, objects, places and people.",
    ),
    "reasoning": (
        "Logical puzzles: draw the conclusion that follows from the statements given.",
        "Logical thinking: everything needed is in the question, and the answer follows from it.",
        "Reasoning over given information, such as orders, rules and who has what.",
    ),
    "mathematics": (
        "Calculation and mathematical problems with a number as the answer.",
        "Mathematics: sums, equations, fractions and word problems that have to be computed.",
        "Arithmetic, algebra and geometry exercises with their solutions.",
    ),
    "coding": (
        "Programming tasks: write, read, repair or explain Python code.",
        "Writing programs and algorithms, with code in the question or in the answer.",
        "Python coding exercises whose output is a program.",
    ),
}
"""Sentences that describe each domain; the demo uses the first."""


def seed_request(description: str, *, count: int = 5, avoid: Sequence[str] = ()) -> str:
    """Ask for `count` rows of the described domain, unlike the domains in `avoid`.

    >>> prompts.seed_request(prompts.DESCRIPTIONS["coding"][0], count=2)
    """
    request = f"Write {count} different training examples for this domain.\nDomain: {description}\n"
    request += "".join(f"Not: {other}\n" for other in avoid)
    return request + "Give each as Instruction, Input and Output."


def variation_request(description: str, examples: Sequence[Mapping[str, str]], *, avoid: Sequence[str] = ()) -> str:
    """Ask for one more row of the domain that is unlike the rows shown.

    >>> prompts.variation_request("Sums.", [{"instruction": "1 + 1?", "input": "", "output": "2"}])
    """
    shown = "\n".join(triple(row) for row in examples)
    request = f"Write one more training example for this domain, unlike those shown.\nDomain: {description}\n"
    request += "".join(f"Not: {other}\n" for other in avoid)
    return f"{request}{shown}\nGive it as Instruction, Input and Output."


def triple(row: Mapping[str, str]) -> str:
    """One row in the form of the answers."""
    return f"Instruction: {row['instruction']}\nInput: {row['input']}\nOutput: {row['output']}"


def numbered(rows: Sequence[Mapping[str, str]]) -> str:
    """Several rows in the form of the answers."""
    return "\n".join(f"{index}.\n{triple(row)}" for index, row in enumerate(rows, start=1))


def conversation(rng: random.Random, seed: int) -> list[dict[str, str]]:
    """One training document: a request for rows of a random domain, and a correct answer from the pool's part."""
    domain = rng.choice(list(DOMAINS))
    description = rng.choice(DESCRIPTIONS[domain])
    avoid = [rng.choice(DESCRIPTIONS[name]) for name in DOMAINS if name != domain] if rng.random() < 0.5 else []
    several = rng.random() < 0.6
    count = rng.randrange(1, 6) if several else 3
    rows: list[dict[str, str]] = []
    for _, made in stream(domain, seed):
        if part_of(made.instruction, made.input) == "pool":
            rows.append({"instruction": made.instruction, "input": made.input, "output": made.output})
        if len(rows) == count + (not several):
            break
    if several:
        request, answer = seed_request(description, count=count, avoid=avoid), numbered(rows)
    else:
        shown = rows[: rng.randrange(1, 4)]
        request, answer = variation_request(description, shown, avoid=avoid), triple(rows[-1])
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
