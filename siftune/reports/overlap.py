"""Whether methods choose the same rows: every finished selection in the run's parent folder with the same pool, in pairs.

Two numbers: the share of the smaller selection that is in the other, and Spearman's rank correlation of the scores.
Cost: one read of every such run's rows.parquet.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import read_json
from . import words
from .blocks import Heat, Note
from .rows_file import MANIFEST, ROWS, Selection, read_selection

MAX_RUNS = 24


def runs_beside(selection: Selection) -> list[Selection]:
    """The selection itself, then the others in its parent folder that scored the same pool, by name."""
    pool = selection.manifest.get("inputs", {}).get("pool")
    own = selection.folder.resolve()
    selections = [selection]
    for path in sorted(own.parent.iterdir()):
        if path == own or not (path / MANIFEST).is_file() or not (path / ROWS).is_file():
            continue
        try:
            manifest = read_json(path / MANIFEST)
            if isinstance(manifest, dict) and manifest.get("inputs", {}).get("pool") == pool is not None:
                selections.append(read_selection(path))
        except (UserError, AttributeError):  # a damaged or unfinished neighbour does not stop this report
            continue
    return [one for one in selections if len(one) == len(selection)][:MAX_RUNS]


def overlap(runs: list[Selection]) -> list[Heat | Note]:
    """The matrices of shared rows and of rank correlations; empty for a single run."""
    if len(runs) < 2:
        return []
    names = [_name(run, runs) for run in runs]
    shared, sentences = [], []
    for one, first in zip(runs, names, strict=True):
        shared.append([shared_rows(one.kept, other.kept) for other in runs])
        sentences.append([_sentence(one, first, other, second) for other, second in zip(runs, names, strict=True)])
    chance = [float(run.kept.sum()) / max(1, int(run.manifest.get("rows", {}).get("usable", len(run)))) for run in runs]
    blocks: list[Heat | Note] = [
        Heat(
            caption="Rows that both methods chose, in percent of the smaller selection",
            corner="chosen by",
            rows=names,
            columns=names,
            values=shared,
            titles=sentences,
        ),
        Note(
            text=f"Two independent selections would share a part equal to the larger one's share of the pool: here "
            f"{words.share(min(chance), 1)} to {words.share(max(chance), 1)}."
            if max(chance) - min(chance) > 5e-4
            else f"Two independent selections of this size would share {words.share(chance[0], 1)} of their rows."
        ),
    ]
    ranks = [[rank_correlation(one.score, other.score) for other in runs] for one in runs]
    if any(value is not None for index, line in enumerate(ranks) for at, value in enumerate(line) if at != index):
        blocks.append(_rank_heat(names, ranks))
    return blocks


def shared_rows(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float | None:
    """Share of the smaller of two selections that is also in the other; None where one is empty."""
    smaller = min(int(first.sum()), int(second.sum()))
    return float((first & second).sum()) / smaller if smaller else None


def rank_correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float | None:
    """Spearman's rho over the rows that both scored; None where one of them does not vary."""
    from scipy.stats import spearmanr

    both = ~np.isnan(first) & ~np.isnan(second)
    a, b = first[both], second[both]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def _rank_heat(names: list[str], ranks: list[list[float | None]]) -> Heat:
    """Rank correlations in percent; negative ones are shaded as zero and given in the cell's title."""
    sentences = [
        [
            f"{row} and {column}: rank correlation {words.decimal(value, 3)}"
            for column, value in zip(names, line, strict=True)
        ]
        for row, line in zip(names, ranks, strict=True)
    ]
    values = [[None if value is None else round(value, 4) for value in line] for line in ranks]
    return Heat(
        caption="Rank correlation of the scores (Spearman, times 100), over all rows that both scored",
        corner="scored by",
        rows=names,
        columns=names,
        values=values,
        titles=sentences,
    )


def _name(run: Selection, runs: list[Selection]) -> str:
    """The method, with the folder's name where several runs have the same method."""
    several = sum(other.method == run.method for other in runs) > 1
    return f"{run.method} ({run.name})" if several else run.method


def _sentence(one: Selection, first: str, other: Selection, second: str) -> str:
    both = int((one.kept & other.kept).sum())
    return f"{first} chose {int(one.kept.sum()):,} rows, {second} {int(other.kept.sum()):,}; {both:,} are the same"
