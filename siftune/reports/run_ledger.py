"""Questions to what a run was trained on: `siftune.open_ledger(folder)` and `siftune ledger RUN`.

Every answer is a table with one line per row (or step, or interval) that can be read, exported as Parquet or CSV, or
written as a pool for the next run. Loads no model. Cost: one pass over the ledger; texts are read for the rows that an
answer shows.

Shapes: `L` lines of the ledger, `K` distinct rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..data.checked_parquet import write_checked
from ..data.protect import refuse_overlap
from ..data.write import check_suffix
from ..errors import UserError, did_you_mean
from ..files import atomic_path
from .composition import Labels
from .spikes import find_spikes, step_losses
from .training_run import Ledger, TrainingRows, TrainingRun, is_training, read_training

INTERVALS = 20
"""Intervals of steps in `losses`, at most."""
EXPORTS = (".parquet", ".csv")


def open_ledger(folder: str | Path, *, rows: str | None = None, cache: str | Path | None = None) -> RunLedger:
    """The ledger of a run folder of `siftune train`, or of the OUTPUT_DIR of a trainer with `siftune.attach`.

    `rows` is the file that such a trainer was trained on, in its order, for texts, labels and `write`; a run folder
    names its own. Raises `UserError` for a folder without a ledger, a damaged file, and rows that do not fit.

    >>> ledger = siftune.open_ledger("siftune-runs/train-0a1b2c")
    >>> ledger.texts(ledger.trained(120, 130))
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder} is not a folder; pass a run folder of siftune train or a trainer's OUTPUT_DIR")
    run = read_training(path, rows=rows, cache=cache) if is_training(path) else None
    if run is None or run.ledger is None or not len(run.ledger):
        raise UserError(
            f"{folder} holds no ledger; train with online selection (method: regular keeps every row and logs its loss), "
            "or call siftune.attach with ledger=True"
        )
    return RunLedger(run, run.ledger, rows)


