"""Steps whose loss jumped, and the rows that they were trained on.

A step is a spike where its loss exceeds the median of the `BEFORE` steps before it by `FACTOR` of their standard
deviations (estimated from the median absolute deviation) and by a tenth. The loss of a step is the mean over its rows
of the loss that the ledger recorded; without that record it is the trainer's log. Cost: one pass over the ledger.

Shapes: `S` steps with a loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import words
from .blocks import Block, Note, Section, Table
from .training_run import Ledger, TrainingRun
from .untrusted import one_line

BEFORE = 20
LEAST_BEFORE = 8
FACTOR = 4.0
DEVIATION_OF_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
MOST_SPIKES = 10
ROWS_EACH = 4
TEXT_BYTES = 160


def step_losses(run: TrainingRun) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps `(S,)` ascending, and the loss of each; see the module."""
    ledger = run.ledger
    if ledger is not None and np.isfinite(ledger.loss).any():
        known = ~np.isnan(ledger.loss)
        steps, of = np.unique(ledger.step[known], return_inverse=True)
        return steps, np.bincount(of, ledger.loss[known]) / np.bincount(of)
    steps_logged, values = run.logged("loss")
    return np.array(steps_logged, dtype=np.int64), np.array(values, dtype=np.float64)


def find_spikes(losses: NDArray[np.float64]) -> list[tuple[int, float]]:
    """Positions of the spikes among the losses `(S,)`, each with the median before it, in order.

    >>> find_spikes(np.array([2.0] * 10 + [5.0]))
    [(10, 2.0)]
    """
    spikes = []
    for index in range(LEAST_BEFORE, len(losses)):
        before = losses[max(0, index - BEFORE) : index]
        before = before[np.isfinite(before)]
        if len(before) < LEAST_BEFORE or np.isnan(losses[index]):
            continue
        median = float(np.median(before))
        deviation = DEVIATION_OF_MAD * float(np.median(np.abs(before - median)))
        if losses[index] > median + max(FACTOR * deviation, 0.1 * abs(median)):
            spikes.append((index, median))
    return spikes


def rows_of_step(ledger: Ledger, step: int) -> NDArray[np.int64]:
    """Lines of the ledger that were trained on at a step, the highest loss first."""
    lines = np.flatnonzero((ledger.step == step) & ledger.kept)
    return lines[np.argsort(-np.nan_to_num(ledger.loss[lines], nan=-np.inf), kind="stable")]


def spikes_section(run: TrainingRun, prefix: str) -> Section | None:
    """The largest spikes with the rows of each; None for a run without a ledger or with too few steps."""
    if run.ledger is None or not len(run.ledger):
        return None
    steps, losses = step_losses(run)
    if len(steps) <= LEAST_BEFORE:
        return None
    spikes = find_spikes(losses)
    lede = (
        f"Steps whose loss exceeds the median of the {BEFORE} steps before it by {FACTOR:g} deviations and by a tenth."
    )
    blocks: list[Block] = [_spikes_table(run, run.ledger, steps, losses, spikes)] if spikes else []
    if not spikes:
        blocks.append(Note(text="There is none."))
    elif len(spikes) > MOST_SPIKES:
        blocks.append(Note(text=f"The largest {MOST_SPIKES} of {words.count(len(spikes))} are shown."))
    return Section(name=f"{prefix}spikes", title="Loss spikes", lede=lede, blocks=blocks)


def _spikes_table(
    run: TrainingRun,
    ledger: Ledger,
    steps: NDArray[np.int64],
    losses: NDArray[np.float64],
    spikes: list[tuple[int, float]],
) -> Table:
    largest = sorted(spikes, key=lambda spike: -(losses[spike[0]] - spike[1]))[:MOST_SPIKES]
    rows = []
    for index, median in sorted(largest):
        lines = rows_of_step(ledger, int(steps[index]))[:ROWS_EACH]
        texts = run.texts_of(ledger.row[lines])
        cells = [words.count(steps[index]), words.decimal(float(losses[index])), words.decimal(median)]
        for line, text in zip(lines.tolist(), texts, strict=True):
            name = f"row {ledger.row[line]:,}" if ledger.row[line] >= 0 else ledger.token_id[line][:12]
            loss = "–" if np.isnan(ledger.loss[line]) else words.decimal(float(ledger.loss[line]))
            rows.append([*cells, name, loss, "" if text is None else one_line(" → ".join(text), TEXT_BYTES)])
            cells = ["", "", ""]
    return Table(
        caption=f"Spikes, each with up to {ROWS_EACH} of its rows, the highest loss first",
        columns=("step", "loss", "median before", "row", "loss of the row", "text"),
        rows=rows,
        numbers=(0, 1, 2, 4),
    )
