"""Which rank and micro-batch trains which of the kept rows, and how rows that change ranks are sent.

Every rank trains the same number of rows, up to one where they do not divide evenly; a row stays on the rank that read
it unless that rank kept more than its share. Rows that move are sent as their tensors, cut to their own width: about 9
bytes a token for ids, mask and labels, and every rank receives all that move. Cost: nothing where no row moves.

Shapes: `R` ranks, `K` kept rows; a slot `(rank, micro)` is a micro-batch that a rank read and has to train.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..models.layout import BatchWithLayout, Layout, Span, candidates_of, layout_of, with_layout
from ..models.repack import join_segments
from ..online.base import cut
from .batching import Padding, dummy_batch, join_rows, pads_left, trim
from .exchange import Ranks, pack, unpack

Batch = Mapping[str, Any]
Slot = tuple[int, int]
Origin = tuple[int, int, int]
"""(rank, micro-batch, row in it) of a candidate."""


def rows_per_rank(kept: Mapping[int, int]) -> dict[int, int]:
    """Rows that each rank trains, from the rows that each kept: even, with the remainder where most were kept.

    >>> shares({0: 5, 1: 0, 2: 2})
    {0: 3, 1: 2, 2: 2}
    """
    base, remainder = divmod(sum(kept.values()), len(kept))
    ranks_with_extra = sorted(kept, key=lambda rank: (-kept[rank], rank))[:remainder]
    return {rank: base + (rank in ranks_with_extra) for rank in kept}


def rebalance(slots: Sequence[Slot], kept: Sequence[Origin]) -> dict[Slot, list[Origin]]:
    """The rows that each slot trains. `kept` is in the order of all candidates, and every slot's rows are too.

    The last rows of a rank that kept more than its share move to the ranks that kept fewer, in order; a rank's rows are
    spread evenly over its own slots.
    """
    order = {origin: index for index, origin in enumerate(kept)}
    rows_of_rank: dict[int, list[Origin]] = {rank: [] for rank, _ in slots}
    for origin in kept:
        rows_of_rank[origin[0]].append(origin)
    quota = rows_per_rank({rank: len(rows) for rank, rows in rows_of_rank.items()})
    moving = sorted((row for rank, rows in rows_of_rank.items() for row in rows[quota[rank] :]), key=order.__getitem__)
    result: dict[Slot, list[Origin]] = {}
    for rank, rows in rows_of_rank.items():
        rows = rows[: quota[rank]]
        missing = quota[rank] - len(rows)
        rows, moving = sorted(rows + moving[:missing], key=order.__getitem__), moving[missing:]
        slots_of_rank = [slot for slot in slots if slot[0] == rank]
        base, remainder = divmod(len(rows), len(slots_of_rank))
        start = 0
        for index, slot in enumerate(slots_of_rank):
            size = base + (index < remainder)
            result[slot] = rows[start : start + size]
            start += size
    return result


def rebalance_by_tokens(
    slots: Sequence[Slot], kept: Sequence[Origin], tokens: Mapping[Origin, int]
) -> dict[Slot, list[Origin]]:
    """As `rebalance`, for packed batches: every rank, and every slot of a rank, trains about the same number of tokens.

    A rank keeps its own rows while they fit its share; the others go, in order, to the rank with the fewest tokens. No
    slot is empty where there are as many rows as slots.
    """
    order = {origin: index for index, origin in enumerate(kept)}
    rows_of_rank: dict[int, list[Origin]] = {rank: [] for rank, _ in slots}
    slots_of_rank = Counter(rank for rank, _ in slots)
    share = sum(tokens[origin] for origin in kept) / len(rows_of_rank)
    moving: list[Origin] = []
    tokens_of_rank = dict.fromkeys(rows_of_rank, 0)
    for origin in kept:
        rank = origin[0]
        if rank in rows_of_rank and (not rows_of_rank[rank] or tokens_of_rank[rank] + tokens[origin] / 2 <= share):
            rows_of_rank[rank].append(origin)
            tokens_of_rank[rank] += tokens[origin]
        else:
            moving.append(origin)
    for origin in moving:
        rank = min(
            rows_of_rank,
            key=lambda candidate: (
                len(rows_of_rank[candidate]) >= slots_of_rank[candidate],
                tokens_of_rank[candidate],
                candidate,
            ),
        )
        rows_of_rank[rank].append(origin)
        tokens_of_rank[rank] += tokens[origin]
    while len(kept) >= len(slots) and (
        lacking := [rank for rank in rows_of_rank if len(rows_of_rank[rank]) < slots_of_rank[rank]]
    ):
        donor = max(rows_of_rank, key=lambda rank: (len(rows_of_rank[rank]) - slots_of_rank[rank], rank))
        rows_of_rank[lacking[0]].append(rows_of_rank[donor].pop())
    result: dict[Slot, list[Origin]] = {}
    for rank, rows in rows_of_rank.items():
        result |= _spread_by_tokens(
            [slot for slot in slots if slot[0] == rank], sorted(rows, key=order.__getitem__), tokens
        )
    return result


def _spread_by_tokens(
    slots: Sequence[Slot], rows: list[Origin], tokens: Mapping[Origin, int]
) -> dict[Slot, list[Origin]]:
    """One rank's rows, in order, over its slots: each takes rows up to its share of what is left."""
    result: dict[Slot, list[Origin]] = {}
    remaining = list(rows)
    for index, slot in enumerate(slots):
        slots_left = len(slots) - index - 1
        share = sum(tokens[row] for row in remaining) / (slots_left + 1)
        slot_rows: list[Origin] = []
        while len(remaining) > slots_left or (remaining and not slot_rows and len(rows) < len(slots)):
            if slot_rows and slots_left and sum(tokens[row] for row in slot_rows) + tokens[remaining[0]] / 2 > share:
                break
            slot_rows.append(remaining.pop(0))
        result[slot] = slot_rows
    return result


