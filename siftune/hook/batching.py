"""From a batch to its rows and back: real tokens, cut, trim, join, and the dummy batch that trains nothing.

No function here reads a score. Real tokens, labels and positions of a row are never changed; only padding that no kept
row needs is dropped, so that kept rows train at their own width. Cost: one index per tensor; no forward pass.

Shapes: `B` rows of a micro-batch, `T` columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..models.hidden_states import real_tokens
from ..models.layout import BatchWithLayout, Span, candidates_of, layout_of, with_layout
from ..models.repack import join_segments
from ..online.base import cut

if TYPE_CHECKING:
    from transformers import Trainer

Batch = Mapping[str, Any]

_ROTARY_KEYS = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_pct", "rotary_dim", "rotary_emb_base")


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How the trainer's collator pads, as far as cutting and joining rows depends on it."""

    token: int = 0
    """Token id of the padding that joining adds."""
    multiple: int = 1
    """The collator's `pad_to_multiple_of`: widths stay a multiple of it."""
    left: bool = False
    """Columns may be trimmed from the left too: true for models with rotary positions, which are relative. Learned
    absolute positions would shift."""

    @staticmethod
    def of(trainer: Trainer) -> Padding:
        """Derived from a live trainer: its collator, its tokenizer and its model's configuration."""
        collator, tokenizer = trainer.data_collator, getattr(trainer, "processing_class", None)
        token = getattr(collator, "pad_token_id", None)
        if token is None:
            token = getattr(tokenizer, "pad_token_id", None)
        config = getattr(trainer.model, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            config = config.get_text_config()
        rotary = any(getattr(config, name, None) is not None for name in _ROTARY_KEYS)
        multiple = getattr(collator, "pad_to_multiple_of", None) or 1
        return Padding(token=int(token or 0), multiple=int(multiple), left=rotary)


def token_counts(batch: Batch) -> torch.Tensor:
    """Real tokens of each candidate: int64 `(B,)`, on the CPU."""
    layout = layout_of(batch)
    if layout.packed:
        return torch.tensor([span.tokens for span in layout.spans], dtype=torch.int64)
    return real_tokens(batch).sum(dim=1)


def has_labels(batch: Batch) -> torch.Tensor:
    """Rows with at least one label token: bool `(B,)`. The label of the first column is never predicted."""
    labels_BT = batch.get("labels")
    if not isinstance(labels_BT, torch.Tensor) or labels_BT.ndim != 2:
        return torch.ones(candidates_of(batch), dtype=torch.bool)
    layout = layout_of(batch)
    if layout.packed:
        labels_on_cpu_BT = labels_BT.cpu()
        return torch.tensor(
            [bool((labels_on_cpu_BT[line, start + 1 : stop] != -100).any()) for line, start, stop in layout.spans]
        )
    return (labels_BT[:, 1:] != -100).any(dim=1).cpu()


def trim(batch: Batch, padding: Padding) -> Batch:
    """Drop the columns that are padding in every row: from the right always, from the left where positions allow it.

    The width stays a multiple of the collator's `pad_to_multiple_of`. A batch without a 2-D attention mask, or with a
    tensor that holds the columns on another axis than the second, is returned as it is; so is a packed batch.
    """
    mask_BT = batch.get("attention_mask")
    if layout_of(batch).packed or not isinstance(mask_BT, torch.Tensor) or mask_BT.ndim != 2:
        return batch
    rows, width = mask_BT.shape
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if any(width in value.shape[2:] for value in tensors):
        return batch
    used = mask_BT.ne(0).any(dim=0).nonzero().flatten()
    if not len(used):
        return batch
    start = int(used[0]) if padding.left or "position_ids" in batch else 0
    stop = int(used[-1]) + 1
    needed = -(-(stop - start) // padding.multiple) * padding.multiple
    stop = min(width, start + needed)
    start = max(0, stop - needed)
    return batch if stop - start == width else _slice_columns(batch, rows, width, start, stop)


def _slice_columns(batch: Batch, rows: int, width: int, start: int, stop: int) -> dict[str, Any]:
    def sliced(value: Any) -> Any:
        spans = isinstance(value, torch.Tensor) and value.ndim > 1 and tuple(value.shape[:2]) == (rows, width)
        return value[:, start:stop] if spans else value

    return {name: sliced(value) for name, value in batch.items()}


def join_rows(parts: Sequence[Batch], padding: Padding, *, like: Batch, left: bool) -> dict[str, Any]:
    """Several batches' rows as one batch, in order; narrower parts are padded, on the `left` or on the right. Where one
    of them is packed, the result is, with the keys of `like`."""
    if len(parts) == 1:
        return parts[0] if isinstance(parts[0], BatchWithLayout) else dict(parts[0])
    if any(layout_of(part).packed for part in parts):
        pieces = [(part, span) for part in parts for span in real_spans(part)]
        return join_segments(pieces, like=like, pad_token=padding.token)
    width = max(part["input_ids"].shape[1] for part in parts)
    if any(
        "attention_mask" not in part for part in parts
    ):  # every column so far is a token; the added ones are padding
        parts = [{**part, "attention_mask": torch.ones_like(part["input_ids"])} for part in parts]
    parts = [_widen(part, width, left, padding) for part in parts]
    return {
        name: _join_column([part[name] for part in parts], [len(part["input_ids"]) for part in parts])
        for name in parts[0]
    }


def real_spans(batch: Batch) -> list[Span]:
    """Every candidate's place without its padding. Of a line, from its first real token to its last."""
    layout = layout_of(batch)
    if layout.packed:
        return list(layout.spans)
    spans = []
    for line, real_T in enumerate(real_tokens(batch)):
        columns = real_T.nonzero().flatten()
        spans.append(Span(line, int(columns[0]) if len(columns) else 0, int(columns[-1]) + 1 if len(columns) else 0))
    return spans


def pads_left(batch: Batch) -> bool:
    """Whether some row of the batch is padded on the left; never of a packed batch."""
    if layout_of(batch).packed:
        return False
    real_BT = real_tokens(batch)
    return bool((real_BT[:, -1] & ~real_BT[:, 0]).any())


def _widen(part: Batch, width: int, left: bool, padding: Padding) -> dict[str, Any]:
    rows, columns = part["input_ids"].shape
    if columns == width:
        return dict(part)

    if getattr(part.get("attention_mask"), "ndim", 2) == 4:
        raise UserError(
            f"micro-batches of {columns} and {width} columns with 4-D attention masks cannot be joined; pass window='micro' to "
            "the selector, or return a 2-D mask from the collator"
        )

    def widened(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or tuple(value.shape[:2]) != (rows, columns):
            return value
        fill = padding.token if name == "input_ids" else -100 if "labels" in name else 0
        extra_columns = value.new_full((rows, width - columns, *value.shape[2:]), fill)
        return torch.cat([extra_columns, value] if left else [value, extra_columns], dim=1)

    return {name: widened(name, value) for name, value in part.items()}


def _join_column(values: Sequence[Any], rows: Sequence[int]) -> Any:
    """One column of several batches: per-row values are concatenated, anything else is taken from the first."""
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


def dummy_batch(batch: Batch, row: int) -> dict[str, Any]:
    """Two real columns of one row, fully masked: a micro-batch that adds neither loss nor label tokens."""
    layout = layout_of(batch)
    if layout.packed:
        line, start, stop = layout.spans[row]
        packed = join_segments([(batch, Span(line, start, min(stop, start + 2)))], like=batch)
        return with_layout({**packed, "labels": torch.full_like(packed["labels"], -100)}, packed.layout)
    width = batch["input_ids"].shape[1]
    start = max(0, width - 2) if pads_left(batch) else 0
    short = _slice_columns(cut(batch, torch.tensor([row])), 1, width, start, start + 2)
    if len(batch["input_ids"]) == 1:  # cut() returns a one-row batch unchanged, and its labels are overwritten below
        short = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in short.items()}
    short["labels"] = torch.full_like(short["labels"], -100)
    return short
