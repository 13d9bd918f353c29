"""The final hidden states of a causal LM, without its logits: one forward pass, a hook on the decoder's output.

The forward goes through the model as passed in (DDP, PEFT, autocast wrappers included), in eval mode, without
gradients, keys and values, labels or more than one column of logits; the model's state is restored. The
collator's tensors are forwarded unchanged: never padded again, never padded on the other side.
Cost: one forward of the backbone. Sources: UDS (arXiv 2510.16882) for the use, `transformers` for the interfaces.

Axes: `B` lines of the batch, `C` candidates (its lines, or the segments of a packed batch), `R` lines of a chunk,
`T` columns, `N` positions of a candidate, `D` hidden width, `V` vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .grouping import consecutive_groups
from .layout import CUMULATIVE, LENGTHS, layout_of, per_candidate, real_columns

Batch = Mapping[str, Any]
Passes = Callable[[int], int]
"""Maps the forward passes that this process needs to the number that all processes have to make."""
_TRANSPARENT = ("FullyShardedDataParallel", "DeepSpeedEngine")
"""Wrappers that forward attribute access to the wrapped module."""


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The parts of a causal LM that scoring hooks, reads and calls."""

    called: nn.Module
    """The module to call: the model as given, without an outermost `torch.compile`."""
    causal: nn.Module
    """The `transformers` model inside the wrappers: it holds the configuration and the head."""
    decoder: nn.Module
    """Its output, after the final norm, is what the head reads."""
    head: nn.Module
    """The output embeddings, with the wrappers' changes (LoRA, trained copies)."""
    config: Any
    """The configuration of the text model."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Hidden states of some candidates of a batch, from one forward pass."""

    rows: list[int]
    """Positions among the batch's candidates."""
    states: list[torch.Tensor]
    """Per candidate `(N, D)`: its positions, in order, in the model's own dtype and on its device."""
    probe_states: torch.Tensor
    """`(R, D)`: the states of the last column ..."""
    probe_logits: torch.Tensor | None
    """... and `(R, V)`: the model's own logits there, to check a head formula against. None where the model returns
    none."""


# --- unwrapping a model ---------------------------------------------------------------------------------------------


def unwrap_model(model: nn.Module) -> ModelParts:
    """Find decoder and head inside any nesting of DDP, FSDP, PEFT and `torch.compile`.

    Raises `UserError` for encoder-decoders, for models without output embeddings and for anything that is not a
    language model.

    >>> parts = unwrap_model(peft_model)
    >>> parts.head.weight.shape, parts.config.vocab_size
    """
    called: Any = getattr(model, "_orig_mod", model)  # a compiled outermost wrapper would never fire a hook made later
    causal: Any = called
    while (inner := _unwrapped(causal)) is not causal:
        causal = inner
    kind = type(causal).__name__
    config = getattr(causal, "config", None)
    if config is None or not hasattr(causal, "get_output_embeddings"):
        raise UserError(f"{kind} is not a transformers language model; online scoring needs an AutoModelForCausalLM")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{kind} is an encoder-decoder, whose rows have two sequences; use a decoder-only causal LM")
    if is_encoder(config):
        raise UserError(f"{kind} is an encoder, whose tokens see those after them; use a decoder-only language model")
    head = causal.get_output_embeddings()
    if head is None:
        raise UserError(f"{kind} has no output embeddings; load the model with AutoModelForCausalLM")
    if type(head).__name__ in _TRANSPARENT:  # an FSDP unit of its own
        head = head.module
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else causal
    if decoder is causal:  # transformers 4 does not name the decoder of GPT-2 and GPT-NeoX
        decoder = causal.base_model
    if decoder is causal and isinstance(getattr(causal, "model", None), nn.Module):  # Llama 4's text model
        decoder = causal.model
    if decoder is causal or not isinstance(decoder, nn.Module):
        raise UserError(f"{kind} does not separate its decoder from its head; use an AutoModelForCausalLM architecture")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return ModelParts(called, causal, decoder, head, text)


