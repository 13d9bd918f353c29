"""Functions that the commands share: read options, look up methods, print JSON."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import UserError
from ..file_keys import check_texts
from ..output import as_json, say
from ..progress import begin
from ..runs.options import PARTS, Option, options_of, read_config
from .parser import Command, HelpRequested

SEEDS = 2**32
"""Exclusive upper bound of seeds that every underlying library accepts."""


def read(command: Command, words: Sequence[str]) -> dict[str, Any] | None:
    """The options' values; None when the help was printed."""
    try:
        values = command.read(words)
    except HelpRequested:
        say(command.help(), multiline=True, end="")
        return None
    for name, value in values.items():
        check_texts(value, f"--{name.replace('_', '-')}", command.where)
    if not (values.get("quiet") or values.get("json") or sys.stderr.isatty()):
        begin(command.name)
    seed = values.get("seed")
    if seed is not None and not 0 <= seed < SEEDS:
        raise UserError(f"--seed {str(seed)[:20]} is not from 0 to {SEEDS - 1}; choose another")
    if values.get("cache"):  # also for code that takes no cache argument
        os.environ["SIFTUNE_CACHE"] = str(Path(values["cache"]).expanduser().absolute())
    return values


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    say(as_json(value, indent=2), multiline=True)


def own_options(method: str) -> list[Option]:
    """The options of one method: the fields of its dataclass."""
    cls = registry.find("offline", method).load()
    return options_of(cls, group=f"The method {method}", skip=(*PARTS, "seed"))


def which_method(words: list[str], command: str = "select") -> tuple[str | None, list[str]]:
    """The method's name, from the first word or the configuration file, and the remaining words; None for help."""
    if words and not words[0].startswith("-"):
        return registry.find("offline", words[0]).name, words[1:]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("-h", "--help", action="store_true")
    early.add_argument("--config", nargs="?")
    options, _ = early.parse_known_args(words)
    if options.help:
        return None, words
    method = read_config(options.config).get("method") if options.config else None
    if method is None:
        known = ", ".join(entry.name for entry in registry.methods("offline"))
        raise UserError(
            f"siftune {command} needs a method as its first argument: one of {known}; see siftune {command} --help"
        )
    return registry.find("offline", str(method)).name, words


MAP_ROWS = 5000
"""Rows of the map on the page that a command writes at its end; keeps it to seconds for any pool size."""


def page_line(run: str | Path, *, cache: str | None = None, seed: int = 0) -> str:
    """Write the page of a finished run into its folder; returns a line for "next", with the reason where no page was written.

    The run is already finished, so an error here does not end the command.
    """
    from ..reports import report

    try:
        path = report.write(run, map_rows=MAP_ROWS, cache=cache, seed=seed)
    except UserError as error:
        return f"siftune report {run}   the page of this run ({error})"
    return f"{path}   the page of this run, to open in a browser"
