"""`rows.parquet` of a selection as arrays, and the texts of its rows where they can still be read.

Texts come from the pool, as long as it is at the same path and unchanged; else, for the chosen rows, from the run's
own copy. Shapes: `n` rows of the pool, `K` domains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.load import load_pool
from ..data.messages import plain_text
from ..errors import UserError
from ..files import cache_folder, read_json
from ..records import Pool, Row
from .untrusted import visible

ROWS, MANIFEST, SELECTED = "rows.parquet", "manifest.json", "selected.jsonl"
COLUMNS = ("file", "line", "tokens", "score", "kept", "reason", "pseudo_label")
"""The columns of `rows.parquet` that are read here."""
READING = ("columns", "roles", "format", "on_bad_row", "duplicates")


@dataclass(frozen=True, eq=False)
class Selection:
    """A finished selection's run folder."""

    folder: Path
    manifest: Mapping[str, Any]
    score: NDArray[np.float32]
    """Shape `(n,)`, NaN where a row has none."""
    kept: NDArray[np.bool_]
    tokens: NDArray[np.int32]
    """Shape `(n,)`, -1 where unknown."""
    labels: NDArray[np.int16]
    """Shape `(n,)`: index into `domains`, -1 where there is none."""
    domains: tuple[str, ...]
    """Pseudo-domains, made visible."""
    probabilities: NDArray[np.float32] | None
    """Shape `(n, K)`."""
    reasons: Mapping[int, str]
    places: tuple[list[str], NDArray[np.int64]]
    """File (by name alone) and line of every row."""
    target_rows: NDArray[np.int32] | None = None
    """The target row, 0-based, that brought each row in, -1 where none did; None for a method without a target."""

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def config(self) -> Mapping[str, Any]:
        """The options of the run."""
        values: Mapping[str, Any] = self.manifest.get("config", {})
        return values

    @property
    def method(self) -> str:
        return str(self.config.get("method", "selection"))

    @property
    def info(self) -> Mapping[str, Any]:
        """The facts of the method's fit."""
        values: Mapping[str, Any] = self.manifest.get("info", {})
        return values

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return visible(self.folder.resolve().name)

    @cached_property
    def scored(self) -> NDArray[np.int64]:
        """Rows with a score, ascending."""
        return np.flatnonzero(~np.isnan(self.score))

    @cached_property
    def ranked(self) -> NDArray[np.int64]:
        """Scored rows, the highest first, ties in the pool's order."""
        return self.scored[np.argsort(-self.score[self.scored].astype(np.float64), kind="stable")]

    def place(self, row: int) -> str:
        """File and line."""
        return visible(f"{self.places[0][row]}:{self.places[1][row]}")


