"""Where each candidate of a batch is stored: a line of a padded batch, or a segment of a packed one.

A packed (or padding-free) batch holds several rows one after another in a line. Its boundaries are read from the batch
itself, in this order, and all of them that are present have to agree:

    packed_seq_lengths, seq_lengths    lengths of the segments, in order of place (Unsloth, TRL)
    cu_seq_lens_q                      their cumulative sums (transformers' flattening collator, ms-swift)
    seq_idx                            the segment's number, per token (the same collator)
    attention_mask, numbers above 1    the segment's number, per token; 0 is padding (LLaMA-Factory, Axolotl)
    attention_mask, 4-D                a segment's first token does not attend to the token before it
    position_ids                       restart at 0; 3-D ones (M-RoPE) by their first component

A trailing run of two or more positions 0 is padding. Unknown boundaries are refused, never treated as a padded batch.
Cost: a few comparisons per token, on the CPU.

Shapes: `B` lines of the batch, `T` columns, `C` candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import UserError

Batch = Mapping[str, Any]

LENGTHS = ("packed_seq_lengths", "seq_lengths")
CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k")
BOUNDARIES = (*LENGTHS, *CUMULATIVE, "seq_idx", "attention_mask", "position_ids")
"""The keys that may say where segments begin."""


class Span(NamedTuple):
    """One candidate's place: columns `start:stop` of a line."""

    line: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The candidates of a batch, in order of place."""

    spans: Sequence[Span]
    """One per candidate: a complete line of a padded batch, padding included, or a segment."""
    packed: bool
    source: str = "lines"
    """The key that the boundaries of a packed batch were read from."""

    def __len__(self) -> int:
        return len(self.spans)


class BatchWithLayout(dict[str, Any]):
    """A batch with its layout, so that the layout is read once."""

    layout: Layout
    original: Batch
    """The original batch."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError(f"the original batch would keep its {key!r}; build a new batch with its layout")


def with_layout(batch: Batch, layout: Layout | None = None, *, packed: bool = False) -> BatchWithLayout:
    """The same batch (no copy of its tensors) that stores its layout. Raises `UserError` as `layout_of` does.

    `packed` treats a batch without boundaries as one of a trainer that packs: each line is one segment.
    """
    if isinstance(batch, BatchWithLayout) and layout is None:
        return batch
    with_spans = BatchWithLayout(batch)
    with_spans.original = batch
    with_spans.layout = layout or _read(batch)
    if packed and not with_spans.layout.packed:
        with_spans.layout = Layout(_real_lines(batch), packed=True)
    return with_spans


def original_of(batch: Batch) -> Batch:
    """The batch without its layout, as the collator (or another source) returned it."""
    return batch.original if isinstance(batch, BatchWithLayout) else batch


def real_columns(batch: Batch) -> torch.Tensor:
    """Which columns of each line hold a real token: bool `(B, T)`, on the CPU.

    Without a mask, all do. A 2-D mask marks them; in a 4-D mask (boolean or additive) a real token is one that may attend
    to itself, padding with completely open rows left out. Raises `UserError` for any other mask.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return torch.ones(ids.shape, dtype=torch.bool)
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        return mask.detach().cpu() != 0
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[-1] == mask.shape[-2] == ids.shape[1]:
        return _real_of_block_mask(_allowed(mask, ids))
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    raise UserError(f"attention_mask of {shape} does not match input_ids of {tuple(ids.shape)}; pass one 0/1 per token")


def _allowed(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A 4-D mask as bool `(B, T, T)`: whether a token attends to another; of several heads the first."""
    allowed_BTT = mask[:, 0].detach().cpu()
    allowed_BTT = allowed_BTT == 0 if allowed_BTT.is_floating_point() else allowed_BTT != 0
    return allowed_BTT.expand(len(ids), -1, -1)


