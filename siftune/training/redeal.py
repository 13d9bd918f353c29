"""Which rank trains which of the rows that were kept together, and how the rows that have to move get there.

Every rank trains the same number of rows, up to one where that cannot be; a row stays where it was read unless its rank
kept more than its share. Rows that move go as their tensors, cut to their own width: about 9 bytes a token for ids, mask
and labels, and every rank receives all that move. Cost: nothing where no row moves.

Shapes: `R` ranks, `K` kept rows; `(rank, micro)` is a seat, a micro-batch that a rank brought and has to train.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import UserError
from ..online.base import cut
from .deal import Padding, blank, join_rows, pads_left, trim
from .ranks import Ranks, pack, unpack

Batch = Mapping[str, Any]
Seat = tuple[int, int]
Origin = tuple[int, int, int]
"""(rank, micro-batch, row in it) of a candidate."""


def shares(kept: Mapping[int, int]) -> dict[int, int]:
    """Rows that each rank is to train, from the rows that each kept: even, the odd ones where most were kept.

    >>> shares({0: 5, 1: 0, 2: 2})
    {0: 3, 1: 2, 2: 2}
    """
    base, more = divmod(sum(kept.values()), len(kept))
    first = sorted(kept, key=lambda rank: (-kept[rank], rank))[:more]
    return {rank: base + (rank in first) for rank in kept}


def redeal(seats: Sequence[Seat], kept: Sequence[Origin]) -> dict[Seat, list[Origin]]:
    """The rows that each seat trains. `kept` is in the order of all candidates, and every seat's rows are too.

    A rank that kept more than its share gives its last rows away, to the ranks that lack some, in their order; a rank's
    rows go evenly over its own seats.
    """
    place = {origin: index for index, origin in enumerate(kept)}
    own: dict[int, list[Origin]] = {rank: [] for rank, _ in seats}
    for origin in kept:
        own[origin[0]].append(origin)
    share = shares({rank: len(rows) for rank, rows in own.items()})
    moving = sorted((row for rank, rows in own.items() for row in rows[share[rank] :]), key=place.__getitem__)
    result: dict[Seat, list[Origin]] = {}
    for rank, rows in own.items():
        rows = rows[: share[rank]]
        missing = share[rank] - len(rows)
        rows, moving = sorted(rows + moving[:missing], key=place.__getitem__), moving[missing:]
        mine = [seat for seat in seats if seat[0] == rank]
        base, more = divmod(len(rows), len(mine))
        at = 0
        for index, seat in enumerate(mine):
            size = base + (index < more)
            result[seat] = rows[at : at + size]
            at += size
    return result


def build(
    batches: Sequence[Batch], plan: Mapping[Seat, Sequence[Origin]], padding: Padding, ranks: Ranks
) -> list[Batch]:
    """This rank's micro-batches as planned. All ranks have to call it with the same plan.

    A seat without a row gets a blank one. Raises `UserError` for columns that cannot be sent.
    """
    moved = {row for (rank, _), rows in plan.items() for row in rows if row[0] != rank}
    sources: dict[Seat, tuple[Batch, list[int], bool]] = {
        (ranks.rank, micro): (batch, list(range(len(batch["input_ids"]))), pads_left(batch))
        for micro, batch in enumerate(batches)
    }
    if moved:
        sources |= _received(batches, moved, padding, ranks)
    trained: list[Batch] = []
    for micro, batch in enumerate(batches):
        rows = plan[(ranks.rank, micro)]
        if not rows:
            trained.append(blank(batch, 0))
        elif [row[:2] for row in rows] == [(ranks.rank, micro)] * len(batch["input_ids"]):
            trained.append(batch)
        else:
            trained.append(trim(_seat(rows, sources, padding), padding))
    return trained


def _seat(
    rows: Sequence[Origin], sources: Mapping[Seat, tuple[Batch, list[int], bool]], padding: Padding
) -> dict[str, Any]:
    by_source: dict[Seat, list[int]] = {}
    for rank, micro, row in rows:
        by_source.setdefault((rank, micro), []).append(row)
    parts: list[Batch] = []
    left = False
    for source, wanted in by_source.items():
        batch, held, pads = sources[source]
        parts.append(cut(batch, torch.tensor([held.index(row) for row in wanted])))
        left |= pads
    return join_rows(parts, padding, left=left)


def _received(
    batches: Sequence[Batch], moved: set[Origin], padding: Padding, ranks: Ranks
) -> dict[Seat, tuple[Batch, list[int], bool]]:
    """The other ranks' rows that move, by where they come from."""
    tensors: dict[str, torch.Tensor] = {}
    note: dict[str, Any] = {}
    for micro, batch in enumerate(batches):
        rows = sorted(row for rank, own, row in moved if (rank, own) == (ranks.rank, micro))
        if rows:
            columns, lists = _columns(batch, rows, padding)
            tensors |= {f"{micro}/{name}": value for name, value in columns.items()}
            note[str(micro)] = {"rows": rows, "lists": lists, "left": pads_left(batch)}
    found: dict[Seat, tuple[Batch, list[int], bool]] = {}
    for rank, message in enumerate(ranks.gather(pack(tensors, note))):
        given, notes = unpack(message)
        if rank == ranks.rank or not batches:
            continue
        for micro, said in notes.items():
            own = {name.partition("/")[2]: value for name, value in given.items() if name.partition("/")[0] == micro}
            found[(rank, int(micro))] = (_like(batches[0], {**own, **said["lists"]}), said["rows"], said["left"])
    return found


def _columns(batch: Batch, rows: list[int], padding: Padding) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]]]:
    """Some rows of a batch as tensors and lists; what belongs to no row is not sent."""
    count = len(batch["input_ids"])
    some = trim(cut(batch, torch.tensor(rows)), padding)
    tensors: dict[str, torch.Tensor] = {}
    lists: dict[str, list[Any]] = {}
    for name, value in some.items():
        whole = batch[name]
        if isinstance(value, torch.Tensor):
            if whole.ndim > 0 and len(whole) == count:
                tensors[name] = value
        elif isinstance(value, (list, tuple)) and len(whole) == count:
            try:
                lists[name] = json.loads(json.dumps(list(value), allow_nan=True))
            except TypeError:
                raise UserError(
                    f"the column {name!r} of the training batch holds {type(value[0]).__name__}, which cannot be sent to "
                    'another rank; drop it in the collator or pass scope="local" to the selector'
                ) from None
    return tensors, lists


def _like(own: Batch, given: Mapping[str, Any]) -> dict[str, Any]:
    """A received batch with the columns of our own, on the same device."""
    count = len(own["input_ids"])
    result: dict[str, Any] = {}
    for name, value in own.items():
        if name in given:
            theirs = given[name]
            result[name] = theirs.to(value.device) if isinstance(theirs, torch.Tensor) else type(value)(theirs)
        elif isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count and count > 1:
            raise UserError(
                f"another rank's batch lacks the column {name!r}, so its rows cannot be trained with this rank's; make "
                'the collator give the same columns on all ranks or pass scope="local" to the selector'
            )
        else:
            result[name] = value
    return result
