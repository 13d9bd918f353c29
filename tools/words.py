"""Words that siftune's code and documentation do not use, each with its replacement.

    python tools/words.py

Checks the names that a file defines, its comments, docstrings and string literals, in the files of `ROOMS`, and the text of
`PAGES`. Prints `file:line: word -> replacement` for each finding; exit code 1 where there is one. Cost: about a second.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("siftune",)
"""The files and folders that are checked: the complete package."""
PAGES = ("README.md", "docs")
EXCLUDED = (
    "docs/results",  # written by scripts
    "docs/benchmarks.md",
    "docs/reliability.md",
    "docs/real-model.md",
)
TEXT = {
    r"said": "name the thing: message, value, flags",
    r"told": "message, event; in sentences: passed, given, set",
    r"mend(s|ed|ing)?": "fix",
    r"nobody|nobody's": "no user, no row, none",
    r"strangers?": "foreign files, unknown rows",
    r"guilty": "failing",
    r"stands?": "is, is stored in, represents",
    r"lies": "is, is stored in",
    r"hangs? on": "depends on",
    r"(our fault|faults? of siftune)": "internal error",
    r"goes on where|went on where|going on where": "resumes",
    r"by hand": "manually",
    r"(in sight|at hand)": "available",
    r"in (its|their) stead": "instead",
    r"(learnt tokens?|tokens? learnt|tokens? that (is|are) learnt)": "label tokens",
    r"no amount of": "NAME must be >= 1, got VALUE",
}
"""Patterns of words in sentences, without regard to case, and what to write."""
NAME_PARTS = {"said", "told", "mend", "mended", "nobody", "strangers", "guilty"}
NAMES = {"asked", "found", "wanted", "whole"}
"""Names that say nothing of the thing; as a part of a longer name they are allowed."""
REPLACEMENT = "name the thing: flags, message, verdict, rows, result"

Finding = tuple[int, str, str]
"""Line, word and replacement."""


def in_text(text: str, line: int) -> Iterator[Finding]:
    """The banned words of a text that begins on `line`."""
    for pattern, replacement in TEXT.items():
        for match in re.finditer(rf"(?<![\w-])({pattern})(?![\w-])", text, re.IGNORECASE):
            yield line + text.count("\n", 0, match.start()), match[0], replacement


def in_name(name: str, line: int) -> Iterator[Finding]:
    """The name itself where it is banned, or has a banned part."""
    if name.strip("_") in NAMES or NAME_PARTS & set(name.lower().split("_")):
        yield line, name, REPLACEMENT


def in_python(source: str) -> Iterator[Finding]:
    """The banned words of a Python file: defined names, comments, docstrings, and literals of more than one word.

    A literal of one word is a key of a file or of an option, and those names are public.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield from in_name(name, node.lineno)
            case ast.arg(arg=name):
                yield from in_name(name, node.lineno)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield from in_name(name, node.lineno)
            case ast.Constant(value=str(text)) if not text.isidentifier():
                yield from in_text(text, node.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from in_text(token.string, token.start[0])


def files(root: Path = ROOT) -> list[Path]:
    """The files that are checked."""
    python = [
        path for room in ROOMS for path in ((root / room).rglob("*.py") if (root / room).is_dir() else [root / room])
    ]
    pages = [
        path for page in PAGES for path in ((root / page).rglob("*.md") if (root / page).is_dir() else [root / page])
    ]
    excluded = [root / name for name in EXCLUDED]
    return sorted(path for path in [*python, *pages] if not any(path.is_relative_to(one) for one in excluded))


def main() -> int:
    """Print every finding; 1 where there is one."""
    count = 0
    for path in files():
        source = path.read_text(encoding="utf-8")
        findings = in_python(source) if path.suffix == ".py" else in_text(source, 1)
        for line, word, replacement in sorted(set(findings)):
            print(f"{path.relative_to(ROOT)}:{line}: {word} -> {replacement}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
