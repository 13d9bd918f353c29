"""Rich consoles for tables and summaries: their input is text, never markup and never control characters.

Colours stop where NO_COLOR is set or the output is not a terminal.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from .output import single_line, visible

PIPED_WIDTH = 160


class Screen(Console):
    """A console that prints strings as they are, in paragraphs and in the cells of tables, by `output.visible`."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, or that a table holds, passes through here."""
        return super().render_str(visible(text), **options)

    def line(self, text: object = "") -> None:
        """One line: line breaks in it are spaces."""
        self.print(single_line(str(text)))


def console(*, piped_width: int = PIPED_WIDTH, silent: bool = False) -> Screen:
    """Standard output: as wide as the terminal, wide enough for complete lines otherwise."""
    width = None if sys.stdout.isatty() else piped_width
    return Screen(file=sys.stdout, markup=False, emoji=False, highlight=False, width=width, quiet=silent)


def error_console() -> Screen:
    """Standard error, for progress bars."""
    return Screen(file=sys.stderr, markup=False, emoji=False, highlight=False)
