"""A column of the training set for the candidates of a batch, which collators drop: for choice inside strata.

A candidate is recognised by its `token_id`, as in the ledger; of equal rows the first one's value counts. Cost: the
column is read once; a hash per candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UserError
from ..online.strata import length_band
from ..online.token_id import token_ids
from .row_index import RowIndex


class TrainingColumn:
    """The values of `name` in `dataset`, whose rows `index` finds.

    >>> TrainingColumn("domain", trainer.train_dataset, index)(batch)
    ['mathematics', 'coding', ...]
    """

    def __init__(self, name: str, dataset: Any, index: Callable[[], RowIndex | None]) -> None:
        """Raises `UserError` where the data set has no such column."""
        names = getattr(dataset, "column_names", None)
        if names is None or name not in names:
            raise UserError(
                f"strata={name!r} is no column of the training set ({', '.join(names or ()) or 'which has no columns'}); "
                "keep the column in it, or use strata='length:N'. Trainers that pack or prepare rows drop other columns"
            )
        self._name, self._dataset, self._index = name, dataset, index
        self._values: list[Any] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> list[Any]:
        """One value a candidate. Raises `UserError` for a candidate that is no row of the training set."""
        if self._values is None:
            self._values = list(self._dataset[self._name])
        index = self._index()
        rows = [None if index is None else index.row(digest) for digest in token_ids(batch)]
        if None in rows:
            raise UserError(
                f"candidate {rows.index(None)} of a batch is no row of the training set as its collator shows it, so its "
                f"{self._name!r} is unknown; use a collator without random changes, or strata='length:N'"
            )
        return [self._values[row] for row in rows if row is not None]


def use_training_column(selector: Any, dataset: Any, index: Callable[[], RowIndex | None]) -> None:
    """Give the selector the column of its `strata`, where that is one."""
    if selector.strata is not None and length_band(selector.strata) is None:
        selector.use_columns(TrainingColumn(selector.strata, dataset, index))