def is_encoder(config: Any) -> bool:
    """Whether a configuration is of a model whose tokens see those after them (BERT, without `is_decoder`)."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return True
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _unwrapped(module: Any) -> Any:
    """Without one wrapper: compiled module, PEFT model, or anything that keeps the model in `.module` (DDP, FSDP)."""
    if hasattr(module, "_orig_mod"):
        return module._orig_mod
    if type(module).__name__ in _TRANSPARENT:
        return module.module
    if hasattr(module, "get_base_model"):
        return module.get_base_model()
    inner = getattr(module, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(module, "get_output_embeddings") else module


# --- which positions ------------------------------------------------------------------------------------------------


def real_tokens(batch: Batch) -> torch.Tensor:
    """Which positions hold a real token of each candidate: bool `(C, T)`, on the CPU.

    As `siftune.models.layout.real_columns` reads them, each in the row of its candidate. Raises `UserError` for a mask of
    another shape.
    """
    return per_candidate(batch, real_columns(batch))


def predicting_tokens(batch: Batch) -> torch.Tensor:
    """Which positions of each candidate predict a label token: bool `(C, T)`, on the CPU; its last position never does.

    Position t predicts token t + 1, so these are the logits that a causal LM's loss reads. Raises `UserError` where
    the batch has no labels.
    """
    labels = batch.get("labels")
    if labels is None:
        raise UserError("the batch has no labels, which mark the answer's tokens; pass labels with -100 on the prompt")
    positions_BT = torch.zeros(labels.shape, dtype=torch.bool)
    positions_BT[:, :-1] = labels[:, 1:].detach().cpu() != -100
    layout = layout_of(batch)
    if layout.packed:  # the next segment's first token belongs to another row
        positions_BT[[span.line for span in layout.spans], [span.stop - 1 for span in layout.spans]] = False
    return per_candidate(batch, positions_BT)


# --- the forward pass -----------------------------------------------------------------------------------------------


def iter_hidden_states(
    parts: ModelParts,
    batch: Batch,
    positions_CT: torch.Tensor,
    *,
    score_tokens: int | None = None,
    passes: Passes | None = None,
) -> Iterator[Chunk]:
    """Hidden states at `positions_CT` (bool `(C, T)`), by candidate, in chunks of one forward pass each.

    Lines are processed in order of length; a chunk holds at most `score_tokens` padded tokens (at least one line).
    Candidates without a position are left out. Where `passes` returns more forward passes than there are chunks, chunks
    without rows follow. Raises `UserError` when the hook on the decoder does not fire.
    """
    columns = positions_CT.shape[1]
    plan: Iterable[tuple[list[int], int]] = chunks(batch, positions_CT, score_tokens)
    extra_passes = 0
    if passes is not None:
        plan = list(plan)
        extra_passes = passes(len(plan)) - len(plan)
    for lines, width in plan:
        states, logits = _forward(parts, rows_of_batch(parts, batch, lines, width), last_logits_only=True)
        states = states[:, -width:]  # prompt tuning puts virtual tokens in front
        candidates = candidates_in(batch, lines, positions_CT)
        masks = positions_CT[[candidate for candidate, _ in candidates]][:, :width]
        indices = [mask.nonzero().flatten() for mask in masks]  # on the CPU: no wait for the device
        selected = [
            states[place][index.to(states.device)] for (_, place), index in zip(candidates, indices, strict=True)
        ]
        assert width <= columns
        rows = [candidate for candidate, _ in candidates]
        yield Chunk(rows, selected, states[:, -1], None if logits is None else logits[:, -1])
    for _ in range(extra_passes):
        yield Chunk([], [], _idle(parts, batch)[:0, -1], None)


def _idle(parts: ModelParts, batch: Batch) -> torch.Tensor:
    """A forward pass of one token, for the processes that have more to score."""
    one_token = {"input_ids": batch["input_ids"][:1, :1].to(next(parts.causal.parameters()).device)}
    return _forward(parts, one_token, last_logits_only=True)[0]


def iter_logits(
    parts: ModelParts, batch: Batch, positions_CT: torch.Tensor, *, passes: Passes | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The model's own logits `(N, V)` at `positions_CT`, one line at a time, where the head is not a linear map.
    Candidates without a position are left out; `passes` as in `iter_hidden_states`."""
    lines = _scored_lines(batch, positions_CT)
    extra_passes = 0 if passes is None else passes(len(lines)) - len(lines)
    for line in lines:
        _, logits = _forward(parts, rows_of_batch(parts, batch, [line], positions_CT.shape[1]), last_logits_only=False)
        assert logits is not None, "a causal LM without logits"
        logits_of_line = logits[0, -positions_CT.shape[1] :]
        for row, _ in candidates_in(batch, [line], positions_CT):
            yield row, logits_of_line[positions_CT[row].to(logits_of_line.device)]
    for _ in range(extra_passes):
        _idle(parts, batch)


def candidates_in(batch: Batch, lines: list[int], positions_CT: torch.Tensor) -> list[tuple[int, int]]:
    """(candidate, place of its line in `lines`) of the candidates in some lines that have a position, line by line."""
    layout = layout_of(batch)
    if not layout.packed:
        return [(line, place) for place, line in enumerate(lines)]
    scored_lines = positions_CT.any(dim=1).tolist()
    place = {line: at for at, line in enumerate(lines)}
    members = [
        (row, place[span.line]) for row, span in enumerate(layout.spans) if scored_lines[row] and span.line in place
    ]
    return sorted(members, key=lambda pair: (pair[1], pair[0]))


