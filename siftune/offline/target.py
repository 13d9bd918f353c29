"""The target: a few rows that represent what the model is for, read once and shared by every method that aims at them.

A target may have any form that a pool may have, and a column `subtask`. A row of the pool that is also in the target (the
same id, or the same text but for letter case, width of characters and white space) is never chosen: it has no score and a
reason. How to write a method with a target: derive from `TargetMethod` (one score per row) or from
`siftune.offline.similarity.SimilarityMethod` (one similarity per row and target row, picked by `pick`).
Cost: reading a small file, one hash per row of the pool.

Axes: `M` target rows.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.load import load_pool
from ..data.messages import plain_text
from ..errors import UserError
from ..files import hash_json
from ..records import Pool, Row
from .base import OfflineMethod

SUBTASK = "subtask"
"""The column that names a target row's subtask."""

TargetSource = str | Path | Sequence[Mapping[str, Any]] | Pool
"""A file, folder, glob or hub id; rows as dicts; or a pool."""


@dataclass(frozen=True, eq=False)
class Target:
    """The target's rows; subtasks in the order in which the rows first name them."""

    pool: Pool
    rows: NDArray[np.int64]
    """Shape `(M,)`: positions in `pool`, ascending."""
    subtasks: tuple[str, ...]
    """Names of the subtasks; `()` where the rows have no column `subtask`."""
    labels: NDArray[np.int64]
    """Shape `(M,)`: index into `subtasks`; 0 where there are none."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def key(self) -> str:
        """Content hash of the rows and their subtasks."""
        return hash_json(["target", 1, self.pool.fingerprint, list(self.subtasks), self.labels.tolist()])

    @property
    def groups(self) -> list[NDArray[np.int64]]:
        """Target rows `0 .. M - 1` of each subtask; one group of all where there are none."""
        return [np.flatnonzero(self.labels == index) for index in range(max(1, len(self.subtasks)))]

    def read(self) -> list[Row]:
        """All rows of the target."""
        return self.pool.read(self.rows.tolist())

    def facts(self) -> dict[str, Any]:
        """Plain facts for `Scores.info["target"]`; the warning of a small budget reads `rows`."""
        facts: dict[str, Any] = {"rows": len(self)}
        if self.subtasks:
            counts = np.bincount(self.labels, minlength=len(self.subtasks))
            facts["subtasks"] = {name: int(count) for name, count in zip(self.subtasks, counts, strict=True)}
        return facts


def read_target(source: TargetSource, *, cache: str | Path | None = None) -> Target:
    """Read a target. Raises `UserError`, by file and line, for an invalid row and for a row without the subtask that
    others have; warns of a target of one row.

    >>> target = read_target("queries.jsonl")
    >>> len(target), target.subtasks
    """
    try:
        pool = source if isinstance(source, Pool) else load_pool(_loadable(source), cache=cache)
    except UserError as error:
        raise UserError(f"target: {error}") from error
    rows = pool.eligible
    names = [original.get(SUBTASK) for original in pool.source.originals(rows.tolist())]
    subtasks, labels = _subtasks(pool, rows, names)
    if len(rows) == 1:
        warnings.warn(
            "the target has one row, so everything chosen resembles that row alone; add rows that represent the rest",
            stacklevel=2,
        )
    return Target(pool, rows, subtasks, labels)


def _loadable(source: str | Path | Sequence[Mapping[str, Any]]) -> Any:
    if isinstance(source, (str, Path)):
        return source
    from datasets import Dataset

    rows = list(source)
    if not rows:
        raise UserError("it has no row; add rows that represent what the model is for")
    if not all(isinstance(row, Mapping) for row in rows):
        raise UserError("it is not a list of rows; pass dicts such as {'instruction': ..., 'output': ...}")
    return Dataset.from_list([dict(row) for row in rows])


def _subtasks(pool: Pool, rows: NDArray[np.int64], names: Sequence[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The subtasks' names and each row's index. Raises `UserError` where only some rows have one."""
    if all(name is None for name in names):
        return (), np.zeros(len(rows), dtype=np.int64)
    for row, name in zip(rows.tolist(), names, strict=True):
        if not isinstance(name, str) or not name.strip():
            ((file, line),) = pool.source.locations([row])
            raise UserError(
                f"target {file} line {line} has {SUBTASK}={name!r} and other rows name theirs; name the subtask of "
                "every row, or remove the column"
            )
    subtasks = tuple(dict.fromkeys(str(name) for name in names))
    index = {name: number for number, name in enumerate(subtasks)}
    return subtasks, np.array([index[str(name)] for name in names], dtype=np.int64)


