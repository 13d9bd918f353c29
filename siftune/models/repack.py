"""Segments of packed batches, extracted and joined again into a packed batch of the same kind.

Kept segments follow each other in order of place. A batch of one line stays one line, as long as its segments; a batch
of several lines keeps its line length, filled segment by segment, and drops the columns that no line needs. Token ids,
labels and positions of a segment are unchanged, but for the label of its first token: nothing in its own row predicts
that token, so it is masked. Every key that locates segments (`siftune.models.layout`) is rebuilt; any other key with
one entry per token or per segment is cut alike, and a key of another length is an error that names it. Cost: one index
per tensor.

Shapes: `B` lines, `T` columns, `S` segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import torch

from ..errors import UserError
from .layout import CUMULATIVE, LENGTHS, BatchWithLayout, Layout, Span, layout_of, with_layout

Batch = Mapping[str, Any]
Piece = tuple[Batch, Span]
"""A batch, and one segment's place in it."""

MAX_LENGTHS = ("max_length_q", "max_length_k")
_REBUILT = (*LENGTHS, *CUMULATIVE, *MAX_LENGTHS, "seq_idx", "attention_mask")


def cut_segments(batch: Batch, kept: torch.Tensor, *, pad_token: int = 0) -> BatchWithLayout:
    """The segments `kept` (int64, ascending) of a packed batch, as a batch of the same kind. Raises `UserError`."""
    spans = layout_of(batch).spans
    return join_segments([(batch, spans[index]) for index in kept.tolist()], like=batch, pad_token=pad_token)


def join_segments(
    pieces: Sequence[Piece], *, like: Batch, pad_token: int = 0, one_line: bool = False
) -> BatchWithLayout:
    """Segments of one or several packed batches as one batch with the keys of `like`, on its device. At least one
    piece. `one_line` joins them in one line, whatever the lines of `like`.

    Raises `UserError` for a key whose entries belong neither to tokens nor to segments.

    >>> join_segments([(batch, layout_of(batch).spans[3])], like=batch)["cu_seq_lens_q"]
    tensor([0, 17], dtype=torch.int32)
    """
    spans = _places(pieces, like, one_line=one_line)
    shape = (spans[-1].line + 1, max(span.stop for span in spans))
    result: dict[str, Any] = {}
    for name, value in like.items():
        if name in _REBUILT and value is not None:
            result[name] = _rebuilt(name, value, pieces, spans, shape, like)
        else:
            result[name] = _carried(name, value, pieces, spans, shape, like, pad_token)
    return with_layout(result, Layout(spans, packed=True, source=layout_of(like).source))


def segments_as_rows(batch: Batch) -> Batch:
    """The segments of a packed batch as rows of a padded one, in order, for a model that separates them.

    The same batch where no line holds two of them, where its mask is 4-D and may hide tokens inside a segment, or where it has
    keys that a padded batch would not have.
    """
    spans = layout_of(batch).spans
    keys = {name for name, value in batch.items() if value is not None}
    if (
        len({span.line for span in spans}) == len(spans)
        or keys - {"input_ids", "labels", "position_ids", *_REBUILT}
        or any(getattr(batch.get(name), "ndim", 2) != 2 for name in ("position_ids", "attention_mask"))
    ):
        return batch
    shape = (len(spans), max(span.tokens for span in spans))
    result = {"attention_mask": torch.zeros(shape, dtype=torch.int64, device=batch["input_ids"].device)}
    for name, fill in (("input_ids", 0), ("labels", -100)):
        if name in keys:
            result[name] = batch[name].new_full(shape, fill)
    for row, (line, start, stop) in enumerate(spans):
        result["attention_mask"][row, : stop - start] = 1
        for name in ("input_ids", "labels"):
            if name in keys:
                result[name][row, : stop - start] = batch[name][line, start:stop]
    return with_layout(result, Layout([Span(row, 0, shape[1]) for row in range(shape[0])], packed=False))


def _places(pieces: Sequence[Piece], like: Batch, *, one_line: bool) -> list[Span]:
    """Where each segment goes: one line of any length, or lines of at most the width of `like`, filled in order."""
    lines, width = like["input_ids"].shape
    spans: list[Span] = []
    line = start = 0
    for _, span in pieces:
        if lines > 1 and not one_line and start and start + span.tokens > width:
            line, start = line + 1, 0
        spans.append(Span(line, start, start + span.tokens))
        start += span.tokens
    return spans


# --- keys that locate segments --------------------------------------------------------------------------------------


def _rebuilt(
    name: str, value: Any, pieces: Sequence[Piece], spans: Sequence[Span], shape: tuple[int, int], like: Batch
) -> Any:
    lengths = [span.tokens for span in spans]
    if name in LENGTHS:
        return _like_lengths(value, lengths, spans)
    if name in CUMULATIVE:
        return torch.tensor([0, *lengths], dtype=value.dtype, device=value.device).cumsum(0, dtype=value.dtype)
    if name in MAX_LENGTHS:
        return torch.full_like(value, max(lengths)) if isinstance(value, torch.Tensor) else max(lengths)
    if name == "seq_idx":
        return _numbered(value, spans, shape, first=0)
    if value.ndim == 4:
        return _block_mask(value, pieces, spans, shape)
    return _mask(value, pieces, spans, shape, like)


