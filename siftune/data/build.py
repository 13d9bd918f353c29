"""Every row's id and reason, and the folder that keeps the rows (`siftune.data.store` reads it).

An id is blake2b-128 of the canonical JSON of the row's original columns; where a row is not an object, of its bytes.
Cost per row of 300 bytes: about 10 microseconds, most of it canonical JSON; 36 bytes of memory per row while it runs.

Shapes: `n` rows of the pool.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..files import canonical_json, sync, without_nan, write_json
from .formats import BadRow, Reading
from .parse import CHUNK_BYTES, Chunk
from .store import VERSION
from .sums import sums_of, write_checked_json

_ID_BYTES = 16


# --- one row's id and reason ----------------------------------------------------------------------------------------


def row_text(row: dict[str, Any], *, table: bool) -> tuple[str, str | None]:
    """Canonical JSON of a row, and why the row is bad (None: good). Tables may hold NaN, which is written as null."""
    try:
        text = canonical_json(row)
    except ValueError:
        text = canonical_json(without_nan(row))
        if not table:
            return text, f"NaN or Infinity: {_first_column(row, lambda value: without_nan(value) != value)}"
    except (TypeError, RecursionError) as error:
        return repr(row), f"wrong type: {error}"
    except MemoryError:
        return repr(sorted(row)), "too large: memory ran out over its values"
    if "\\u0000" in text:
        name = _first_column(row, lambda value: isinstance(value, str) and "\0" in value)
        return text, None if name is None else f"NUL character: {name}"
    return text, None


def _first_column(row: dict[str, Any], test: Callable[[Any], bool]) -> str | None:
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


def identify(chunk: Chunk, reading: Reading) -> Iterator[tuple[bytes, str | None, tuple[str, ...]]]:
    """(id, reason, notes) of every row of a chunk; a note marks a good row that may not be of the kind the user
    expects, or is used in part."""
    for index, (row, reason) in enumerate(zip(chunk.rows, chunk.reasons, strict=True)):
        notes: tuple[str, ...] = ()
        if row is None:
            data = chunk.raws[index] if chunk.batch is None else _ipc_bytes(chunk.batch.slice(index, 1))
        else:
            text, text_reason = row_text(row, table=chunk.batch is not None)
            reason = reason or text_reason
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:
                data = text.encode("utf-8", "surrogatepass")
                reason = reason or f"lone surrogate: {_first_column(row, _surrogate)}"
            if reason is None:
                try:
                    notes = reading.check(row)
                except BadRow as bad:
                    reason = str(bad)
        yield hashlib.blake2b(data, digest_size=_ID_BYTES).digest(), reason, notes


def _ipc_bytes(batch: pa.RecordBatch) -> bytes:
    return cast(bytes, batch.serialize().to_pybytes())


def later_duplicates(ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(row, first row with the same id) of every row whose id occurred before, ascending. Shape `(duplicates, 2)`."""
    id_words = np.ascontiguousarray(ids).view(np.uint64)
    order = np.lexsort((id_words[:, 1], id_words[:, 0]))  # stable: equal ids stay in the pool's order
    ordered = id_words[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    pairs = np.stack([order, first], axis=1)[~new].astype(np.int64)
    return pairs[np.argsort(pairs[:, 0])]


def save(path: Path, values: NDArray[Any]) -> None:
    """Like `np.save`, which raises an error without an errno on a full disk."""
    values = np.ascontiguousarray(values)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(values.data if values.size else b"")


# --- writing --------------------------------------------------------------------------------------------------------


class Writer:
    """Writes chunks into a folder, in order; `finish` completes the folder. Uses 36 bytes of memory per row."""

    def __init__(self, folder: Path, reading: Reading) -> None:
        self.folder, self.reading = folder, reading
        self.ids = bytearray()
        self.lines, self.offsets, self.sums = array("q"), array("q", [0]), array("I")
        self.starts: list[int] = []
        self.reasons: dict[int, str] = {}
        self.notes: Counter[str] = Counter()
        """Good rows that may not be of the kind the user expects, counted by note."""
        self.tables: list[dict[str, Any]] = []
        self._text = open(folder / "lines.bin", "wb", buffering=CHUNK_BYTES)  # noqa: SIM115
        self._table: pa.RecordBatchFileWriter | None = None
        self._schema: pa.Schema | None = None

    def begin_part(self) -> None:
        """The next rows come from the next file or dataset."""
        self.starts.append(len(self.lines))

    def add(self, chunk: Chunk) -> None:
        """Store a chunk's rows."""
        start = len(self.lines)
        for row, (identity, reason, notes) in enumerate(identify(chunk, self.reading), start):
            self.ids += identity
            self.notes.update(notes)
            if reason is not None:
                self.reasons[row] = reason
        self.lines.extend(chunk.lines)
        if chunk.batch is not None:
            self._add_table(chunk.batch, start)
            return
        for raw in chunk.raws:
            self._text.write(raw)
            self.offsets.append(self.offsets[-1] + len(raw))
            self.sums.append(zlib.crc32(raw))

    def _add_table(self, batch: pa.RecordBatch, start: int) -> None:
        self.offsets.extend([self.offsets[-1]] * len(batch))
        self.sums.extend([0] * len(batch))
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
        """Close the open files."""
        self._text.close()
        self._close_table()

    def finish(self) -> str:
        """Write the rest; `meta.json` comes last. Returns the digest of all that was stored."""
        self.close()
        ids = np.frombuffer(self.ids, dtype=np.uint8).reshape(-1, _ID_BYTES)
        save(self.folder / "ids.npy", ids)
        save(self.folder / "lines.npy", np.frombuffer(self.lines, dtype=np.int64))
        save(self.folder / "offsets.npy", np.frombuffer(self.offsets, dtype=np.int64))
        save(self.folder / "sums.npy", np.frombuffer(self.sums, dtype=np.uint32))
        save(self.folder / "duplicates.npy", later_duplicates(ids))
        write_json(self.folder / "reasons.json", {str(row): reason for row, reason in self.reasons.items()})
        sums = sums_of(self.folder)
        digest = hashlib.blake2b(digest_size=_ID_BYTES)
        for name in sorted(sums):
            with open(self.folder / name, "rb") as handle:
                digest.update(name.encode() + b"\0")
                digest.update(hashlib.file_digest(handle, "blake2b").digest())
            sync(self.folder / name)
        meta = {
            "version": VERSION,
            "rows": len(self.lines),
            "format": self.reading.format,
            "columns": dict(self.reading.columns),
            "roles": dict(self.reading.roles),
            "starts": self.starts,
            "tables": self.tables,
            "notes": dict(self.notes),
            "ids": hashlib.blake2b(self.ids, digest_size=_ID_BYTES).hexdigest(),
            "sums": sums,
        }
        write_checked_json(self.folder / "meta.json", meta)
        return digest.hexdigest()