def refuse_unusable(target: Target, reasons: Mapping[int, str]) -> None:
    """Raise `UserError`, by file and line, where a target row (`0 .. M - 1`) cannot be used."""
    if reasons:
        place, reason = min(reasons.items())
        ((file, line),) = target.pool.source.locations([int(target.rows[place])])
        raise UserError(f"target {file} line {line}: {reason}; fix or remove the row")


# --- rows of the pool that are also in the target ---------------------------------------------------------------------

IN_TARGET = "in the target"
"""The kind of the reason, under which such rows are counted."""


def normalised_text(row: Row) -> str:
    """The row's words without form: contents alone, compatibility characters unified, no letter case, single spaces.

    >>> normalised_text(Row(0, "", "Add.", "1 + 1", "Two"))
    'add. 1 + 1 two'
    """
    parts: Iterable[str] = map(plain_text, row.messages) if row.messages else (row.question, row.output)
    return " ".join(unicodedata.normalize("NFKC", "\n".join(parts)).casefold().split())


def text_hash(row: Row) -> bytes:
    """blake2b-128 of the normalised text."""
    return blake2b(normalised_text(row).encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class TargetRows:
    """Recognises rows of the target in a pool; small, picklable, part of a shard task."""

    ids: Mapping[str, int]
    """Line of the target file by row id ..."""
    texts: Mapping[bytes, int]
    """... and by hash of the normalised text."""

    @classmethod
    def of(cls, target: Target) -> TargetRows:
        """Of a target's rows; the first of equal ones is named."""
        ids: dict[str, int] = {}
        texts: dict[bytes, int] = {}
        for row, (_, line) in zip(target.read(), target.pool.source.locations(target.rows.tolist()), strict=True):
            ids.setdefault(row.id, line)
            texts.setdefault(text_hash(row), line)
        return cls(ids, texts)

    @property
    def key(self) -> str:
        """Content hash, for the keys of tasks."""
        return hash_json(["target rows", 1, dict(self.ids), {text.hex(): line for text, line in self.texts.items()}])

    def split(self, rows: Sequence[Row]) -> tuple[list[Row], dict[int, str]]:
        """The rows that are not in the target, and a reason for each of the others, by row of the pool."""
        remaining, reasons = [], {}
        for row in rows:
            if (line := self.ids.get(row.id)) is not None:
                reasons[row.row] = f"{IN_TARGET}: the same row as line {line} of the target"
            elif (line := self.texts.get(text_hash(row))) is not None:
                reasons[row.row] = f"{IN_TARGET}: the same text as line {line} of the target"
            else:
                remaining.append(row)
        return remaining, reasons


def without_target_rows(pool: Pool, start: int, stop: int, known: TargetRows, *, at_once: int = 256) -> dict[int, str]:
    """Reasons for the rows `start .. stop - 1` of a pool that are in the target; rows are read some at a time."""
    usable = [row for row in range(start, stop) if row not in pool.reasons]
    reasons: dict[int, str] = {}
    for first in range(0, len(usable), at_once):
        reasons |= known.split(pool.read(usable[first : first + at_once]))[1]
    return reasons


# --- the methods' base ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class TargetMethod(OfflineMethod):
    """Base of the methods that choose rows for a target. A subclass's `shard_task` leaves out the rows that
    `TargetRows.split` recognises; its `finish` adds `target_facts` to `Scores.info` as `target`."""

    target: TargetSource
    """Rows that represent what the model is for, in any form that a pool may have: a file, folder, glob or hub id. A column `subtask` makes groups."""

    def check(self) -> None:
        """Read the target. Raises `UserError`."""
        self.read_target()

    def inputs(self) -> dict[str, str]:
        return {**super().inputs(), "target": self.read_target().key}

    def read_target(self) -> Target:
        """The target, read once per method. Raises `UserError`."""
        cached: tuple[Any, Target] | None = self.__dict__.get("_target")
        if cached is None or cached[0] is not self.target:
            cached = self.__dict__["_target"] = (self.target, read_target(self.target, cache=self.cache))
        return cached[1]

    def target_facts(self, reasons: Mapping[int, str]) -> dict[str, Any]:
        """The target's facts, and the number of the pool's rows that were left out because they are in it."""
        kinds = Counter(reason.split(":")[0] for reason in reasons.values())
        return self.read_target().facts() | {"rows_in_pool": kinds[IN_TARGET]}
