"""`siftune methods`: every method, its paper, its requirements."""

from __future__ import annotations

from .. import registry
from ..output import say
from ..runs.options import Everywhere, options_of
from .common import print_json, read
from .parser import Command


def run(words: list[str]) -> int:
    command = Command(
        "methods",
        "siftune methods [options]",
        "Every method: one line, its paper, its requirements.",
        options_of(Everywhere),
        examples=("siftune methods", "siftune methods --json"),
    )
    values = read(command, words)
    if values is None:
        return 0
    every = list(registry.methods())
    if values["json"]:
        fields = ("side", "name", "summary", "paper", "needs")
        print_json([{field: getattr(entry, field) for field in fields} for entry in every])
        return 0
    if values["quiet"]:
        for entry in every:
            say(f"{entry.side} {entry.name}")
        return 0
    from ..screen import console
    from .terminal import table

    titles = {
        "offline": "offline: scores a pool once, before training (siftune select METHOD)",
        "online": "online: scores every batch during training (siftune.attach)",
    }
    for side, title in titles.items():
        entries = [entry for entry in every if entry.side == side]
        lines = [(entry.name, entry.summary, entry.paper, entry.needs) for entry in entries]
        console().print(table(title, ("method", "what it ranks by", "paper", "needs"), lines))
    return 0
