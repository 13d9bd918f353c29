"""The composition of the pool and of the chosen rows, by pseudo-domain and by every column that looks like a label.

A column looks like a label when it holds few distinct short values. Cost: one pass over the pool's rows, or over a random
sample of `MAX_READ` rows.

Shapes: `n` rows of the pool, `V` values of a column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.formats import FIELDS
from ..records import Pool
from . import words
from .blocks import Pair, Table
from .untrusted import visible

MAX_VALUES = 30
MAX_CHARACTERS = 60
MAX_COLUMNS = 3
UNFOLDED = 12
"""Tables with up to this many values are shown open; longer ones are collapsed."""
SAMPLED = 2000
MAX_READ = 200_000
CHUNK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Labels:
    """One column's value of each row that was read."""

    name: str
    values: tuple[str, ...]
    """The values, the most frequent first, made visible."""
    of: NDArray[np.int16]
    """Shape `(n,)`: index into `values`; -1 where the row has none or was not read."""


def label_columns(pool: Pool, *, seed: int = 0) -> list[Labels]:
    """The columns of the user's own rows that look like labels, at most `MAX_COLUMNS`."""
    rows = pool.eligible
    draw = np.random.Generator(np.random.PCG64(seed))
    sample = np.sort(draw.choice(rows, SAMPLED, replace=False)) if len(rows) > SAMPLED else rows
    names = _candidates(pool, sample.tolist())
    if not names:
        return []
    read = np.sort(draw.choice(rows, MAX_READ, replace=False)) if len(rows) > MAX_READ else rows
    by_column: dict[str, dict[int, str]] = {name: {} for name in names}
    for start in range(0, len(read), CHUNK_ROWS):
        part = read[start : start + CHUNK_ROWS].tolist()
        for row, original in zip(part, pool.source.originals(part), strict=True):
            for name in names:
                if _short(original.get(name)):
                    by_column[name][row] = str(original[name])
    columns = [_labels(name, values, len(pool)) for name, values in by_column.items()]
    return sorted((one for one in columns if len(one.values) <= MAX_VALUES), key=lambda one: len(one.values))


def _candidates(pool: Pool, rows: Sequence[int]) -> list[str]:
    reading = getattr(pool.source, "reading", None)
    format_fields = {name for fields in FIELDS.values() for name in fields} | {"conversations"}
    format_fields |= set(getattr(reading, "columns", {}).values())
    values: dict[str, Counter[str]] = {}
    unsuitable: set[str] = set()
    for original in pool.source.originals(rows):
        for name, value in original.items():
            if name in format_fields or name in unsuitable or value is None:
                continue
            if not _short(value) or (len(values.get(name, ())) == MAX_VALUES and str(value) not in values[name]):
                unsuitable.add(name)
                continue
            values.setdefault(name, Counter())[str(value)] += 1
    suitable = [name for name in values if name not in unsuitable and len(values[name]) >= 2]
    return [name for name in suitable if values[name].total() >= len(rows) / 2][:MAX_COLUMNS]


def _short(value: Any) -> bool:
    return isinstance(value, (str, bool, int)) and len(str(value)) <= MAX_CHARACTERS


def _labels(name: str, values: dict[int, str], rows: int) -> Labels:
    order = [value for value, _ in sorted(Counter(values.values()).items(), key=lambda item: (-item[1], item[0]))]
    index = {value: number for number, value in enumerate(order[:MAX_VALUES])}
    of = np.full(rows, -1, dtype=np.int16)
    for row, value in values.items():
        of[row] = index.get(value, -1)
    return Labels(visible(name), tuple(visible(value) for value in order), of)


def in_order_of(names: Sequence[str], columns: Sequence[Labels]) -> list[Labels]:
    """The columns; a column with exactly these names as values is reordered to match them, so that colours agree."""
    ordered = []
    for one in columns:
        if set(one.values) == set(names) and len(one.values) == len(names):
            place = np.array([*(names.index(value) for value in one.values), -1], dtype=np.int16)
            one = Labels(one.name, tuple(names), place[one.of])
        ordered.append(one)
    return ordered


def composition(
    name: str,
    values: Sequence[str],
    of: NDArray[Any],
    kept: NDArray[np.bool_],
    caption: str,
    *,
    sides: tuple[str, str] = ("pool", "chosen"),
) -> Table:
    """The table of a labelling: rows of the pool and chosen rows per value, and the share of each value that was chosen.

    `sides` are the words for all rows and for the chosen ones.
    """
    counts = [(int((of == index).sum()), int(((of == index) & kept).sum())) for index in range(len(values))]
    read, chosen = sum(pool for pool, _ in counts), sum(part for _, part in counts)
    rest = int((of < 0).sum()), int(((of < 0) & kept).sum())
    most = max([1e-9, *(pool / max(1, read) for pool, _ in counts), *(part / max(1, chosen) for _, part in counts)])
    rows: list[list[str | Pair]] = []
    for value, (pool, part) in zip(values, counts, strict=True):
        bars = Pair(pool=pool / max(1, read) / most, chosen=part / max(1, chosen) / most)
        cells = [value, words.count(pool), words.share(pool, read), words.count(part), words.share(part, chosen)]
        rows.append([*cells, words.share(part, pool), bars])
    if rest[0]:
        rows.append(["none", words.count(rest[0]), "–", words.count(rest[1]), "–", words.share(rest[1], rest[0]), ""])
    return Table(
        caption=caption,
        columns=(
            name,
            sides[0],
            "share",
            sides[1],
            "share",
            f"{sides[1]} of these",
            f"{sides[0]} (grey), {sides[1]} (blue)",
        ),
        rows=rows,
        numbers=(1, 2, 3, 4, 5),
        folded=len(values) > UNFOLDED,
    )
