"""What a trained layer says of its rows' gradients: its input and output caught by a hook, its weights' factors after.

Linear layers, GPT-2's `Conv1D` and embeddings give factors (see `siftune.online.per_example.ghost`); biases are summed over tokens;
other small layers (norms) are run again row by row. LoRA needs nothing of its own: its A and B are linear layers.

Axes: `R` rows of a group, `T` tokens, `I` x `O` a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding
from transformers.pytorch_utils import Conv1D

from .ghost import Use


@dataclass(frozen=True)
class Call:
    """One call of a trainable layer."""

    module: nn.Module
    given: torch.Tensor
    """Its input."""
    output: torch.Tensor
    autocast: torch.dtype | None


@dataclass(frozen=True)
class Group:
    """Where the rows of a group are in what a layer sees: row r is line r, or a segment of a packed line."""

    rows: int
    """R."""
    lines: int
    """Lines of the forward pass."""
    spans: Sequence[tuple[int, int, int]] | None = None
    """Per row (line, start, stop), counted from the last of `columns` columns; None where rows are lines."""
    columns: int = 0

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """`(R, tokens, ...)`: each row's own tokens, shorter segments filled with zeros.

        Raises `Unsuited` for a layer that sees several lines' tokens in one axis: rows have to be taken alone.
        """
        if values.ndim < 3 or len(values) != self.lines:
            if self.lines > 1:
                raise Unsuited("a layer sees the tokens of several rows together", alone=True)
            values = values.reshape(1, -1, values.shape[-1])
        if self.spans is None:
            return values
        # Prompt tuning puts virtual tokens in front; the head sees the last columns alone, from the first label on.
        more = values.shape[1] - self.columns
        parts = [values[line, max(0, more + start) : max(0, more + stop)] for line, start, stop in self.spans]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


class Unsuited(Exception):
    """The group cannot be told apart into rows; `alone` says whether single rows can."""

    def __init__(self, why: str, *, alone: bool) -> None:
        super().__init__(why)
        self.alone = alone


@contextmanager
def caught(model: nn.Module, calls: list[Call], lines: int) -> Iterator[list[bool]]:
    """Hooks on every layer with trained weights of its own; they record while the yielded list is not empty."""
    recording = [True]

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        replaced = None
        if isinstance(module, nn.Embedding) and isinstance(output, torch.Tensor) and len(output) == 1 < lines:
            replaced = output = output.expand(lines, *output.shape[1:])  # positions, the same ids for every row
        if recording:
            given = args[0] if args else None
            if len(args) != 1 or kwargs or not isinstance(given, torch.Tensor) or not isinstance(output, torch.Tensor):
                raise Unsuited(f"{type(module).__name__} is not a layer of one tensor to one tensor", alone=False)
            given = given.expand(lines, *given.shape[1:]) if replaced is not None else given
            kind = output.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            calls.append(Call(module, given.detach(), output, autocast))
        return replaced

    handles = []
    for module in model.modules():
        if any(weight.requires_grad for weight in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(catch, with_kwargs=True))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def layer_uses(call: Call, back: torch.Tensor, group: Group) -> Iterator[tuple[str, Use]]:
    """(name of the weight, its use) for the trained weights of one layer, from the gradient of its output."""
    module, forward = call.module, type(call.module).forward
    names = [name for name, weight in module.named_parameters(recurse=False) if weight.requires_grad]
    if isinstance(module, nn.Embedding):
        back = _lookup(module, call, back)
        ids, back = group.split(call.given[..., None])[..., 0], group.split(back)
        yield "weight", Use(ids, back, module.num_embeddings)
    elif (isinstance(module, nn.Linear) and forward is nn.Linear.forward) or isinstance(module, Conv1D):
        given, back = _by_row(call.given.to(call.output.dtype), group), _by_row(back, group)
        used = (back != 0).any(dim=2).any(dim=0)
        if float(used.float().mean()) < 0.75:  # positions that no label of these rows depends on: padding, prompts
            given, back = given[:, used], back[:, used]
        if "weight" in names:
            left, right = (given, back) if isinstance(module, Conv1D) else (back, given)
            yield "weight", Use(left, right, left.shape[2])
        if "bias" in names:
            yield "bias", Use(None, back.sum(dim=1, keepdim=True, dtype=_wide(back)))
    else:
        yield from _again(call, back, group, names)


def _lookup(module: nn.Embedding, call: Call, back: torch.Tensor) -> torch.Tensor:
    """The gradient of the looked-up rows; a layer that scales what it looks up (Gemma) is known by its `embed_scale`."""
    plain = embedding(call.given, module.weight)
    scale = getattr(module, "embed_scale", None)
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=module.weight.dtype, device=back.device)
        plain, back = plain * scale, back * scale
    same = torch.allclose(plain, call.output, rtol=0, atol=0, equal_nan=True)
    if module.max_norm is not None or module.scale_grad_by_freq or not same:
        raise Unsuited(f"{type(module).__name__} does more than look rows up", alone=False)
    if module.padding_idx is not None:
        back = back.masked_fill((call.given == module.padding_idx)[..., None], 0)
    return back


def _again(call: Call, back: torch.Tensor, group: Group, names: list[str]) -> Iterator[tuple[str, Use]]:
    """A small layer (a norm) run again row by row, its weights' gradients formed."""
    if any(True for _ in call.module.children()):
        raise Unsuited(f"{type(call.module).__name__} has weights of its own around other layers", alone=False)
    if len(call.given) != group.lines or len(back) != group.lines:
        raise Unsuited(f"{type(call.module).__name__} sees the tokens of several rows together", alone=True)
    given = call.given if group.spans is None else group.split(call.given)
    back = back if group.spans is None else group.split(back)
    weights = [getattr(call.module, name) for name in names]
    formed: list[list[torch.Tensor]] = [[] for _ in names]
    for row in range(group.rows):
        part = slice(row, row + 1)
        kind = back.device.type
        with torch.enable_grad(), torch.autocast(kind, dtype=call.autocast, enabled=call.autocast is not None):
            output = call.module(given[part])
            found = torch.autograd.grad(output, weights, back[part].to(output.dtype))
        for gradients, gradient in zip(formed, found, strict=True):
            gradients.append(gradient.reshape(1, -1))
    for name, gradients in zip(names, formed, strict=True):
        yield name, Use(None, torch.stack(gradients))


def _by_row(values: torch.Tensor, group: Group) -> torch.Tensor:
    """`(R, tokens, elements)`: further axes between tokens and elements count as tokens."""
    split = group.split(values)
    return split.reshape(len(split), -1, split.shape[-1])


def _wide(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
