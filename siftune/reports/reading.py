"""Rows to read: the highest, those around the cut, the lowest, a random sample, and those left out, with their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import words
from .blocks import Explorer
from .composition import Labels
from .rows_file import Selection, Texts
from .untrusted import clip

EACH = 100
"""Rows of a view."""
LEFT_OUT = 300
"""Maximum number of rows without a score that are listed; all are counted."""
CHARACTERS = 1500
"""Maximum characters of a question, and of an answer."""


def explorer(selection: Selection, texts: Texts, labels: Sequence[Labels], *, seed: int = 0) -> Explorer:
    """The rows to row_texts of a selection."""
    views = [(key, name, about, rows) for key, name, about, rows in _views(selection, seed) if len(rows)]
    shown_rows = sorted({row for *_, rows in views for row in rows})
    row_texts = dict(zip(shown_rows, texts.read(shown_rows), strict=True))
    ranks = dict(zip(selection.ranked.tolist(), range(1, len(selection.ranked) + 1), strict=True))
    entries = {row: _row(selection, row, row_texts[row], ranks.get(row), labels) for row in shown_rows}
    data: dict[str, Any] = {
        "views": [
            {"key": key, "name": name, "about": about, "rows": [entries[row] for row in rows]}
            for key, name, about, rows in views
        ],
        "domains": list(selection.domains),
        "choice": ["Chosen", "chosen", "not chosen"],
    }
    return Explorer(name="rows-to-read", data=data)


def _views(selection: Selection, seed: int) -> list[tuple[str, str, str, list[int]]]:
    ranked = selection.ranked
    low = ranked[::-1][:EACH]
    views = [
        ("high", "Highest", f"The {len(ranked[:EACH])} highest scores, best first.", ranked[:EACH].tolist()),
        ("low", "Lowest", f"The {len(low)} lowest scores, lowest first.", low.tolist()),
    ]
    if not selection.config.get("target_mix"):  # with one, rows are not cut by their score
        cut = around_the_cut(selection)
        about = "The lowest chosen rows and the highest rows that were not chosen, by score"
        about += ", per pseudo-domain." if selection.config.get("quota") else "."
        views.insert(1, ("cut", "Around the cut", about, cut.tolist()))
    draw = np.random.Generator(np.random.PCG64(seed))
    sample = draw.permutation(selection.scored)[:EACH]
    views.append(("draw", "Drawn at random", f"{len(sample)} scored rows drawn at random.", sample.tolist()))
    unscored = left_out(selection.reasons)
    total = len(selection.reasons)
    about = f"Rows that were left unscored, with the reason: {words.count(len(unscored))} of {words.count(total)}."
    views.append(("out", "Left out", about, unscored))
    return views


def around_the_cut(selection: Selection) -> NDArray[np.int64]:
    """The lowest chosen and the highest other rows, half of `EACH` each, best first; per pseudo-domain where the
    budget was set per domain."""
    ranked, kept = selection.ranked, selection.kept
    by_domain = bool(selection.config.get("quota")) and len(selection.domains) > 0
    groups = [ranked[selection.labels[ranked] == at] for at in range(len(selection.domains))] if by_domain else [ranked]
    half = max(1, EACH // 2 // len(groups))
    parts = [np.concatenate([rows[kept[rows]][-half:], rows[~kept[rows]][:half]]) for rows in groups]
    rows_around = np.concatenate(parts)
    return rows_around[np.argsort(-selection.score[rows_around].astype(np.float64), kind="stable")]


def left_out(reasons: Mapping[int, str]) -> list[int]:
    """At most `LEFT_OUT` of the rows with a reason, taking the kinds of reason in turn, so that rare ones are included."""
    kinds: dict[str, list[int]] = {}
    for row, reason in sorted(reasons.items()):
        kinds.setdefault(reason.split(":")[0], []).append(row)
    turns = [(turn, kind, row) for kind, rows in kinds.items() for turn, row in enumerate(rows[:LEFT_OUT])]
    return sorted(row for _, _, row in sorted(turns)[:LEFT_OUT])


def _row(
    selection: Selection, row: int, text: tuple[str, str] | None, rank: int | None, labels: Sequence[Labels]
) -> dict[str, Any]:
    score = float(selection.score[row])
    entry: dict[str, Any] = {"row": row, "place": selection.place(row), "kept": bool(selection.kept[row])}
    if not np.isnan(score):
        entry |= {"score": float(f"{score:.6g}"), "rank": rank}
    if (label := int(selection.labels[row])) >= 0:
        entry["domain"] = selection.domains[label]
    if selection.tokens[row] >= 0:
        entry["tokens"] = int(selection.tokens[row])
    if row in selection.reasons:
        entry["reason"] = clip(selection.reasons[row], CHARACTERS)[0]
    label_texts = [f"{one.name}: {one.values[one.of[row]]}" for one in labels if one.of[row] >= 0]
    return entry | ({"labels": label_texts} if label_texts else {}) | texted(text)


def texted(text: tuple[str, str] | None) -> dict[str, Any]:
    """Question, answer and the number of cut characters, in the form of the page's rows."""
    if text is None:
        return {"question": "The text of this row is not available."}
    (question, cut_question), (answer, cut_answer) = (clip(part, CHARACTERS) for part in text)
    entry: dict[str, Any] = {"question": question, "answer": answer}
    return entry | ({"cut": cut_question + cut_answer} if cut_question + cut_answer else {})


def reasons_counted(reasons: Mapping[int, str]) -> list[tuple[str, int]]:
    """The number of rows per kind of reason, most frequent first."""
    kinds: dict[str, int] = {}
    for reason in reasons.values():
        kind = reason.split(":")[0]
        kind = "duplicate" if kind.startswith("duplicate of row") else kind
        kinds[kind] = kinds.get(kind, 0) + 1
    return sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
