"""Parquet files with damage detection: every page holds its checksum, and the metadata a hash of the columns.

A file that was cut, or in which any bit was flipped, is reported in one sentence when it is read. Files of other origin
are read as well, without these checks. Cost: a CRC-32 of every page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from ..errors import UserError
from ..files import hash_json

if TYPE_CHECKING:
    import pyarrow.parquet as pq

COLUMNS = b"siftune columns"
"""Key of the hash in the file's metadata."""


def open_writer(path: str | Path, schema: pa.Schema, *, compression: str = "snappy") -> pq.ParquetWriter:
    """A writer of tables of this schema, as `pyarrow.parquet.ParquetWriter`.

    >>> with open_writer(temporary, table.schema) as writer:
    ...     writer.write_table(table)
    """
    import pyarrow.parquet as pq

    schema = schema.with_metadata({**(schema.metadata or {}), COLUMNS: _columns_hash(schema)})
    return pq.ParquetWriter(path, schema, compression=compression, write_page_checksum=True)


def write_checked(table: pa.Table, path: str | Path) -> None:
    """Write one table."""
    with open_writer(path, table.schema) as writer:
        writer.write_table(table)


def read_checked(path: str | Path, *, columns: Sequence[str] | None = None, way_out: str) -> pa.Table:
    """The table of a file, or some of its columns. Raises `UserError`, which ends in `way_out`, for a damaged file and
    for one that lacks a column.

    >>> read_checked("run/rows.parquet", columns=["row", "kept"], way_out="run siftune select again")
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            expected = (schema.metadata or {}).get(COLUMNS)
            if expected is not None and expected != _columns_hash(schema):
                raise ValueError("its columns are not those that were written")
            absent = [name for name in columns or () if name not in schema.names]
            if absent:
                raise ValueError(f"it has no column {absent[0]}")
            table = file.read(columns=None if columns is None else list(columns))
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            if not len(table) == file.metadata.num_rows == sum(groups):
                raise ValueError("its number of rows is not the one that was written")
        table.validate(full=True)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); {way_out}") from error
    return table


def _columns_hash(schema: pa.Schema) -> bytes:
    return hash_json([[field.name, str(field.type)] for field in schema]).encode()
