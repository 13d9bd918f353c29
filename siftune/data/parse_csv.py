"""CSV text as rows: the first row names the columns, every value is a string.

Comma, double quotes, line breaks inside quotes. Streamed. Bytes that are no UTF-8 travel as lone surrogates until the
row is told apart as bad. Cost: about 5 microseconds per small row.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

from ..errors import UserError
from .parse import Entry


def csv_rows(stream: IO[bytes], name: str) -> Iterator[Entry]:
    """The rows of a CSV file called `name`. Raises `UserError` when two columns share a name."""
    seen: list[str] = []

    def watched() -> Iterator[str]:
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""):
            seen.append(line)
            yield line

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(watched(), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        seen.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, "".join(seen).encode("utf-8", "surrogateescape"), (None, f"unparsable line: {error}")
            continue
        if not values:
            continue
        if header is None:
            header = _header(values, name)
            continue
        text = "".join(seen).encode("utf-8", "surrogateescape")
        if len(values) != len(header):
            yield line, text, (None, f"unparsable line: {len(values)} values for {len(header)} columns")
            continue
        row = dict(zip(header, values, strict=True))
        raw = json.dumps(row, ensure_ascii=False)
        try:
            yield line, raw.encode("utf-8"), (cast("dict[str, Any]", row), None)
        except UnicodeEncodeError:
            yield line, text, (None, "invalid UTF-8: in a value")


def _header(values: list[str], name: str) -> list[str]:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise UserError(f"{name} names the column {twice[0]!r} twice in its first line; rename one of them")
    return values
