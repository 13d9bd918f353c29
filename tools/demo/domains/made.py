"""One made row, and the small grammar tools its makers share.

A maker is a function of a `random.Random` alone, so a seed fixes the corpus on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A question, its computed answer, and where it fits how the tests can recompute it."""

    instruction: str
    output: str
    input: str = ""
    check: str = ""
    """Python asserts that hold after the output has run (rows whose output is a program), else empty."""


Maker = Callable[[random.Random], Made]
Kinds = Sequence[tuple[str, float, Maker]]
"""(kind, how often, maker)."""

NAMES = [
    "Ada",
    "Ben",
    "Carla",
    "Dev",
    "Elif",
    "Femi",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Mina",
    "Noor",
    "Omar",
    "Petra",
    "Quinn",
    "Rosa",
    "Sven",
    "Tara",
    "Uma",
    "Viktor",
    "Wanda",
    "Yusuf",
    "Zoe",
    "Anton",
    "Bela",
    "Chidi",
    "Dora",
    "Emil",
]
THINGS = [
    "apples",
    "pencils",
    "coins",
    "stamps",
    "marbles",
    "books",
    "shells",
    "buttons",
    "tickets",
    "stickers",
    "candles",
    "cups",
    "plums",
    "nails",
    "bottles",
]


def pick(rng: random.Random, *choices: T) -> T:
    """One of the choices, uniformly."""
    return choices[rng.randrange(len(choices))]


def people(rng: random.Random, count: int) -> list[str]:
    """Different names."""
    return rng.sample(NAMES, count)


def a(noun: str) -> str:
    """The noun with its article: `an owl`, `a fox`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def up(text: str) -> str:
    """The text with its first letter large and the rest as it is."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str], joint: str = "and") -> str:
    """`x, y and z`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joint} {words[-1]}"