def build_batches(
    batches: Sequence[Batch], plan: Mapping[Slot, Sequence[Origin]], padding: Padding, ranks: Ranks
) -> list[Batch]:
    """This rank's micro-batches as planned. All ranks have to call it with the same plan.

    A slot without a row gets a dummy batch. Raises `UserError` for columns that cannot be sent.
    """
    moved = {row for (rank, _), rows in plan.items() for row in rows if row[0] != rank}
    sources = {(ranks.rank, micro): _RowSource(batch) for micro, batch in enumerate(batches)}
    if moved:
        sources |= _exchange_rows(batches, moved, padding, ranks)
    trained: list[Batch] = []
    for micro, batch in enumerate(batches):
        rows = plan[(ranks.rank, micro)]
        if not rows:
            trained.append(dummy_batch(batch, 0))
        elif [row[:2] for row in rows] == [(ranks.rank, micro)] * candidates_of(batch):
            trained.append(batch)
        else:
            trained.append(trim(_join_planned(rows, sources, batch, padding), padding))
    return trained


@dataclass(frozen=True, eq=False)
class _RowSource:
    """Rows that micro-batches are built from: a micro-batch of this rank, or rows that another rank sent."""

    batch: Batch
    rows: Sequence[int] | None = None
    """Positions in the micro-batch that the rows were read in; None is all of them."""
    left: bool | None = None
    """Whether that micro-batch is padded on the left; None: derived from `batch`."""

    def cut(self, rows: Sequence[int]) -> dict[str, Any]:
        positions = rows if self.rows is None else [self.rows.index(row) for row in rows]
        if len(positions) == candidates_of(self.batch) and isinstance(self.batch, BatchWithLayout):
            return self.batch
        return cut(self.batch, torch.tensor(positions))

    def pads_left(self) -> bool:
        return pads_left(self.batch) if self.left is None else self.left


def _join_planned(
    rows: Sequence[Origin], sources: Mapping[Slot, _RowSource], like: Batch, padding: Padding
) -> dict[str, Any]:
    """The rows as one batch with the keys of `like`; rows of one source are adjacent."""
    by_source: dict[Slot, list[int]] = {}
    for rank, micro, row in rows:
        by_source.setdefault((rank, micro), []).append(row)
    parts = [sources[slot].cut(positions) for slot, positions in by_source.items()]
    return join_rows(
        parts, padding, like=like, left=len(parts) > 1 and any(sources[slot].pads_left() for slot in by_source)
    )