def _real_of_block_mask(allowed_BTT: torch.Tensor) -> torch.Tensor:
    """Tokens that attend to themselves, without padding whose rows are completely open (a softmax over nothing is
    undefined): tokens that attend to later ones, and that no other token attends to."""
    open_BT = allowed_BTT.all(dim=2)
    open_BT[:, -1] = False
    attended_BT = (allowed_BTT & ~open_BT[:, :, None]).any(dim=1)
    real_BT: torch.Tensor = allowed_BTT.diagonal(dim1=-2, dim2=-1) & ~(open_BT & ~attended_BT)
    return real_BT


def _real_lines(batch: Batch) -> list[Span]:
    """Every line as one segment, from its first real token to its last; lines of padding alone have none."""
    spans = []
    for line, real_T in enumerate(real_columns(batch) & ~_position_padding(batch)):
        columns = real_T.nonzero().flatten().tolist()
        if columns:
            spans.append(Span(line, columns[0], columns[-1] + 1))
    return spans


def layout_of(batch: Batch) -> Layout:
    """The candidates of a batch. Raises `UserError` for boundaries that contradict each other or cannot be understood.

    >>> layout_of({"input_ids": ids_1T, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}).spans
    [Span(line=0, start=0, stop=3), Span(line=0, start=3, stop=5)]
    """
    return batch.layout if isinstance(batch, BatchWithLayout) else _read(batch)


def candidates_of(batch: Batch) -> int:
    """Candidates of a batch. Raises `UserError` where it has no `input_ids`."""
    if "input_ids" not in batch:
        raise UserError(f"the batch has no input_ids, only {', '.join(batch) or 'nothing'}; pass tokenised rows")
    return len(layout_of(batch))


def per_candidate(batch: Batch, positions_BT: torch.Tensor) -> torch.Tensor:
    """Bool `(B, T)` as `(C, T)`: the same positions, each in the row of the candidate that it belongs to."""
    layout = layout_of(batch)
    if not layout.packed:
        return positions_BT
    result = torch.zeros(len(layout), positions_BT.shape[1], dtype=torch.bool)
    for candidate, (line, start, stop) in enumerate(layout.spans):
        result[candidate, start:stop] = positions_BT[line, start:stop]
    return result


# --- reading --------------------------------------------------------------------------------------------------------


def _read(batch: Batch) -> Layout:
    if "input_ids" not in batch:
        raise UserError(
            f"the batch has no input_ids, only {', '.join(map(str, batch)) or 'nothing'}; tokenise the rows first"
        )
    ids = batch["input_ids"]
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise UserError(f"input_ids of {shape} are not (rows, tokens); pass one line of token ids per row")
    readers: dict[str, Callable[[Batch], list[Span] | None]] = {
        **{name: _from_lengths(name) for name in LENGTHS},
        **{name: _from_cumulative(name) for name in CUMULATIVE},
        "seq_idx": _from_numbers("seq_idx"),
        "attention_mask": _from_mask,
        "position_ids": _from_positions,
    }
    read = {name: spans for name, reader in readers.items() if (spans := reader(batch)) is not None}
    if not read:
        rows, width = ids.shape
        return Layout([Span(row, 0, width) for row in range(rows)], packed=False)
    source, spans = next(iter(read.items()))
    for name, other_spans in read.items():
        if _without_padding(other_spans, batch) != _without_padding(spans, batch):
            raise UserError(
                f"{source} divides the batch into {len(spans)} segments and {name} divides it into {len(other_spans)}, at other "
                "places; make the collator return boundaries that agree"
            )
    return Layout(_before_padding(spans, batch), packed=True, source=source)


def _before_padding(spans: Sequence[Span], batch: Batch) -> list[Span]:
    """Without the one-token segments that a collator makes of padding: those in a trailing run of positions 0."""
    padding_BT = _position_padding(batch)
    return [span for span in spans if not bool(padding_BT[span.line, span.start])]


def _positions(batch: Batch) -> torch.Tensor | None:
    """`position_ids` as `(B, T)` on the CPU; of M-RoPE's the first component; None where the batch has none."""
    positions, ids = batch.get("position_ids"), batch["input_ids"]
    if not isinstance(positions, torch.Tensor) or positions.shape[-2:] != ids.shape:
        return None
    return (positions if positions.ndim == 2 else positions.reshape(-1, *ids.shape)[0]).detach().cpu()


