"""The files of a training run: the trainer's log, the ledger of candidates, and the training rows.

A run folder of `siftune train` has all of them; for another trainer's OUTPUT_DIR the log is the newest
`trainer_state.json`, the ledger is the one of `siftune.attach`, and the rows are those that the caller names.

Shapes: `L` lines of the ledger, `n` rows of the training set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.load import load_pool
from ..errors import UserError
from ..files import read_json
from ..hook.ledger import LOSS
from ..records import Pool
from .composition import CHUNK_ROWS, Labels, in_order_of, label_columns
from .rows_file import MANIFEST, ROWS, SELECTED, Texts, read_selection
from .untrusted import visible

LOG, STATE = "log.jsonl", "trainer_state.json"
LEDGER, PARTS = "siftune/selection.parquet", "siftune/selection"
FIXED = ("step", "rank", "micro", "row", "segment", "token_id", "total", "kept", "reason", LOSS)
"""Columns of every ledger; the others are specific to the method."""


@dataclass(frozen=True, eq=False)
class Ledger:
    """Every candidate of every step."""

    step: NDArray[np.int64]
    row: NDArray[np.int64]
    """Position in the training set; -1 where it is not known. Shape `(L,)`."""
    token_id: list[str]
    total: NDArray[np.float64]
    kept: NDArray[np.bool_]
    parts: Mapping[str, NDArray[np.float64]]
    complete: bool
    """False where training is not finished."""
    loss: NDArray[np.float64]
    """Mean loss of the row in the training forward, NaN where it was not trained on or not read. Shape `(L,)`."""

    def __len__(self) -> int:
        return len(self.step)

    @property
    def names_lines(self) -> bool:
        """Whether `row` is the line of a packed data set: several different rows then have the same number."""
        known = self.row >= 0
        pairs = set(zip(self.row[known].tolist(), np.array(self.token_id, dtype=object)[known], strict=True))
        return len(pairs) > len(np.unique(self.row[known]))

    @property
    def keys(self) -> tuple[NDArray[np.int64], list[str]]:
        """An index for each distinct row `(L,)`, and the names by index."""
        names = [
            f"row {row:,}" if row >= 0 else digest[:12] for row, digest in zip(self.row, self.token_id, strict=True)
        ]
        distinct, of = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
        return of.astype(np.int64), distinct.tolist()


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The rows of the training set."""

    texts: Texts
    rows: NDArray[np.int64]
    """Row of the file for each row of the training set. Shape `(n,)`."""
    lengths: NDArray[np.int64]
    """Shape `(n,)`, in `unit`."""
    unit: str
    """`tokens` where the run counted them, else `characters`."""
    labels: Sequence[Labels]
    """Labels by row of the training set."""
    how: str
    """How rows of the set were matched to rows of the file, where that is an assumption; else empty."""


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """One training run."""

    folder: Path
    manifest: Mapping[str, Any]
    """Empty for a trainer's OUTPUT_DIR."""
    log: Sequence[Mapping[str, Any]]
    ledger: Ledger | None
    training_rows: TrainingRows | None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return visible(self.folder.resolve().name)

    def texts_of(self, rows: NDArray[np.int64]) -> list[tuple[str, str] | None]:
        """Question and answer of rows of the training set; None where the text is not available."""
        if self.training_rows is None:
            return [None] * len(rows)
        known = [int(self.training_rows.rows[row]) for row in rows if row >= 0]
        texts = dict(zip(known, self.training_rows.texts.read(known), strict=True))
        return [texts[int(self.training_rows.rows[row])] if row >= 0 else None for row in rows]

    def logged(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key of the log."""
        points = [
            (int(line["step"]), float(line[key])) for line in self.log if _is_number(line.get(key)) and "step" in line
        ]
        return [step for step, _ in points], [value for _, value in points]


def is_training(folder: Path) -> bool:
    """Whether the folder holds a training log or a ledger."""
    return log_file(folder) is not None or (folder / LEDGER).is_file() or any((folder / PARTS).glob("part-*.parquet"))


def read_training(folder: Path, *, rows: str | None = None, cache: str | Path | None = None) -> TrainingRun:
    """A training run's folder. Raises `UserError` for damaged files and for rows that cannot be read."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    ledger = read_ledger(folder)
    try:
        training_rows = read_training_rows(folder, manifest, rows=rows, cache=cache)
    except (UserError, OSError, ImportError):
        if rows is not None:
            raise
        training_rows = None  # the files have moved: the page is written without their texts
    if training_rows is not None and ledger is not None and len(ledger) and ledger.row.max() >= len(training_rows.rows):
        if rows is not None:
            raise UserError(
                f"--rows {rows} has {len(training_rows.rows):,} usable rows, and the ledger names row {ledger.row.max():,}; pass "
                "the file that the trainer was trained on"
            )
        training_rows = None
    if training_rows is not None and training_rows.how and ledger is not None and ledger.names_lines:
        if rows is not None:
            raise UserError(
                f"--rows {rows}: the trainer of {folder} was handed packed lines, and the ledger numbers those, not the rows "
                "of a file; remove --rows, or train with siftune train, which records the rows"
            )
        training_rows = None
    return TrainingRun(folder, manifest, read_log(folder), ledger, training_rows)


def log_file(folder: Path) -> Path | None:
    """The trainer's log: siftune's, the trainer's final state, or the newest checkpoint's."""
    for path in (folder / LOG, folder / STATE):
        if path.is_file():
            return path
    states = []
    for path in [*folder.glob(f"checkpoint-*/{STATE}"), *folder.glob(f"checkpoints/checkpoint-*/{STATE}")]:
        if step := re.fullmatch(r"checkpoint-(\d+)", path.parent.name):
            states.append((int(step[1]), path))
    return max(states)[1] if states else None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the trainer's log; empty where there is none."""
    path = log_file(folder)
    if path is None:
        return []
    try:
        if path.name == LOG:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            lines = read_json(path)["log_history"]
        return [dict(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a trainer's log ({error}); remove it, or pass another folder") from error


def read_ledger(folder: Path) -> Ledger | None:
    """The ledger, merged or in the parts of a running or interrupted training; None where there is none."""
    merged = folder / LEDGER
    parts = [(step, path) for path in (folder / PARTS).glob("part-*.parquet") if (step := _step(path)) is not None]
    paths = [merged] if merged.is_file() else [path for _, path in sorted(parts)]
    if not paths:
        return None
    import pyarrow as pa

    from ..data.checked_parquet import read_checked

    tables = [read_checked(path, way_out="remove it, or pass another folder") for path in paths]
    try:
        table = pa.concat_tables([table.replace_schema_metadata() for table in tables], promote_options="default")
        numbers = {name: table[name].to_numpy(zero_copy_only=False) for name in ("step", "kept")}
        row = table["row"].fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        names = [name for name in table.column_names if name not in FIXED and pa.types.is_floating(table[name].type)]
        return Ledger(
            step=numbers["step"].astype(np.int64),
            row=row,
            token_id=table["token_id"].to_pylist(),
            total=table["total"].to_numpy(zero_copy_only=False).astype(np.float64),
            kept=numbers["kept"].astype(bool),
            parts={visible(name): table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in names},
            complete=merged.is_file(),
            loss=_losses(table),
        )
    except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{paths[0]} is not a ledger of siftune ({reason}); remove it, or pass another folder"
        ) from error


def _losses(table: Any) -> NDArray[np.float64]:
    if LOSS not in table.column_names:  # written before version 0.2, or by a trainer whose forward shows no loss
        return np.full(len(table), np.nan)
    losses: NDArray[np.float64] = table[LOSS].to_numpy(zero_copy_only=False).astype(np.float64)
    return losses


def read_training_rows(
    folder: Path, manifest: Mapping[str, Any], *, rows: str | None, cache: str | Path | None
) -> TrainingRows | None:
    """The rows that were trained on; None where the run does not name them."""
    config = manifest.get("config", {})
    train = rows if rows is not None else config.get("train")
    if not train:
        return None
    reading = {
        name: config[name] for name in ("columns", "roles", "format") if rows is None and config.get(name) is not None
    }
    sources = [train] if isinstance(train, str) else [str(path) for path in train]
    pool = load_pool(sources[0] if len(sources) == 1 else sources, on_bad_row="skip", cache=cache, **reading)
    at, tokens = _positions(folder, pool) if rows is None else (None, None)
    how = ""
    if at is None:
        at = pool.eligible
        how = "Rows are matched to the file by position: this holds where the trainer's dataset is the file, in its order."
    domains = pseudo_domains(sources, pool)
    labels = [*domains, *in_order_of(domains[0].values if domains else (), label_columns(pool))]
    counted = tokens if tokens is not None else characters(Texts(pool), at)
    labels = [Labels(one.name, one.values, one.of[at]) for one in labels]
    return TrainingRows(Texts(pool), at, counted, "characters" if tokens is None else "tokens", labels, how)


def characters(texts: Texts, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Characters of the question and the answer of each row."""
    counts = []
    for start in range(0, len(rows), CHUNK_ROWS):
        read = texts.read(rows[start : start + CHUNK_ROWS].tolist())
        counts += [0 if parts is None else len(parts[0]) + len(parts[1]) for parts in read]
    return np.array(counts, dtype=np.int64)


def _positions(folder: Path, pool: Pool) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Row of the pool and tokens of each row of the training set, as `siftune train` wrote them."""
    from ..data.checked_parquet import read_checked

    if not (folder / ROWS).is_file():
        return None, None
    table = read_checked(folder / ROWS, way_out="run siftune train again")
    if "position" not in table.column_names:
        return None, None
    table = table.select(["row", "position", "tokens"])
    table = table.filter(table["position"].is_valid()).sort_by("position")
    if table.num_rows and table["row"][-1].as_py() >= len(pool):
        raise UserError(f"the rows of {folder} have changed since it was trained")
    at, tokens = (table[name].to_numpy(zero_copy_only=False).astype(np.int64) for name in ("row", "tokens"))
    return at, tokens


def pseudo_domains(sources: Sequence[str], pool: Pool) -> list[Labels]:
    """The pseudo-domain of each row of `pool`, where it is the file of chosen rows in a selection's run folder."""
    if len(sources) != 1 or Path(sources[0]).name != SELECTED:
        return []
    try:
        selection = read_selection(Path(sources[0]).parent)
    except UserError:
        return []
    chosen = np.flatnonzero(selection.kept)
    if selection.config.get("order") == "score":
        chosen = chosen[np.argsort(-selection.score[chosen].astype(np.float64), kind="stable")]
    if not selection.domains or len(chosen) != len(pool):
        return []
    return [Labels("pseudo-domain", selection.domains, selection.labels[chosen])]


def _step(path: Path) -> tuple[int, int] | None:
    match = re.fullmatch(r"part-(\d+)(?:-rank(\d+))?\.parquet", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