def _like_lengths(value: Any, lengths: list[int], spans: Sequence[Span]) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.tensor(lengths, dtype=value.dtype, device=value.device)
    if value and isinstance(value[0], (list, tuple)):
        return [[span.tokens for span in spans if span.line == line] for line in range(spans[-1].line + 1)]
    return type(value)(lengths)


def _numbered(value: torch.Tensor, spans: Sequence[Span], shape: tuple[int, int], *, first: int) -> torch.Tensor:
    """Each token's segment number, counted anew in every line from `first`; 0 elsewhere."""
    numbers = value.new_zeros(shape)
    count = {span.line: first for span in spans}
    for line, start, stop in spans:
        numbers[line, start:stop] = count[line]
        count[line] += 1
    return numbers


def _mask(
    value: torch.Tensor, pieces: Sequence[Piece], spans: Sequence[Span], shape: tuple[int, int], like: Batch
) -> torch.Tensor:
    """Segment numbers where some source has them, or where nothing else separates segments; else ones."""
    other_boundaries = (*LENGTHS, *CUMULATIVE, "seq_idx", "position_ids")
    numbered = all(like.get(name) is None for name in other_boundaries) or any(
        int(batch["attention_mask"].max()) > 1 for batch in {id(batch): batch for batch, _ in pieces}.values()
    )
    if numbered:
        return _numbered(value, spans, shape, first=1)
    mask = value.new_zeros(shape)
    for line, start, stop in spans:
        mask[line, start:stop] = 1
    return mask


def _block_mask(
    value: torch.Tensor, pieces: Sequence[Piece], spans: Sequence[Span], shape: tuple[int, int]
) -> torch.Tensor:
    """A block-diagonal 4-D mask with the segments' own blocks."""
    masked = torch.finfo(value.dtype).min if value.is_floating_point() else 0
    lines, width = shape
    mask = value.new_full((lines, value.shape[1], width, width), masked)
    for (batch, source), (line, start, stop) in zip(pieces, spans, strict=True):
        source_values = batch["attention_mask"]
        row = source.line if len(source_values) > 1 else 0
        columns = slice(source.start, source.stop)
        mask[line, :, start:stop, start:stop] = source_values[row, :, columns, columns].to(mask.device)
    return mask


# --- keys that segments carry ---------------------------------------------------------------------------------------


def _carried(
    name: str,
    value: Any,
    pieces: Sequence[Piece],
    spans: Sequence[Span],
    shape: tuple[int, int],
    like: Batch,
    pad_token: int,
) -> Any:
    lines, width = like["input_ids"].shape
    scalar = isinstance(value, torch.Tensor) and not value.ndim
    if value is None or scalar or isinstance(value, (str, bytes, int, float)):
        return value
    if any(name not in batch for batch, _ in pieces):
        raise UserError(
            f"only some of the batches that are trained together have the key {name!r}; make the collator return the same keys"
        )
    if isinstance(value, torch.Tensor) and (axis := _token_axis(value, lines, width)) is not None:
        return _tokens(name, value, pieces, spans, shape, axis, pad_token)
    if isinstance(value, (torch.Tensor, list, tuple)) and len(value) == len(layout_of(like)):
        values = [batch[name][_candidate(batch, span)] for batch, span in pieces]
        if isinstance(value, torch.Tensor):
            return torch.stack([item.to(value.device) for item in values])
        return type(value)(values)
    size = tuple(value.shape) if isinstance(value, torch.Tensor) else len(value) if isinstance(value, Sized) else value
    raise UserError(
        f"the batch has the key {name!r} of size {size}, which belongs neither to its {lines} x {width} tokens nor to its "
        f"{len(layout_of(like))} segments, so rows cannot be cut out of it; drop the key in the collator"
    )


def _candidate(batch: Batch, place: Span) -> int:
    """The candidate that a place in a batch belongs to."""
    spans = layout_of(batch).spans
    return next(i for i, span in enumerate(spans) if span.line == place.line and span.start <= place.start < span.stop)


def _token_axis(value: torch.Tensor, lines: int, width: int) -> int | None:
    """The first of the two axes (lines, tokens) of a per-token tensor: 0, or 1 where a leading axis stacks several
    (M-RoPE positions); None where the tensor is not per token."""
    if tuple(value.shape[:2]) == (lines, width):
        return 0
    if value.ndim == 3 and tuple(value.shape[1:]) == (lines, width):
        return 1
    return None


def _tokens(
    name: str,
    value: torch.Tensor,
    pieces: Sequence[Piece],
    spans: Sequence[Span],
    shape: tuple[int, int],
    axis: int,
    pad_token: int,
) -> torch.Tensor:
    masks_labels = "labels" in name
    fill = pad_token if name == "input_ids" else -100 if masks_labels else 0
    before, after = (value.shape[:1], value.shape[3:]) if axis else ((), value.shape[2:])
    result = value.new_full((*before, *shape, *after), fill)
    for (batch, source), (line, start, stop) in zip(pieces, spans, strict=True):
        source_values, columns = batch[name].to(result.device), slice(source.start, source.stop)
        if axis:
            result[:, line, start:stop] = source_values[:, source.line, columns]
        else:
            result[line, start:stop] = source_values[source.line, columns]
            if masks_labels:
                result[line, start] = -100
    return result