def read_selection(folder: Path) -> Selection:
    """The run folder of `siftune select`. Raises `UserError` when it is not finished or a file is damaged."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("status") != "finished" or not (folder / ROWS).is_file():
        raise UserError(f"{folder} holds a selection that is not finished; run the same siftune select command again")
    table = _table(folder / ROWS)
    arrays = {name: table[name].to_numpy(zero_copy_only=False) for name in ("kept",)}
    names = [str(name) for name in table["pseudo_label"].unique().to_pylist() if name is not None]
    shares = [name for name in table.column_names if name.startswith("p_")]
    domains = [name.removeprefix("p_") for name in shares] if shares else sorted(names)
    index = {name: number for number, name in enumerate(domains)}
    labels = np.array([index.get(name, -1) for name in table["pseudo_label"].to_pylist()], dtype=np.int16)
    reasons = {row: visible(reason) for row, reason in enumerate(table["reason"].to_pylist()) if reason is not None}
    probabilities = np.stack([_floats(table[name]) for name in shares], axis=1) if shares else None
    files = [Path(file).name for file in table["file"].to_pylist()]
    return Selection(
        folder=folder,
        manifest=manifest,
        score=_floats(table["score"]),
        kept=arrays["kept"].astype(bool),
        tokens=table["tokens"].fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32),
        labels=labels,
        domains=tuple(visible(name) for name in domains),
        probabilities=probabilities,
        reasons=reasons,
        places=(files, table["line"].to_numpy(zero_copy_only=False)),
        target_rows=(
            table["target_row"].fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
            if "target_row" in table.column_names
            else None
        ),
    )


def _table(path: Path) -> Any:
    from ..data.checked_parquet import read_checked

    again = "run the same siftune select command again"
    table = read_checked(path, way_out=again).combine_chunks()
    absent = [name for name in COLUMNS if name not in table.column_names]
    if absent:
        raise UserError(f"{path} cannot be read (it has no column {absent[0]}); {again}")
    return table


def _floats(column: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = column.to_numpy(zero_copy_only=False).astype(np.float32)
    return values


# --- texts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a pool's rows, as far as they are available."""

    pool: Pool | None
    """The pool that the run read."""
    chosen: Pool | None = None
    """Where the pool is not available: the run's copy of the chosen rows."""
    positions: Mapping[int, int] | None = None
    """Row of the pool -> row of `chosen`."""
    why: str = ""
    """A sentence on why the pool is not available; empty where it is."""

    def read(self, rows: Sequence[int]) -> list[tuple[str, str] | None]:
        """Question and answer of each row, raw; None where the text is not available."""
        if self.pool is not None:
            usable = [row for row in rows if row not in self.pool.reasons]
            texts_by_row = {row: _parts(read) for row, read in zip(usable, self.pool.read(usable), strict=True)}
            bad = [row for row in rows if row in self.pool.reasons]
            texts_by_row |= {row: (text, "") for row, text in zip(bad, self._raw(bad), strict=True)}
            return [texts_by_row[row] for row in rows]
        if self.chosen is None or self.positions is None:
            return [None] * len(rows)
        places = [self.positions.get(row) for row in rows]
        known = [place for place in places if place is not None and place not in self.chosen.reasons]
        texts = {place: _parts(read) for place, read in zip(known, self.chosen.read(known), strict=True)}
        return [texts.get(place) if place is not None else None for place in places]

    def _raw(self, rows: Sequence[int]) -> list[str]:
        """The raw text of rows that have no known format."""
        assert self.pool is not None
        texts = getattr(self.pool.source, "texts", None)
        if texts is not None:
            return [bytes(text).decode("utf-8", "replace") for text in texts(rows)]
        return [json.dumps(row, ensure_ascii=False, default=str) for row in self.pool.source.originals(rows)]


def _parts(row: Row) -> tuple[str, str]:
    if row.messages:
        turns = "\n\n".join(f"{message['role']}: {plain_text(message)}" for message in row.messages[:-1])
        return turns, row.output
    return row.question, row.output


def texts_of(selection: Selection, *, cache: str | Path | None = None) -> Texts:
    """The texts of a selection's rows, from the pool, or the chosen ones from the run folder."""
    config = selection.config
    reading = {name: config[name] for name in READING if config.get(name) is not None}
    sources = [str(path) for path in config.get("pool", [])]
    try:
        pool = load_pool(sources[0] if len(sources) == 1 else sources, cache=cache, **reading)
        if pool.fingerprint == selection.manifest.get("inputs", {}).get("pool"):
            return Texts(pool)
        why = "The pool has changed since this run, so only the chosen rows, which the run folder holds, can be read here."
    except (UserError, OSError, ImportError):
        why = (
            "The pool is no longer at its path, so only the chosen rows, which the run folder holds, can be read here."
        )
    columns = {name: config[name] for name in ("columns", "roles") if config.get(name)}
    try:
        chosen = load_pool(str(selection.folder / SELECTED), on_bad_row="skip", cache=cache, **columns)
    except UserError:
        return Texts(
            None, why=why.replace(", so only the chosen rows, which the run folder holds, can", "; no row can")
        )
    return Texts(None, chosen, _positions(selection), why)


def _positions(selection: Selection) -> dict[int, int]:
    """The position of each chosen row in the run's own copy, which is in the pool's order or best first."""
    rows = np.flatnonzero(selection.kept)
    if selection.config.get("order") == "score":
        rows = rows[np.argsort(-selection.score[rows].astype(np.float64), kind="stable")]
    return {row: place for place, row in enumerate(rows.tolist())}


def store_folder(name: str, cache: str | Path | None = None) -> Path:
    """A folder of the cache."""
    return cache_folder(cache) / name
