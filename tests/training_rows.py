"""Rows for the tests of training: short questions and answers of mixed length, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "seven",
    "owls",
    "count",
    "stars",
    "over",
    "a",
    "quiet",
    "hill",
    "while",
    "rivers",
    "turn",
    "blue",
    "stones",
    "into",
    "sand",
]


def alpaca(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Alpaca rows, all different."""
    draw = random.Random(seed)

    def said(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    return [{"instruction": f"{index} {said(4)}", "input": "", "output": said(6)} for index in range(count)]


def write_alpaca(path: Path, count: int, *, seed: int = 0) -> Path:
    """The same as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in alpaca(count, seed=seed)))
    return path
