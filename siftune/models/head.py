"""The LM head as a linear map, and its Gram matrix as a packed triangular factor (UDS, arXiv 2510.16882, without
logits).

    logits = cap(m * (H Wᵀ + 1 bᵀ))          W with every active LoRA update, b the bias, m the multiplier
    G = [W b]ᵀ [W b] = C Cᵀ                  C lower triangular, so ‖H Wᵀ‖ = ‖[H 1] C‖ in every unitary norm

Nothing of size N x V is formed for a linear head; a capped head gives its logits in blocks of the vocabulary.
Cost: G takes V*D*D/2 products once per version of the weights; a LoRA update of a frozen head V*D*r.

Axes: `V` vocabulary, `D` hidden width (plus one for a bias), `N` positions, `r` rank of the LoRA updates, `S` rows of
a vocabulary sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .hidden_states import ModelParts

BLOCK = 4_000_000
"""Elements of W in one block of the vocabulary: 16 MB in float32, and products still run at full speed."""
PANEL = 128
"""Rows of a triangular panel: small enough that a diagonal block wastes little, large enough for fast products."""
FLOAT64_PRODUCTS = 4e11
"""A frozen head of up to so many products V*D*D has G formed in float64 on a CPU (seconds, once); beyond, in
float32."""
NOISE = 1e-5
"""Share of a diagonal entry below which a pivot of a float32 G may be rounding: G is then formed again in float64."""


@dataclass(frozen=True, eq=False)
class Head:
    """One reading of a model's head: references to its weights, no copies.

    >>> head = read_head(unwrap_model(model))
    >>> head.logits(states, 0, head.vocabulary)      # the logits that the model itself computes
    """

    weight: torch.Tensor
    """W, `(V, D)`."""
    bias: torch.Tensor | None
    """b, `(V,)`, the LoRA updates' own biases included."""
    down: torch.Tensor | None
    """A of all active LoRA updates one below the other, each times its scaling: `(r, D)`; the update is `up @ down`."""
    up: torch.Tensor | None
    """B of all active LoRA updates side by side: `(V, r)`."""
    multiplier: float
    """m, by which the model multiplies its logits."""
    cap: float | None
    """Soft cap c: the model's logits are `c * tanh(logits / c)`."""
    key: tuple[Any, ...]
    """Identity of the weights, in-place updates included where torch tracks them."""
    base_key: tuple[Any, ...]
    """The same of W and b alone."""
    trained: bool
    """Whether any part requires gradients: such weights change with every optimiser step, tracked or not."""
    base_trained: bool
    """Whether W or b do."""

    @property
    def vocabulary(self) -> int:
        return len(self.weight)

    @property
    def width(self) -> int:
        """D, plus one where there is a bias."""
        return self.weight.shape[1] + (self.bias is not None)

    @property
    def device(self) -> torch.device:
        """Where the mathematics run: the weights' device, or the CPU where that device has no float64."""
        return torch.device("cpu") if self.weight.device.type == "mps" else self.weight.device

    def inputs(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states `(N, D)` as the map's inputs: with a column of ones where there is a bias."""
        states = states.to(self.device)
        if self.bias is None:
            return states
        return torch.cat([states, states.new_ones(len(states), 1)], dim=1)

    def base(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows of [W b] without LoRA, `(stop - start, D)`."""
        rows = self.weight[start:stop].detach().to(self.device, dtype)
        if self.bias is None:
            return rows
        return torch.cat([rows, self.bias[start:stop, None].detach().to(self.device, dtype)], dim=1)

    def update(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up `(V, r)`, down `(r, D)`) with a zero column for the bias, or None without LoRA."""
        if self.up is None or self.down is None:
            return None
        down = self.down.detach().to(self.device, dtype)
        if self.bias is not None:
            down = torch.cat([down, down.new_zeros(len(down), 1)], dim=1)
        return self.up.detach().to(self.device, dtype), down

    def logits(self, inputs: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The model's logits of some vocabulary rows, float32 `(N, stop - start)`, from `inputs` as above."""
        inputs = inputs.to(torch.float32)
        logits = inputs @ self.base(start, stop).T
        if update := self.update(torch.float32):
            up, down = update
            logits += (inputs @ down.T) @ up[start:stop].T
        if self.multiplier != 1.0:
            logits *= self.multiplier
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, int]]:
        """The vocabulary in blocks of `rows` (default: about 16 MB of W each), as (start, stop)."""
        rows = rows or max(256, BLOCK // self.width)
        for start in range(0, self.vocabulary, rows):
            yield start, min(start + rows, self.vocabulary)

    def project(
        self, sketch: Callable[[int, int], torch.Tensor], base: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Γ [W b]` with and without the LoRA update, float64 `(S, D)` each; the second is `base` where that is given.

        The sketch is given by its columns: `sketch(start, stop)` is float64 `(S, stop - start)`.
        """
        precise = torch.float64 if exact_products(self, self.base_trained) else torch.float32
        update = self.update(precise)
        projected = torch.zeros(1, dtype=torch.float64, device=self.device)
        lora = torch.zeros(1, dtype=torch.float64, device=self.device)
        for start, stop in self.blocks():
            columns = sketch(start, stop).to(self.device, precise)
            if base is None:
                projected = projected + columns @ self.base(start, stop, precise)
            if update:
                lora = lora + columns @ update[0][start:stop]
        base = projected if base is None else base
        return (base + lora @ update[1].double() if update else base), base

    def agrees(self, states: torch.Tensor, logits: torch.Tensor | None) -> bool | None:
        """Whether this reading reproduces the model's own logits `(R, V)` at `states` `(R, D)`; None where that is
        unknown.

        Decided from at most 8 states that are finite and not zero. Logits that bf16 or fp16 can hold exactly were
        rounded to it, and may differ by 2 % of their norm; others by 0.1 %.
        """
        if logits is None or logits.shape[-1] < self.vocabulary:
            return None
        usable = (torch.isfinite(states).all(-1) & states.any(-1) & torch.isfinite(logits).all(-1)).nonzero()[:8, 0]
        if len(usable) == 0:
            return None
        expected = logits[usable, : self.vocabulary].to(self.device, torch.float32)
        computed = self.logits(self.inputs(states[usable]), 0, self.vocabulary)
        rounded = any(bool((expected == expected.to(low).float()).all()) for low in (torch.bfloat16, torch.float16))
        rounded |= states.dtype in (torch.bfloat16, torch.float16)
        distance = float((computed - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
        return distance <= (2e-2 if rounded else 1e-3)


# --- reading a model's head -----------------------------------------------------------------------------------------


def read_head(parts: ModelParts) -> Head | None:
    """The head as a linear map with multiplier and soft cap; None where its module is not a supported linear map.

    Supports plain linear layers, LoRA on them, and trained copies (`modules_to_save`). Multipliers come from the
    configuration: `logit_scale`, `output_multiplier`, `lm_head_multiplier`, `logits_scaling` (which divides, but
    multiplies in HyperCLOVA-X); the soft cap from `final_logit_softcapping` or `output_logit_soft_cap`.
    Raises `UserError` for a weight that is sharded over processes.
    """
    module = _active_copy(parts.head)
    adapters = _lora(module)
    linear = getattr(module, "base_layer", module) if adapters is not None else module
    weight = getattr(linear, "weight", None)
    if adapters is None or not isinstance(linear, nn.Linear) or weight is None or not weight.is_floating_point():
        return None
    if weight.ndim != 2 or weight.numel() == 0 or type(weight).__name__ == "DTensor":
        raise UserError(
            f"the LM head's weight is sharded over processes (shape {tuple(weight.shape)} here), and scoring needs all "
            "of it; exclude the head from the sharding"
        )
    bias: torch.Tensor | None = linear.bias
    for _, up, scale in adapters:
        if up.bias is not None:
            bias = up.bias * scale if bias is None else bias + up.bias * scale
    pieces = [weight, *([] if linear.bias is None else [linear.bias])]
    extra = [part for down, up, _ in adapters for layer in (down, up) for part in layer.parameters()]
    scales = tuple(scale for _, _, scale in adapters)
    merged = tuple(getattr(module, "merged_adapters", ()))  # merging changes W without its version counter
    return Head(
        weight=weight,
        bias=bias,
        down=torch.cat([down.weight.detach() * scale for down, _, scale in adapters]) if adapters else None,
        up=torch.cat([up.weight.detach() for _, up, _ in adapters], dim=1) if adapters else None,
        multiplier=_multiplier(parts.config),
        cap=_cap(parts.config),
        key=(*map(_identity, [*pieces, *extra]), scales, merged),
        base_key=(*map(_identity, pieces), merged),
        trained=any(part.requires_grad for part in [*pieces, *extra]),
        base_trained=any(part.requires_grad for part in pieces),
    )


def _active_copy(module: nn.Module) -> nn.Module:
    """Inside PEFT's `modules_to_save` wrapper: the trained copy in use, or the original when adapters are off."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    names = getattr(module, "active_adapters", None) or [getattr(module, "active_adapter", None)]
    active = [name for name in names if name in copies]
    if getattr(module, "disable_adapters", False) or not active:
        original: nn.Module = module.original_module  # type: ignore[assignment]
        return original
    return copies[active[0]]


def _lora(module: Any) -> list[tuple[nn.Linear, nn.Linear, float]] | None:
    """Active LoRA updates as (A, B, scaling); empty for a plain module; None for adapters of any other kind."""
    if not hasattr(module, "base_layer"):
        return []
    if not hasattr(module, "lora_A") or not hasattr(module, "lora_B"):
        return None
    if module.disable_adapters and module.merged:
        return None  # the next forward will remove the update from the weight
    if module.disable_adapters or module.merged:
        return []
    names = [name for name in module.active_adapters if name in module.lora_A]
    variants = getattr(module, "lora_variant", {})
    if any(name in variants for name in names) or any(getattr(module, "use_dora", {}).get(n) for n in names):
        return None
    return [(module.lora_A[n], module.lora_B[n], float(module.scaling[n])) for n in names]


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype, str(tensor.device))


def _multiplier(config: Any) -> float:
    factor = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor *= float(getattr(config, name, None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    multiplies = "hyperclovax" in str(getattr(config, "model_type", "")).replace("_", "").lower()
    return factor * scaling if multiplies else factor / scaling


def _cap(config: Any) -> float | None:
    for name in ("final_logit_softcapping", "output_logit_soft_cap"):
        if value := getattr(config, name, None):
            return float(value)
    return None


# --- G and its factor -----------------------------------------------------------------------------------------------


class Gram:
    """The lower triangle of a symmetric `(D, D)` matrix in float64 panels: half the memory of the square.

    `panels[b]` holds rows `start .. stop - 1` and columns `0 .. stop - 1` of `bounds[b]`.
    """

    def __init__(self, panels: list[torch.Tensor]) -> None:
        self.panels = panels
        self.width = panels[-1].shape[1]
        self.bounds = _bounds(self.width)

    @classmethod
    def of_head(cls, head: Head, dtype: torch.dtype) -> Gram:
        """`[W b]ᵀ [W b]` without LoRA: products in `dtype` over blocks of the vocabulary, sums in float64."""
        gram = cls([torch.zeros(e - s, e, dtype=torch.float64, device=head.device) for s, e in _bounds(head.width)])
        stripe = PANEL * math.ceil(head.width / 8 / PANEL)  # fewer, larger products than one per panel
        for low, high in head.blocks():
            rows = head.base(low, high, dtype)
            for left in range(0, head.width, stripe):
                product = rows[:, left : left + stripe].T @ rows[:, : left + stripe]
                for panel, (start, stop) in zip(gram.panels, gram.bounds, strict=True):
                    if left <= start < left + stripe:
                        panel += product[start - left : stop - left, :stop]
        return gram

    def updated(self, head: Head, dtype: torch.dtype) -> Gram:
        """G of the head with its LoRA update P = up @ down: `G + WᵀP + PᵀW + PᵀP`, in V*D*r products."""
        update = head.update(dtype)
        if update is None:
            return self
        up, down = update[0], update[1].double()
        cross = torch.zeros(head.width, len(down), dtype=torch.float64, device=head.device)  # Wᵀ up
        for low, high in head.blocks():
            cross += (head.base(low, high, dtype).T @ up[low:high]).double()
        half = cross + down.T @ (up.double().T @ up.double()) / 2
        return Gram(
            [
                panel + half[start:stop] @ down[:, :stop] + down[:, start:stop].T @ half[:stop].T
                for panel, (start, stop) in zip(self.panels, self.bounds, strict=True)
            ]
        )

    def cholesky(self) -> float:
        """Overwrite the panels with C, `G = C Cᵀ`; the smallest squared pivot as a share of its diagonal entry.

        0 where G is not positive definite to rounding; the panels are then undefined.
        """
        smallest = 1.0
        for index, (panel, (start, _)) in enumerate(zip(self.panels, self.bounds, strict=True)):
            diagonal = panel[:, start:].diagonal().clone()
            for above, (left, right) in zip(self.panels[:index], self.bounds, strict=False):
                rest = panel[:, left:right] - panel[:, :left] @ above[:, :left].T
                upper = above[:, left:right].T
                panel[:, left:right] = torch.linalg.solve_triangular(upper, rest, upper=True, left=False)
            rest = panel[:, start:] - panel[:, :start] @ panel[:, :start].T
            lower, info = torch.linalg.cholesky_ex(rest)
            share = float((lower.diagonal().square() / diagonal).min())
            if int(info) != 0 or not share > 0:
                return 0.0
            panel[:, start:] = lower
            smallest = min(smallest, share)
        return smallest

    def factor_singular(self) -> Gram:
        """C of a G that is singular (V < D, dependent rows): `eigh`, tiny negatives clamped, then QR to a triangle."""
        full = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.panels[0].device)
        for panel, (start, stop) in zip(self.panels, self.bounds, strict=True):
            full[start:stop, :stop] = panel
        values, vectors = torch.linalg.eigh(full)  # reads the lower triangle
        root = vectors * values.clamp_min(0).sqrt()  # G = root rootᵀ, and rootᵀ = Q R, so G = Rᵀ R
        lower = torch.linalg.qr(root.T, mode="r").R.T
        return Gram([lower[start:stop, :stop].clone() for start, stop in self.bounds])


class Factor:
    """C, lower triangular with `G = C Cᵀ`: `inputs @ C` has the singular values of the logits (before m).

    Kept in blocks of columns, in float64; a C of more than 32 MB in float32 (28 MB at D = 3584), which changes the
    logits by a part in 10^7 and keeps equal rows equal.
    """

    def __init__(self, gram: Gram) -> None:
        self.width = gram.width
        self.device = gram.panels[0].device
        dtype = torch.float64 if 4 * self.width**2 <= 32e6 else torch.float32
        self.columns = 4 * PANEL if dtype == torch.float64 else PANEL
        self.blocks = []
        for left in range(0, self.width, self.columns):
            below = gram.panels[left // PANEL :]
            block = torch.zeros(
                self.width - left, min(self.columns, self.width - left), dtype=dtype, device=self.device
            )
            row = 0
            for panel in below:
                piece = panel[:, left : left + block.shape[1]]
                block[row : row + len(piece), : piece.shape[1]] = piece
                row += len(piece)
            self.blocks.append(block)

    def images(self, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        """`inputs @ C` in float64, some columns at a time: `(..., N, D)` gives pieces `(..., N, <= columns)`."""
        inputs = inputs.double()
        for index, block in enumerate(self.blocks):
            yield inputs[..., index * self.columns :] @ block.double()


def factorise(head: Head, base: Gram | None = None) -> tuple[Factor, Gram | None]:
    """The head's factor C, and G of its frozen part where a LoRA update will need it again.

    G is formed in float64 where that is affordable (`exact_products`), else from float32 products; a float32 G whose
    pivots come near its rounding is formed again in float64, and a singular one goes through `eigh`.
    """
    first = torch.float64 if exact_products(head, head.base_trained) else torch.float32
    lora = head.up is not None
    for dtype in dict.fromkeys((first, torch.float64)):
        if base is None or dtype != first:
            base = Gram.of_head(head, dtype)
        gram = base.updated(head, dtype)
        if gram.cholesky() > (1e-12 if dtype == torch.float64 else NOISE):
            return Factor(gram), base if lora else None
    again = base if lora and base is not None else Gram.of_head(head, torch.float64)
    return Factor(again.updated(head, torch.float64).factor_singular()), base if lora else None


def exact_products(head: Head, trained: bool) -> bool:
    """Whether products over the whole vocabulary are affordable in float64 (see `FLOAT64_PRODUCTS`)."""
    products = head.vocabulary * head.width**2
    if trained:
        return products <= 1e9
    return head.device.type == "cuda" or products <= FLOAT64_PRODUCTS


def _bounds(width: int) -> list[tuple[int, int]]:
    """Panels of a triangle of `width` rows, as (start, stop)."""
    return [(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]
