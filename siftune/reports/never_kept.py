"""Rows that a selector never kept, and rows that it kept most often, with their texts where available."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import words
from .blocks import Block, Chart, Explorer, Fact, Facts, Note, Section
from .reading import texted
from .training_run import Ledger, TrainingRun

EACH = 100
MAX_TIMES = 20


def rows_section(run: TrainingRun, ledger: Ledger, prefix: str, *, seed: int) -> Section:
    """Rows by the number of times they were candidates and were kept."""
    of, names = ledger.keys
    seen = np.bincount(of, minlength=len(names))
    kept = np.bincount(of[ledger.kept], minlength=len(names))
    never = kept == 0
    facts = Facts(
        items=[
            Fact(label="Different rows seen", value=words.count(len(names))),
            Fact(
                label="Trained on at least once",
                value=words.count((~never).sum()),
                note=words.share((~never).sum(), len(names)),
            ),
            Fact(label="Never trained on", value=words.count(never.sum()), note=words.share(never.sum(), len(names))),
            Fact(label="Times a row was a candidate", value=words.decimal(seen.mean(), 3), note="on average"),
        ]
    )
    blocks: list[Block] = [facts, *([_times(kept, f"{prefix}times")] if kept.max() > 1 else [])]
    if run.training_rows is None:
        blocks.append(
            Note(
                text="The texts of the rows are not available; pass the file of the training rows with --rows to show them."
            )
        )
    blocks.append(_explorer(run, ledger, of, names, seen, kept, prefix, seed))
    lede = "A row that is never trained on may be noise, or a kind of row that the score misses. Read some of them."
    return Section(name=f"{prefix}rows", title="Rows never kept", lede=lede, blocks=blocks)


def _times(kept: NDArray[np.int64], name: str) -> Chart:
    counts = np.bincount(np.minimum(kept, MAX_TIMES))
    times = list(range(len(counts)))
    labels = [str(time) if time < MAX_TIMES else f"{MAX_TIMES} or more" for time in times]
    series = [{"as": "bars", "name": "rows", "role": "kept", "x": times, "y": counts.tolist()}]
    data: dict[str, Any] = {"x": "times trained on", "y": "rows", "zero": True, "series": series}
    label = "Rows by how often they were trained on: " + ", ".join(
        f"{count:,} rows {time} times" for time, count in zip(labels, counts.tolist(), strict=True)
    )
    if len(times) <= MAX_TIMES + 1:
        data |= {"ticks": times, "ticktext": labels}
    return Chart(name=name, title="How often rows were trained on", label=label, data=data)


def _explorer(
    run: TrainingRun,
    ledger: Ledger,
    of: NDArray[np.int64],
    names: list[str],
    seen: NDArray[np.int64],
    kept: NDArray[np.int64],
    prefix: str,
    seed: int,
) -> Explorer:
    known = ~np.isnan(ledger.total)
    sums, times = (np.bincount(of[known], weights, minlength=len(names)) for weights in (ledger.total[known], None))
    mean = np.where(times > 0, sums / np.maximum(times, 1), np.nan)
    row = np.full(len(names), -1, dtype=np.int64)
    row[of] = ledger.row
    never = np.flatnonzero(kept == 0)
    draw = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))[:EACH]
    ranked = np.flatnonzero(times > 0)[np.argsort(-mean[times > 0], kind="stable")]
    views = [
        (
            "never",
            "Never kept",
            "Rows that were candidates and never trained on, most frequent candidates first.",
            never[np.argsort(-seen[never], kind="stable")],
        ),
        ("often", "Most often kept", "Rows that were trained on most often.", np.argsort(-kept, kind="stable")),
        ("high", "Highest mean score", "Rows with the highest mean score over their candidacies.", ranked),
        ("low", "Lowest mean score", "Rows with the lowest mean score over their candidacies.", ranked[::-1]),
        ("draw", "Drawn at random", "Rows drawn at random.", draw),
    ]
    shown_views = [(key, name, about, keys[:EACH].tolist()) for key, name, about, keys in views if len(keys)]
    shown_rows = sorted({key for *_, keys in shown_views for key in keys})
    texts = run.texts_of(row[shown_rows])
    entries = {}
    for key, text in zip(shown_rows, texts, strict=True):
        entries[key] = {
            "row": key,
            "name": names[key],
            "kept": bool(kept[key]),
            **_labels(run, int(row[key])),
            **texted(text),
        }
        entries[key]["facts"] = [f"seen {words.times(seen[key])}", f"kept {words.times(kept[key])}"]
        if np.isfinite(mean[key]):
            entries[key]["facts"].append(f"mean score {words.decimal(float(mean[key]))}")
    data = {
        "views": [
            {"key": key, "name": name, "about": about, "rows": [entries[one] for one in keys]}
            for key, name, about, keys in shown_views
        ],
        "domains": list(run.training_rows.labels[0].values)
        if run.training_rows is not None and run.training_rows.labels
        else [],
        "by": run.training_rows.labels[0].name if run.training_rows is not None and run.training_rows.labels else "",
        "choice": ["Kept", "kept at least once", "never kept"],
    }
    return Explorer(name=f"{prefix}rows-to-read", data=data)


def _labels(run: TrainingRun, row: int) -> dict[str, Any]:
    if run.training_rows is None or row < 0 or not run.training_rows.labels:
        return {}
    first, *others = run.training_rows.labels
    labels: dict[str, Any] = {"domain": first.values[first.of[row]]} if first.of[row] >= 0 else {}
    other_labels = [f"{one.name}: {one.values[one.of[row]]}" for one in others if one.of[row] >= 0]
    return labels | ({"labels": other_labels} if other_labels else {})
