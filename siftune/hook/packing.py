"""Packed trainers: whether a trainer packs rows, and whether its model separates the packed rows.

Where attention separates the segments of a packed line (flash attention, flex attention, a block mask, or a mask that
`transformers` derives from restarting positions), a segment's score is that of its row alone. Elsewhere a model reads
across rows, so a segment is scored in the context of those before it, as it is trained. Which of the two holds is
measured once, on the first packed batch: one segment's hidden states after another one and alone. Models that
carry a recurrent state from row to row are refused. Cost: two forward passes of one or two segments, once.

Shapes: `T` tokens of a segment, `D` hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..budget import parse_keep
from ..errors import UserError
from ..models.hidden_states import iter_hidden_states, real_tokens, unwrap_model
from ..models.layout import BatchWithLayout, Span
from ..models.repack import join_segments
from ..models.sharded import is_sharded
from ..online.base import OnlineMethod
from .selection_step import window_count

if TYPE_CHECKING:
    from transformers import Trainer

_RECURRENT_LAYERS = ("linear_attention", "mamba", "conv", "recurrent", "ssm", "hybrid")
_RECURRENT_KEYS = ("ssm_cfg", "state_size", "mamba_d_state", "linear_conv_kernel_dim", "ssm_state_size", "conv_L_cache")
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative distance of hidden states below which a segment counts as unaffected by the one before it; 1e-3 in
float32."""


def packs(trainer: Trainer) -> bool:
    """Whether the trainer's options or its collator show that rows are packed; otherwise its first batches may."""
    args, collator = trainer.args, trainer.data_collator
    options = any(getattr(args, name, False) is True for name in ("packing", "sample_packing", "padding_free"))
    kinds = {cls.__name__ for cls in type(collator).__mro__}
    joins = any(
        getattr(collator, name, False) is True for name in ("padding_free", "neat_packing")
    )  # trl, LLaMA-Factory
    return options or joins or "DataCollatorWithFlattening" in kinds


def packed_lines(trainer: Trainer) -> int | None:
    """Packed lines that an optimiser step reads on all processes; None where lines hold one row each, or joined
    rows."""
    args = trainer.args
    options = any(getattr(args, name, False) is True for name in ("packing", "sample_packing"))
    options = options or getattr(trainer.data_collator, "neat_packing", False) is True
    if not options and "seq_lengths" not in (getattr(trainer.train_dataset, "column_names", None) or ()):
        return None
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def describe_lines(selector: OnlineMethod, trainer: Trainer, lines: int) -> str:
    """What a step of packed lines reads and trains on, in one line; how many rows it holds is known at the first
    one."""
    longest = getattr(trainer.args, "max_length", None)
    size = f" of at most {longest:,} tokens" if isinstance(longest, int) else ""
    return (
        f"siftune: {selector.name} reads {lines} packed lines{size} per step, scores their rows and trains on "
        f"{_budget(selector)}, the new effective batch; optimiser steps and schedule stay as they are"
    )


def _budget(selector: OnlineMethod) -> str:
    share = f"keep={selector.keep!r} of them"
    if selector.keep_tokens is None:
        return share
    choice = "step" if selector.window == "step" else "micro-batch"
    limit = "" if parse_keep(selector.keep).fraction == 1.0 else f", {share} at most"
    return f"the best of them that fit in {selector.keep_tokens:,} tokens per {choice}{limit}"


def describe_packed(selector: OnlineMethod, batches: Sequence[BatchWithLayout], *, processes: int = 1) -> str:
    """What the first packed step holds, in one line; `processes` share one selection."""
    tokens = [sum(span.tokens for span in batch.layout.spans) for batch in batches]
    segments = [len(batch.layout) for batch in batches]
    kept = window_count(selector, segments) if selector.window == "step" else sum(map(selector.count, segments))
    trained = f"{kept} rows" if processes == 1 and selector.keep_tokens is None else _budget(selector)
    place = f" on this process, one of {processes}," if processes > 1 else ""
    return (
        f"siftune: packed batches (rows begin where {_boundary_source(batches)} says so): the first step holds {sum(segments)} "
        f"rows of {sum(tokens):,} tokens in {len(batches)} micro-batch{'es' if len(batches) > 1 else ''}{place} and trains on "
        f"{trained}"
    )


