"""One optimiser step's selection across ranks: all candidates of all processes are chosen from together.

Global micro-batch j is the ranks' j-th micro-batches in rank order, so 1, 2 and 4 processes that read the same rows in a
step keep the same ones. Every rank measures its own candidates; what it measured is gathered, and every rank then
combines, chooses and commits the same numbers, which keeps memories and counters equal everywhere. That it does is held:
the choice at every step, the state at the first and every hundredth.

Cost: the columns measured (for UDS 8 kB a candidate), gathered; the rows that change ranks (`siftune.training.redeal`).
Comparing with the memory is shared out: each rank's own candidates. Four collective calls a step, two more for each choice
of a method that compares, two more where rows move.

Shapes: `C` candidates of all ranks in the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..online.base import Measured, OnlineMethod
from ..records import RowScores
from .deal import Padding, answered, real_tokens
from .ranks import Ranks, pack, unpack
from .redeal import Origin, Seat, build, redeal
from .sift import NO_ANSWER, Sifted, choose, flags, join, measure, window_count, without

Batch = Mapping[str, Any]
EVERY = 100
"""Selections between two checks of the whole state; choices are held at every step."""


@dataclass(frozen=True, eq=False)
class _Told:
    """What a rank says of one of its micro-batches."""

    measured: Measured
    tokens: torch.Tensor
    """Real tokens, int64 `(B,)`."""
    mute: torch.Tensor
    """Bool `(B,)`: nothing to learn from."""


@dataclass(frozen=True, eq=False)
class SiftedTogether:
    """A step of all ranks, the same on each but for `everyone.batches`, which are this rank's."""

    everyone: Sifted
    mine: list[int]
    """This rank's candidates among everyone's, in the order of its own micro-batches."""


def sift_together(
    selector: OnlineMethod,
    model: torch.nn.Module,
    batches: Sequence[Batch],
    *,
    ranks: Ranks,
    padding: Padding,
    blanks: bool = False,
    learning_rate: float | None = None,
    unscored: str | None = None,
) -> SiftedTogether:
    """As `siftune.training.sift.sift`, with the candidates of all ranks; all have to call it, with batches or without.

    `unscored` keeps every row, without a score, for that reason. Raises `RuntimeError` where ranks disagree: their
    memories would drift apart unseen.
    """
    if unscored is None:
        selector.new_step(learning_rate=learning_rate)
    looked = [
        _Told(
            Measured(len(batch["input_ids"])) if unscored is not None else measure(selector, model, batch),
            real_tokens(batch).sum(dim=1).cpu(),
            ~answered(batch),
        )
        for batch in batches
    ]
    told = [_read(message) for message in ranks.gather(_message(looked))]
    groups = _groups(told, whole_step=getattr(selector, "window", "micro") == "step")
    plan: dict[Seat, list[Origin]] = {}
    scores: list[RowScores] = []
    kept: list[torch.Tensor] = []
    for seats in groups:
        parts = [told[rank][micro] for rank, micro in seats]
        if unscored is None:
            said, chosen = _choice(selector, _compared(selector, seats, parts, ranks), blanks=blanks)
        else:
            said, chosen = _everything(parts, reason=unscored)
        scores.append(said)
        kept.append(flags(chosen, len(said)))
        origins = _origins(seats, parts)
        rows = [origins[index] for index in chosen.tolist()]
        whole = len(rows) == len(origins)
        plan |= {seat: [row for row in rows if row[:2] == seat] for seat in seats} if whole else redeal(seats, rows)
    _agree(selector, kept, ranks, scored=unscored is None)
    order = [seat for seats in groups for seat in seats]
    everyone = Sifted(
        build(batches, plan, padding, ranks),
        [micro for rank, micro in order for _ in range(told[rank][micro].measured.rows)],
        torch.cat(kept) if kept else torch.zeros(0, dtype=torch.bool),
        torch.cat([told[rank][micro].tokens for rank, micro in order]) if order else torch.zeros(0, dtype=torch.int64),
        *_columns(scores),
    )
    return SiftedTogether(everyone, _own(order, told, ranks.rank))


def _groups(told: Sequence[Sequence[_Told]], *, whole_step: bool) -> list[list[Seat]]:
    """Micro-batches that are chosen from together: the ranks' j-th ones, or all of the step, in global order."""
    longest = max((len(parts) for parts in told), default=0)
    by_micro = [[(rank, micro) for rank in range(len(told)) if micro < len(told[rank])] for micro in range(longest)]
    if not whole_step or not by_micro:
        return by_micro
    return [[seat for seats in by_micro for seat in seats]]


def _origins(seats: Sequence[Seat], parts: Sequence[_Told]) -> list[Origin]:
    return [
        (rank, micro, row)
        for (rank, micro), part in zip(seats, parts, strict=True)
        for row in range(part.measured.rows)
    ]


