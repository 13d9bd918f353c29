"""`load_pool`: files, folders, hub ids and datasets become a `Pool` of checked rows.

One streaming pass checks every row and stores it in the cache folder (`pools/<key>/`, see `siftune.data.store`); the
key of files is their content, so that the next load of the same bytes costs one hash, a check of the stored bytes and
no parsing; stored rows that are damaged are stored again. Two processes may
load the same pool at once: each writes a temporary folder, and the first to finish renames it. Memory does not grow
with the pool but for 36 bytes per row while the pass runs. Cost: about 15 microseconds per row of 300 bytes.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import (
    cache_folder,
    hash_file,
    hash_json,
    plain_errors,
    remove,
    sweep_temporaries,
    sync,
    temporary_beside,
)
from ..progress import Activity, doing
from ..records import Pool
from .build import Writer
from .exports import refill
from .formats import FIELDS, Reading, candidates, check_format, check_roles, recognise
from .parse import Chunk, counted
from .protect import places
from .sources import Part, resolve
from .store import VERSION, StoredRows, is_complete

_HEAD_ROWS = 1000
"""Rows within which the pool's format must be recognised."""


def load_pool(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    duplicates: Literal["keep", "drop"] = "keep",
    format: str | None = None,
    cache: str | Path | None = None,
) -> Pool:
    """Read a pool of rows: every row is checked, none is lost, and the user's columns are kept for writing.

    `source` is a path (`.jsonl`, `.json`, `.csv`, `.tsv`, each also compressed, `.parquet` or `.arrow`), a folder or
    glob of them, a hub id (`owner/name` or `owner/name:split`), a `datasets.Dataset` or `IterableDataset` (read once),
    a pandas or Polars frame, a list of objects, or a list of these. `columns` says which of
    the user's columns holds a field (`{"instruction": "question", "output": "answer"}`), `roles` the role of a name that
    is not known (`{"teacher": "assistant"}`). `format` is detected when it
    is not set: `messages`, `alpaca`, `prompt-completion` or `text`. `on_bad_row="skip"` keeps bad rows as positions
    with a reason; `duplicates="drop"` gives a reason to each later row with the same content. `cache` is the folder for
    the checked rows (else `SIFTUNE_CACHE`, else `~/.cache/siftune`).

    Raises `UserError`, one sentence, for a missing or unreadable source, an unknown option or format, a pool without a
    usable row, and (unless skipped) bad rows: file, line, reason of the first, and the counts by reason.

    >>> pool = siftune.load_pool("pool.jsonl", on_bad_row="skip")
    >>> len(pool), pool.format, pool.duplicates, pool.reasons
    """
    columns, roles = dict(columns or {}), dict(roles or {})
    check_roles(roles)
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"on_bad_row={on_bad_row!r} is not known; use error or skip")
    if duplicates not in ("keep", "drop"):
        raise UserError(f"duplicates={duplicates!r} is not known; use keep or drop")
    candidates(columns)
    if format is not None:
        check_format(format, columns)
    parts = resolve(source)
    with doing(f"reading {parts[0].name}" + (f" and {len(parts) - 1} more" if len(parts) > 1 else "")) as reading:
        stored = _stored(parts, columns, roles, format, cache, reading)
    rows = StoredRows(stored, tuple(part.name for part in parts), _read_from(source, parts))
    _check(rows, on_bad_row)
    for note, count in rows.meta.get("notes", {}).items():
        others = "" if len(parts) == 1 else f" and {len(parts) - 1} more"
        warnings.warn(f"{parts[0].name}{others}: {counted(count, 'row')} with {note}", stacklevel=2)
    reasons = dict(rows.reasons)
    if duplicates == "drop":
        for row, first in rows.duplicates.tolist():
            reasons.setdefault(row, f"duplicate of row {first}")
        reasons = dict(sorted(reasons.items()))
    fingerprint = hash_json(
        {
            "ids": rows.meta["ids"],
            "reasons": {str(row): reason for row, reason in reasons.items()},
            "format": rows.reading.format,
            "columns": columns,
        }
        | ({"roles": roles} if roles else {})
    )
    return Pool(rows, rows.reading.format, fingerprint, reasons, len(rows.duplicates))


# --- the stored rows ------------------------------------------------------------------------------------------------


def _stored(
    parts: list[Part],
    columns: dict[str, str],
    roles: dict[str, str],
    format: str | None,
    cache: str | Path | None,
    reading: Activity,
) -> Path:
    """The folder that holds these parts' rows, written now unless an earlier load wrote it."""
    pools = cache_folder(cache) / "pools"
    with plain_errors(pools):
        pools.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(pools)
    options = {"version": VERSION, "columns": columns, "roles": roles, "format": format}
    key: str | None = None
    before = _stamps(parts)
    if all(part.path is not None for part in parts):
        files = [[part.kind, hash_file(part.path)] for part in parts if part.path is not None]
        key = hash_json(options | {"files": files})
        if is_complete(pools / key):
            return pools / key
    temporary = temporary_beside(pools / "new")
    with plain_errors(pools):
        temporary.mkdir()
        try:
            digest = _build(temporary, parts, Reading(format or "", columns, roles), reading)
            if _stamps(parts) != before:
                raise UserError(f"{parts[0].name} (or a file beside it) changed while it was read; load it again")
            return _publish(temporary, pools / (key or hash_json(options | {"content": digest})))
        finally:
            remove(temporary)


