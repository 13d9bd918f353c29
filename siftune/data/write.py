"""Chosen rows as a file: the user's own rows with every original column, in the format of the file's suffix.

`.jsonl`, `.jsonl.gz` and `.jsonl.zst` write a text row's own bytes; `.json` is an array of the same; `.parquet`
keeps a table's own types and finds one type per column for text rows. Rows are streamed, `CHUNK_ROWS` at a time, into
a temporary that is renamed at the end; equal rows produce equal bytes. Cost: one pass (two for text rows to Parquet).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, cast

import pyarrow as pa
import pyarrow.parquet

from ..errors import UserError
from ..files import atomic_path

CHUNK_ROWS = 128
"""Rows in memory at once: few, because a row may hold megabytes."""

GROUP_BYTES = 32 << 20
"""Least size of a Parquet row group but the last, as Arrow counts it."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")


class Rows(Protocol):
    """The part of a row source that writing needs."""

    @property
    def schema(self) -> pa.Schema | None: ...
    def originals(self, rows: Sequence[int]) -> list[dict[str, Any]]: ...
    def texts(self, rows: Sequence[int]) -> list[bytes]: ...
    def arrow(self, rows: Sequence[int]) -> pa.Table: ...


def check_suffix(path: str | Path) -> str:
    """The suffix that decides how `path` is written. Raises `UserError` for one that is not known."""
    name = Path(path).name.lower()
    matching = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    if not matching:
        raise UserError(f"{path} cannot be written: its suffix is not known; use one of {', '.join(SUFFIXES)}")
    return max(matching, key=len)


def write_rows(source: Rows, rows: Sequence[int], path: str | Path) -> None:
    """Write the rows at these positions, in this order, atomically.

    Raises `UserError` for an unknown suffix, a full disk, a missing permission, or columns that Parquet cannot hold.

    >>> write_rows(pool.source, [0, 2], Path("chosen.jsonl"))
    """
    suffix = check_suffix(path)
    with atomic_path(path) as temporary:
        if suffix == ".parquet":
            _parquet(source, rows, temporary, Path(path))
            return
        before, between, after = (b"[\n", b",\n", b"\n]\n") if suffix == ".json" else (b"", b"\n", b"\n")
        with _opened(temporary, suffix) as stream:
            stream.write(before)
            for index, chunk in enumerate(_chunks(rows)):
                stream.write((between if index else b"") + between.join(source.texts(chunk)))
            if len(rows) or suffix == ".json":
                stream.write(after)


def _chunks(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]


@contextmanager
def _opened(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    with open(path, "wb") as file:
        if suffix.endswith(".gz"):  # no name, no time: equal rows, equal bytes
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as packed:
                yield cast(IO[bytes], packed)
        elif suffix.endswith(".zst"):
            with pa.CompressedOutputStream(file, "zstd") as packed:
                yield cast(IO[bytes], packed)
        else:
            yield file


# --- Parquet --------------------------------------------------------------------------------------------------------


def _parquet(source: Rows, rows: Sequence[int], temporary: Path, path: Path) -> None:
    table_schema = source.schema
    try:
        schema = table_schema if table_schema is not None else _schema(source, rows, path)
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            for group in _groups(source, rows, schema, from_table=table_schema is not None):
                writer.write_table(group)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        if isinstance(error, OSError):
            raise
        message = " ".join(str(error).split())[:160].rstrip(".")
        raise UserError(f"{path}: Parquet cannot hold these rows ({message}); write a .jsonl instead") from error


def _groups(source: Rows, rows: Sequence[int], schema: pa.Schema, *, from_table: bool) -> Iterator[pa.Table]:
    pending: list[pa.Table] = []
    size = 0
    for chunk in _chunks(rows):
        table = source.arrow(chunk) if from_table else pa.Table.from_pylist(source.originals(chunk), schema=schema)
        pending.append(table)
        size += table.nbytes
        if size >= GROUP_BYTES:
            yield pa.concat_tables(pending)
            pending, size = [], 0
    if pending:
        yield pa.concat_tables(pending)


def _schema(source: Rows, rows: Sequence[int], path: Path) -> pa.Schema:
    """One type per column over all rows, columns in the order in which they first appear."""
    types: dict[str, pa.DataType] = {}
    for chunk in _chunks(rows):
        originals = source.originals(chunk)
        for name in dict.fromkeys(key for row in originals for key in row):
            values = [row.get(name) for row in originals]
            try:
                kind = pa.array(values).type
                if name in types:
                    both = [pa.schema([(name, types[name])]), pa.schema([(name, kind)])]
                    kind = pa.unify_schemas(both, promote_options="permissive").field(0).type
            except (pa.ArrowException, OverflowError, TypeError) as error:
                raise UserError(
                    f"{path}: the column {name!r} holds values of more than one type, which Parquet cannot; "
                    "write a .jsonl instead"
                ) from error
            types[name] = kind
    return pa.schema(list(types.items()))