@dataclass(frozen=True, eq=False)
class RunLedger:
    """A run's ledger. `row` in every table is the position in the training set, null where it is not known."""

    run: TrainingRun
    lines: Ledger
    source: str | None = None
    """The file of the training rows, where the caller named it."""

    def trained(self, first: int | None = None, last: int | None = None) -> pa.Table:
        """What was trained on at the steps `first` to `last`, both included: `step`, `row`, `token_id`, `loss`, `score`."""
        low = self.lines.step.min() if first is None else first
        high = self.lines.step.max() if last is None else last
        if low > high:
            raise UserError(f"steps {low}..{high}: the first step is above the last; exchange them")
        at = np.flatnonzero(self.lines.kept & (self.lines.step >= low) & (self.lines.step <= high))
        return _table(step=self.lines.step[at], **self._names(at), loss=self.lines.loss[at], score=self.lines.total[at])

    def spikes(self) -> pa.Table:
        """Steps whose loss jumped: `step`, `loss`, `median_before`, `rows` (trained at that step)."""
        steps, losses = step_losses(self.run)
        jumps = find_spikes(losses)
        at = np.array([index for index, _ in jumps], dtype=np.int64)
        trained = [int((self.lines.kept & (self.lines.step == step)).sum()) for step in steps[at]]
        medians = np.array([median for _, median in jumps], dtype=np.float64)
        return _table(step=steps[at], loss=losses[at], median_before=medians, rows=np.array(trained, dtype=np.int64))

    def losses(self, by: str | None = None) -> pa.Table:
        """Loss of the trained rows over time: `first_step`, `last_step`, `label`, `rows`, `loss` (a mean over rows).

        `by` is a label column of the training rows, such as `source` or `domain`; without it all rows are one label.
        Raises `UserError` for a column that is none, and for a run whose rows cannot be read.
        """
        self._require_losses()
        known = self.lines.kept & ~np.isnan(self.lines.loss)
        labels = None if by is None else self._labels(by)
        of_label, names = np.zeros(len(self.lines), dtype=np.int64), ["all rows"]
        if labels is not None:
            of_label = np.where(self.lines.row >= 0, labels.of[np.maximum(self.lines.row, 0)], -1).astype(np.int64)
            of_label, names = np.where(of_label < 0, len(labels.values), of_label), [*labels.values, "none"]
        low, high = int(self.lines.step.min()), int(self.lines.step.max())
        edges = np.linspace(low, high + 1, min(INTERVALS, high - low + 1) + 1)
        interval = np.clip(np.searchsorted(edges, self.lines.step, side="right") - 1, 0, len(edges) - 2)
        of = (interval * len(names) + of_label)[known]
        counts = np.bincount(of, minlength=(len(edges) - 1) * len(names))
        sums = np.bincount(of, self.lines.loss[known], minlength=len(counts))
        at = np.flatnonzero(counts)
        starts = np.ceil(edges).astype(np.int64)
        return _table(
            first_step=starts[at // len(names)],
            last_step=starts[at // len(names) + 1] - 1,
            label=[names[index] for index in at % len(names)],
            rows=counts[at],
            loss=sums[at] / counts[at],
        )

    def never(self) -> pa.Table:
        """Rows that were never trained on: `row`, `token_id` (null where the row was never read), `candidate` (how many
        times it was one), `score` (mean). Of rows with equal tokens the ledger names the first; rows whose columns equal
        those of a row that was read are left out."""
        of, count = self._distinct()
        seen, kept = np.bincount(of, minlength=count), np.bincount(of[self.lines.kept], minlength=count)
        first = np.full(count, -1, dtype=np.int64)
        first[of[::-1]] = np.arange(len(of))[::-1]
        scored = ~np.isnan(self.lines.total)
        sums = np.bincount(of[scored], self.lines.total[scored], minlength=count)
        times = np.bincount(of[scored], minlength=count)
        never = np.flatnonzero(kept == 0)
        never = never[np.argsort(-seen[never], kind="stable")]
        unread = self._never_read()
        names = self._names(first[never])
        mean = np.where(times > 0, sums / np.maximum(times, 1), np.nan)[never]
        return _table(
            row=[*names["row"], *unread.tolist()],
            token_id=[*names["token_id"], *([None] * len(unread))],
            candidate=np.concatenate([seen[never], np.zeros(len(unread), dtype=np.int64)]),
            score=np.concatenate([mean, np.full(len(unread), np.nan)]),
        )

    def often(self) -> pa.Table:
        """Rows by how often they were trained on, most often first: `row`, `token_id`, `trained`, `candidate`,
        `first_step`, `last_step`, `first_loss`, `last_loss`."""
        of, count = self._distinct()
        seen, kept = np.bincount(of, minlength=count), np.bincount(of[self.lines.kept], minlength=count)
        first, last = self._ends(of, count)
        keys = np.flatnonzero(kept)
        keys = keys[np.argsort(-kept[keys], kind="stable")]
        return _table(
            **self._names(last[keys]),
            trained=kept[keys],
            candidate=seen[keys],
            first_step=self.lines.step[first[keys]],
            last_step=self.lines.step[last[keys]],
            first_loss=self.lines.loss[first[keys]],
            last_loss=self.lines.loss[last[keys]],
        )

    def forgotten(self, now: str | Path | Mapping[str, float]) -> pa.Table:
        """A row's loss when it was last trained on against its loss now, the largest increase first: `row`, `token_id`,
        `last_step`, `loss_then`, `loss_now`, `change`.

        `now` is a table of `siftune score-reference` under the trained model, or a mapping from `token_id` (hex) to the
        loss. Rows without one of the two losses are left out. Raises `UserError` where no row has both.
        """
        self._require_losses()
        of, count = self._distinct()
        _, last = self._ends(of, count, self.lines.kept & ~np.isnan(self.lines.loss))
        loss_now = _losses_now(now)
        lines = last[last >= 0]
        after = np.array([loss_now.get(self.lines.token_id[line], np.nan) for line in lines], dtype=np.float64)
        lines, after = lines[~np.isnan(after)], after[~np.isnan(after)]
        if not len(lines):
            raise UserError(
                f"none of the trained rows is in the table of losses now ({len(loss_now):,} rows); make it with siftune "
                "score-reference RECIPE --reference RUN/model for the recipe of this run"
            )
        change = after - self.lines.loss[lines]
        order = np.argsort(-change, kind="stable")
        return _table(
            **self._names(lines[order]),
            last_step=self.lines.step[lines[order]],
            loss_then=self.lines.loss[lines[order]],
            loss_now=after[order],
            change=change[order],
        )

    # --- from an answer to texts and files ----------------------------------------------------------------------------

    def texts(self, table: pa.Table) -> pa.Table:
        """A table with a column `row`, and the columns `question` and `answer`, null where the text is not available."""
        rows = np.array([-1 if row is None else row for row in table["row"].to_pylist()], dtype=np.int64)
        pairs = self.run.texts_of(rows)
        for at, name in enumerate(("question", "answer")):
            column = [None if pair is None else pair[at].encode("utf-8", "replace").decode() for pair in pairs]
            table = table.append_column(name, pa.array(column, pa.string()))
        return table

    def export(self, table: pa.Table, path: str | Path) -> Path:
        """Write a table as .parquet or .csv. Raises `UserError` for another ending and for a path that is an input."""
        path = self._check_output("--out", path)
        if path.suffix not in EXPORTS:
            raise UserError(f"--out {path} must end in {' or '.join(EXPORTS)}")
        with atomic_path(path) as temporary:
            if path.suffix == ".csv":
                from pyarrow.csv import write_csv

                write_csv(table, temporary)
            else:
                write_checked(table, temporary)
        return path

    def write(self, table: pa.Table, path: str | Path) -> int:
        """Write the rows of a table as a pool, each once, with the user's own columns, in the order of the training set;
        returns their number. Raises `UserError` where a row's number or its file is not known."""
        path = self._check_output("--write", path)
        check_suffix(path)
        training = self._training_rows("to write rows")
        numbers = table["row"].to_pylist()
        if None in numbers:
            raise UserError(
                f"--write {path}: {numbers.count(None):,} of {len(numbers):,} rows have no number in the ledger, because the "
                "training set was iterable or its collator changed rows; export them by token_id with --out"
            )
        rows = np.unique(np.array(numbers, dtype=np.int64))
        if not len(rows):
            raise UserError(f"--write {path}: the answer holds no row, so there is nothing to write")
        assert training.texts.pool is not None
        training.texts.pool.source.write(training.rows[rows].tolist(), path)
        return len(rows)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _names(self, lines: NDArray[np.int64]) -> dict[str, Any]:
        """The columns that name a row, of some lines."""
        rows = [None if row < 0 else row for row in self.lines.row[lines].tolist()]
        return {"row": rows, "token_id": [self.lines.token_id[line] for line in lines]}

    def _distinct(self) -> tuple[NDArray[np.int64], int]:
        """An index for each distinct row `(L,)`, and their number `K`."""
        _, of = np.unique(np.array(self.lines.token_id, dtype=object).astype(str), return_inverse=True)
        return of.astype(np.int64), int(of.max()) + 1

    def _ends(
        self, of: NDArray[np.int64], count: int, where: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first and the last line of each row that was trained on (or is among `where`); -1 for the others."""
        lines = np.flatnonzero(self.lines.kept if where is None else where)
        lines = lines[np.argsort(self.lines.step[lines], kind="stable")]
        first, last = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64)
        first[of[lines[::-1]]] = lines[::-1]
        last[of[lines]] = lines
        return first, last

    def _never_read(self) -> NDArray[np.int64]:
        """Rows of the training set that never were candidates; none where the rows cannot be read or numbered."""
        training = self.run.training_rows
        if training is None or training.texts.pool is None or (self.lines.row < 0).any():
            return np.zeros(0, dtype=np.int64)
        unread = np.setdiff1d(np.arange(len(training.rows)), self.lines.row)
        source = training.texts.pool.source
        read_ids = set(source.ids(training.rows[np.unique(self.lines.row)].tolist()))
        ids = source.ids(training.rows[unread].tolist())
        return unread[[row_id not in read_ids for row_id in ids]] if len(unread) else unread

    def _labels(self, by: str) -> Labels:
        labels = {label.name: label for label in self._training_rows(f"--by {by}").labels}
        if by not in labels:
            known = ", ".join(labels) or "none"
            hint = did_you_mean(by, list(labels), otherwise="a label has few distinct short values")
            raise UserError(f"--by {by} is no label column of the training rows; known: {known}; {hint}")
        return labels[by]

    def _training_rows(self, purpose: str) -> TrainingRows:
        training = self.run.training_rows
        if training is None or training.texts.pool is None:
            raise UserError(
                f"{purpose}: the training rows of {self.run.folder} cannot be read; pass their file with --rows (a trainer "
                "that was handed packed lines has none)"
            )
        return training

    def _require_losses(self) -> None:
        if not np.isfinite(self.lines.loss).any():
            raise UserError(
                f"the ledger of {self.run.folder} holds no loss in training: it was written by an earlier version, or the "
                "trainer's model returns neither logits nor log-probabilities (a fused loss); train again without it"
            )

    def _check_output(self, flag: str, path: str | Path) -> Path:
        train = self.source if self.source is not None else self.run.manifest.get("config", {}).get("train")
        refuse_overlap({flag: path}, {"the training rows": train, "the run folder": self.run.folder})
        if Path(path).is_dir():
            raise UserError(f"{flag} {path} is a folder; pass the path of a file")
        return Path(path)


def _losses_now(now: str | Path | Mapping[str, float]) -> Mapping[str, float]:
    if isinstance(now, Mapping):
        return now
    from ..online.rho_loss import TABLE_SUFFIXES, read_table

    if Path(now).suffix not in TABLE_SUFFIXES:
        raise UserError(f"--now {now} must end in {' or '.join(TABLE_SUFFIXES)}; make it with siftune score-reference")
    return {token_id.hex(): loss for token_id, loss in read_table(Path(now)).items()}


def _table(**columns: Any) -> pa.Table:
    """A table; NaN is null."""
    kinds = {"row": pa.int64(), "token_id": pa.string(), "label": pa.string()}
    return pa.table(
        {
            name: pa.array(values, kinds.get(name), from_pandas=isinstance(values, np.ndarray))
            for name, values in columns.items()
        }
    )