def _read_from(source: Any, parts: list[Part]) -> tuple[str, ...]:
    """Absolute paths of the files, and of the folders of saved datasets, that hold these rows."""
    files = [part.path for part in parts if part.path is not None]
    datasets = [path for path in places(source) if (path / "state.json").is_file()]
    return tuple(os.path.abspath(path) for path in (*files, *datasets))


def _stamps(parts: list[Part]) -> list[tuple[int, int]]:
    stamps = []
    for part in parts:
        if part.path is not None:
            with plain_errors(part.name):
                status = os.stat(part.path)
            stamps.append((status.st_size, status.st_mtime_ns))
    return stamps


def _publish(temporary: Path, folder: Path) -> Path:
    """Rename a finished folder to its final name, unless another process was first."""
    if folder.exists() and not is_complete(folder):
        refill(folder, temporary, last="meta.json")
        return folder
    try:
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError:
        if not is_complete(folder):
            raise
    return folder


def _build(folder: Path, parts: list[Part], how: Reading, reading: Activity) -> str:
    """Store the rows; a reading without a format takes that of the first row that has one."""
    chunks = ((index, chunk) for index, part in enumerate(parts) for chunk in part.chunks())
    head: list[tuple[int, Chunk]] = []
    if not how.format:
        how = replace(how, format=_find_format(chunks, head, parts, dict(how.columns)))
    writer = Writer(folder, how)
    try:
        for index, chunk in chain(head, chunks):
            while len(writer.starts) <= index:
                writer.begin_part()
            writer.add(chunk)
            reading.advance(len(chunk))
        while len(writer.starts) < len(parts):
            writer.begin_part()
        if not len(writer.lines):
            raise UserError(_empty(parts))
        return writer.finish()
    finally:
        writer.close()


def _find_format(
    chunks: Iterator[tuple[int, Chunk]], head: list[tuple[int, Chunk]], parts: list[Part], columns: dict[str, str]
) -> str:
    """The format of the first row that has one; the chunks read on the way go to `head`."""
    examined, first = 0, ""
    for index, chunk in chunks:
        head.append((index, chunk))
        for line, row, reason in zip(chunk.lines, chunk.rows, chunk.reasons, strict=True):
            if row is not None and (name := recognise(row, columns)):
                return name
            first = first or _unknown(parts[index].name, line, row, reason, columns)
        examined += len(chunk)
        if examined >= _HEAD_ROWS:
            break
    if not head:
        raise UserError(_empty(parts))
    raise UserError(
        f"none of the {'first ' if examined >= _HEAD_ROWS else ''}{examined} rows has a known format: {first}"
    )


def _unknown(name: str, line: int, row: dict[str, Any] | None, reason: str | None, columns: dict[str, str]) -> str:
    if row is None:
        return f"{name}, line {line}: {reason}"
    columns_present = ", ".join(ascii(column)[1:-1] for column in list(row)[:12]) or "no columns"
    expected = " or ".join(
        "+".join(columns.get(field, field) for field in FIELDS[known] if field != "input")
        for known in candidates(columns)
    )
    return f"{name}, line {line} has {columns_present}, where {expected} is needed; map the columns with --columns"


def _empty(parts: list[Part]) -> str:
    names = parts[0].name if len(parts) == 1 else f"{parts[0].name} and the {len(parts) - 1} sources after it"
    return f"{names} holds no rows; pass a file with at least one"


# --- bad rows -------------------------------------------------------------------------------------------------------


def counts(reasons: Mapping[int, str]) -> dict[str, int]:
    """How many rows per kind of reason (the part before the colon), most frequent first.

    >>> counts({3: "missing field: output", 5: "missing field: input", 9: "not an object: a list"})
    {'missing field': 2, 'not an object': 1}
    """
    return dict(Counter(reason.partition(":")[0] for reason in reasons.values()).most_common())


def _check(rows: StoredRows, on_bad_row: str) -> None:
    """Stop with one sentence for bad rows that are not to be skipped, and for a pool that has no others."""
    reasons = rows.reasons
    if not reasons or (on_bad_row == "skip" and len(reasons) < len(rows)):
        return
    row = min(reasons)
    ((file, line),) = rows.locations([row])
    by_kind = ", ".join(f"{count} {kind}" for kind, count in counts(reasons).items())
    first = f"{file}, line {line}: {reasons[row]}"
    if len(reasons) == len(rows):
        raise UserError(f"{first}; all {len(rows)} rows are bad ({by_kind}); fix them, or pass --columns")
    raise UserError(
        f"{first}; {len(reasons)} of {len(rows)} rows are bad ({by_kind}); fix them or pass --on-bad-row skip"
    )