def _without_padding(spans: Sequence[Span], batch: Batch) -> list[Span]:
    """Spans that hold more than padding tokens of a collator that packs padding as a segment of its own."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.shape != batch["input_ids"].shape:
        return list(spans)
    return [span for span in spans if bool((labels[span.line, span.start + 1 : span.stop] != -100).any())]


def _from_lengths(name: str) -> Callable[[Batch], list[Span] | None]:
    def read(batch: Batch) -> list[Span] | None:
        value = batch.get(name)
        if value is None:
            return None
        lengths = _flat_ints(value)
        return _tile(name, lengths, batch)

    return read


def _from_cumulative(name: str) -> Callable[[Batch], list[Span] | None]:
    def read(batch: Batch) -> list[Span] | None:
        value = batch.get(name)
        if value is None:
            return None
        ends = _flat_ints(value)
        if not ends or ends[0] != 0:
            raise UserError(f"{name} begins with {ends[0] if ends else 'nothing'}, not with 0; pass cumulative lengths")
        return _tile(name, [after - before for before, after in itertools.pairwise(ends)], batch)

    return read


def _flat_ints(value: Any) -> list[int]:
    if isinstance(value, torch.Tensor):
        return [int(number) for number in value.flatten().tolist()]
    flat: list[int] = []
    for item in value:
        flat.extend(_flat_ints(item) if isinstance(item, (list, tuple, torch.Tensor)) else [int(item)])
    return flat


def _tile(name: str, lengths: Sequence[int], batch: Batch) -> list[Span]:
    """Segments of these lengths, one after another through the lines; the rest of a line is padding."""
    rows, width = batch["input_ids"].shape
    spans: list[Span] = []
    line = start = 0
    for length in lengths:
        if length < 0:
            raise UserError(f"{name} holds the length {length}; lengths are whole numbers of at least 1")
        if length == 0:
            continue
        if start + length > width:
            line, start = line + 1, 0
        if length > width or line >= rows:
            raise UserError(
                f"{name} adds up to {sum(lengths)} tokens, and the batch has {rows} x {width}; pass the lengths of this batch"
            )
        spans.append(Span(line, start, start + length))
        start += length
    _check_uncovered(name, spans, batch)
    return spans


def _check_uncovered(name: str, spans: Sequence[Span], batch: Batch) -> None:
    """Raises `UserError` where a token outside all segments has a label or is marked by the mask: it has to be
    padding."""
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    rows, width = ids.shape
    outside_BT = torch.ones(ids.shape, dtype=torch.bool)
    for line, start, stop in spans:
        outside_BT[line, start:stop] = False
    counted_BT = torch.zeros(ids.shape, dtype=torch.bool)
    if isinstance(labels, torch.Tensor) and labels.shape == ids.shape:
        counted_BT |= labels.detach().cpu() != -100
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        counted_BT |= mask.detach().cpu() != 0
    if bool((outside_BT & counted_BT).any()):
        raise UserError(
            f"{name} covers {int((~outside_BT).sum())} of the batch's {rows} x {width} tokens, and the "
            "others are not padding; pass the lengths of all segments of this batch"
        )


def _from_numbers(name: str) -> Callable[[Batch], list[Span] | None]:
    def read(batch: Batch) -> list[Span] | None:
        value = batch.get(name)
        if not isinstance(value, torch.Tensor):
            return None
        if value.shape != batch["input_ids"].shape:
            raise UserError(
                f"{name} of {tuple(value.shape)} does not match input_ids of {tuple(batch['input_ids'].shape)}"
            )
        return _runs(value.detach().cpu(), torch.ones(value.shape, dtype=torch.bool))

    return read


def _runs(numbers_BT: torch.Tensor, real_BT: torch.Tensor) -> list[Span]:
    """Runs of equal numbers among real tokens."""
    changes_BT = numbers_BT[:, 1:] != numbers_BT[:, :-1]
    changes_BT |= real_BT[:, 1:] != real_BT[:, :-1]
    spans: list[Span] = []
    width = numbers_BT.shape[1]
    for line in range(len(numbers_BT)):
        edges = [0, *(changes_BT[line].nonzero().flatten() + 1).tolist(), width]
        spans += [
            Span(line, start, stop)
            for start, stop in itertools.pairwise(edges)
            if stop > start and bool(real_BT[line, start])
        ]
    return spans


def _from_mask(batch: Batch) -> list[Span] | None:
    mask, ids = batch.get("attention_mask"), batch["input_ids"]
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 4:
        return _from_block_mask(mask, ids)
    if mask.shape != ids.shape or mask.dtype == torch.bool or mask.is_floating_point():
        return None
    numbers_BT = mask.detach().cpu()
    if numbers_BT.numel() == 0 or int(numbers_BT.max()) <= 1:
        return None
    return _runs(numbers_BT, numbers_BT != 0)


def _from_block_mask(mask: torch.Tensor, ids: torch.Tensor) -> list[Span] | None:
    if mask.shape[-1] != mask.shape[-2] or mask.shape[-1] != ids.shape[1]:
        return None
    allowed_BTT = _allowed(mask, ids)
    real_BT = _real_of_block_mask(allowed_BTT)
    starts_BT = real_BT.clone()
    starts_BT[:, 1:] &= ~(allowed_BTT.diagonal(offset=-1, dim1=-2, dim2=-1) & real_BT[:, :-1])
    if int(starts_BT.sum(dim=1).max()) <= 1:
        return None
    spans = _runs(starts_BT.cumsum(dim=1), real_BT)
    for line, start, stop in spans:
        if bool(allowed_BTT[line, start:stop, :start].any()) or bool(allowed_BTT[line, start:stop, stop:].any()):
            raise UserError(
                f"the 4-D attention_mask lets tokens {start} to {stop - 1} of a line attend outside their own segment, so its "
                "rows cannot be separated; pass a block-diagonal mask"
            )
    return spans


def _from_positions(batch: Batch) -> list[Span] | None:
    positions_BT = _positions(batch)
    if positions_BT is None:
        return None
    real_BT = real_columns(batch) & ~_position_padding(batch)
    after_real_BT = torch.zeros_like(real_BT)
    after_real_BT[:, 1:] = real_BT[:, :-1]
    restarts_BT = real_BT & after_real_BT & (positions_BT == 0)
    falls_BT = torch.zeros_like(real_BT)
    falls_BT[:, 1:] = positions_BT[:, 1:] < positions_BT[:, :-1]
    unknown_BT = falls_BT & real_BT & after_real_BT & (positions_BT != 0)
    if bool(unknown_BT.any()):
        line, column = (int(index) for index in unknown_BT.nonzero()[0])
        raise UserError(
            f"position_ids fall from {int(positions_BT[line, column - 1])} to {int(positions_BT[line, column])} inside line "
            f"{line}, which is neither one row nor rows that each start at 0; make the collator restart positions at 0"
        )
    if not bool(restarts_BT.any()):
        return None
    return _runs(restarts_BT.cumsum(dim=1), real_BT)


def _position_padding(batch: Batch) -> torch.Tensor:
    """Bool `(B, T)`: padding by its positions, a trailing run of 0 that is two tokens or longer. A mask that tells tokens from
    padding, by a 0 or by numbers of segments, wins: the run may begin with a row of one token."""
    ids, positions_BT, mask = batch["input_ids"], _positions(batch), batch.get("attention_mask")
    if positions_BT is None:
        return torch.zeros(ids.shape, dtype=torch.bool)
    trailing_BT = (positions_BT != 0).flip(1).cumsum(dim=1).flip(1) == 0
    trailing_BT &= trailing_BT.sum(dim=1, keepdim=True) > 1
    if isinstance(mask, torch.Tensor) and bool(trailing_BT.any()):
        real_BT = real_columns(batch)
        if not bool(real_BT.all()) or (mask.ndim == 2 and int(mask.max()) > 1):
            trailing_BT &= ~real_BT
    return trailing_BT
