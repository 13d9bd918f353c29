"""Every row's own gradient from one backward pass over a group of rows, in factors (see
`siftune.online.per_example.ghost`).

The loss differentiated is the sum over rows of each row's mean cross-entropy over its label tokens. Hooks record the
input of each trainable layer, and `autograd.grad` returns the gradients of the layers' outputs: `.grad` is never
written, so gradient accumulation and DDP's reducer are unaffected. The pass runs in eval mode, where the library's
gradient checkpointing is off; layers that are recomputed all the same are recorded once. The factors of each kind of
layer are in `siftune.online.per_example.layers`.

At first use one row's norm is compared with that of its explicit gradient; where they differ, every row is
differentiated alone, and a warning says so once. Cost: one forward and backward pass without weight gradients, plus the
ghost products; the check takes one row's gradient of all trained weights, once.

Axes: `B` rows of the batch and `L` its lines, `R`, `S` rows of groups (of packed batches, logits are per line), `T`
columns, `V` vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ...errors import UserError
from ...models.hidden_states import (
    ModelParts,
    accepted_arguments,
    candidates_in,
    chunks,
    evaluating,
    exact_math,
    predicting_tokens,
    rows_of_batch,
    unwrap_model,
)
from ...models.layout import layout_of
from .ghost import NORM_SIZE_FACTOR, GradientFactors, cheaper_form, inner, inner_with_gradient, squares
from .layers import LayerCall, RowGroup, RowsNotSeparable, layer_factors, record_layers

Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RowGradients:
    """Gradients of R rows in every trained weight, in factors."""

    rows: list[int]
    """Positions in the batch."""
    factors: Mapping[int, list[GradientFactors]]
    """Per weight, by its position among the trained ones; unused weights are left out."""

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(term.bytes for factors in self.factors.values() for term in factors)

    def squares(self) -> torch.Tensor:
        """Squared norms, float64 `(R,)`."""
        total = torch.zeros(len(self.rows), dtype=torch.float64)
        for factors in self.factors.values():
            with exact_math(factors[0].right.device):
                total += squares(factors)
        return total

    def inner(self, other: RowGradients) -> torch.Tensor:
        """Inner products with other rows' gradients, float64 `(R, S)`."""
        total = torch.zeros(len(self.rows), len(other.rows), dtype=torch.float64)
        for weight in self.factors.keys() & other.factors.keys():
            with exact_math(self.factors[weight][0].right.device):
                total += inner(self.factors[weight], other.factors[weight])
        return total

    def inner_with_gradient(self, gradient: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Inner products with one formed gradient (see `Gradients.mean`), float64 `(R,)`."""
        total = torch.zeros(len(self.rows), dtype=torch.float64)
        for weight in self.factors.keys() & gradient.keys():
            with exact_math(gradient[weight].device):
                total += inner_with_gradient(self.factors[weight], gradient[weight])
        return total


class PerExampleGradients:
    """Gradients of single rows; remembers, per model, by which route they can be computed.

    >>> gradients = Gradients()
    >>> for rows, width in gradients.plan(model, batch):
    ...     for part in gradients.compute(model, batch, rows, width):
    ...         part.squares()
    """

    def __init__(self, *, size_factor: float = NORM_SIZE_FACTOR) -> None:
        self._size_factor = size_factor
        self._model_id: int | None = None
        self._route = "group"
        """`group`, `alone` (each row separately) or `explicit` (each row's gradient in full)."""
        self._norm_checked = False

    def plan(self, model: nn.Module, batch: Batch, score_tokens: int | None = None) -> list[tuple[list[int], int]]:
        """Groups of rows with a label token, as (rows, columns), of at most `score_tokens` padded tokens each."""
        positions_BT = predicting_tokens(batch)
        return [
            ([row for row, _ in candidates_in(batch, lines, positions_BT)], width)
            for lines, width in chunks(batch, positions_BT, score_tokens)
        ]

    def compute(self, model: nn.Module, batch: Batch, rows: list[int], width: int) -> list[RowGradients]:
        """The gradients of some rows, in their order: one part, or one per row where rows are differentiated alone.

        Raises `UserError` for models that are sharded, train fused expert weights, or train nothing.
        """
        parts = without_ddp(unwrap_model(model))
        weights = trained_weights(parts.called)
        if self._model_id != id(parts.causal):
            self._model_id, self._route, self._norm_checked = id(parts.causal), "group", False
        if self._route == "group":
            try:
                group_gradients = _grouped_gradients(parts, weights, batch, rows, width, self._size_factor)
                if self._norm_agrees(parts, weights, batch, group_gradients, width):
                    return [group_gradients]
            except RowsNotSeparable as error:
                self._fall_back("alone" if error.alone else "explicit", str(error))
        if self._route == "alone":
            try:
                row_gradients = [
                    _grouped_gradients(parts, weights, batch, [row], width, self._size_factor) for row in rows
                ]
                if all(self._norm_agrees(parts, weights, batch, gradients, width) for gradients in row_gradients):
                    return row_gradients
            except RowsNotSeparable as error:
                self._fall_back("explicit", str(error))
        return [_explicit_gradient(parts, weights, batch, row, width) for row in rows]

    def mean(self, model: nn.Module, batch: Batch, score_tokens: int | None = None) -> dict[int, torch.Tensor] | None:
        """The mean gradient of the rows, per weight in the weight's shape, float32 (float64 of float64); None where no
        row has one. Rows without a label token and rows whose gradient is not finite are left out.

        Cost: a plain forward and backward pass; a group with a gradient that is not finite is computed again row by
        row.
        """
        parts = without_ddp(unwrap_model(model))
        weights = trained_weights(parts.called)
        total: dict[int, torch.Tensor] = {}
        count = 0
        for rows, width in self.plan(model, batch, score_tokens):
            sums = [(len(rows), _summed_gradients(parts, weights, batch, rows, width))]
            if not _all_finite(sums[0][1]):
                row_sums = (_summed_gradients(parts, weights, batch, [row], width) for row in rows)
                sums = [(1, gradients) for gradients in row_sums if _all_finite(gradients)]
            for rows_summed, gradients in sums:
                count += rows_summed
                for weight, gradient in gradients.items():
                    total[weight] = total[weight] + gradient if weight in total else gradient
        return {weight: gradient / count for weight, gradient in total.items()} if count else None

    def _norm_agrees(
        self, parts: ModelParts, weights: list[nn.Parameter], batch: Batch, gradients: RowGradients, width: int
    ) -> bool:
        """Whether one row's norm is that of its explicit gradient; checked once per model."""
        if self._norm_checked:
            return True
        norms = gradients.squares()
        if not bool(torch.isfinite(norms).any()):
            return True
        largest = int(norms.nan_to_num(-1, posinf=-1).argmax())
        explicit = _explicit_gradient(parts, weights, batch, gradients.rows[largest], width).squares()
        from_factors, from_autograd = float(norms[largest].sqrt()), float(explicit[0].sqrt())
        if from_factors == from_autograd == 0:
            return True
        half_precision = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in parts.called.parameters())
        half_precision |= torch.is_autocast_enabled(weights[0].device.type)
        distance = abs(from_factors - from_autograd) / max(from_factors, from_autograd)
        if distance <= (5e-2 if half_precision else 1e-3):
            self._norm_checked = True
            return True
        self._fall_back(
            "explicit", f"a row's factors give another gradient norm than the row itself ({distance:.1%} off)"
        )
        return False

    def _fall_back(self, route: str, reason: str) -> None:
        self._route = route
        if route == "explicit":
            self._norm_checked = True
            warnings.warn(f"gradients are taken one row at a time, in full and more slowly: {reason}", stacklevel=4)


# --- which model, which weights -------------------------------------------------------------------------------------


def without_ddp(parts: ModelParts) -> ModelParts:
    """The same model without DDP around it: its forward exchanges buffers and prepares the reducer for a backward pass,
    and ranks score in different numbers of groups."""
    called: Any = parts.called
    while isinstance(called, nn.parallel.DistributedDataParallel) or hasattr(called, "_orig_mod"):
        called = getattr(called, "_orig_mod", None) or called.module
    return ModelParts(called, parts.causal, parts.decoder, parts.head, parts.config)


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that require gradients, each once. Raises `UserError` where gradients of rows cannot be computed."""
    if any(type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule") for module in model.modules()):
        raise UserError(
            "FSDP shards the weights, and gradient methods need the complete weights; use maxloss or uds, or plain DDP"
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in model.parameters():
        if type(weight).__name__ == "DTensor" or hasattr(weight, "ds_id"):
            kind = "DeepSpeed ZeRO-3" if hasattr(weight, "ds_id") else "FSDP"
            raise UserError(
                f"{kind} shards the weights, and gradient methods need the complete weights; use maxloss or uds"
            )
    if not weights:
        raise UserError(
            "no weight of the model requires gradients, so rows have no gradient; make some weights trainable or use maxloss"
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        for weight_name, weight in module.named_parameters(recurse=False):
            if weight.requires_grad and weight.ndim > 2:
                raise UserError(
                    f"{name}.{weight_name} holds several experts in one weight of shape {tuple(weight.shape)}, whose rows cannot "
                    "be separated; freeze it, train with LoRA on other layers, or use maxloss or uds"
                )
    return weights


# --- forward and backward -------------------------------------------------------------------------------------------


def _losses(parts: ModelParts, batch: Batch, rows: list[int], width: int) -> torch.Tensor:
    """Each row's mean cross-entropy over its label tokens, `(R,)`, with a graph. Rows have at least one."""
    layout = layout_of(batch)
    lines_of_rows = [layout.spans[row].line for row in rows]
    lines = sorted(set(lines_of_rows)) if layout.packed else lines_of_rows  # a chunk's rows come in order of length
    positions_RT = predicting_tokens(batch)[rows][:, :width]
    labels_LT = batch["labels"].detach().cpu()
    targets_RT = torch.cat([labels_LT[:, 1:], labels_LT[:, :1]], dim=1)[lines_of_rows, :width].masked_fill(
        ~positions_RT, -100
    )
    first = int(positions_RT.any(dim=0).nonzero()[0])
    targets_RT = targets_RT[:, first:]
    arguments = rows_of_batch(parts, batch, lines, width)
    accepted = accepted_arguments(parts.causal)
    arguments |= {name: width - first for name in ("logits_to_keep", "num_logits_to_keep") if name in accepted}
    if {"use_cache", "**"} & accepted:
        arguments["use_cache"] = False
    logits_RTV = parts.called(**arguments).logits[:, first - width :]
    with torch.autocast(logits_RTV.device.type, enabled=False):
        logits_RTV = logits_RTV if logits_RTV.dtype == torch.float64 else logits_RTV.float()
        targets_RT = targets_RT.to(logits_RTV.device)
        if layout.packed:  # one line holds the targets of several rows
            counted_RT = targets_RT != -100
            places = torch.tensor([lines.index(line) for line in lines_of_rows], device=logits_RTV.device)
            row, column = counted_RT.nonzero(as_tuple=True)
            losses = cross_entropy(logits_RTV[places[row], column], targets_RT[counted_RT], reduction="none")
            sums = losses.new_zeros(len(rows)).index_add(0, row, losses)
            _check_graph(losses)
            return sums / counted_RT.sum(dim=1)
        losses = cross_entropy(logits_RTV.flatten(0, 1), targets_RT.flatten(), ignore_index=-100, reduction="none")
        _check_graph(losses)
        return losses.view(targets_RT.shape).sum(dim=1) / (targets_RT != -100).sum(dim=1)


def _check_graph(losses: torch.Tensor) -> None:
    if not losses.requires_grad:
        raise UserError("the loss depends on no weight that requires gradients; are adapters merged or switched off?")


def _row_group(batch: Batch, rows: list[int], width: int) -> RowGroup:
    """Where some rows are in the forward pass of `_losses` over their lines."""
    layout = layout_of(batch)
    if not layout.packed:
        return RowGroup(len(rows), len(rows))
    lines = sorted({layout.spans[row].line for row in rows})
    spans = [layout.spans[row] for row in rows]
    return RowGroup(len(rows), len(lines), [(lines.index(s.line), s.start, s.stop) for s in spans], width)


def _summed_gradients(
    parts: ModelParts, weights: list[nn.Parameter], batch: Batch, rows: list[int], width: int
) -> dict[int, torch.Tensor]:
    """The sum of some rows' gradients, in full, by `autograd.grad`."""
    with torch.enable_grad(), evaluating(parts.called):
        loss = _losses(parts, batch, rows, width).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        index: gradient if gradient.dtype == torch.float64 else gradient.float()
        for index, gradient in enumerate(gradients)
        if gradient is not None
    }


