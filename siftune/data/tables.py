"""Parquet files and `datasets.Dataset`s as chunks of rows, in their own types.

A chunk holds the Arrow batch itself, which is stored and written back, and its rows as objects, which are
checked. Categorical (dictionary) columns become their values. Cost: about 4 microseconds per field.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from .parse import CHUNK_BYTES, CHUNK_ROWS, Chunk, Parsed


def read_parquet(path: Path) -> Iterator[Chunk]:
    """The rows of a Parquet file, streamed page by page."""
    with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
        yield from _tables(file.iter_batches(batch_size=CHUNK_ROWS))


def read_dataset(dataset: Any) -> Iterator[Chunk]:
    """The rows of a `datasets.Dataset`, its selection and order respected."""
    tables = dataset.with_format("arrow").iter(batch_size=CHUNK_ROWS)
    yield from _tables(batch for table in tables for batch in table.combine_chunks().to_batches())


def _tables(batches: Iterator[pa.RecordBatch]) -> Iterator[Chunk]:
    number = 1
    for table_batch in batches:
        table_batch = _plain_columns(table_batch)
        step = max(1, min(len(table_batch), CHUNK_BYTES * len(table_batch) // max(1, table_batch.nbytes)))
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


def _plain_columns(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Dictionary-encoded (categorical) columns as their values: an Arrow file cannot hold changing dictionaries."""
    if not any(pa.types.is_dictionary(kind) for kind in batch.schema.types):
        return batch
    arrays, fields = [], []
    for column, schema_field in zip(batch.columns, batch.schema, strict=True):
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
            schema_field = schema_field.with_type(column.type)
        arrays.append(column)
        fields.append(schema_field)
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields, metadata=batch.schema.metadata))


def _table_rows(batch: pa.RecordBatch) -> list[Parsed]:
    try:
        return [(row, None) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        if len(batch) > 1:
            return [parsed for index in range(len(batch)) for parsed in _table_rows(batch.slice(index, 1))]
        return [(None, "invalid UTF-8: in a value")]
    except (ValueError, OverflowError, pa.ArrowException) as error:  # such as a date beyond Python's calendar
        if len(batch) > 1:
            return [parsed for index in range(len(batch)) for parsed in _table_rows(batch.slice(index, 1))]
        return [(None, f"wrong type: {' '.join(str(error).split())[:120]}")]
