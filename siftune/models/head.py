"""The LM head as a linear map, and its Gram matrix as a packed triangular factor (UDS, arXiv 2510.16882, without
logits).

    logits = cap(m * (H Wᵀ + 1 bᵀ))          W with every active LoRA update, b the bias, m the multiplier
    G = [W b]ᵀ [W b] = C Cᵀ                  C lower triangular, so ‖H Wᵀ‖ = ‖[H 1] C‖ in every unitary norm

Nothing of size N x V is formed for a linear head; a capped head gives its logits in blocks of the vocabulary.
Cost: G takes V*D*D/2 products once per version of the weights; a LoRA update of a frozen head V*D*r.

Axes: `V` vocabulary, `D` hidden width (plus one for a bias), `N` positions, `r` rank of the LoRA updates, `S` rows of
a vocabulary sketch, `R` checked positions. A block of an axis keeps its letter.
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

    def inputs(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Hidden states `(N, D)` as the map's inputs: with a column of ones where there is a bias."""
        states_ND = states_ND.to(self.device)
        if self.bias is None:
            return states_ND
        return torch.cat([states_ND, states_ND.new_ones(len(states_ND), 1)], dim=1)

    def base(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows of [W b] without LoRA, `(stop - start, D)`."""
        rows_VD = self.weight[start:stop].detach().to(self.device, dtype)
        if self.bias is None:
            return rows_VD
        return torch.cat([rows_VD, self.bias[start:stop, None].detach().to(self.device, dtype)], dim=1)

    def update(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up `(V, r)`, down `(r, D)`) with a zero column for the bias, or None without LoRA."""
        if self.up is None or self.down is None:
            return None
        down_rD = self.down.detach().to(self.device, dtype)
        if self.bias is not None:
            down_rD = torch.cat([down_rD, down_rD.new_zeros(len(down_rD), 1)], dim=1)
        return self.up.detach().to(self.device, dtype), down_rD

    def logits(self, inputs_ND: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The model's logits of some vocabulary rows, float32 `(N, stop - start)`, from `inputs_ND` as above."""
        inputs_ND = inputs_ND.to(torch.float32)
        logits_NV = inputs_ND @ self.base(start, stop).T
        if update := self.update(torch.float32):
            up_Vr, down_rD = update
            logits_NV += (inputs_ND @ down_rD.T) @ up_Vr[start:stop].T
        if self.multiplier != 1.0:
            logits_NV *= self.multiplier
        if self.cap is not None:
            logits_NV = logits_NV.div_(self.cap).tanh_().mul_(self.cap)
        return logits_NV

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, int]]:
        """The vocabulary in blocks of `rows` (default: about 16 MB of W each), as (start, stop)."""
        rows = rows or max(256, BLOCK // self.width)
        for start in range(0, self.vocabulary, rows):
            yield start, min(start + rows, self.vocabulary)

    def project(
        self, sketch: Callable[[int, int], torch.Tensor], base_SD: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Γ [W b]` with and without the LoRA update, float64 `(S, D)` each; the second is `base_SD` where that is
        given.

        The sketch is given by its columns: `sketch(start, stop)` is float64 `(S, stop - start)`.
        """
        precise = torch.float64 if exact_products(self, self.base_trained) else torch.float32
        update = self.update(precise)
        projected_SD = torch.zeros(1, dtype=torch.float64, device=self.device)
        lora_Sr = torch.zeros(1, dtype=torch.float64, device=self.device)
        for start, stop in self.blocks():
            columns_SV = sketch(start, stop).to(self.device, precise)
            if base_SD is None:
                projected_SD = projected_SD + columns_SV @ self.base(start, stop, precise)
            if update:
                lora_Sr = lora_Sr + columns_SV @ update[0][start:stop]
        base_SD = projected_SD if base_SD is None else base_SD
        return (base_SD + lora_Sr @ update[1].double() if update else base_SD), base_SD

    def agrees(self, states_RD: torch.Tensor, logits_RV: torch.Tensor | None) -> bool | None:
        """Whether this reading reproduces the model's own logits `(R, V)` at `states_RD` `(R, D)`; None where that is
        unknown.

        Decided from at most 8 states that are finite and not zero. Logits that bf16 or fp16 can hold exactly were
        rounded to it, and may differ by 2 % of their norm; others by 0.1 %.
        """
        if logits_RV is None or logits_RV.shape[-1] < self.vocabulary:
            return None
        usable = (torch.isfinite(states_RD).all(-1) & states_RD.any(-1) & torch.isfinite(logits_RV).all(-1)).nonzero()[
            :8, 0
        ]
        if len(usable) == 0:
            return None
        expected_RV = logits_RV[usable, : self.vocabulary].to(self.device, torch.float32)
        computed_RV = self.logits(self.inputs(states_RD[usable]), 0, self.vocabulary)
        rounded = any(
            bool((expected_RV == expected_RV.to(low).float()).all()) for low in (torch.bfloat16, torch.float16)
        )
        rounded |= states_RD.dtype in (torch.bfloat16, torch.float16)
        distance = float(
            (computed_RV - expected_RV).norm() / expected_RV.norm().clamp_min(torch.finfo(torch.float32).tiny)
        )
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
            rows_VD = head.base(low, high, dtype)
            for left in range(0, head.width, stripe):
                product_DD = rows_VD[:, left : left + stripe].T @ rows_VD[:, : left + stripe]
                for panel, (start, stop) in zip(gram.panels, gram.bounds, strict=True):
                    if left <= start < left + stripe:
                        panel += product_DD[start - left : stop - left, :stop]
        return gram

    def updated(self, head: Head, dtype: torch.dtype) -> Gram:
        """G of the head with its LoRA update P = up @ down: `G + WᵀP + PᵀW + PᵀP`, in V*D*r products."""
        update = head.update(dtype)
        if update is None:
            return self
        up_Vr, down_rD = update[0], update[1].double()
        cross_Dr = torch.zeros(head.width, len(down_rD), dtype=torch.float64, device=head.device)  # Wᵀ up
        for low, high in head.blocks():
            cross_Dr += (head.base(low, high, dtype).T @ up_Vr[low:high]).double()
        half_Dr = cross_Dr + down_rD.T @ (up_Vr.double().T @ up_Vr.double()) / 2
        return Gram(
            [
                panel + half_Dr[start:stop] @ down_rD[:, :stop] + down_rD[:, start:stop].T @ half_Dr[:stop].T
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
                remainder = panel[:, left:right] - panel[:, :left] @ above[:, :left].T
                upper = above[:, left:right].T
                panel[:, left:right] = torch.linalg.solve_triangular(upper, remainder, upper=True, left=False)
            remainder = panel[:, start:] - panel[:, :start] @ panel[:, :start].T
            lower, info = torch.linalg.cholesky_ex(remainder)
            share = float((lower.diagonal().square() / diagonal).min())
            if int(info) != 0 or not share > 0:
                return 0.0
            panel[:, start:] = lower
            smallest = min(smallest, share)
        return smallest

    def factor_singular(self) -> Gram:
        """C of a G that is singular (V < D, dependent rows): `eigh`, tiny negatives clamped, then QR to a triangle."""
        full_DD = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.panels[0].device)
        for panel, (start, stop) in zip(self.panels, self.bounds, strict=True):
            full_DD[start:stop, :stop] = panel
        values, vectors_DD = torch.linalg.eigh(full_DD)  # reads the lower triangle
        root_DD = vectors_DD * values.clamp_min(0).sqrt()  # G = root rootᵀ, and rootᵀ = Q R, so G = Rᵀ R
        lower_DD = torch.linalg.qr(root_DD.T, mode="r").R.T
        return Gram([lower_DD[start:stop, :stop].clone() for start, stop in self.bounds])


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

    def images(self, inputs_ND: torch.Tensor) -> Iterator[torch.Tensor]:
        """`inputs @ C` in float64, some columns at a time: `(..., N, D)` gives pieces `(..., N, <= columns)`."""
        inputs_ND = inputs_ND.double()
        for index, block in enumerate(self.blocks):
            yield inputs_ND[..., index * self.columns :] @ block.double()


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
    float64_gram = base if lora and base is not None else Gram.of_head(head, torch.float64)
    return Factor(float64_gram.updated(head, torch.float64).factor_singular()), base if lora else None


def exact_products(head: Head, trained: bool) -> bool:
    """Whether products over the whole vocabulary are affordable in float64 (see `FLOAT64_PRODUCTS`)."""
    products = head.vocabulary * head.width**2
    if trained:
        return products <= 1e9
    return head.device.type == "cuda" or products <= FLOAT64_PRODUCTS


def _bounds(width: int) -> list[tuple[int, int]]:
    """Panels of a triangle of `width` rows, as (start, stop)."""
    return [(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]
