"""From the chosen rows to the micro-batches that are trained on: cut, trim, and deal over the accumulation window.

Nothing here knows a score. The trainer must get exactly as many micro-batches as it brought, none of them empty, and the
rows' real tokens, labels and positions unchanged; only padding that no kept row needs may go (METHODS: the kept rows
train at the width they need). Cost: one index per tensor; no forward pass.

Shapes: `B` rows of a micro-batch, `T` columns, `M` micro-batches, `K` kept rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..online.base import cut

Batch = Mapping[str, Any]

_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_pct", "rotary_dim", "rotary_emb_base")


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How the trainer's collator pads, as far as cutting rows has to respect it."""

    token: int = 0
    """Token id written into columns that dealing adds."""
    multiple: int = 1
    """The collator's `pad_to_multiple_of`: widths stay a multiple of it."""
    left: bool = False
    """Columns may be trimmed from the left too: true for models with rotary positions, which are relative. Learned
    absolute positions would shift."""

    @staticmethod
    def of(trainer: Any) -> Padding:
        """Read off a live trainer: its collator, its tokenizer and its model's configuration."""
        collator, tokenizer = trainer.data_collator, getattr(trainer, "processing_class", None)
        token = getattr(collator, "pad_token_id", None)
        if token is None:
            token = getattr(tokenizer, "pad_token_id", None)
        config = getattr(trainer.model, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            config = config.get_text_config()
        rotary = any(getattr(config, name, None) is not None for name in _ROTARY)
        multiple = getattr(collator, "pad_to_multiple_of", None) or 1
        return Padding(token=int(token or 0), multiple=int(multiple), left=rotary)


def real_tokens(batch: Batch) -> torch.Tensor:
    """Which columns of each row are tokens and not padding: bool `(B, T)`, all true where the batch has no 2-D mask."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask != 0
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def answered(batch: Batch) -> torch.Tensor:
    """Rows with at least one token to learn from: bool `(B,)`. The label of the first column is never predicted."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2:
        return torch.ones(len(batch["input_ids"]), dtype=torch.bool)
    return (labels[:, 1:] != -100).any(dim=1).cpu()


def trim(batch: Batch, padding: Padding) -> Batch:
    """Drop the columns that are padding in every row: from the right always, from the left where positions allow it.

    The width stays a multiple of the collator's `pad_to_multiple_of`. A batch without a 2-D attention mask, or with a
    tensor that holds the columns on another axis than the second, is returned as it is.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return batch
    rows, width = mask.shape
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if any(width in value.shape[2:] for value in tensors):
        return batch
    used = mask.ne(0).any(dim=0).nonzero().flatten()
    if not len(used):
        return batch
    start = int(used[0]) if padding.left or "position_ids" in batch else 0
    stop = int(used[-1]) + 1
    wanted = -(-(stop - start) // padding.multiple) * padding.multiple
    stop = min(width, start + wanted)
    start = max(0, stop - wanted)
    return batch if stop - start == width else _columns(batch, rows, width, start, stop)


def _columns(batch: Batch, rows: int, width: int, start: int, stop: int) -> dict[str, Any]:
    def sliced(value: Any) -> Any:
        spans = isinstance(value, torch.Tensor) and value.ndim > 1 and tuple(value.shape[:2]) == (rows, width)
        return value[:, start:stop] if spans else value

    return {name: sliced(value) for name, value in batch.items()}


def deal(batches: Sequence[Batch], kept: torch.Tensor, padding: Padding) -> list[Batch]:
    """The kept rows of a whole accumulation window, in order, over exactly `M` micro-batches of even size.

    `kept` indexes the window's candidates in order, ascending, `(K,)`. Where `K < M` the last micro-batches are blank:
    two columns of a kept row with every label masked, which add neither loss nor tokens.
    """
    pieces: list[list[tuple[int, int]]] = [[] for _ in batches]
    rows = _origins(batches, kept)
    base, more = divmod(len(rows), len(batches))
    at = 0
    for index, piece in enumerate(pieces):
        size = base + (index < more)
        piece.extend(rows[at : at + size])
        at += size
    empty = blank(batches[rows[0][0]], rows[0][1])
    return [trim(_gather(batches, piece, padding), padding) if piece else empty for piece in pieces]


def _origins(batches: Sequence[Batch], kept: torch.Tensor) -> list[tuple[int, int]]:
    """(micro-batch, row in it) of each kept candidate."""
    origins = [(micro, row) for micro, batch in enumerate(batches) for row in range(len(batch["input_ids"]))]
    return [origins[index] for index in kept.tolist()]


def _gather(batches: Sequence[Batch], rows: Sequence[tuple[int, int]], padding: Padding) -> dict[str, Any]:
    """Rows from several micro-batches as one batch; narrower ones are padded on the side their collator pads."""
    by_micro: dict[int, list[int]] = {}
    for micro, row in rows:
        by_micro.setdefault(micro, []).append(row)
    parts = [cut(batches[micro], torch.tensor(indices)) for micro, indices in by_micro.items()]
    return join_rows(parts, padding, left=any(pads_left(batches[micro]) for micro in by_micro))


def join_rows(parts: Sequence[Batch], padding: Padding, *, left: bool) -> dict[str, Any]:
    """Several batches' rows as one batch, in order; narrower parts are padded, on the `left` or on the right."""
    if len(parts) == 1:
        return dict(parts[0])
    width = max(part["input_ids"].shape[1] for part in parts)
    if any("attention_mask" not in part for part in parts):  # every column was a token; the ones added now are not
        parts = [{**part, "attention_mask": torch.ones_like(part["input_ids"])} for part in parts]
    parts = [_widen(part, width, left, padding) for part in parts]
    return {
        name: _join([part[name] for part in parts], [len(part["input_ids"]) for part in parts]) for name in parts[0]
    }


def pads_left(batch: Batch) -> bool:
    """Whether some row of the batch is padded on the left."""
    real = real_tokens(batch)
    return bool((real[:, -1] & ~real[:, 0]).any())


def _widen(part: Batch, width: int, left: bool, padding: Padding) -> dict[str, Any]:
    rows, columns = part["input_ids"].shape
    if columns == width:
        return dict(part)

    def widened(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or tuple(value.shape[:2]) != (rows, columns):
            return value
        fill = padding.token if name == "input_ids" else -100 if "labels" in name else 0
        extra = value.new_full((rows, width - columns, *value.shape[2:]), fill)
        return torch.cat([extra, value] if left else [value, extra], dim=1)

    return {name: widened(name, value) for name, value in part.items()}


def _join(values: Sequence[Any], rows: Sequence[int]) -> Any:
    """One column of several batches: rows are put one after another, what belongs to no row is taken once."""
    first = values[0]
    per_row = all(hasattr(value, "__len__") and not isinstance(value, str) for value in values) and all(
        (not isinstance(value, torch.Tensor) or value.ndim > 0) and len(value) == count
        for value, count in zip(values, rows, strict=True)
    )
    if not per_row:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(values))
    return type(first)(item for value in values for item in value)


def blank(batch: Batch, row: int) -> dict[str, Any]:
    """Two real columns of one row with every label masked: a micro-batch that trains nothing."""
    width = batch["input_ids"].shape[1]
    start = max(0, width - 2) if pads_left(batch) else 0
    short = _columns(cut(batch, torch.tensor([row])), 1, width, start, start + 2)
    if len(batch["input_ids"]) == 1:  # cut() passes a one-row batch on, and its labels are about to be written to
        short = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in short.items()}
    short["labels"] = torch.full_like(short["labels"], -100)
    return short
