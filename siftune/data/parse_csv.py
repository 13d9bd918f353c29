"""CSV text as rows: the first row names the columns, every value is a string.

Comma (in `.tsv` the tabulator), double quotes, line breaks inside quotes. Streamed. Bytes that are not UTF-8 are kept as lone surrogates
until the row is marked as bad. A quote that is not closed takes the lines after it into its row: each of them becomes a
separate entry with a reason, so that all lines are counted. Cost: about 5 microseconds per small row.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

from ..errors import UserError
from .parse import LONGEST_ROW, Entry, counted


class _Lines:
    """The lines of a file for `csv.reader`, which takes several for a row with line breaks inside quotes."""

    def __init__(self, stream: IO[bytes], longest: int) -> None:
        self.text = io.TextIOWrapper(cast(Any, stream), encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.longest = longest
        self.number = 0
        """Lines read."""
        self.row: list[str] = []
        """Lines of the row that is being read."""
        self.size = 0

    def begin_row(self) -> int:
        """The next line begins a row; its number."""
        self.row, self.size = [], 0
        return self.number + 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = piece = self.text.readline(self.longest)
        if not line:
            raise StopIteration
        self.number += 1
        self.size += len(line)
        if self.size >= self.longest:
            while piece and not piece.endswith(("\n", "\r")):
                piece = self.text.readline(self.longest)
            self.row.append(line[: 1 << 20])
            raise csv.Error(f"the row has more than {self.longest:,} characters")
        self.row.append(line)
        return line


def csv_rows(stream: IO[bytes], name: str, *, longest: int = LONGEST_ROW, delimiter: str = ",") -> Iterator[Entry]:
    """The rows of a CSV file called `name`. Raises `UserError` where its first row, which names the columns, is
    invalid."""
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(stream, longest)
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        line = lines.begin_row()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise UserError(
                    f"{name}, line {line}, which names the columns, is not CSV ({error}); fix it"
                ) from error
            yield from _bad(line, lines.row, str(error))
            continue
        if not values:
            continue
        if header is None:
            header = _header(values, name)
            continue
        if len(values) != len(header):
            yield from _bad(line, lines.row, f"{len(values)} values for {len(header)} columns")
            continue
        row = dict(zip(header, values, strict=True))
        raw = json.dumps(row, ensure_ascii=False)
        try:
            yield line, raw.encode("utf-8"), (cast("dict[str, Any]", row), None)
        except UnicodeEncodeError:
            yield line, _encoded("".join(lines.row)), (None, "invalid UTF-8: in a value")


def _bad(line: int, row: list[str], why: str) -> Iterator[Entry]:
    """A row that cannot be read, and every further line that its quotes took in."""
    if len(row) > 1:
        why = f"{why}; its quotes take in {counted(len(row), 'line')}, to line {line + len(row) - 1}"
    yield line, _encoded(row[0] if row else ""), (None, f"unparsable line: {why}")
    for number, text in enumerate(row[1:], line + 1):
        if text.strip():
            yield number, _encoded(text), (None, f"unparsable line: inside the quotes of the row in line {line}")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _header(values: list[str], name: str) -> list[str]:
    duplicates = [value for index, value in enumerate(values) if value in values[:index]]
    if duplicates:
        raise UserError(f"{name} names the column {duplicates[0]!r} twice in its first line; rename one of them")
    return values
