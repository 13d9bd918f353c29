"""One optimiser step's selection: candidates in, the micro-batches to train on and a record of every candidate out.

`window="micro"` chooses within each micro-batch (UDS, arXiv 2510.16882), `window="step"` over the accumulation window.
With several processes, their j-th micro-batches in rank order form one global micro-batch, so 1, 2 and 4 processes that
read the same rows in a step keep the same rows. Every rank measures its own candidates; the measurements are gathered,
and every rank combines, chooses and commits the same numbers, which keeps memories and counters equal everywhere. That
they are equal is checked: the choice at every step, the complete state at the first and every hundredth.

A world of one runs the same code and exchanges nothing. Cost: the selector's own; with several ranks the measured
columns (for UDS 8 kB a candidate), gathered, and the rows that change ranks (`siftune.hook.rebalance`): four collective
calls a step, two more for each choice of a method that compares, two more where rows move.

Shapes: `B` candidates of a micro-batch, `C` candidates of the step on all ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..budget import parse_keep
from ..models.layout import candidates_of, layout_of, original_of, with_layout
from ..models.repack import segments_as_rows
from ..online.base import Measured, OnlineMethod, mask_labels, with_segment_tokens
from ..records import RowScores
from .batching import Padding, has_labels, token_counts
from .exchange import Ranks, pack, unpack
from .rebalance import Origin, Slot, build_batches, rebalance, rebalance_by_tokens

Batch = Mapping[str, Any]
NO_ANSWER = "no answer tokens: every label of the row is masked"
STATE_CHECK_EVERY = 100
"""Selections between two checks of the complete state; choices are checked at every step."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The result of one step's selection. Tensors have one entry per candidate, in the order of micro-batches and
    ranks."""

    batches: list[Batch]
    """This rank's micro-batches to train on, as many as it read."""
    micro: list[int]
    """The micro-batch that each candidate came in."""
    kept: torch.Tensor
    """Bool `(C,)`."""
    tokens: torch.Tensor
    """Real tokens of each candidate, int64 `(C,)`."""
    total: torch.Tensor
    """Float64 `(C,)`, NaN where there is no score."""
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)
    local: Sequence[int] = ()
    """Positions of this rank's candidates among the C, in the order of its own micro-batches."""
    trained: Sequence[Sequence[int | None]] = ()
    """For each row of each of `batches`, its position among this rank's candidates; None for another rank's row."""

    def local_only(self) -> Selection:
        """The same record of this rank's candidates alone."""
        index = torch.tensor(list(self.local), dtype=torch.int64)
        return Selection(
            self.batches,
            [self.micro[candidate] for candidate in self.local],
            self.kept[index],
            self.tokens[index],
            self.total[index],
            {name: values[index] for name, values in self.parts.items()},
            {at: self.reasons[candidate] for at, candidate in enumerate(self.local) if candidate in self.reasons},
            range(len(index)),
            self.trained,
        )


@dataclass(frozen=True, eq=False)
class Measurement:
    """One measured micro-batch, as it is exchanged between ranks."""

    measured: Measured
    tokens: torch.Tensor
    """Real tokens, int64 `(B,)`."""
    unlabelled: torch.Tensor
    """Bool `(B,)`: rows without a label token."""
    packed: bool = False
    """Whether the candidates are segments of a packed batch."""

    @staticmethod
    def join(parts: Sequence[Measurement]) -> Measurement:
        return Measurement(
            Measured.join([part.measured for part in parts]),
            torch.cat([part.tokens for part in parts]) if parts else torch.zeros(0, dtype=torch.int64),
            torch.cat([part.unlabelled for part in parts]) if parts else torch.zeros(0, dtype=torch.bool),
        )


