"""Every row's own gradient from one backward pass over a group of rows, in factors (see `siftune.online.per_example.ghost`).

The loss differentiated is the sum over rows of each row's mean cross-entropy over its label tokens. What went into each
trainable layer is caught by hooks, what came back by `autograd.grad` on the layers' outputs: `.grad` is never touched,
so accumulation and DDP's reducer do not notice. The pass runs in eval mode, where the library's gradient checkpointing is
off; layers that are recomputed all the same are caught once. What a layer makes of both: `siftune.online.per_example.layers`.

At first use one row's norm is held against its explicit gradient; where they differ, every row is differentiated alone,
and a warning says so once. Cost: one forward and backward pass without weight gradients, plus the ghost products; the
check takes one row's gradient of all trained weights, once.

Axes: `B` rows of the batch, `R`, `S` rows of groups, `T` columns.
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
from .ghost import NORM, Use, against, compact, inner, squares
from .layers import Call, Group, Unsuited, caught, layer_uses

Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RowGradients:
    """Gradients of R rows in every trained weight, in factors."""

    rows: list[int]
    """Positions in the batch."""
    uses: Mapping[int, list[Use]]
    """Per weight, by its position among the trained ones; weights that took no part are left out."""

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(use.bytes for uses in self.uses.values() for use in uses)

    def squares(self) -> torch.Tensor:
        """Squared norms, float64 `(R,)`."""
        total = torch.zeros(len(self.rows), dtype=torch.float64)
        for uses in self.uses.values():
            with exact_math(uses[0].right.device):
                total += squares(uses)
        return total

    def inner(self, other: RowGradients) -> torch.Tensor:
        """Inner products with other rows' gradients, float64 `(R, S)`."""
        total = torch.zeros(len(self.rows), len(other.rows), dtype=torch.float64)
        for weight in self.uses.keys() & other.uses.keys():
            with exact_math(self.uses[weight][0].right.device):
                total += inner(self.uses[weight], other.uses[weight])
        return total

    def against(self, gradient: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Inner products with one formed gradient (see `Gradients.mean`), float64 `(R,)`."""
        total = torch.zeros(len(self.rows), dtype=torch.float64)
        for weight in self.uses.keys() & gradient.keys():
            with exact_math(gradient[weight].device):
                total += against(self.uses[weight], gradient[weight])
        return total


class Gradients:
    """What gradient methods know of one model between batches: how its rows' gradients can be had.

    >>> gradients = Gradients()
    >>> for rows, width in gradients.plan(model, batch):
    ...     for part in gradients.of(model, batch, rows, width):
    ...         part.squares()
    """

    def __init__(self, *, larger: float = NORM) -> None:
        self._larger = larger
        self._model: int | None = None
        self._way = "group"
        """`group`, `alone` (each row by itself) or `explicit` (each row's gradient in full)."""
        self._checked = False

    def plan(self, model: nn.Module, batch: Batch, score_tokens: int | None = None) -> list[tuple[list[int], int]]:
        """Groups of rows with a label token, as (rows, columns), of at most `score_tokens` padded tokens each."""
        wanted = predicting_tokens(batch)
        return [
            ([row for row, _ in candidates_in(batch, lines, wanted)], width)
            for lines, width in chunks(batch, wanted, score_tokens)
        ]

    def of(self, model: nn.Module, batch: Batch, rows: list[int], width: int) -> list[RowGradients]:
        """The gradients of some rows, in their order: one part, or one per row where rows have to go alone.

        Raises `UserError` for models that are sharded, train fused expert weights, or train nothing.
        """
        parts = without_ddp(unwrap_model(model))
        weights = trained(parts.called)
        if self._model != id(parts.causal):
            self._model, self._way, self._checked = id(parts.causal), "group", False
        if self._way == "group":
            try:
                found = _grouped(parts, weights, batch, rows, width, self._larger)
                if self._holds(parts, weights, batch, found, width):
                    return [found]
            except Unsuited as unsuited:
                self._fall_back("alone" if unsuited.alone else "explicit", str(unsuited))
        if self._way == "alone":
            try:
                made = [_grouped(parts, weights, batch, [row], width, self._larger) for row in rows]
                if all(self._holds(parts, weights, batch, one, width) for one in made):
                    return made
            except Unsuited as unsuited:
                self._fall_back("explicit", str(unsuited))
        return [_explicit(parts, weights, batch, row, width) for row in rows]

    def mean(self, model: nn.Module, batch: Batch, score_tokens: int | None = None) -> dict[int, torch.Tensor] | None:
        """The mean gradient of the rows, per weight in the weight's shape, float32 (float64 of float64); None where no row
        has one. Rows without a label token and rows whose gradient is not finite are left out.

        Cost: a plain forward and backward pass; a group with a gradient that is not finite is walked again row by row.
        """
        parts = without_ddp(unwrap_model(model))
        weights = trained(parts.called)
        total: dict[int, torch.Tensor] = {}
        count = 0
        for rows, width in self.plan(model, batch, score_tokens):
            found = [(len(rows), _summed(parts, weights, batch, rows, width))]
            if not _finite(found[0][1]):
                alone = (_summed(parts, weights, batch, [row], width) for row in rows)
                found = [(1, gradients) for gradients in alone if _finite(gradients)]
            for number, gradients in found:
                count += number
                for weight, gradient in gradients.items():
                    total[weight] = total[weight] + gradient if weight in total else gradient
        return {weight: gradient / count for weight, gradient in total.items()} if count else None

    def _holds(
        self, parts: ModelParts, weights: list[nn.Parameter], batch: Batch, found: RowGradients, width: int
    ) -> bool:
        """Hold one row's norm against its explicit gradient, once per model."""
        if self._checked:
            return True
        norms = found.squares()
        if not bool(torch.isfinite(norms).any()):
            return True
        largest = int(norms.nan_to_num(-1, posinf=-1).argmax())
        truth = _explicit(parts, weights, batch, found.rows[largest], width).squares()
        ours, theirs = float(norms[largest].sqrt()), float(truth[0].sqrt())
        if ours == theirs == 0:
            return True
        coarse = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in parts.called.parameters())
        coarse |= torch.is_autocast_enabled(weights[0].device.type)
        distance = abs(ours - theirs) / max(ours, theirs)
        if distance <= (5e-2 if coarse else 1e-3):
            self._checked = True
            return True
        self._fall_back(
            "explicit", f"a row's factors give another gradient norm than the row itself ({distance:.1%} off)"
        )
        return False

    def _fall_back(self, way: str, why: str) -> None:
        self._way = way
        if way == "explicit":
            self._checked = True
            warnings.warn(f"gradients are taken one row at a time, in full and more slowly: {why}", stacklevel=4)


# --- which model, which weights -------------------------------------------------------------------------------------


def without_ddp(parts: ModelParts) -> ModelParts:
    """The same model without DDP around it: its forward exchanges buffers and readies the reducer for a backward pass,
    and ranks score in different numbers of groups."""
    called: Any = parts.called
    while isinstance(called, nn.parallel.DistributedDataParallel) or hasattr(called, "_orig_mod"):
        called = getattr(called, "_orig_mod", None) or called.module
    return ModelParts(called, parts.causal, parts.decoder, parts.head, parts.config)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The weights that require gradients, each once. Raises `UserError` where row gradients cannot be had."""
    if any(type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule") for module in model.modules()):
        raise UserError(
            "FSDP shards the weights, and gradient methods need them whole; use maxloss or uds, or plain DDP"
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in model.parameters():
        if type(weight).__name__ == "DTensor" or hasattr(weight, "ds_id"):
            kind = "DeepSpeed ZeRO-3" if hasattr(weight, "ds_id") else "FSDP"
            raise UserError(f"{kind} shards the weights, and gradient methods need them whole; use maxloss or uds")
    if not weights:
        raise UserError(
            "no weight of the model requires gradients, so rows have none; make some trainable or use maxloss"
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.requires_grad and weight.ndim > 2:
                raise UserError(
                    f"{name}.{own} holds several experts in one weight of shape {tuple(weight.shape)}, whose rows cannot "
                    "be told apart; freeze it, train with LoRA on other layers, or use maxloss or uds"
                )
    return weights


# --- forward and backward -------------------------------------------------------------------------------------------


def _losses(parts: ModelParts, batch: Batch, rows: list[int], width: int) -> torch.Tensor:
    """Each row's mean cross-entropy over its label tokens, `(R,)`, with a graph. Rows have at least one."""
    layout = layout_of(batch)
    owners = [layout.spans[row].line for row in rows]
    lines = sorted(set(owners)) if layout.packed else owners  # a chunk's rows come in order of length
    wanted = predicting_tokens(batch)[rows][:, :width]
    labels = batch["labels"].detach().cpu()
    targets = torch.cat([labels[:, 1:], labels[:, :1]], dim=1)[owners, :width].masked_fill(~wanted, -100)
    first = int(wanted.any(dim=0).nonzero()[0])
    targets = targets[:, first:]
    arguments = rows_of_batch(parts, batch, lines, width)
    accepted = accepted_arguments(parts.causal)
    arguments |= {name: width - first for name in ("logits_to_keep", "num_logits_to_keep") if name in accepted}
    if {"use_cache", "**"} & accepted:
        arguments["use_cache"] = False
    logits = parts.called(**arguments).logits[:, first - width :]
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = targets.to(logits.device)
        if layout.packed:  # one line holds the targets of several rows
            counted = targets != -100
            places = torch.tensor([lines.index(owner) for owner in owners], device=logits.device)
            row, column = counted.nonzero(as_tuple=True)
            each = cross_entropy(logits[places[row], column], targets[counted], reduction="none")
            sums = each.new_zeros(len(rows)).index_add(0, row, each)
            _check_graph(each)
            return sums / counted.sum(dim=1)
        each = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        _check_graph(each)
        return each.view(targets.shape).sum(dim=1) / (targets != -100).sum(dim=1)


def _check_graph(losses: torch.Tensor) -> None:
    if not losses.requires_grad:
        raise UserError("the loss depends on no weight that requires gradients; are adapters merged or switched off?")


def _group(batch: Batch, rows: list[int], width: int) -> Group:
    """Where some rows are in the forward pass that `_losses` makes of their lines."""
    layout = layout_of(batch)
    if not layout.packed:
        return Group(len(rows), len(rows))
    lines = sorted({layout.spans[row].line for row in rows})
    spans = [layout.spans[row] for row in rows]
    return Group(len(rows), len(lines), [(lines.index(s.line), s.start, s.stop) for s in spans], width)


def _summed(
    parts: ModelParts, weights: list[nn.Parameter], batch: Batch, rows: list[int], width: int
) -> dict[int, torch.Tensor]:
    """The sum of some rows' gradients, in full, by `autograd.grad`."""
    with torch.enable_grad(), evaluating(parts.called):
        loss = _losses(parts, batch, rows, width).sum()
        found = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        index: gradient if gradient.dtype == torch.float64 else gradient.float()
        for index, gradient in enumerate(found)
        if gradient is not None
    }