def describe_reading_across(model: torch.nn.Module) -> str:
    """The line for a model that reads across the rows of a packed line."""
    attention = getattr(unwrap_model(model).config, "_attn_implementation", None)
    return (
        f"siftune: this model reads across the rows of a packed line (attn_implementation={attention!r}), so a row is "
        "scored, as it is trained, in the context of the rows before it; flash_attention_2 keeps them apart"
    )


def _boundary_source(batches: Sequence[BatchWithLayout]) -> str:
    return next((batch.layout.source for batch in batches if batch.layout.source != "lines"), "the line")


def separates(model: torch.nn.Module, batches: Sequence[BatchWithLayout]) -> bool | None:
    """Whether a segment's hidden states are those that it has alone; None where no line holds two segments to try, and for
    a sharded model, whose forward passes every process would have to make.

    Raises `UserError` for a model with recurrent layers whose state crosses segments, or may cross them where it is sharded.
    """
    parts = unwrap_model(model)
    pair = _neighbouring_segments(batches)
    if pair is None:
        return None
    recurrent = is_recurrent(parts.config)
    if is_sharded(parts.called):
        if recurrent:
            raise UserError(
                f"{type(parts.causal).__name__} has recurrent layers, and whether they separate packed rows cannot be measured "
                "on a sharded model; set packing and padding_free to False"
            )
        return None
    batch, first, second = pair
    after_neighbour_TD = _hidden_states(model, join_segments([(batch, first), (batch, second)], like=batch))[-1]
    alone_TD = _hidden_states(model, join_segments([(batch, second)], like=batch))[-1]
    distance = float(
        (after_neighbour_TD.double() - alone_TD.double()).norm() / alone_TD.double().norm().clamp_min(1e-12)
    )
    separated = distance <= _TOLERANCE.get(alone_TD.dtype, 1e-3)
    if not separated and recurrent:
        raise UserError(
            f"{type(parts.causal).__name__} carries a state from one packed row to the next, so its rows cannot be separated; "
            "set packing and padding_free to False"
        )
    return separated


def attends_to_complete_lines(model: torch.nn.Module) -> bool:
    """Whether attention computes every pair of tokens in a line and masks those of different segments: its cost grows with
    the square of the line, so that segments are cheaper to score as rows."""
    return getattr(unwrap_model(model).config, "_attn_implementation", None) in ("sdpa", "eager")


def is_recurrent(config: Any) -> bool:
    """Whether a configuration names layers with a recurrent or convolutional state."""
    layers = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    return any(name in kind for kind in layers for name in _RECURRENT_LAYERS) or any(
        getattr(config, key, None) is not None for key in _RECURRENT_KEYS
    )


def _neighbouring_segments(batches: Sequence[BatchWithLayout]) -> tuple[BatchWithLayout, Span, Span] | None:
    """Two neighbours in a line, the second of at least two tokens; the shortest such pair of the first batch with
    one."""
    for batch in batches:
        spans = batch.layout.spans
        pairs = [
            (first, second)
            for first, second in itertools.pairwise(spans)
            if first.line == second.line and second.tokens > 1
        ]
        if pairs:
            first, second = min(pairs, key=lambda pair: pair[0].tokens + pair[1].tokens)
            return batch, first, second
    return None


def _hidden_states(model: torch.nn.Module, batch: BatchWithLayout) -> list[torch.Tensor]:
    """Final hidden states of each segment, in order."""
    states: dict[int, torch.Tensor] = {}
    for chunk in iter_hidden_states(unwrap_model(model), batch, real_tokens(batch)):
        states |= dict(zip(chunk.rows, chunk.states, strict=True))
    return [states[row] for row in sorted(states)]