def _scored_lines(batch: Batch, positions_CT: torch.Tensor) -> list[int]:
    """Lines with a candidate that has a position, ascending."""
    rows = positions_CT.any(dim=1).nonzero().flatten().tolist()
    layout = layout_of(batch)
    return sorted({layout.spans[row].line for row in rows}) if layout.packed else rows


def chunks(batch: Batch, positions_CT: torch.Tensor, score_tokens: int | None) -> Iterator[tuple[list[int], int]]:
    """Lines of each chunk, and the columns it needs: trailing columns that are padding in all its lines are dropped.

    Only when the batch is split into chunks, and only where the mask is 2-D (or absent) and no tensor has an ambiguous
    axis. Columns on the left are never dropped: learned positions would move. A batch whose keys list its segments'
    lengths is one chunk.
    """
    rows, columns = batch["input_ids"].shape
    scored_lines = torch.tensor(_scored_lines(batch, positions_CT), dtype=torch.int64)
    layout = layout_of(batch)
    if layout.packed and len(scored_lines) and any(batch.get(name) is not None for name in (*LENGTHS, *CUMULATIVE)):
        yield list(range(rows)), columns
        return
    if score_tokens is None or len(scored_lines) == 0 or rows * columns <= score_tokens:
        if len(scored_lines):
            yield scored_lines.tolist(), columns
        return
    mask = batch.get("attention_mask")
    trims = mask is None or mask.ndim == 2
    ends = torch.full((rows,), columns)
    if trims and layout.packed:
        ends = torch.tensor([max((s.stop for s in layout.spans if s.line == line), default=0) for line in range(rows)])
    elif trims:
        ends = torch.where(real_columns(batch) | positions_CT, torch.arange(1, columns + 1), 0).amax(dim=1)
    limit: int = score_tokens
    order = scored_lines[torch.argsort(ends[scored_lines], stable=True)].tolist()
    for chunk in consecutive_groups(order, lambda chunk, row: (len(chunk) + 1) * int(ends[row]) <= limit):
        yield chunk, int(ends[chunk[-1]])


def rows_of_batch(parts: ModelParts, batch: Batch, rows: list[int], width: int) -> dict[str, Any]:
    """The model's arguments for some rows and the first `width` columns, on the model's device."""
    count, columns = batch["input_ids"].shape
    device = next(parts.causal.parameters()).device
    accepted = accepted_arguments(parts.causal)
    arguments: dict[str, Any] = {}
    for name, value in batch.items():
        if name in ("labels", "use_cache") or (name not in accepted and "**" not in accepted):
            continue
        if isinstance(value, torch.Tensor):
            if value.ndim == 3 and tuple(value.shape[1:]) == (count, columns) and name == "position_ids":  # M-RoPE
                value = value[:, rows, :width]
            elif value.ndim and len(value) == count and rows != list(range(count)):
                value = value[torch.tensor(rows, device=value.device)]
            if value.ndim == 2 and value.shape[1] == columns and width < columns:
                value = value[:, :width]
            value = value.to(device)
        arguments[name] = value
    return arguments


def accepted_arguments(causal: nn.Module) -> set[str]:
    """Names that the model's forward accepts; `**` means any."""
    parameters = inspect.signature(type(causal).forward).parameters.values()
    return {"**" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters}


def _forward(parts: ModelParts, arguments: dict[str, Any], *, last_logits_only: bool) -> tuple[torch.Tensor, Any]:
    """Decoder output `(R, T', D)` and the logits that the model returns; the model is left unchanged."""
    outputs: list[torch.Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output.last_hidden_state
        outputs.append(state.detach())

    accepted = accepted_arguments(parts.causal)
    if last_logits_only:
        arguments |= {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in accepted}
    if {"use_cache", "**"} & accepted:
        arguments["use_cache"] = False  # in eval mode the default returns every candidate's keys and values
    handle = parts.decoder.register_forward_hook(catch)
    try:
        with torch.no_grad(), evaluating(parts.called):
            output = parts.called(**arguments)
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise UserError(
            f"the decoder {type(parts.decoder).__name__} ran {len(outputs)} times in one scoring forward; a model "
            "compiled in place hides it: set torch_compile=False, or compile with torch.compile(model)"
        )
    return outputs[0], getattr(output, "logits", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module's training flag and the global random state are restored."""
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        model.eval()
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


@contextmanager
def exact_math(device: torch.device) -> Iterator[None]:
    """Score mathematics in the dtype written: no autocast, no TF32 or bf16 inside float32 products, no gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
