"""Parquet files, Arrow files and `datasets.Dataset`s as chunks of rows, in their own types.

A chunk holds the Arrow batch itself, which is stored and written back, and its rows as objects, which are
checked. `siftune.data.arrow_values` says which types are stored as another one, and which are refused. Cost: about 4
microseconds per field.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from ..errors import UserError, is_failure, one_line
from .arrow_values import NotJson, failing_column, plain_columns, python_rows
from .parse import CHUNK_BYTES, CHUNK_ROWS, Chunk, Parsed


def read_parquet(path: Path, name: str) -> Iterator[Chunk]:
    """The rows of a Parquet file, streamed page by page. Raises `UserError` for a column that cannot be read."""
    with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
        yield from tables(file.iter_batches(batch_size=CHUNK_ROWS), name)


def read_arrow(path: Path, name: str) -> Iterator[Chunk]:
    """The rows of an Arrow file, in the file or the stream form (as `datasets` caches them)."""
    with pa.OSFile(str(path), "rb") as source:
        start = source.read(6)
        source.seek(0)
        if start == b"ARROW1":
            file = pa.ipc.open_file(source)
            yield from tables((file.get_batch(index) for index in range(file.num_record_batches)), name)
        else:
            yield from tables(iter(pa.ipc.open_stream(source)), name)


def read_dataset(dataset: Any, name: str) -> Iterator[Chunk]:
    """The rows of a `datasets.Dataset`, its selection and order respected."""
    pieces = dataset.with_format("arrow").iter(batch_size=CHUNK_ROWS)
    yield from tables((batch for table in pieces for batch in table.combine_chunks().to_batches()), name)


def tables(batches: Iterator[pa.RecordBatch], name: str) -> Iterator[Chunk]:
    """The rows of Arrow batches as chunks of limited size; `name` is used in messages."""
    number = 1
    for table_batch in batches:
        if not len(table_batch):
            continue
        table_batch = plain_columns(table_batch, name)
        step = max(1, min(len(table_batch), CHUNK_ROWS, CHUNK_BYTES * len(table_batch) // max(1, table_batch.nbytes)))
        for start in range(0, len(table_batch), step):
            batch = table_batch.slice(start, step)
            parsed = _table_rows(batch)
            yield Chunk(
                lines=list(range(number, number + len(batch))),
                rows=[row for row, _ in parsed],
                reasons=[reason for _, reason in parsed],
                batch=batch,
            )
            number += len(batch)


def _table_rows(batch: pa.RecordBatch) -> list[Parsed]:
    """Every row as an object; one with a value that Python cannot hold (a date beyond its calendar) has a reason."""
    try:
        return [(row, None) for row in python_rows(batch)]
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if len(batch) > 1:
            return [parsed for index in range(len(batch)) for parsed in _table_rows(batch.slice(index, 1))]
        if isinstance(error, UnicodeDecodeError):
            return [(None, f"invalid UTF-8: in a value of {failing_column(batch)}")]
        why = str(error) if isinstance(error, NotJson) else one_line(error)
        return [(None, f"wrong type: {failing_column(batch)}: {why}")]
