"""The request for one row in the plainest words, for a model that cannot keep to the form of the usual requests.

Two finished turns about fields that are no domain of the run show the form; a model of 0.1 B parameters, which answers
the usual request for five rows with remarks on it, then writes a usable row more often than not. Cost: about 200
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...models.generate import Message
from .descriptions import Domain

PLAIN_TOKENS = 256
"""Tokens of a reply to a plain request at most: it holds one row."""
SHOWN = 2
"""Finished turns before the request."""

FIELDS: Mapping[str, tuple[str, str, str]] = {
    "cooking": (
        "Preparing food: recipes, ingredients, kitchen tools.",
        "How long should an egg be boiled so that its yolk stays soft?",
        "Put the egg into boiling water for six minutes, then cool it under cold water. The white is firm and the yolk "
        "still soft.",
    ),
    "gardening": (
        "Growing plants: soil, water, light, and the care of a garden.",
        "Explain why tomato plants are tied to a stake.",
        "The stems cannot carry the weight of the fruit. A stake keeps the plant upright, so that the fruit does not lie "
        "on wet soil and rot.",
    ),
    "sewing": (
        "Making and repairing clothes: fabric, thread, stitches.",
        "Which stitch is used to hem a pair of trousers so that it cannot be seen?",
        "A blind stitch: the needle takes only one or two threads of the outer fabric, so that nothing shows outside.",
    ),
    "fishing": (
        "Catching fish: tackle, bait, places and seasons.",
        "Name a bait for carp and explain why it works.",
        "Sweet corn. It is soft, sweet and yellow, so that carp smell and see it at the bottom of a pond.",
    ),
}
"""Fields that show the form: description, instruction, output."""


def plain_messages(domain: Domain, domains: Sequence[str]) -> tuple[Message, ...]:
    """The conversation that asks for one row of a domain; fields named like one of `domains` are not shown.

    >>> [role for role, _ in plain_messages(Domain("law", "Questions of law."), ["law", "music"])]
    ['user', 'assistant', 'user', 'assistant', 'user']
    """
    turns: list[Message] = []
    for name in [name for name in FIELDS if name not in domains][:SHOWN]:
        description, instruction, output = FIELDS[name]
        turns += [("user", _request(name, description)), ("assistant", f"Instruction: {instruction}\nOutput: {output}")]
    return (*turns, ("user", _request(domain.name, domain.description)))


def copies_the_form(row: Mapping[str, str]) -> bool:
    """Whether the row is one of those that show the form."""
    return any(row["instruction"] == instruction for _, instruction, _ in FIELDS.values())


def _request(name: str, description: str) -> str:
    return f"Write one question or task from the field of {name.replace('_', ' ')}, with its answer. {description}"
