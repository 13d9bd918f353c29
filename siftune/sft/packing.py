"""A recipe's rows packed into lines by trl, and whether its model keeps them apart.

trl packs its own data sets while it tokenises them; a recipe's rows are tokens already, so its packing function is called
here. Every line carries `seq_lengths`, from which trl's collator makes the positions. Cost: one pass over the tokens, written
to the output folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..hook.packing import describe_reading_across, separates
from ..models.layout import with_layout
from ..models.load import quiet as silent
from ..output import say

LINES = "packed-lines.arrow"
"""The packed rows in the output folder, written anew by every start."""


def packed_lines(dataset: Any, arguments: Any, length: int) -> Any:
    """The rows of a token data set in lines of at most `length` tokens, none of them cut; the same on every start.

    `dataset` has `input_ids` and `labels`; the result `seq_lengths` too, the tokens of each row of a line, in order.
    """
    from trl import pack_dataset  # type: ignore[attr-defined]

    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with silent():
        return pack_dataset(
            dataset,
            length,
            arguments.packing_strategy,
            {"cache_file_name": str(folder / LINES), "load_from_cache_file": False},
        )


def report_reading_across(trainer: Any, *, quiet: bool) -> None:
    """One line on stderr where the model of a trainer that packs reads across rows, measured on its first rows.

    Raises `UserError` for a model that carries a state from row to row.
    """
    first = [trainer.train_dataset[index] for index in range(min(2, len(trainer.train_dataset)))]
    batch = with_layout(trainer.data_collator(first), packed=True)
    if separates(trainer.model, [batch]) is False and not quiet:
        say(describe_reading_across(trainer.model), error=True)
