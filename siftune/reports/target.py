"""What each row of a target brought in: the section of a selection's page for methods with a target.

Cost: reading the target, and one row of the pool for each row of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from ..offline.target import Target, read_target
from . import words
from .blocks import Block, Note, Section, Table
from .rows_file import Selection, Texts
from .untrusted import one_line, visible

TEXT_BYTES = 200
"""Maximum bytes of one row's text."""
MOST = 500
"""Target rows in the table."""


def target_section(selection: Selection, texts: Texts, *, cache: str | Path | None) -> Section | None:
    """A table of the target's rows with the number of chosen rows that each brought in, and the first of them."""
    source = selection.config.get("target")
    if selection.target_rows is None or not isinstance(source, str):
        return None
    blocks: list[Block] = []
    try:
        target = read_target(source, cache=cache)
    except UserError as error:
        return _section([Note(text=visible(f"The target cannot be read any more: {error}"))])
    if selection.manifest.get("inputs", {}).get("target") == target.key:
        blocks.append(_table(selection, texts, target))
    else:
        blocks.append(Note(text=visible(f"The target {source} has changed since the run, so its rows are not shown.")))
    return _section(blocks)


def _section(blocks: list[Block]) -> Section:
    lede = "The chosen rows by the target row that brought them in (round robin), or is most similar to them."
    return Section(name="target", title="The target", lede=lede, blocks=blocks)


def _table(selection: Selection, texts: Texts, target: Target) -> Table:
    assert selection.target_rows is not None
    chosen = selection.ranked[selection.kept[selection.ranked]]
    owners = selection.target_rows[chosen]
    shown = range(min(len(target), MOST))
    first = {int(owner): int(row) for owner, row in zip(owners[::-1], chosen[::-1], strict=True)}
    with_rows = [index for index in shown if index in first]
    best = dict(zip(with_rows, texts.read([first[index] for index in with_rows]), strict=True))
    counts = np.bincount(owners[owners >= 0], minlength=len(target))
    lines = [line for _, line in target.pool.source.locations(target.rows.tolist())]
    rows = []
    for index, row in zip(shown, target.read(), strict=False):
        text = one_line("\n".join(part for part in (row.question, row.output) if part), TEXT_BYTES)
        pair = best.get(index)
        example = one_line("\n".join(part for part in pair if part), TEXT_BYTES) if pair else "–"
        subtask = visible(target.subtasks[int(target.labels[index])]) if target.subtasks else "–"
        rows.append((words.count(lines[index]), subtask, text, words.count(int(counts[index])), example))
    caption = f"{words.count(len(target))} target rows; {words.count(int((counts == 0).sum()))} brought in nothing"
    columns = ("line", "subtask", "target row", "chosen rows", "the first of them")
    return Table(caption=caption, columns=columns, rows=rows, numbers=(0, 3))