def _all_finite(gradients: Mapping[int, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def _explicit_gradient(
    parts: ModelParts, weights: list[nn.Parameter], batch: Batch, row: int, width: int
) -> RowGradients:
    """One row's gradient in full, by `autograd.grad`."""
    gradients = _summed_gradients(parts, weights, batch, [row], width)
    return RowGradients(
        [row], {index: [GradientFactors(None, gradient.reshape(1, 1, -1))] for index, gradient in gradients.items()}
    )


def _grouped_gradients(
    parts: ModelParts, weights: list[nn.Parameter], batch: Batch, rows: list[int], width: int, size_factor: float
) -> RowGradients:
    """The gradients of a group of rows from one backward pass. Raises `RowsNotSeparable` where rows cannot be
    separated."""
    calls: list[LayerCall] = []
    position = {id(weight): index for index, weight in enumerate(weights)}
    factors: dict[int, list[GradientFactors]] = {}
    group = _row_group(batch, rows, width)
    with torch.enable_grad(), evaluating(parts.called), record_layers(parts.called, calls, group.lines) as recording:
        loss = _losses(parts, batch, rows, width).sum()
        recording.clear()  # layers recomputed by checkpointing in the backward pass are not recorded again
        if any(not call.output.requires_grad for call in calls):
            raise UserError(
                "layers are checkpointed with use_reentrant=True, inside which no gradient can be read; set "
                "use_reentrant=False"
            )
        outputs = [call.output for call in calls]
        output_gradients = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
        with exact_math(loss.device):
            for call, output_gradient in zip(calls, output_gradients, strict=True):
                if output_gradient is None:
                    continue
                for name, term in layer_factors(call, output_gradient, group):
                    weight = getattr(call.module, name)
                    factors.setdefault(position[id(weight)], []).append(term)
            return RowGradients(rows, {weight: cheaper_form(terms, size_factor) for weight, terms in factors.items()})
