"""What the two studies without training share: their YAML, their draw of real rows, rank correlations, the page's table.

A draw takes equally many rows of each pool file, by a seed; the file's name is the row's true domain, which no method sees.
Cost: one pass over the files.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DOMAINS = ("common_sense", "reasoning", "math", "code")
FIELDS = ("instruction", "input", "output")

Study = TypeVar("Study")


def read_study(cls: type[Study], path: Path) -> Study:
    """A study's YAML as its dataclass; ends with one sentence for a key that it does not have, or lacks."""
    import yaml

    said = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in said:
        if name not in known:
            raise SystemExit(f"{path} has the unknown key {name}; known: {', '.join(known)}")
    if lacking := [name for name in known if name not in said]:
        raise SystemExit(f"{path} lacks {', '.join(lacking)}")
    return cls(**said)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a gzip JSONL file, in order."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a JSONL file; its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def draw(data: Path, count: int, seed: object, *, held_out: bool = False) -> list[dict[str, Any]]:
    """`count` rows of each domain's file, shuffled within the domain, with `true_domain` beside their own fields."""
    drawn = []
    for name in DOMAINS:
        rows = read_rows(data / f"{name}{'_heldout' if held_out else ''}.jsonl.gz")
        for row in random.Random(f"{seed} {name}").sample(rows, min(count, len(rows))):
            drawn.append({**{field: row[field] for field in FIELDS}, "true_domain": name})
    return drawn


def ranks(values: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing their mean rank."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=np.float64)


def spearman(one: Any, other: Any) -> float:
    """Rank correlation; NaN where one side is constant."""
    return _pearson(ranks(one), ranks(other))


def partial_spearman(one: Any, other: Any, given: Any) -> float:
    """Rank correlation of two quantities once the ranks of a third are regressed out of both."""
    a, b, g = ranks(one), ranks(other), ranks(given)
    design = np.stack([np.ones(len(g)), g], axis=1)
    left = a - design @ np.linalg.lstsq(design, a, rcond=None)[0]
    right = b - design @ np.linalg.lstsq(design, b, rcond=None)[0]
    return _pearson(left, right)


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 1e-9 * len(a) else float("nan")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and in brackets the smallest and largest."""
    known = [value for value in values if value == value]
    if not known:
        return "-"
    return f"{np.mean(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"
