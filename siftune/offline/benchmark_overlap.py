"""Rows of a pool that hold text of a benchmark: 13 words in a row in common, or a part that is a benchmark's text.

    overlap   any run of 13 words of a benchmark row (all its texts, in order) is also in the row
    equal     a part of the row (a turn, a question, an answer, all of it) of at least 5 words is a text of a benchmark row

Words are those of `words`: no letter case, no punctuation. Source of the 13-gram rule: GPT-3, arXiv 2005.14165, appendix C.
Cost: one pass over the pool's words; memory 16 bytes for each 13-gram of the benchmarks.

Axes: `G` 13-grams of the benchmarks.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..data.formats import text_of
from ..data.messages import plain_text
from ..errors import UserError
from ..files import hash_file, refuse_special
from ..progress import counted
from ..records import Pool, Row
from .draw import blocks
from .near_copies import word_hashes
from .words import words_of

GRAM = 13
LEAST_WORDS = 5
"""Shorter texts (an answer `42`) are in any pool."""
KIND = "in a benchmark"
"""The kind of the reason, under which such rows are counted."""
ROWS_AT_ONCE = 256

_POWERS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(GRAM)], dtype=np.uint64)


@dataclass(frozen=True, eq=False)
class BenchmarkTexts:
    """Texts of benchmark files, as hashes."""

    grams_G: NDArray[np.uint64]
    """Ascending ..."""
    places_G: NDArray[np.int64]
    """... and the benchmark row of each, an index into `names`."""
    equal: dict[tuple[int, ...], int]
    """The words of each text of at least 5, as numbers, and its benchmark row."""
    names: list[str]
    """`FILE line N` of every benchmark row."""

    def reason(self, row: Row) -> str | None:
        """Why a row of the pool is left out, or None."""
        words = word_hashes(words_of(text_of(row)))
        if len(words) >= GRAM and len(self.grams_G):
            grams = _grams(words)
            at = np.minimum(np.searchsorted(self.grams_G, grams), len(self.grams_G) - 1)
            found = np.flatnonzero(self.grams_G[at] == grams)
            if len(found):
                return f"{KIND}: {GRAM} words in a row of {self.names[int(self.places_G[at[found[0]]])]}"
        parts = [plain_text(message) for message in row.messages] or [
            row.instruction,
            row.input,
            row.output,
            row.question,
        ]
        for part in (*parts, text_of(row)):
            numbers = tuple(word_hashes(words_of(part)).tolist())
            if numbers in self.equal:
                return f"{KIND}: a text of {self.names[self.equal[numbers]]}"
        return None


def _grams(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    result: NDArray[np.uint64] = (sliding_window_view(words, GRAM) * _POWERS).sum(axis=1, dtype=np.uint64)
    return result


def read_benchmarks(files: Sequence[Path]) -> BenchmarkTexts:
    """The texts of JSON Lines files (also .gz), whatever their fields. Raises `UserError` by file and line."""
    grams: list[NDArray[np.uint64]] = []
    places: list[NDArray[np.int64]] = []
    equal: dict[tuple[int, ...], int] = {}
    names: list[str] = []
    for file in files:
        for line, value in _lines(file):
            texts = list(_texts(value))
            words = word_hashes([word for text in texts for word in words_of(text)])
            if len(words) >= GRAM:
                grams.append(_grams(words))
                places.append(np.full(len(grams[-1]), len(names), dtype=np.int64))
            for text in texts:
                numbers = tuple(word_hashes(words_of(text)).tolist())
                if len(numbers) >= LEAST_WORDS:
                    equal.setdefault(numbers, len(names))
            names.append(f"{file.name} line {line}")
    flat = np.concatenate(grams) if grams else np.empty(0, dtype=np.uint64)
    owner = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
    order = np.argsort(flat, kind="stable")
    return BenchmarkTexts(flat[order], owner[order], equal, names)


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Every row of a file with its line."""
    refuse_special(file)
    opener: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise UserError(f"decontaminate: {file} line {number} is no JSON ({error})") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"decontaminate: {file} cannot be read ({error}); use .jsonl or .jsonl.gz files") from error


def _texts(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def benchmark_rows(pool: Pool, benchmarks: BenchmarkTexts) -> dict[int, str]:
    """A reason for every eligible row of the pool that holds text of a benchmark."""
    reasons: dict[int, str] = {}
    eligible = pool.eligible
    for block in counted("comparing with benchmarks", list(blocks(eligible)), len(eligible), size=len):
        for start in range(0, len(block), ROWS_AT_ONCE):
            for row in pool.read(block[start : start + ROWS_AT_ONCE].tolist()):
                if (reason := benchmarks.reason(row)) is not None:
                    reasons[row.row] = reason
    return reasons


def benchmark_hashes(files: Sequence[Path]) -> dict[str, str]:
    """Content hashes of benchmark files, by path."""
    return {str(file): hash_file(file) for file in files}
