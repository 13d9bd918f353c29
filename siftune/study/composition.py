"""The composition of each cell's training rows: rows by domain, and how many of them were different, from its run folder.

A cell that trains on all of its rows has them in `train/rows.parquet`; one that chooses inside batches has each candidate in
`train/siftune/selection.parquet`. A cell whose rows are unknown is left out: plain training that ended inside an epoch, or
a run folder that was cleared.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.checked_parquet import read_checked
from .cell import selection_folder
from .frame import Done, Frame
from .statistics import mean_of
from .tables import markdown

AGAIN = "run siftune compare again"


@dataclass(frozen=True)
class Trained:
    """The rows that one cell trained on."""

    domains: Counter[str]
    """Rows by domain, a row counted as often as it was trained."""
    different: int


def trained(frame: Frame, done: Done, labels_of: Callable[[Path], list[str]]) -> Trained | None:
    """The trained rows of a finished cell; None where its files do not tell. `labels_of` is the domain of every line of a file.

    >>> trained(frame, frame.done[0], labels_of).domains
    Counter({'coding': 308, 'common_sense': 234, 'mathematics': 149, 'reasoning': 109})
    """
    run = frame.work.folder / "cells" / done.cell.name / "train"
    rows_file = run / "rows.parquet"
    if not rows_file.is_file():
        return None
    table = read_checked(rows_file, columns=["row", "position"], way_out=AGAIN).drop_null()
    row_of = np.empty(len(table), dtype=np.int64)
    row_of[table["position"].to_numpy()] = table["row"].to_numpy()
    positions = _positions(run, len(row_of), int(done.facts["tokens"]["trained_rows"]))
    if positions is None:
        return None
    chosen = selection_folder(frame.work, done.cell)
    labels = labels_of(frame.work.data.pool if chosen is None else chosen / "selected.jsonl")
    return Trained(Counter(labels[row] for row in row_of[positions]), len(np.unique(positions)))


def _positions(run: Path, rows: int, count: int) -> NDArray[np.int64] | None:
    """The position in the training set of every trained row."""
    ledger = run / "siftune" / "selection.parquet"
    if ledger.is_file():
        table = read_checked(ledger, columns=["row", "kept"], way_out=AGAIN)
        kept = table.filter(table["kept"])["row"]
        return None if kept.null_count else kept.to_numpy().astype(np.int64)
    if not rows or count % rows:
        return None
    return np.tile(np.arange(rows, dtype=np.int64), count // rows)


def _labels(path: Path, label: str) -> list[str]:
    """The domain of every line. A line without one is a row of a pool that is not labelled."""
    with path.open(encoding="utf-8") as lines:
        return [str(json.loads(line).get(label, "none")) for line in lines if line.strip()]


def composition_table(frame: Frame) -> str | None:
    """Markdown: a line per arm, means over the seeds; None where the rows of no cell are known."""
    domains = list(frame.work.data.facts["domains"])
    labels_of = functools.cache(functools.partial(_labels, label=frame.work.study.label))  # most cells share a file
    lines = []
    for arm in frame.arms:
        results = [trained(frame, done, labels_of) for done in frame.done if done.cell.arm == arm]
        trained_cells = [result for result in results if result is not None]
        if not trained_cells:
            continue
        rows = [f"{mean_of([float(cell.domains[name]) for cell in trained_cells]).mean:,.0f}" for name in domains]
        different = mean_of([float(cell.different) for cell in trained_cells]).mean
        tokens = frame.tokens(arm, "trained_tokens").mean / frame.tokens(arm, "trained_rows").mean
        lines.append([arm.label, *rows, f"{different:,.0f}", f"{tokens:.1f}"])
    return markdown(["method", *domains, "different rows", "tokens a row"], lines) if lines else None