def select_step(
    selector: OnlineMethod,
    model: torch.nn.Module,
    batches: Sequence[Batch],
    *,
    padding: Padding,
    ranks: Ranks | None = None,
    allow_dummies: bool = False,
    learning_rate: float | None = None,
    unscored: str | None = None,
    packed: bool = False,
    score_segments_alone: bool = False,
) -> Selection:
    """Score the candidates of all `ranks` with `model`, keep the selector's choice and commit it to its memory.

    All ranks have to call it, with batches or without; `ranks=None` is this process alone. `allow_dummies` permits
    micro-batches that train nothing where fewer rows are kept than micro-batches were read; without it at least one row
    per micro-batch is kept. `learning_rate` is that of the coming optimiser step. `unscored` keeps every row, without a
    score, for that reason. `packed` takes lines without boundaries for segments, where the trainer packs;
    `score_segments_alone` measures segments as rows of a padded batch, for a model that separates them. Raises
    `RuntimeError` where ranks disagree: their memories would diverge unnoticed.
    """
    ranks = ranks or Ranks.alone()
    selector.new_step(learning_rate=learning_rate)
    batches = [with_layout(batch, packed=packed) for batch in batches]
    local = [_measure(selector, model, batch, scored=unscored is None, alone=score_segments_alone) for batch in batches]
    of_ranks = _gather_measurements(local, ranks)
    groups = _groups([len(parts) for parts in of_ranks], complete_step=selector.window == "step")
    plan: dict[Slot, list[Origin]] = {}
    scores: list[RowScores] = []
    kept: list[torch.Tensor] = []
    for slots in groups:
        parts = [of_ranks[rank][micro] for rank, micro in slots]
        if unscored is None:
            group_scores, chosen = _choose_group(
                selector, _with_comparisons(selector, slots, parts, ranks), allow_dummies=allow_dummies
            )
        else:
            group_scores, chosen = _keep_all(parts, reason=unscored)
        scores.append(group_scores)
        kept.append(flags(chosen, len(group_scores)))
        plan |= _assign(slots, parts, chosen)
    _check_agreement(selector, kept, ranks, scored=unscored is None)
    order = [slot for slots in groups for slot in slots]
    joined = join_scores(scores)
    trained = build_batches(batches, plan, padding, ranks)
    if any(part.measured.label_masks for part in local):  # methods that mask tokens keep every row where it is
        trained = [mask_labels(batch, part.measured.label_masks) for batch, part in zip(trained, local, strict=True)]
    return Selection(
        [original_of(batch) for batch in trained],
        [micro for rank, micro in order for _ in range(of_ranks[rank][micro].measured.rows)],
        torch.cat(kept) if kept else torch.zeros(0, dtype=torch.bool),
        Measurement.join([of_ranks[rank][micro] for rank, micro in order]).tokens,
        joined.total,
        joined.parts,
        joined.reasons,
        _local_candidates(order, of_ranks, ranks.rank),
        _trained_candidates(plan, [part.measured.rows for part in local], ranks.rank),
    )


# --- measure ----------------------------------------------------------------------------------------------------------


def _measure(
    selector: OnlineMethod, model: torch.nn.Module, batch: Batch, *, scored: bool, alone: bool = False
) -> Measurement:
    measured = (
        selector.stratified(measure_in_chunks(selector, model, batch, alone=alone and layout_of(batch).packed), batch)
        if scored
        else Measured(candidates_of(batch))
    )
    return Measurement(measured, token_counts(batch), ~has_labels(batch), layout_of(batch).packed)