def _compared(selector: OnlineMethod, seats: Sequence[Seat], parts: Sequence[_Told], ranks: Ranks) -> Sequence[_Told]:
    """The parts with the columns that `compare` adds: every rank compares its own candidates, and tells the others."""
    if type(selector).compare is OnlineMethod.compare:
        return parts
    of_rank: dict[int, list[int]] = {rank: [] for rank in range(ranks.world)}
    for index, (rank, _) in enumerate(seats):
        of_rank[rank].append(index)
    columns: dict[str, torch.Tensor] = {}
    if of_rank[ranks.rank]:
        mine = Measured.join([parts[index].measured for index in of_rank[ranks.rank]])
        columns = {name: new for name, new in selector.compare(mine).columns.items() if name not in mine.columns}
    result = list(parts)
    for rank, message in enumerate(ranks.gather(pack(columns))):
        given, _ = unpack(message)
        at = 0
        for index in of_rank[rank]:
            measured = parts[index].measured
            more = {name: values[at : at + measured.rows] for name, values in given.items()}
            at += measured.rows
            result[index] = replace(parts[index], measured=replace(measured, columns={**measured.columns, **more}))
    return result


def _choice(selector: OnlineMethod, parts: Sequence[_Told], *, blanks: bool) -> tuple[RowScores, torch.Tensor]:
    """Scores and choice of the candidates of some micro-batches, taken into the selector's memory."""
    measured = Measured.join([part.measured for part in parts])
    mute = torch.cat([part.mute for part in parts]).nonzero().flatten().tolist()
    scores = without(selector.combine(measured), dict.fromkeys(mute, NO_ANSWER))
    count = window_count(selector, [part.measured.rows for part in parts])
    chosen = choose(selector, scores, measured, count, least=0 if blanks else len(parts))
    selector.commit(measured, scores, chosen)
    return scores, chosen


def _everything(parts: Sequence[_Told], *, reason: str) -> tuple[RowScores, torch.Tensor]:
    count = sum(part.measured.rows for part in parts)
    nothing = torch.full((count,), torch.nan, dtype=torch.float64)
    return RowScores(nothing, {}, dict.fromkeys(range(count), reason)), torch.arange(count)


def _columns(scores: Sequence[RowScores]) -> tuple[torch.Tensor, Mapping[str, torch.Tensor], Mapping[int, str]]:
    if not scores:
        return torch.zeros(0, dtype=torch.float64), {}, {}
    whole = join(scores)
    return whole.total, whole.parts, whole.reasons


def _own(order: Sequence[Seat], told: Sequence[Sequence[_Told]], me: int) -> list[int]:
    at = 0
    mine: list[int] = []
    for rank, micro in order:
        rows = told[rank][micro].measured.rows
        if rank == me:
            mine.extend(range(at, at + rows))
        at += rows
    return mine


# --- what is sent ---------------------------------------------------------------------------------------------------


def _message(looked: Sequence[_Told]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    notes = []
    for micro, part in enumerate(looked):
        tensors |= {f"{micro}/column/{name}": value for name, value in part.measured.columns.items()}
        tensors |= {f"{micro}/tokens": part.tokens, f"{micro}/mute": part.mute}
        names = list(part.measured.columns)
        notes.append({"rows": part.measured.rows, "columns": names, "reasons": list(part.measured.reasons.items())})
    return pack(tensors, notes)


def _read(message: bytes) -> list[_Told]:
    tensors, notes = unpack(message)
    return [
        _Told(
            Measured(
                note["rows"],
                {name: tensors[f"{micro}/column/{name}"] for name in note["columns"]},
                {int(row): str(reason) for row, reason in note["reasons"]},
            ),
            tensors[f"{micro}/tokens"],
            tensors[f"{micro}/mute"],
        )
        for micro, note in enumerate(notes)
    ]


# --- what is held ---------------------------------------------------------------------------------------------------


def _agree(selector: OnlineMethod, kept: Sequence[torch.Tensor], ranks: Ranks, *, scored: bool) -> None:
    """Every rank kept the same rows and, now and then, has the same state; before any row moves, so that ranks that
    do not would wait for each other for ever."""
    digest = hashlib.blake2b(digest_size=7)
    for part in kept:
        digest.update(part.numpy().tobytes() + b"|")
    what = "kept other rows"
    if scored and ranks.choices % EVERY == 0:
        digest.update(state_digest(selector))
        what += " or remember other ones"
    if scored:
        ranks.choices += 1
    found = ranks.numbers(int.from_bytes(digest.digest(), "little"))
    apart = [rank for rank, number in enumerate(found) if number != found[0]]
    if apart:
        raise RuntimeError(
            f"rank {', '.join(map(str, apart))} {what} than rank 0 in the same step; the ranks' selectors, software or "
            "processors differ: resume from the last checkpoint on equal ones"
        )


def state_digest(selector: OnlineMethod) -> bytes:
    """blake2b of everything the selector remembers.

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