def _finite(gradients: Mapping[int, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def _explicit(parts: ModelParts, weights: list[nn.Parameter], batch: Batch, row: int, width: int) -> RowGradients:
    """One row's gradient in full, by `autograd.grad`."""
    found = _summed(parts, weights, batch, [row], width)
    return RowGradients([row], {index: [Use(None, gradient.reshape(1, 1, -1))] for index, gradient in found.items()})


def _grouped(
    parts: ModelParts, weights: list[nn.Parameter], batch: Batch, rows: list[int], width: int, larger: float
) -> RowGradients:
    """The gradients of a group of rows from one backward pass. Raises `Unsuited` where rows cannot be told apart."""
    calls: list[Call] = []
    position = {id(weight): index for index, weight in enumerate(weights)}
    uses: dict[int, list[Use]] = {}
    group = _group(batch, rows, width)
    with torch.enable_grad(), evaluating(parts.called), caught(parts.called, calls, group.lines) as recording:
        loss = _losses(parts, batch, rows, width).sum()
        recording.clear()  # layers recomputed by checkpointing in the backward pass are not caught again
        if any(not call.output.requires_grad for call in calls):
            raise UserError(
                "layers are checkpointed with use_reentrant=True, inside which no gradient can be read; set "
                "use_reentrant=False"
            )
        outputs = [call.output for call in calls]
        backs = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
        with exact_math(loss.device):
            for call, back in zip(calls, backs, strict=True):
                if back is None:
                    continue
                for name, use in layer_uses(call, back, group):
                    weight = getattr(call.module, name)
                    uses.setdefault(position[id(weight)], []).append(use)
            return RowGradients(rows, {weight: compact(some, larger) for weight, some in uses.items()})
