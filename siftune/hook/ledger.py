"""The ledger: every candidate of every step, its scores, and whether it was trained on.

`OUTPUT_DIR/siftune/selection/part-<step>.parquet` holds the lines since the previous part, up to and including that
optimiser step. A part ends at every checkpoint, so resuming from checkpoint N keeps the parts up to N and drops the
rest; at the end the parts are merged into `OUTPUT_DIR/siftune/selection.parquet`. Files are written under a temporary
name and renamed; a damaged one is noticed when it is read, and a file of one of these names that is no part of a ledger
is refused. Cost: about 60 bytes a candidate on disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.checked_parquet import open_writer, read_checked, write_checked
from ..errors import UserError
from ..files import atomic_path

MAX_BUFFERED_LINES = 65_536
"""Lines buffered before a part is written without a checkpoint."""

_LEADING_COLUMNS = [("step", pa.int64()), ("rank", pa.int32()), ("micro", pa.int32()), ("row", pa.int64())]
_LEADING_COLUMNS += [("token_id", pa.string()), ("total", pa.float64())]
_SEGMENT_COLUMN = [("segment", pa.int32())]
"""Of packed batches only: the position among the micro-batch's segments."""
_METADATA_PREFIX = b"siftune."
_TRAILING_COLUMNS = [("kept", pa.bool_()), ("reason", pa.string())]
LOSS = "train_loss"
_LOSS_COLUMN = [(LOSS, pa.float64())]
"""Of trainers whose forward shows a loss for every token; always the last column."""


class Ledger:
    """Lines of one process, buffered; see the module for the files.

    Columns: `step` (the trainer's `global_step` once the step is done), `rank`, `micro`, `row` or null, `segment` (of
    packed batches: its position in the micro-batch), `token_id` in hex, `total` or null, the method's own parts,
    `kept`, `reason` (why a candidate has no score) or null, `train_loss` (the row's mean loss in the training forward)
    or null.
    """

    def __init__(self, folder: Path, *, rank: int = 0, world: int = 1) -> None:
        self.folder = folder
        self.rank, self.world = rank, world
        self.facts: dict[str, str] = {}
        """What the files' metadata holds beside the columns, under `siftune.NAME`: how scores were computed."""
        self._columns: dict[str, list[Any]] = {}
        self._lines = 0
        self._losses: list[tuple[Sequence[int], Any]] = []

    @property
    def merged(self) -> Path:
        """Path of the complete ledger after training."""
        return self.folder / "selection.parquet"

    def add(
        self,
        step: int,
        micro: Sequence[int],
        *,
        token_ids: Sequence[bytes],
        rows: Sequence[int | None],
        total: Sequence[float],
        parts: Mapping[str, Sequence[float]],
        kept: Sequence[bool],
        segments: Sequence[int] | None = None,
        reasons: Mapping[int, str],
    ) -> int:
        """One line per candidate; every sequence has one entry per candidate, `reasons` is keyed by position.

        Returns the number of the first line, for `add_losses`.
        """
        if self._lines >= MAX_BUFFERED_LINES:  # before this step's lines, which its training forward completes
            self.flush(step - 1)
        count = len(micro)
        lines: dict[str, Sequence[Any]] = {
            "step": [step] * count,
            "rank": [self.rank] * count,
            "micro": micro,
            "row": rows,
            **({} if segments is None else {"segment": segments}),
            "token_id": [token_id.hex() for token_id in token_ids],
            "total": [_or_null(value) for value in total],
            "kept": kept,
            "reason": [reasons.get(index) for index in range(count)],
            **{name: [_or_null(value) for value in values] for name, values in parts.items()},
        }
        for name in lines.keys() - self._columns.keys():
            self._columns[name] = [None] * self._lines
        for name, column in self._columns.items():
            column.extend(lines.get(name, [None] * count))
        self._lines += count
        return self._lines - count

    def add_losses(self, lines: Sequence[int], losses: Any) -> None:
        """The losses in training of some lines added since the last `flush`: a tensor of the lines' length, which is
        read when the lines are written, so that no device waits for it."""
        self._losses.append((lines, losses))

    def _read_losses(self) -> None:
        if self._losses:
            column = self._columns.setdefault(LOSS, [None] * self._lines)
            for lines, losses in self._losses:
                for line, loss in zip(lines, losses.tolist(), strict=True):
                    column[line] = _or_null(loss)
        self._losses = []

    def flush(self, step: int) -> None:
        """Write the buffered lines as the part that ends at `step`."""
        if not self._lines:
            return
        self._read_losses()
        known = {name for name, _ in _LEADING_COLUMNS + _SEGMENT_COLUMN + _TRAILING_COLUMNS + _LOSS_COLUMN}
        parts = [(name, pa.float64()) for name in self._columns if name not in known]
        segment = _SEGMENT_COLUMN if "segment" in self._columns else []
        loss = _LOSS_COLUMN if LOSS in self._columns else []
        schema = pa.schema(
            _LEADING_COLUMNS + segment + sorted(parts) + _TRAILING_COLUMNS + loss, metadata=_metadata([self.facts])
        )
        name = f"part-{step}.parquet" if self.rank == 0 else f"part-{step}-rank{self.rank}.parquet"
        path = self._parts_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_is_ledger(path)
        table = pa.table({field.name: self._columns[field.name] for field in schema}, schema=schema)
        with atomic_path(path) as temporary:
            write_checked(table, temporary)
        self._columns, self._lines = {}, 0

    def drop_after(self, step: int) -> None:
        """Drop the records beyond `step`: the buffer, later parts of this rank (and, by rank 0, of ranks that only an
        earlier run had) and the merged file. Raises `UserError` for a file of such a name that is no ledger, and where
        an earlier part of this rank is damaged: before training rather than after it."""
        self._columns, self._lines, self._losses = {}, 0, []
        if self._parts_folder.is_dir():
            for path in self._parts_folder.iterdir():
                part = _step_and_rank(path)
                owned = part and (part[1] == self.rank or (self.rank == 0 and part[1] >= self.world))
                if part and part[0] > step and owned:
                    _check_is_ledger(path)
                    path.unlink(missing_ok=True)
                elif part and owned:
                    _read(path)
        if self.rank == 0:
            _check_is_ledger(self.merged)
            self.merged.unlink(missing_ok=True)

    def merge(self) -> Path | None:
        """All parts of all ranks as one file, ordered by step and rank; None where no part was written."""
        numbered = [
            (part, path) for path in self._parts_folder.glob("part-*.parquet") if (part := _step_and_rank(path))
        ]
        if not numbered:
            return None
        paths = [path for _, path in sorted(numbered)]
        for path in (*paths, self.merged):
            _check_is_ledger(path)
        schemas = [_read(path).schema for path in paths]
        facts = _metadata([facts_of(schema) for schema in schemas])
        schema = pa.unify_schemas([schema.remove_metadata() for schema in schemas])
        known = {name for name, _ in _LEADING_COLUMNS + _TRAILING_COLUMNS + _LOSS_COLUMN}
        parts = [(field.name, field.type) for field in schema if field.name not in known]
        loss = _LOSS_COLUMN if LOSS in schema.names else []
        schema = pa.schema([*_LEADING_COLUMNS, *parts, *_TRAILING_COLUMNS, *loss], metadata=facts)
        with atomic_path(self.merged) as temporary, open_writer(temporary, schema) as writer:
            for path in paths:
                table = _read(path)
                columns = [
                    table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
                    for field in schema
                ]
                writer.write_table(pa.table(columns, schema=schema))
        return self.merged

    @property
    def _parts_folder(self) -> Path:
        return self.folder / "selection"


