"""Rows on disk: every row of a pool once, with id, location and reason, at random access and in constant memory.

One folder per pool content: `lines.bin` (rows of text files, their own bytes), `table-*.arrow` (rows of Parquet files
and datasets, in their own types), `ids.npy`, `lines.npy`, `offsets.npy`, `sums.npy`, `duplicates.npy`, `reasons.json`
and `meta.json`. Every file is checked by its sum when a pool is loaded, every text row again when it is read. Text rows
keep their bytes, not an Arrow struct, so that a JSON row is returned as it was: key order, number spelling, absent
against null. Files are read by position (`pread`), not mapped: what was read does not stay resident. Written once,
under a temporary name, then renamed; a `StoredRows` pickles as its folder and opens the files again elsewhere.

Shapes: `n` rows of the pool.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import UserError
from ..files import json_value, plain_errors, read_json, without_nan
from ..records import Row
from . import write
from .arrow_values import python_rows
from .formats import Reading
from .protect import refuse_overlap
from .sums import are_intact, read_checked_json

VERSION = 4
"""Increased whenever the files below, or what counts as a bad row, change."""


def is_complete(folder: Path) -> bool:
    """Whether this is a finished store with every file as it was written."""
    meta = read_checked_json(folder / "meta.json")
    return meta is not None and meta.get("version") == VERSION and are_intact(folder, meta["sums"])


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The `RowSource` of every pool: a finished folder, and the names of the files that its rows came from.

    Pickles as its fields; memory does not grow with the pool beyond the pages of ids and lines that were looked at.
    """

    folder: Path
    files: tuple[str, ...]
    """Name of each part, as the user gave it."""
    sources: tuple[str, ...] = ()
    """Absolute paths of the files and folders that were read, which are never overwritten."""

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "files": self.files, "sources": self.sources}

    def __len__(self) -> int:
        return int(self.meta["rows"])

    # --- the RowSource contract -----------------------------------------------------------------------------------

    def read(self, rows: Sequence[int]) -> list[Row]:
        """The rows at these positions, all of them good."""
        reading = self.reading
        identified = zip(rows, self.ids(rows), self.originals(rows), strict=True)
        return [reading.row(int(row), identity, original) for row, identity, original in identified]

    def originals(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The user's own columns; empty for a row that is not an object."""
        objects = self.tables(rows) if self._table_starts.size else {}
        return [objects[row] if row in objects else _object(self._bytes(row)) for row in map(int, rows)]

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Hex ids of any rows."""
        return [bytes(self._ids[int(row)]).hex() for row in rows]

    def locations(self, rows: Sequence[int]) -> list[tuple[str, int]]:
        """(file, line) of any rows."""
        parts = np.searchsorted(np.asarray(self.meta["starts"]), np.asarray(rows, dtype=np.int64), side="right") - 1
        return [(self.files[part], int(self._lines[int(row)])) for part, row in zip(parts.tolist(), rows, strict=True)]

    def write(self, rows: Sequence[int], path: Path) -> None:
        """Write the user's own rows, in this order (see `siftune.data.write`). Raises `UserError` for a path that was
        read."""
        refuse_overlap({"the output": path}, {"the pool": self.sources})
        write.write_rows(self, rows, path)

    # --- for writing ----------------------------------------------------------------------------------------------

    def texts(self, rows: Sequence[int]) -> list[bytes]:
        """Each row as JSON on one line: a text row's own bytes, a table row converted to JSON."""
        objects = self.tables(rows) if self._table_starts.size else {}
        return [_json_line(objects[row]) if row in objects else self._bytes(row) for row in map(int, rows)]

    def tables(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Those of `rows` that are stored in tables, as objects, by row."""
        by_row: dict[int, dict[str, Any]] = {}
        for batch, positions in self._by_batch(rows):
            taken = batch.take(pa.array([index for _, index in positions]))
            try:
                objects = python_rows(taken)
            except Exception:  # a value that Python cannot hold, in a row that has a reason
                objects = [_table_object(taken.slice(index, 1)) for index in range(len(taken))]
            by_row.update(zip((row for row, _ in positions), objects, strict=True))
        return by_row

    def arrow(self, rows: Sequence[int]) -> pa.Table:
        """Rows of the one table that holds the whole pool, in this order."""
        order: list[int] = []
        taken = []
        for batch, positions in self._by_batch(rows):
            taken.append(batch.take(pa.array([index for _, index in positions])))
            order += [row for row, _ in positions]
        place = {row: index for index, row in enumerate(order)}
        table = pa.Table.from_batches(taken, schema=self.schema)
        return table.take(pa.array([place[int(row)] for row in rows], type=pa.int64()))

    @cached_property
    def schema(self) -> pa.Schema | None:
        """The columns' types where the whole pool is one table, else None."""
        tables = self.meta["tables"]
        if len(tables) == 1 and tables[0]["stop"] - tables[0]["start"] == len(self):
            return self._readers[0].schema
        return None

    # --- open files, opened on first use, not pickled ------------------------------------------------------------

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The content of `meta.json`."""
        meta = read_checked_json(self.folder / "meta.json")
        if meta is None:
            raise self._damaged("meta.json")
        return meta

    @cached_property
    def reading(self) -> Reading:
        """The pool's format, columns and roles."""
        return Reading(self.meta["format"], self.meta["columns"], self.meta["roles"])

    @cached_property
    def reasons(self) -> dict[int, str]:
        """Why rows are bad, by row."""
        return {int(row): reason for row, reason in read_json(self.folder / "reasons.json").items()}

    @cached_property
    def duplicates(self) -> NDArray[np.int64]:
        """(row, first row with its id), shape `(duplicates, 2)`."""
        return cast("NDArray[np.int64]", self._array("duplicates", mapped=False))

    @cached_property
    def _ids(self) -> NDArray[np.uint8]:
        return cast("NDArray[np.uint8]", self._array("ids"))

    @cached_property
    def _lines(self) -> NDArray[np.int64]:
        return cast("NDArray[np.int64]", self._array("lines"))

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        return cast("NDArray[np.int64]", self._array("offsets"))

    @cached_property
    def _sums(self) -> NDArray[np.uint32]:
        """CRC-32 of every text row's bytes."""
        return cast("NDArray[np.uint32]", self._array("sums"))

    def _array(self, name: str, *, mapped: bool = True) -> NDArray[Any]:
        try:
            with plain_errors(self.folder):
                return cast("NDArray[Any]", np.load(self.folder / f"{name}.npy", mmap_mode="r" if mapped else None))
        except (ValueError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(f"{name}.npy") from error

    def _damaged(self, name: str) -> UserError:
        """For a file that was damaged after the pool was loaded: loading checks all of them."""
        return UserError(f"{self.folder / name} is damaged; run the same command again to rewrite it")

    @cached_property
    def _text(self) -> int:
        with plain_errors(self.folder):
            return os.open(self.folder / "lines.bin", os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound here: at exit `os` may be gone already
        if "_text" in self.__dict__:
            close(self.__dict__["_text"])

    def _bytes(self, row: int) -> bytes:
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        if not 0 <= start <= stop <= self.meta["sums"]["lines.bin"][0]:
            raise self._damaged("offsets.npy")
        raw = os.pread(self._text, stop - start, start)
        if zlib.crc32(raw) != self._sums[row]:
            raise self._damaged("lines.bin")
        return raw

    @cached_property
    def _readers(self) -> list[pa.RecordBatchFileReader]:
        try:
            with plain_errors(self.folder):
                return [pa.ipc.open_file(pa.OSFile(str(self.folder / table["file"]))) for table in self.meta["tables"]]
        except pa.ArrowException as error:
            raise self._damaged("table-*.arrow") from error

    @cached_property
    def _table_starts(self) -> NDArray[np.int64]:
        """First row of every batch of every table. Shape `(batches,)`."""
        return np.array([start for table in self.meta["tables"] for start in table["batches"]], dtype=np.int64)

    @cached_property
    def _batches(self) -> list[tuple[int, int]]:
        """(table, batch in it), aligned with `_table_starts`."""
        tables = enumerate(self.meta["tables"])
        return [(index, batch) for index, table in tables for batch in range(len(table["batches"]))]

    def _by_batch(self, rows: Sequence[int]) -> Iterator[tuple[pa.RecordBatch, list[tuple[int, int]]]]:
        """The batches that hold `rows`, each read once, with (row, index in the batch) of its rows."""
        requested: dict[int, list[tuple[int, int]]] = {}
        positions = np.asarray(rows, dtype=np.int64)
        places = np.searchsorted(self._table_starts, positions, side="right") - 1
        for row, place in zip(positions.tolist(), places.tolist(), strict=True):
            if place >= 0:
                requested.setdefault(place, []).append((row, row - int(self._table_starts[place])))
        for place in sorted(requested):
            table, index = self._batches[place]
            try:
                batch = self._readers[table].get_batch(index)
            except (pa.ArrowException, OSError) as error:
                raise self._damaged(self.meta["tables"][table]["file"]) from error
            batch_rows = [(row, position) for row, position in requested[place] if position < len(batch)]
            if batch_rows:
                yield batch, batch_rows


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _table_object(single: pa.RecordBatch) -> dict[str, Any]:
    try:
        return python_rows(single)[0]
    except Exception:
        return {}


def _json_line(row: dict[str, Any]) -> bytes:
    options: dict[str, Any] = {"ensure_ascii": False, "default": json_value, "allow_nan": False}
    try:
        text = json.dumps(row, **options)
    except ValueError:
        text = json.dumps(without_nan(row), **options)
    return text.encode("utf-8", "surrogatepass")
