"""Rows on disk: every row of a pool once, with id, place and reason, at random access and in constant memory.

One folder per pool content: `lines.bin` (rows of text files, their own bytes), `table-*.arrow` (rows of Parquet files
and datasets, in their own types), `ids.npy`, `lines.npy`, `offsets.npy`, `duplicates.npy`, `reasons.json` and
`meta.json`. Text rows keep their bytes, not an Arrow struct, so that a JSON row comes back as it was: key order, number
spelling, absent against null. Files are read by position (`pread`), not mapped: what was read does not stay resident.
Written once, aside, then renamed; a `StoredRows` pickles as its folder and opens the files again elsewhere.

Shapes: `n` rows of the pool.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import UserError
from ..records import Row
from . import write
from .files import canonical_json, json_value, plain_errors, read_json, sync, without_nan, write_json
from .formats import BadRow, Reading
from .parse import CHUNK_BYTES, Chunk

VERSION = 1
"""Raised whenever the files below, or what counts as a bad row, change."""

_ID_BYTES = 16


# --- one row's id and reason ----------------------------------------------------------------------------------------


def row_text(row: dict[str, Any], *, table: bool) -> tuple[str, str | None]:
    """Canonical JSON of a row, and why the row is bad (None: good). Tables may hold NaN, which stands as null."""
    try:
        text = canonical_json(row)
    except ValueError:
        text = canonical_json(without_nan(row))
        if not table:
            return text, f"NaN or Infinity: {_guilty(row, lambda value: without_nan(value) != value)}"
    except (TypeError, RecursionError) as error:
        return repr(row), f"wrong type: {error}"
    if "\\u0000" in text:
        name = _guilty(row, lambda value: isinstance(value, str) and "\0" in value)
        return text, None if name is None else f"NUL character: {name}"
    return text, None


def _guilty(row: dict[str, Any], test: Callable[[Any], bool]) -> str | None:
    """The top-level column below which a value (or a key) meets the test, printable; None if there is none."""

    def anywhere(value: Any) -> bool:
        if isinstance(value, dict):
            return any(test(key) or anywhere(item) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return any(map(anywhere, value))
        return test(value)

    return next((ascii(key)[1:-1] for key, value in row.items() if test(key) or anywhere(value)), None)


def _surrogate(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def identify(chunk: Chunk, reading: Reading) -> Iterator[tuple[bytes, str | None]]:
    """(id, reason) of every row of a chunk."""
    for index, (row, reason) in enumerate(zip(chunk.rows, chunk.reasons, strict=True)):
        if row is None:
            data = chunk.raws[index] if chunk.batch is None else _wire(chunk.batch.slice(index, 1))
        else:
            text, wrong = row_text(row, table=chunk.batch is not None)
            reason = reason or wrong
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:
                data = text.encode("utf-8", "surrogatepass")
                reason = reason or f"lone surrogate: {_guilty(row, _surrogate)}"
            if reason is None:
                try:
                    reading.parts(row)
                except BadRow as bad:
                    reason = str(bad)
        yield hashlib.blake2b(data, digest_size=_ID_BYTES).digest(), reason


def _wire(batch: pa.RecordBatch) -> bytes:
    return cast(bytes, batch.serialize().to_pybytes())


def later_duplicates(ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(row, first row with the same id) of every row whose id came before, ascending. Shape `(duplicates, 2)`."""
    words = np.ascontiguousarray(ids).view(np.uint64)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ids stay in the pool's order
    ordered = words[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    pairs = np.stack([order, first], axis=1)[~new].astype(np.int64)
    return pairs[np.argsort(pairs[:, 0])]


# --- writing --------------------------------------------------------------------------------------------------------


class Writer:
    """Puts chunks into a folder, in order; `finish` makes the folder whole. Holds 32 bytes per row."""

    def __init__(self, folder: Path, reading: Reading) -> None:
        self.folder, self.reading = folder, reading
        self.ids = bytearray()
        self.lines, self.offsets = array("q"), array("q", [0])
        self.starts: list[int] = []
        self.reasons: dict[int, str] = {}
        self.tables: list[dict[str, Any]] = []
        self._text = open(folder / "lines.bin", "wb", buffering=CHUNK_BYTES)
        self._table: pa.RecordBatchFileWriter | None = None
        self._schema: pa.Schema | None = None

    def begin_part(self) -> None:
        """The next rows come from the next file or dataset."""
        self.starts.append(len(self.lines))

    def add(self, chunk: Chunk) -> None:
        """Store a chunk's rows."""
        start = len(self.lines)
        for row, (identity, reason) in enumerate(identify(chunk, self.reading), start):
            self.ids += identity
            if reason is not None:
                self.reasons[row] = reason
        self.lines.extend(chunk.lines)
        if chunk.batch is not None:
            self._add_table(chunk.batch, start)
            return
        for raw in chunk.raws:
            self._text.write(raw)
            self.offsets.append(self.offsets[-1] + len(raw))

    def _add_table(self, batch: pa.RecordBatch, start: int) -> None:
        self.offsets.extend([self.offsets[-1]] * len(batch))
        last = self.tables[-1] if self.tables else None
        if last is None or last["stop"] != start or not batch.schema.equals(self._schema, check_metadata=True):
            self._close_table()
            last = {"file": f"table-{len(self.tables)}.arrow", "start": start, "stop": start, "batches": []}
            self.tables.append(last)
            self._schema = batch.schema
            self._table = pa.ipc.new_file(str(self.folder / last["file"]), batch.schema)
        assert self._table is not None
        self._table.write_batch(batch)
        last["batches"].append(start)
        last["stop"] = start + len(batch)

    def _close_table(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None

    def close(self) -> None:
        """Let go of the open files."""
        self._text.close()
        self._close_table()

    def finish(self) -> str:
        """Write the rest; `meta.json` comes last. Returns the digest of all that was stored."""
        self.close()
        ids = np.frombuffer(self.ids, dtype=np.uint8).reshape(-1, _ID_BYTES)
        np.save(self.folder / "ids.npy", ids)
        np.save(self.folder / "lines.npy", np.frombuffer(self.lines, dtype=np.int64))
        np.save(self.folder / "offsets.npy", np.frombuffer(self.offsets, dtype=np.int64))
        np.save(self.folder / "duplicates.npy", later_duplicates(ids))
        write_json(self.folder / "reasons.json", {str(row): reason for row, reason in self.reasons.items()})
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
        digest = hashlib.blake2b(digest_size=_ID_BYTES)
        for name in sorted(sizes):
            with open(self.folder / name, "rb") as handle:
                digest.update(name.encode() + b"\0")
                digest.update(hashlib.file_digest(handle, "blake2b").digest())
            sync(self.folder / name)
        meta = {
            "version": VERSION,
            "rows": len(self.lines),
            "format": self.reading.format,
            "columns": dict(self.reading.columns),
            "starts": self.starts,
            "tables": self.tables,
            "ids": hashlib.blake2b(self.ids, digest_size=_ID_BYTES).hexdigest(),
            "sizes": sizes,
        }
        write_json(self.folder / "meta.json", meta)
        return digest.hexdigest()


def is_whole(folder: Path) -> bool:
    """Is this a finished store, every file of its full size?"""
    try:
        meta = read_json(folder / "meta.json")
        return bool(meta["version"] == VERSION) and all(
            (folder / name).stat().st_size == size for name, size in meta["sizes"].items()
        )
    except (UserError, OSError, KeyError, TypeError):
        return False


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The `RowSource` of every pool: a finished folder, and the names of the files that its rows came from.

    Pickles as these two; memory does not grow with the pool beyond the pages of ids and lines that were looked at.
    """

    folder: Path
    files: tuple[str, ...]
    """Name of each part, as the user gave it."""

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "files": self.files}

    def __len__(self) -> int:
        return int(self.meta["rows"])

    # --- the RowSource contract -----------------------------------------------------------------------------------

    def read(self, rows: Sequence[int]) -> list[Row]:
        """The rows at these positions, all of them good."""
        reading = self.reading
        found = zip(rows, self.ids(rows), self.originals(rows), strict=True)
        return [reading.row(int(row), identity, original) for row, identity, original in found]

    def originals(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The user's own columns; empty for a row that is not an object."""
        found = self.tables(rows) if self._table_starts.size else {}
        return [found[row] if row in found else _object(self._bytes(row)) for row in map(int, rows)]

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Hex ids of any rows."""
        return [bytes(self._ids[int(row)]).hex() for row in rows]

    def locations(self, rows: Sequence[int]) -> list[tuple[str, int]]:
        """(file, line) of any rows."""
        parts = np.searchsorted(np.asarray(self.meta["starts"]), np.asarray(rows, dtype=np.int64), side="right") - 1
        return [(self.files[part], int(self._lines[int(row)])) for part, row in zip(parts.tolist(), rows, strict=True)]

    def write(self, rows: Sequence[int], path: Path) -> None:
        """Write the user's own rows, in this order (see `siftune.data.write`)."""
        write.write_rows(self, rows, path)

    # --- what writing needs beside them ---------------------------------------------------------------------------

    def texts(self, rows: Sequence[int]) -> list[bytes]:
        """Each row as JSON on one line: a text row's own bytes, a table row made into JSON."""
        found = self.tables(rows) if self._table_starts.size else {}
        return [_json_line(found[row]) if row in found else self._bytes(row) for row in map(int, rows)]

    def tables(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Those of `rows` that lie in tables, as objects, by row."""
        found: dict[int, dict[str, Any]] = {}
        for batch, positions in self._by_batch(rows):
            taken = batch.take(pa.array([index for _, index in positions]))
            try:
                objects = taken.to_pylist()
            except (ValueError, OverflowError, pa.ArrowException):
                objects = [_table_object(taken.slice(index, 1)) for index in range(len(taken))]
            found.update(zip((row for row, _ in positions), objects, strict=True))
        return found

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

    # --- open files, made on first use and not pickled ------------------------------------------------------------

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What `meta.json` says."""
        return cast("dict[str, Any]", read_json(self.folder / "meta.json"))

    @cached_property
    def reading(self) -> Reading:
        """The pool's format and columns."""
        return Reading(self.meta["format"], self.meta["columns"])

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

    def _array(self, name: str, *, mapped: bool = True) -> NDArray[Any]:
        with plain_errors(self.folder):
            return cast("NDArray[Any]", np.load(self.folder / f"{name}.npy", mmap_mode="r" if mapped else None))

    @cached_property
    def _text(self) -> int:
        with plain_errors(self.folder):
            return os.open(self.folder / "lines.bin", os.O_RDONLY)

    def __del__(self) -> None:
        if "_text" in self.__dict__:
            os.close(self.__dict__["_text"])

    def _bytes(self, row: int) -> bytes:
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        return os.pread(self._text, stop - start, start)

    @cached_property
    def _readers(self) -> list[pa.RecordBatchFileReader]:
        with plain_errors(self.folder):
            return [pa.ipc.open_file(pa.OSFile(str(self.folder / table["file"]))) for table in self.meta["tables"]]

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
        wanted: dict[int, list[tuple[int, int]]] = {}
        positions = np.asarray(rows, dtype=np.int64)
        places = np.searchsorted(self._table_starts, positions, side="right") - 1
        for row, place in zip(positions.tolist(), places.tolist(), strict=True):
            if place >= 0:
                wanted.setdefault(place, []).append((row, row - int(self._table_starts[place])))
        for place in sorted(wanted):
            table, index = self._batches[place]
            batch = self._readers[table].get_batch(index)
            inside = [(row, position) for row, position in wanted[place] if position < len(batch)]
            if inside:
                yield batch, inside


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _table_object(single: pa.RecordBatch) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", single.to_pylist()[0])
    except (ValueError, OverflowError, pa.ArrowException):
        return {}


def _json_line(row: dict[str, Any]) -> bytes:
    options: dict[str, Any] = {"ensure_ascii": False, "default": json_value, "allow_nan": False}
    try:
        text = json.dumps(row, **options)
    except ValueError:
        text = json.dumps(without_nan(row), **options)
    return text.encode("utf-8", "surrogatepass")