def facts_of(schema: pa.Schema) -> dict[str, str]:
    """The facts that a ledger's file was written with."""
    metadata = schema.metadata or {}
    names = [name for name in metadata if name.startswith(_METADATA_PREFIX)]
    return {name.removeprefix(_METADATA_PREFIX).decode(): metadata[name].decode() for name in names}


def _metadata(facts_of_parts: Sequence[Mapping[str, str]]) -> dict[bytes, bytes] | None:
    """The facts of several parts as one file's metadata; where parts differ, every distinct value in order."""
    values: dict[str, dict[str, None]] = {}
    for facts in facts_of_parts:
        for name, value in facts.items():
            values.setdefault(name, {}).update(dict.fromkeys(value.split(" | ")))
    return {
        _METADATA_PREFIX + name.encode(): " | ".join(distinct).encode() for name, distinct in values.items()
    } or None


def _step_and_rank(path: Path) -> tuple[int, int] | None:
    match = re.fullmatch(r"part-(\d+)(?:-rank(\d+))?\.parquet", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _read(path: Path) -> pa.Table:
    return read_checked(
        path, way_out="delete it to go without the selection of its steps, or train into another folder"
    )


def _check_is_ledger(path: Path) -> None:
    """Raise `UserError` for an existing file that is no part of a ledger."""
    if not path.exists():
        return
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        names = []
    if names[: len(_LEADING_COLUMNS)] != [name for name, _ in _LEADING_COLUMNS]:
        raise UserError(f"{path} is no part of a selection's ledger, so it is not replaced; move it away")


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
