"""`siftune version`: versions of siftune and of its dependencies."""

from __future__ import annotations

from .. import __version__
from ..output import say
from ..runs.options import Everywhere, options_of
from .common import print_json, read
from .parser import Command


def run(words: list[str]) -> int:
    command = Command(
        "version", "siftune version [options]", "Versions of siftune and of its dependencies.", options_of(Everywhere)
    )
    values = read(command, words)
    if values is None:
        return 0
    from ..runs.folder import versions

    installed = {"siftune": __version__, **versions()}
    if values["json"]:
        print_json(installed)
    elif values["quiet"]:
        say(__version__)
    else:
        for name, number in installed.items():
            say(f"{name} {number}")
    return 0
