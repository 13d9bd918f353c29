"""One optimiser step's selection: candidates in, the micro-batches to train on and what was said of every row out.

`window="micro"` chooses within each micro-batch, one after the other (UDS, arXiv 2510.16882); `window="step"` measures
them all, chooses over the whole accumulation window and deals the kept rows evenly over as many micro-batches. Cost: the
selector's own.

Shapes: `B` candidates of a micro-batch, `M` micro-batches, `C` candidates of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..budget import parse_keep
from ..online.base import Measured, OnlineMethod, cut
from ..records import RowScores
from .deal import Padding, answered, deal, real_tokens, trim

Batch = Mapping[str, Any]
NO_ANSWER = "no answer tokens: every label of the row is masked"


@dataclass(frozen=True, eq=False)
class Sifted:
    """What one step's selection did. Tensors have one entry per candidate of the step, in the order they came."""

    batches: list[Batch]
    """The micro-batches to train on, as many as came."""
    micro: list[int]
    """The micro-batch each candidate came in."""
    kept: torch.Tensor
    """Bool `(C,)`."""
    tokens: torch.Tensor
    """Real tokens of each candidate, int64 `(C,)`."""
    total: torch.Tensor
    """Float64 `(C,)`, NaN where there is no score."""
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)

    def of(self, candidates: Sequence[int]) -> Sifted:
        """The same of some candidates only: a rank's own among all."""
        picked = torch.tensor(list(candidates), dtype=torch.int64)
        return Sifted(
            self.batches,
            [self.micro[index] for index in candidates],
            self.kept[picked],
            self.tokens[picked],
            self.total[picked],
            {name: values[picked] for name, values in self.parts.items()},
            {at: self.reasons[index] for at, index in enumerate(candidates) if index in self.reasons},
        )


def keep_all(batches: Sequence[Batch], reason: str) -> Sifted:
    """No selection: every micro-batch untouched, every candidate kept and without a score, for `reason`."""
    count = sum(len(batch["input_ids"]) for batch in batches)
    nothing = torch.full((count,), torch.nan, dtype=torch.float64)
    kept = torch.ones(count, dtype=torch.bool)
    return _sifted(list(batches), batches, RowScores(nothing, {}, dict.fromkeys(range(count), reason)), kept)


def sift(
    selector: OnlineMethod,
    model: torch.nn.Module,
    batches: Sequence[Batch],
    *,
    padding: Padding,
    blanks: bool = False,
    learning_rate: float | None = None,
) -> Sifted:
    """Score the candidates with `model` as it stands, keep the selector's choice, remember it.

    `blanks` allows micro-batches that train nothing where fewer rows are kept than micro-batches came; without it at
    least one row per micro-batch is kept. `learning_rate` is the one that the step will be taken with.
    """
    selector.new_step(learning_rate=learning_rate)
    if getattr(selector, "window", "micro") == "step":
        return _across(selector, model, batches, padding, blanks)
    trained: list[Batch] = []
    scores: list[RowScores] = []
    kept: list[torch.Tensor] = []
    for batch in batches:
        measured = measure(selector, model, batch)
        said = answers_first(selector.combine(measured), batch)
        chosen = selector.choose(said, measured, selector.count(measured.rows))
        selector.commit(measured, said, chosen)
        trained.append(batch if len(chosen) == measured.rows else trim(cut(batch, chosen), padding))
        scores.append(said)
        kept.append(flags(chosen, measured.rows))
    return _sifted(trained, batches, join(scores), torch.cat(kept))


def measure(selector: OnlineMethod, model: torch.nn.Module, batch: Batch) -> Measured:
    """Measure in chunks of what the kept micro-batch will hold, unless the user said otherwise: candidates then cost no
    more activation memory than training does."""
    if selector.score_tokens is not None:
        return selector.measure(model, batch)
    rows, width = batch["input_ids"].shape
    selector.score_tokens = max(1, selector.count(rows) * width)
    try:
        return selector.measure(model, batch)
    finally:
        selector.score_tokens = None


def _across(
    selector: OnlineMethod, model: torch.nn.Module, batches: Sequence[Batch], padding: Padding, blanks: bool
) -> Sifted:
    parts = [measure(selector, model, batch) for batch in batches]
    measured = Measured.join(parts)
    mute = (~torch.cat([answered(batch) for batch in batches])).nonzero().flatten().tolist()
    scores = without(selector.combine(measured), dict.fromkeys(mute, NO_ANSWER))
    count = window_count(selector, [part.rows for part in parts])
    chosen = choose(selector, scores, measured, count, least=0 if blanks else len(batches))
    selector.commit(measured, scores, chosen)
    whole = len(chosen) == measured.rows
    trained = list(batches) if whole else deal(batches, chosen, padding)
    return _sifted(trained, batches, scores, flags(chosen, measured.rows))


def choose(selector: OnlineMethod, scores: RowScores, measured: Measured, count: int, *, least: int) -> torch.Tensor:
    """The selector's choice of `count` candidates, and of `least` at any rate: one for each micro-batch that may not
    be blank. A budget of its own (tokens) may keep fewer; the first that it left then join."""
    chosen = selector.choose(scores, measured, max(count, least))
    if len(chosen) >= least:
        return chosen
    more = [index for index in range(measured.rows) if index not in set(chosen.tolist())]
    return torch.cat([chosen, torch.tensor(more[: least - len(chosen)], dtype=chosen.dtype)]).sort().values


def window_count(selector: OnlineMethod, sizes: Sequence[int]) -> int:
    """Rows kept of several micro-batches that are chosen from together (an accumulation window, several ranks'): a
    number is per micro-batch, a fraction is of all candidates."""
    if parse_keep(selector.keep).count is not None:
        return sum(selector.count(size) for size in sizes)
    return selector.count(sum(sizes))


def answers_first(scores: RowScores, batch: Batch) -> RowScores:
    """Rows with nothing to learn from lose their score: they are taken last, whatever the method thinks of them."""
    return without(scores, dict.fromkeys((~answered(batch)).nonzero().flatten().tolist(), NO_ANSWER))


def without(scores: RowScores, reasons: Mapping[int, str]) -> RowScores:
    """The scores with NaN, and their reason, for some rows."""
    if not reasons:
        return scores
    empty = flags(torch.tensor(list(reasons)), len(scores))
    parts = {name: value.masked_fill(empty, torch.nan) for name, value in scores.parts.items()}
    return RowScores(scores.total.masked_fill(empty, torch.nan), parts, {**scores.reasons, **reasons})


def flags(indices: torch.Tensor, count: int) -> torch.Tensor:
    """Bool `(count,)`, true at `indices`."""
    result = torch.zeros(count, dtype=torch.bool)
    result[indices] = True
    return result


def join(scores: Sequence[RowScores]) -> RowScores:
    """Several micro-batches' scores as one, in order."""
    reasons: dict[int, str] = {}
    start = 0
    for one in scores:
        reasons |= {start + index: reason for index, reason in one.reasons.items()}
        start += len(one)
    parts = {name: torch.cat([one.parts[name] for one in scores]) for name in scores[0].parts}
    return RowScores(torch.cat([one.total for one in scores]), parts, reasons)


def _sifted(trained: list[Batch], came: Sequence[Batch], scores: RowScores, kept: torch.Tensor) -> Sifted:
    micro = [index for index, batch in enumerate(came) for _ in range(len(batch["input_ids"]))]
    tokens = torch.cat([real_tokens(batch).sum(dim=1).cpu() for batch in came])
    return Sifted(trained, micro, kept, tokens, scores.total, scores.parts, scores.reasons)
