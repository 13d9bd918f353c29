"""docs/scaling.md holds texts that scripts write, each between its two marks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"


def put(text: str, marks: tuple[str, str], *, write: bool) -> None:
    """The text between its marks in place of what was there, or only printed. Ends with one sentence where the page lacks
    the marks."""
    if not write:
        sys.stdout.write(text + "\n")
        return
    page = PAGE.read_text(encoding="utf-8")
    between = re.compile(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), re.DOTALL)
    if not between.search(page):
        raise SystemExit(f"{PAGE.name} lacks the marks {marks[0]} and {marks[1]}")
    PAGE.write_text(between.sub(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page), encoding="utf-8")