def measure_in_chunks(selector: OnlineMethod, model: torch.nn.Module, batch: Batch, *, alone: bool = False) -> Measured:
    """Measure in chunks of the size that the kept micro-batch will have, unless the user set `score_tokens`: scoring then
    needs no more activation memory than training does. `alone` measures the segments of a packed batch as rows."""
    rows = segments_as_rows(batch) if alone else batch
    if selector.score_tokens is not None:
        return selector.measure(model, rows)
    lines, width = batch["input_ids"].shape
    candidates = candidates_of(batch)
    selector.score_tokens = max(1, selector.count(candidates) * width * lines // max(1, candidates))
    try:
        return selector.measure(model, rows)
    finally:
        selector.score_tokens = None


# --- choose -----------------------------------------------------------------------------------------------------------


def _groups(micro_batches: Sequence[int], *, complete_step: bool) -> list[list[Slot]]:
    """Micro-batches that share one selection: the ranks' j-th ones, or all of the step, in global order.

    `micro_batches` is the number of micro-batches that each rank read.
    """
    by_micro = [
        [(rank, micro) for rank, count in enumerate(micro_batches) if micro < count]
        for micro in range(max(micro_batches, default=0))
    ]
    if not complete_step or not by_micro:
        return by_micro
    return [[slot for slots in by_micro for slot in slots]]


def _choose_group(
    selector: OnlineMethod, parts: Sequence[Measurement], *, allow_dummies: bool
) -> tuple[RowScores, torch.Tensor]:
    """Scores and choice of the candidates of some micro-batches, committed to the selector's memory.

    Rows without a label token lose their score: they are taken last, whatever the method scores them.
    """
    joined = Measurement.join(parts)
    unlabelled = joined.unlabelled.nonzero().flatten().tolist()
    scores = without_scores(selector.combine(joined.measured), dict.fromkeys(unlabelled, NO_ANSWER))
    count = window_count(selector, [part.measured.rows for part in parts])
    packed = any(part.packed for part in parts)
    choosable = with_segment_tokens(joined.measured, joined.tokens) if packed else joined.measured
    chosen = choose(selector, scores, choosable, count, minimum=0 if allow_dummies else len(parts))
    selector.commit(joined.measured, scores, chosen)
    return scores, chosen


def _keep_all(parts: Sequence[Measurement], *, reason: str) -> tuple[RowScores, torch.Tensor]:
    count = sum(part.measured.rows for part in parts)
    unscored = torch.full((count,), torch.nan, dtype=torch.float64)
    return RowScores(unscored, {}, dict.fromkeys(range(count), reason)), torch.arange(count)


def choose(selector: OnlineMethod, scores: RowScores, measured: Measured, count: int, *, minimum: int) -> torch.Tensor:
    """The selector's choice of `count` candidates, and of `minimum` in any case: one for each micro-batch that must not
    be a dummy. A token budget may keep fewer; the first rows that it left out are then added."""
    chosen = selector.choose_rows(scores, measured, max(count, minimum))
    if len(chosen) >= minimum:
        return chosen
    remaining = [index for index in range(measured.rows) if index not in set(chosen.tolist())]
    return torch.cat([chosen, torch.tensor(remaining[: minimum - len(chosen)], dtype=chosen.dtype)]).sort().values


def window_count(selector: OnlineMethod, sizes: Sequence[int]) -> int:
    """Rows kept of several micro-batches that share one selection (an accumulation window, several ranks): an int
    is per micro-batch, a fraction is of all candidates."""
    if parse_keep(selector.keep).count is not None:
        return sum(selector.count(size) for size in sizes)
    return selector.count(sum(sizes))


def without_scores(scores: RowScores, reasons: Mapping[int, str]) -> RowScores:
    """The scores with NaN, and their reason, for some rows."""
    if not reasons:
        return scores
    removed = flags(torch.tensor(list(reasons)), len(scores))
    parts = {name: value.masked_fill(removed, torch.nan) for name, value in scores.parts.items()}
    return RowScores(scores.total.masked_fill(removed, torch.nan), parts, {**scores.reasons, **reasons})


def flags(indices: torch.Tensor, count: int) -> torch.Tensor:
    """Bool `(count,)`, true at `indices`."""
    result = torch.zeros(count, dtype=torch.bool)
    result[indices] = True
    return result


def join_scores(scores: Sequence[RowScores]) -> RowScores:
    """Several groups' scores as one, in order."""
    if not scores:
        return RowScores(torch.zeros(0, dtype=torch.float64), {}, {})
    reasons: dict[int, str] = {}
    start = 0
    for group in scores:
        reasons |= {start + index: reason for index, reason in group.reasons.items()}
        start += len(group)
    parts = {name: torch.cat([group.parts[name] for group in scores]) for name in scores[0].parts}
    return RowScores(torch.cat([group.total for group in scores]), parts, reasons)


# --- assign rows to micro-batches -------------------------------------------------------------------------------------


def _assign(slots: Sequence[Slot], parts: Sequence[Measurement], chosen: torch.Tensor) -> dict[Slot, list[Origin]]:
    """The kept rows that each slot trains; where all are kept, every slot keeps its own."""
    origins = [
        (rank, micro, row)
        for (rank, micro), part in zip(slots, parts, strict=True)
        for row in range(part.measured.rows)
    ]
    if len(chosen) == len(origins):
        return {slot: [origin for origin in origins if origin[:2] == slot] for slot in slots}
    kept = [origins[index] for index in chosen.tolist()]
    if any(part.packed for part in parts):
        tokens = dict(zip(origins, Measurement.join(parts).tokens.tolist(), strict=True))
        return rebalance_by_tokens(slots, kept, tokens)
    return rebalance(slots, kept)


def _local_candidates(order: Sequence[Slot], of_ranks: Sequence[Sequence[Measurement]], rank: int) -> list[int]:
    start = 0
    local: list[int] = []
    for slot_rank, micro in order:
        rows = of_ranks[slot_rank][micro].measured.rows
        if slot_rank == rank:
            local.extend(range(start, start + rows))
        start += rows
    return local


def _trained_candidates(
    plan: Mapping[Slot, Sequence[Origin]], rows_of_micro: Sequence[int], rank: int
) -> list[list[int | None]]:
    """For each row that this rank trains, by micro-batch, its position among this rank's own candidates."""
    starts = list(itertools.accumulate(rows_of_micro, initial=0))
    return [
        [starts[source] + row if origin == rank else None for origin, source, row in plan[(rank, micro)]]
        for micro in range(len(rows_of_micro))
    ]


# --- exchange ---------------------------------------------------------------------------------------------------------


def _gather_measurements(local: list[Measurement], ranks: Ranks) -> list[list[Measurement]]:
    """Every rank's measurements, in rank order."""
    if ranks.world == 1:
        return [local]
    return [decode_measurements(message) for message in ranks.gather(encode_measurements(local))]


def encode_measurements(local: Sequence[Measurement]) -> bytes:
    """The message in which a rank sends its measurements."""
    tensors: dict[str, torch.Tensor] = {}
    notes = []
    for micro, part in enumerate(local):
        tensors |= {f"{micro}/column/{name}": value for name, value in part.measured.columns.items()}
        tensors |= {f"{micro}/tokens": part.tokens, f"{micro}/unlabelled": part.unlabelled}
        names = list(part.measured.columns)
        notes.append(
            {
                "rows": part.measured.rows,
                "columns": names,
                "reasons": list(part.measured.reasons.items()),
                "packed": part.packed,
            }
        )
    return pack(tensors, notes)


def decode_measurements(message: bytes) -> list[Measurement]:
    """The measurements in a rank's message."""
    tensors, notes = unpack(message)
    return [
        Measurement(
            Measured(
                note["rows"],
                {name: tensors[f"{micro}/column/{name}"] for name in note["columns"]},
                {int(row): str(reason) for row, reason in note["reasons"]},
            ),
            tensors[f"{micro}/tokens"],
            tensors[f"{micro}/unlabelled"],
            note["packed"],
        )
        for micro, note in enumerate(notes)
    ]


def _with_comparisons(
    selector: OnlineMethod, slots: Sequence[Slot], parts: Sequence[Measurement], ranks: Ranks
) -> Sequence[Measurement]:
    """The parts with the columns that `compare` adds: every rank compares its own candidates and gathers the others'.

    Without other ranks, `combine` compares for itself.
    """
    if ranks.world == 1 or type(selector).compare is OnlineMethod.compare:
        return parts
    positions_of_rank: dict[int, list[int]] = {rank: [] for rank in range(ranks.world)}
    for index, (rank, _) in enumerate(slots):
        positions_of_rank[rank].append(index)
    columns: dict[str, torch.Tensor] = {}
    if positions_of_rank[ranks.rank]:
        local = Measured.join([parts[index].measured for index in positions_of_rank[ranks.rank]])
        columns = {name: new for name, new in selector.compare(local).columns.items() if name not in local.columns}
    result = list(parts)
    for rank, message in enumerate(ranks.gather(pack(columns))):
        received, _ = unpack(message)
        start = 0
        for index in positions_of_rank[rank]:
            measured = parts[index].measured
            added = {name: values[start : start + measured.rows] for name, values in received.items()}
            start += measured.rows
            result[index] = replace(parts[index], measured=replace(measured, columns={**measured.columns, **added}))
    return result


def _check_agreement(selector: OnlineMethod, kept: Sequence[torch.Tensor], ranks: Ranks, *, scored: bool) -> None:
    """Check that every rank kept the same rows and, at intervals, has the same state; before any row moves, because
    ranks that disagree would deadlock."""
    if ranks.world == 1:
        return
    digest = hashlib.blake2b(digest_size=7)
    for part in kept:
        digest.update(part.numpy().tobytes() + b"|")
    difference = "kept different rows"
    if scored and ranks.choices % STATE_CHECK_EVERY == 0:
        digest.update(state_digest(selector))
        difference += " or remember different ones"
    if scored:
        ranks.choices += 1
    digests = ranks.gather_ints(int.from_bytes(digest.digest(), "little"))
    differing = [rank for rank, number in enumerate(digests) if number != digests[0]]
    if differing:
        raise RuntimeError(
            f"rank {', '.join(map(str, differing))} {difference} than rank 0 in the same step; the ranks' selectors, software "
            "or processors differ: resume from the last checkpoint on equal ones"
        )


def state_digest(selector: OnlineMethod) -> bytes:
    """blake2b of the selector's complete state.

    >>> state_digest(UDS(keep=2)) == state_digest(UDS(keep=2))
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(selector.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.digest()