def _exchange_rows(
    batches: Sequence[Batch], moved: set[Origin], padding: Padding, ranks: Ranks
) -> dict[Slot, _RowSource]:
    """The other ranks' rows that move, by where they come from."""
    tensors: dict[str, torch.Tensor] = {}
    note: dict[str, Any] = {}
    for micro, batch in enumerate(batches):
        rows = sorted(row for rank, source_micro, row in moved if (rank, source_micro) == (ranks.rank, micro))
        if rows:
            row_tensors, lists, lengths = _sendable_columns(batch, rows, padding)
            tensors |= {f"{micro}/{name}": value for name, value in row_tensors.items()}
            note[str(micro)] = {"rows": rows, "lists": lists, "left": pads_left(batch), "lengths": lengths}
    received: dict[Slot, _RowSource] = {}
    for rank, message in enumerate(ranks.gather(pack(tensors, note))):
        columns, notes = unpack(message)
        if rank == ranks.rank or not batches:
            continue
        for micro, rows_note in notes.items():
            rows_of_micro = {
                name.partition("/")[2]: value for name, value in columns.items() if name.partition("/")[0] == micro
            }
            sent = _restore(batches[0], {**rows_of_micro, **rows_note["lists"]}, rows_note["lengths"])
            received[(rank, int(micro))] = _RowSource(sent, rows_note["rows"], rows_note["left"])
    return received


def _sendable_columns(
    batch: Batch, rows: list[int], padding: Padding
) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]], list[int]]:
    """Some rows of a batch as tensors and lists, and the lengths of segments; values that are not per row are not
    sent."""
    if layout_of(batch).packed:
        return _sendable_segments(batch, rows)
    count = len(batch["input_ids"])
    subset = trim(cut(batch, torch.tensor(rows)), padding)
    tensors: dict[str, torch.Tensor] = {}
    lists: dict[str, list[Any]] = {}
    for name, value in subset.items():
        complete = batch[name]
        if isinstance(value, torch.Tensor):
            if complete.ndim > 0 and len(complete) == count:
                tensors[name] = value
        elif isinstance(value, (list, tuple)) and len(complete) == count:
            lists[name] = _as_json(name, value)
    return tensors, lists, []


def _sendable_segments(
    batch: Batch, rows: list[int]
) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]], list[int]]:
    """Some segments of a packed batch, in one line."""
    spans = layout_of(batch).spans
    subset = join_segments([(batch, spans[row]) for row in rows], like=batch, one_line=True)
    tensors = {name: value for name, value in subset.items() if isinstance(value, torch.Tensor) and value.ndim}
    lists = {name: _as_json(name, value) for name, value in subset.items() if isinstance(value, (list, tuple))}
    return tensors, lists, [spans[row].tokens for row in rows]


def _as_json(name: str, value: Sequence[Any]) -> list[Any]:
    """A column of Python values as JSON holds it. Raises `UserError`."""
    try:
        plain: list[Any] = json.loads(json.dumps(list(value), allow_nan=True))
    except TypeError:
        raise UserError(
            f"the column {name!r} of the training batch holds {type(value[0]).__name__}, which cannot be sent to another "
            'rank; drop it in the collator or pass scope="local" to the selector'
        ) from None
    return plain


def _restore(local: Batch, received: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """A received batch with the columns of this rank's own, on the same device; `lengths` are those of its segments."""
    if lengths:
        ends = list(itertools.accumulate(lengths))
        spans = [Span(0, end - length, end) for end, length in zip(ends, lengths, strict=True)]
        device = local["input_ids"].device
        tensors = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in received.items()
        }
        return with_layout(tensors, Layout(spans, packed=True))
    count = len(local["input_ids"])
    result: dict[str, Any] = {}
    for name, value in local.items():
        if name in received:
            sent = received[name]
            result[name] = sent.to(value.device) if isinstance(sent, torch.Tensor) else type(value)(sent)
        elif isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count and count > 1:
            raise UserError(
                f"another rank's batch lacks the column {name!r}, so its rows cannot be trained with this rank's; make "
                'the collator return the same columns on all ranks or pass scope="local" to the selector'
            )
        else:
            result[name] = value
    return result
