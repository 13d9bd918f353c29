"""Everything that siftune prints: results on standard output; errors, notes and progress on standard error.

A row, a domain's name, a file's name, an option's value or a server's reply may hold characters that retitle a
terminal, clear its screen or reverse the reading direction. `visible` writes each of them as `[U+001B]`. `say`,
`as_json` and the consoles of `siftune.screen` are the only ways out, and all of them go through it; a test checks that
nothing else in the package prints. Cost: one pass over what is printed.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, TextIO

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls but tab and newline
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # direction, zero width, separators
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"  # annotations, lone surrogates, tags
)
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def visible(text: str) -> str:
    """The same text with every character that would change its look unseen written as `[U+202E]`.

    >>> visible("a" + chr(0x202E) + "b")
    'a[U+202E]b'
    """
    return _UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text.replace("\r\n", "\n"))


def single_line(text: str) -> str:
    """The text as `visible` gives it, on one line: every line break is a space.

    >>> single_line("a\\nb" + chr(27))
    'a b[U+001B]'
    """
    return visible(_LINE_BREAK.sub(" ", text))


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON for a terminal: readable letters as they are, every character that `visible` would name as `\\uXXXX`.

    >>> as_json({"name": chr(0x9B)})
    '{"name": "\\\\u009b"}'
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    return _UNSEEN.sub(lambda match: json.dumps(match[0])[1:-1], text)


def say(
    text: object = "",
    *,
    multiline: bool = False,
    error: bool = False,
    end: str = "\n",
    file: TextIO | None = None,
) -> None:
    """Print a message of one line: on standard output, with `error` on standard error, or to `file`.

    `multiline` keeps line breaks: for help, YAML, JSON and prompts, which are shown as they are.
    """
    shown = visible(str(text)) if multiline else single_line(str(text))
    stream = file or (sys.stderr if error else sys.stdout)
    print(shown + end, end="", file=stream, flush=True)  # one write: threads print too
