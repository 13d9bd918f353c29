"""Per-row gradients of one trained layer: a hook records its input and output, from which its weights' factors follow.

Linear layers, GPT-2's `Conv1D` and embeddings give factors (see `siftune.online.per_example.ghost`); biases are summed
over tokens; other small layers (norms) are run again row by row. LoRA needs no special case: its A and B are linear
layers.

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

from .ghost import GradientFactors


@dataclass(frozen=True)
class LayerCall:
    """One call of a trainable layer."""

    module: nn.Module
    layer_input: torch.Tensor
    """Its input."""
    output: torch.Tensor
    autocast: torch.dtype | None


@dataclass(frozen=True)
class RowGroup:
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

        Raises `RowsNotSeparable` for a layer that sees several lines' tokens in one axis: rows have to be taken alone.
        """
        if values.ndim < 3 or len(values) != self.lines:
            if self.lines > 1:
                raise RowsNotSeparable("a layer sees the tokens of several rows together", alone=True)
            values = values.reshape(1, -1, values.shape[-1])
        if self.spans is None:
            return values
        # Prompt tuning puts virtual tokens in front; the head sees the last columns alone, from the first label on.
        prefix = values.shape[1] - self.columns
        parts = [values[line, max(0, prefix + start) : max(0, prefix + stop)] for line, start, stop in self.spans]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


class RowsNotSeparable(Exception):
    """Gradients of a group cannot be separated into rows; `alone` says whether single rows can be differentiated."""

    def __init__(self, reason: str, *, alone: bool) -> None:
        super().__init__(reason)
        self.alone = alone


@contextmanager
def record_layers(model: nn.Module, calls: list[LayerCall], lines: int) -> Iterator[list[bool]]:
    """Hooks on every layer with trained weights of its own; they record while the yielded list is not empty."""
    recording = [True]

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        expanded = None
        if isinstance(module, nn.Embedding) and isinstance(output, torch.Tensor) and len(output) == 1 < lines:
            expanded = output = output.expand(lines, *output.shape[1:])  # position ids, the same for every row
        if recording:
            layer_input = args[0] if args else None
            if (
                len(args) != 1
                or kwargs
                or not isinstance(layer_input, torch.Tensor)
                or not isinstance(output, torch.Tensor)
            ):
                raise RowsNotSeparable(
                    f"{type(module).__name__} is not a layer of one tensor to one tensor", alone=False
                )
            layer_input = layer_input.expand(lines, *layer_input.shape[1:]) if expanded is not None else layer_input
            device_type = output.device.type
            autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
            calls.append(LayerCall(module, layer_input.detach(), output, autocast))
        return expanded

    handles = []
    for module in model.modules():
        if any(weight.requires_grad for weight in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def layer_factors(
    call: LayerCall, output_gradient: torch.Tensor, group: RowGroup
) -> Iterator[tuple[str, GradientFactors]]:
    """(name of the weight, its use) for the trained weights of one layer, from the gradient of its output."""
    module, forward = call.module, type(call.module).forward
    names = [name for name, weight in module.named_parameters(recurse=False) if weight.requires_grad]
    if isinstance(module, nn.Embedding):
        output_gradient = _embedding_gradient(module, call, output_gradient)
        ids, output_gradient = group.split(call.layer_input[..., None])[..., 0], group.split(output_gradient)
        yield "weight", GradientFactors(ids, output_gradient, module.num_embeddings)
    elif (isinstance(module, nn.Linear) and forward is nn.Linear.forward) or isinstance(module, Conv1D):
        layer_input, output_gradient = (
            _tokens_by_row(call.layer_input.to(call.output.dtype), group),
            _tokens_by_row(output_gradient, group),
        )
        contributing = (output_gradient != 0).any(dim=2).any(dim=0)
        if float(contributing.float().mean()) < 0.75:  # drop tokens that no label depends on: padding, prompts
            layer_input, output_gradient = layer_input[:, contributing], output_gradient[:, contributing]
        if "weight" in names:
            left_RTI, right_RTO = (
                (layer_input, output_gradient) if isinstance(module, Conv1D) else (output_gradient, layer_input)
            )
            yield "weight", GradientFactors(left_RTI, right_RTO, left_RTI.shape[2])
        if "bias" in names:
            yield (
                "bias",
                GradientFactors(None, output_gradient.sum(dim=1, keepdim=True, dtype=_sum_dtype(output_gradient))),
            )
    else:
        yield from _recompute_layer(call, output_gradient, group, names)


def _embedding_gradient(module: nn.Embedding, call: LayerCall, output_gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of the looked-up rows; a layer that scales its embeddings (Gemma) has `embed_scale`."""
    looked_up = embedding(call.layer_input, module.weight)
    scale = getattr(module, "embed_scale", None)
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=module.weight.dtype, device=output_gradient.device)
        looked_up, output_gradient = looked_up * scale, output_gradient * scale
    identical = torch.allclose(looked_up, call.output, rtol=0, atol=0, equal_nan=True)
    if module.max_norm is not None or module.scale_grad_by_freq or not identical:
        raise RowsNotSeparable(f"{type(module).__name__} does more than look rows up", alone=False)
    if module.padding_idx is not None:
        output_gradient = output_gradient.masked_fill((call.layer_input == module.padding_idx)[..., None], 0)
    return output_gradient


def _recompute_layer(
    call: LayerCall, output_gradient: torch.Tensor, group: RowGroup, names: list[str]
) -> Iterator[tuple[str, GradientFactors]]:
    """A small layer (a norm) run again row by row, its weights' gradients formed."""
    if any(True for _ in call.module.children()):
        raise RowsNotSeparable(f"{type(call.module).__name__} has weights of its own around other layers", alone=False)
    if len(call.layer_input) != group.lines or len(output_gradient) != group.lines:
        raise RowsNotSeparable(f"{type(call.module).__name__} sees the tokens of several rows together", alone=True)
    layer_input = call.layer_input if group.spans is None else group.split(call.layer_input)
    output_gradient = output_gradient if group.spans is None else group.split(output_gradient)
    weights = [getattr(call.module, name) for name in names]
    gradients_of_weights: list[list[torch.Tensor]] = [[] for _ in names]
    for row in range(group.rows):
        row_slice = slice(row, row + 1)
        device_type = output_gradient.device.type
        with torch.enable_grad(), torch.autocast(device_type, dtype=call.autocast, enabled=call.autocast is not None):
            output = call.module(layer_input[row_slice])
            row_gradients = torch.autograd.grad(output, weights, output_gradient[row_slice].to(output.dtype))
        for gradients, gradient in zip(gradients_of_weights, row_gradients, strict=True):
            gradients.append(gradient.reshape(1, -1))
    for name, gradients in zip(names, gradients_of_weights, strict=True):
        yield name, GradientFactors(None, torch.stack(gradients))


def _tokens_by_row(values: torch.Tensor, group: RowGroup) -> torch.Tensor:
    """`(R, tokens, elements)`: further axes between tokens and elements count as tokens."""
    split = group.split(values)
    return split.reshape(len(split), -1, split.shape[-1])


def _sum_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
