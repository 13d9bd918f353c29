"""Nuclear and Frobenius norm of a row's logits, from hidden states alone (UDS, arXiv 2510.16882, section 3.1).

Higher = more useful and less repetitive. With G = C Cᵀ (siftune.models.head), `H Wᵀ` and `H C` have the same singular
values; they are the square roots of the eigenvalues of the Gram matrix of `H C`, formed in float64 on its smaller
side. A float32 Gram matrix loses 1e-3 on repeated tokens; this one stays below 1e-7.
Cost per row: N*D*D/2 + N*N*D products and an N^3 eigenproblem (D^3 where N > D), or some 50 products of N^3 by the
polar iteration; no N x V matrix is formed.

Axes: `R` rows, `N` positions of a row, `D` inputs of the head, `K` the smaller of the two and `L` the larger, `V`
vocabulary, `P` probes, `S` Lanczos steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ..models.grouping import consecutive_groups
from ..models.head import Factor

FAST_TOLERANCE = 1e-4
"""Relative error that `precision="fast"` allows itself; rows that cannot show it are computed exactly."""
EXACT_TOLERANCE = 1e-7
"""Relative error of the exact polar route; rows that cannot show it are computed by eigenvalues."""
RIDGE = 1e-15
"""Share of the trace that the exact polar route adds to the diagonal: a few roundings, so that Cholesky succeeds."""
GROUP_ELEMENTS = 2**23
"""Elements of the Gram matrices of one group at most (64 MB in float64), unless one row has more."""

NormRoute = Literal["eigenvalues", "polar", "fast"]
"""`eigenvalues` and `polar` are exact, `fast` is to `FAST_TOLERANCE`."""


@dataclass(frozen=True)
class Norms:
    """Norms of one row's logits, before the head's multiplier."""

    nuclear: float
    frobenius: float
    error: float = 0.0
    """Relative standard error of `nuclear`: 0 where it is exact."""
    fell_back: bool = False
    """Whether a polar iteration could not show its accuracy and eigenvalues were taken."""


class DeviceNorms(NamedTuple):
    """Norms of R rows where they were computed; the caller reads them, after launching further work."""

    nuclear: torch.Tensor
    """Float64 `(R,)`, NaN for a row that is not finite."""
    square: torch.Tensor
    """Square of the Frobenius norm, float64 `(R,)`; the host takes its root, which is correctly rounded there."""
    verified: torch.Tensor
    """Bool `(R,)`: false where a polar iteration could not show its accuracy; that row needs `eigenvalues`."""


def norms(
    inputs_RND: torch.Tensor, lengths: Sequence[int], factor: Factor, *, route: NormRoute = "eigenvalues"
) -> list[Norms]:
    """Norms of `inputs @ [W b]ᵀ` row by row: `inputs_RND` is `(R, N, D)`, zeros beyond each row's own length.

    A polar iteration (`route="polar"` or `"fast"`) falls back to eigenvalues for rows that cannot show its tolerance.
    A row with NaN gives NaN and leaves the others alone.

    >>> factor, _ = factorise(head)
    >>> norms(head.inputs(states)[None], [len(states)], factor)[0].nuclear
    """
    return norms_of_grams(gram_of_rows(inputs_RND, factor), ranks(lengths, factor), route=route)


def ranks(lengths: Sequence[int], factor: Factor) -> list[int]:
    """Largest ranks possible of rows of these lengths."""
    return [min(length, factor.width) for length in lengths]


def gram_of_rows(inputs_RND: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Gram matrices of `X = inputs @ C` on their smaller side, float64: `X Xᵀ` `(R, N, N)`, or `Xᵀ X` `(R, D, D)`."""
    rows, length, width = inputs_RND.shape
    size = min(length, width)
    grams_RKK = torch.zeros(rows, size, size, dtype=torch.float64, device=inputs_RND.device)
    if length <= width:
        for image_RND in factor.images(inputs_RND):
            grams_RKK.baddbmm_(image_RND, image_RND.mT)
        return grams_RKK
    for piece_RND in inputs_RND.split(512, dim=1):
        image_RND = torch.cat(list(factor.images(piece_RND)), dim=2)
        grams_RKK.baddbmm_(image_RND.mT, image_RND)
    return grams_RKK


def groups(
    lengths: Sequence[int], device: torch.device, *, width: int | None = None, tokens: int = 16_384
) -> Iterator[list[int]]:
    """Which rows are computed together: on an accelerator rows of similar length (a quarter of padding at most, some
    `tokens` in all), elsewhere each row alone, which there is as fast and needs no padding.

    Rows longer than `width` are not mixed with others: their Gram matrices are of the other side.
    """
    if not is_accelerator(device):
        yield from ([index] for index in range(len(lengths)))
        return
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    yield from consecutive_groups(
        order,
        lambda group, row: _fits_group(len(group) + 1, lengths[group[0]], lengths[row], width, tokens),
    )


def is_accelerator(device: torch.device) -> bool:
    """Whether rows are better computed in batches there than one by one."""
    return device.type != "cpu"


def _fits_group(count: int, longest: int, length: int, width: int | None, tokens: int) -> bool:
    """Whether a row of this length may join a group, making it `count` rows."""
    side = longest if width is None else min(longest, width)
    same_side = width is None or (longest <= width) == (length <= width)
    within_limits = count * longest <= tokens and count * side * side <= GROUP_ELEMENTS
    return within_limits and same_side and length >= 0.75 * longest


def gram_of_blocks(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Gram matrix `L Lᵀ` `(N, N)` of logits that come in blocks of the vocabulary `(N, <= V)`, float64.

    Only the panels on and below the diagonal are multiplied out: 5/8 of the products at N = 512.
    """
    gram_NN: torch.Tensor | None = None
    for block_NV in blocks:
        block_NV = block_NV.double()
        if gram_NN is None:
            gram_NN = torch.zeros(len(block_NV), len(block_NV), dtype=torch.float64, device=block_NV.device)
        add_gram(gram_NN, block_NV)
    assert gram_NN is not None, "a head without a vocabulary"
    return symmetric(gram_NN)


def add_gram(gram_NN: torch.Tensor, block_NV: torch.Tensor) -> None:
    """Add `block @ blockᵀ` to the panels on and below the diagonal, in place; `symmetric` completes the sum."""
    for start in range(0, len(block_NV), 128):
        panel = gram_NN[start : start + 128, : start + 128]
        panel.addmm_(block_NV[start : start + 128], block_NV[: start + 128].T)


def symmetric(lower_NN: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix with this lower triangle."""
    return lower_NN.tril() + lower_NN.tril(-1).T


def norms_of_grams(grams_RKK: torch.Tensor, ranks: Sequence[int], *, route: NormRoute = "eigenvalues") -> list[Norms]:
    """Norms of any matrices from their float64 Gram matrices `(R, K, K)`, read by the host.

    `ranks` are the largest ranks possible: eigenvalues beyond them belong to the padding and are left out.
    """
    attempt = device_norms(grams_RKK, ranks, route)
    nuclear, squares, verified = attempt.nuclear.tolist(), attempt.square.tolist(), attempt.verified.tolist()
    unverified_rows = [row for row, row_verified in enumerate(verified) if not row_verified]
    if unverified_rows:
        exact_values = device_norms(
            grams_RKK[unverified_rows], [ranks[row] for row in unverified_rows], "eigenvalues"
        ).nuclear.tolist()
        for row, value in zip(unverified_rows, exact_values, strict=True):
            nuclear[row] = value
    return [
        Norms(value, math.sqrt(square), fell_back=not row_verified)
        for value, square, row_verified in zip(nuclear, squares, verified, strict=True)
    ]


def device_norms(grams_RKK: torch.Tensor, ranks: Sequence[int], route: NormRoute) -> DeviceNorms:
    """As `norms_of_grams`, left on the device and without a second attempt: `sum sqrt(eigenvalues)` and the trace."""
    squares = grams_RKK.diagonal(dim1=1, dim2=2).sum(dim=1)
    finite = torch.isfinite(squares)
    grams_RKK = torch.where(finite[:, None, None], grams_RKK, 0.0)  # eigvalsh would raise for every row of the batch
    if route == "eigenvalues":
        nuclear, verified = eigenvalue_traces(grams_RKK, ranks), torch.ones_like(finite)
    elif route == "polar":
        nuclear, verified = exact_polar_traces(grams_RKK)
    else:
        nuclear, verified = polar_traces(grams_RKK)
    squares = torch.where(finite, squares.clamp_min(0), torch.nan)
    return DeviceNorms(torch.where(finite, nuclear, torch.nan), squares, verified | ~finite)


def eigenvalue_traces(grams_RKK: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """`tr sqrt` of Gram matrices `(R, K, K)` from the largest `ranks` eigenvalues of each, float64 `(R,)`."""
    roots_RK = torch.linalg.eigvalsh(grams_RKK).clamp_min(0).sqrt()
    return torch.stack([root[len(root) - rank :].sum() for root, rank in zip(roots_RK, ranks, strict=True)])


# --- polar iterations: matrix products only -------------------------------------------------------------------------


def exact_polar_traces(grams_RKK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`tr sqrt` of Gram matrices `(R, K, K)` in float64 and whether each shows `EXACT_TOLERANCE`: `(R,)`, bool `(R,)`.

    As `polar_traces`, from a Cholesky factor F of the Gram matrix plus a ridge r. Positions whose diagonal is zero
    (padding, rows of zeros) are decoupled: a diagonal entry of their own keeps F regular and is left out of the sum.
    Shown afterwards: U is orthogonal and `Uᵀ F` symmetric, so that it is the polar factor; and `r tr(F⁻¹ U) = r Σ 1/σ`,
    which the ridge adds at most, is small. Rows whose states repeat exactly cannot show the latter.
    """
    size = grams_RKK.shape[1]
    diagonal_RK = grams_RKK.diagonal(dim1=1, dim2=2)
    live_RK, trace = diagonal_RK > 0, diagonal_RK.sum(dim=1)
    ridge = RIDGE * trace
    shift_RK = torch.where(live_RK, ridge[:, None], trace[:, None] / size)
    shifted_RKK = grams_RKK + torch.diag_embed(shift_RK)
    lower_RKK, info = torch.linalg.cholesky_ex(shifted_RKK)
    scale = shifted_RKK.norm(dim=(1, 2)).sqrt() * (1 + 1e-6)  # at least the largest singular value
    factor_RKK = lower_RKK / scale[:, None, None]
    polar_RKK = _polar_factor(factor_RKK, 1e-8)
    for _ in range(2):  # 1e-3 from orthogonal, then 2e-6, then 3e-12
        polar_RKK = 1.5 * polar_RKK - 0.5 * (polar_RKK @ polar_RKK.mT @ polar_RKK)
    value = (polar_RKK * factor_RKK).sum(dim=2).where(live_RK, 0.0).sum(dim=1)
    root_RKK = polar_RKK.mT @ factor_RKK
    eye_KK = torch.eye(size, dtype=grams_RKK.dtype, device=grams_RKK.device)
    inverses_RK = torch.linalg.solve_triangular(factor_RKK, polar_RKK, upper=False).diagonal(dim1=1, dim2=2)
    added = ridge / scale.square() * inverses_RK.where(live_RK, 0.0).sum(dim=1)
    verified = (
        (info == 0)
        & torch.isfinite(value)
        & ((polar_RKK @ polar_RKK.mT - eye_KK).norm(dim=(1, 2)) <= 0.1 * EXACT_TOLERANCE)
        & ((root_RKK - root_RKK.mT).norm(dim=(1, 2)) <= 0.01 * EXACT_TOLERANCE * root_RKK.norm(dim=(1, 2)))
        & (added.abs() <= 0.5 * EXACT_TOLERANCE * value)
    )
    return value * scale, verified


def polar_traces(
    grams_RKK: torch.Tensor, *, smallest: float = 1e-8, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tr sqrt` of Gram matrices `(R, K, K)` by Newton-Schulz on a Cholesky factor, float64 `(R,)`, and whether each
    shows `FAST_TOLERANCE`, bool `(R,)`.

    With `gram + ridge = F Fᵀ` (float64), the polar factor U of F gives `tr(Uᵀ F)`, the nuclear norm. The iteration runs
    on F, not on the Gram matrix: directions far below the largest need not converge, since they weigh next to
    nothing, so a dominant direction does no harm.
    Shown afterwards: U is no longer than 1, the value has stopped moving, `(Uᵀ F)² = Fᵀ F`, and the ridge's share.
    """
    size = grams_RKK.shape[1]
    ridge = 1e-14 * grams_RKK.diagonal(dim1=1, dim2=2).sum(dim=1)
    eye_KK = torch.eye(size, dtype=grams_RKK.dtype, device=grams_RKK.device)
    lower_RKK, info = torch.linalg.cholesky_ex(grams_RKK + ridge[:, None, None] * eye_KK)
    scale = grams_RKK.norm(dim=(1, 2)).sqrt() * (1 + 1e-6)  # at least the largest singular value
    factor_RKK = (lower_RKK / scale[:, None, None]).to(dtype)
    polar_RKK = _polar_factor(factor_RKK, smallest)
    before = (polar_RKK * factor_RKK).sum(dim=(1, 2), dtype=torch.float64)
    polar_RKK = 1.5 * polar_RKK - 0.5 * (polar_RKK @ polar_RKK.mT @ polar_RKK)
    value = (polar_RKK * factor_RKK).sum(dim=(1, 2), dtype=torch.float64)
    root_RKK, square_RKK = polar_RKK.mT @ factor_RKK, factor_RKK.mT @ factor_RKK
    verified = (
        (info == 0)
        & torch.isfinite(value * scale)
        & ((value - before).abs() <= 0.2 * FAST_TOLERANCE * value)
        & ((root_RKK @ root_RKK - square_RKK).norm(dim=(1, 2)) <= 0.2 * FAST_TOLERANCE * square_RKK.norm(dim=(1, 2)))
        & (size * ridge.sqrt() <= 0.5 * FAST_TOLERANCE * value * scale)
        & ((polar_RKK @ polar_RKK.mT).norm(dim=(1, 2)) <= math.sqrt(size) * (1 + 1e-3))
    )
    return value * scale, verified


def _polar_factor(factor_RKK: torch.Tensor, smallest: float) -> torch.Tensor:
    """Polar factor of matrices `(R, K, K)` with singular values in `[smallest, 1]`, to a last Newton-Schulz step.

    Each step `X <- X (3 - X Xᵀ)/2` is rescaled for the interval that the singular values are known to lie in, which
    multiplies the small ones by 2.6 instead of 1.5.
    """
    polar_RKK, low = factor_RKK, smallest
    while low < 0.999:
        mu = math.sqrt(3 / (1 + low + low * low))
        polar_RKK = polar_RKK * (1.5 * mu) - (polar_RKK @ polar_RKK.mT @ polar_RKK) * (0.5 * mu**3)
        low = mu * low * (3 - (mu * low) ** 2) / 2
    return polar_RKK


# --- the long-row route: an estimate with its error ------------------------------------------------------------------


def lanczos_norms(
    inputs_ND: torch.Tensor, factor: Factor, *, seed: int = 0, probes: int = 32, steps: int = 48
) -> Norms:
    """Nuclear norm of a long row by stochastic Lanczos quadrature, with its relative standard error.

    `tr f(X Xᵀ)`, f = square root, in two parts: on the span Q of the P/2 strongest directions as the sum of `qᵀ f q`,
    and off it as the mean of `zᵀ f z` over random signs z with Q taken out (Hutch++, Meyer et al. 2021). Each form is
    found by Gauss quadrature on S Lanczos steps (Ubaru, Chen & Saad 2017). The error is the spread of the second part
    over the root of its probes. Cost: P*S products with X, no eigenproblem of its size. Deterministic: the signs come
    from `seed` and the row's length alone.
    """
    image_ND = torch.cat(list(factor.images(inputs_ND)), dim=1)
    square = float(image_ND.square().sum())
    if not math.isfinite(square):
        return Norms(math.nan, math.nan)
    image_KL = image_ND.T if image_ND.shape[0] > image_ND.shape[1] else image_ND
    rows, half = image_KL.shape[0], min(probes // 2, image_KL.shape[0])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + inputs_ND.shape[0])
    signs_KP = (torch.randint(0, 2, (rows, probes), generator=generator).double() * 2 - 1).to(image_KL.device)
    strong_KP = torch.linalg.qr(image_KL @ (image_KL.T @ signs_KP[:, :half])).Q
    rest_KP = signs_KP[:, half:] - strong_KP @ (strong_KP.T @ signs_KP[:, half:])
    starts_KP = torch.cat([strong_KP, rest_KP], dim=1)
    lengths = starts_KP.norm(dim=0)
    diagonal_PS, off_PS = _lanczos(image_KL, starts_KP / lengths.clamp_min(1e-300), min(steps, rows))
    tridiagonal_PSS = torch.diag_embed(diagonal_PS) + torch.diag_embed(off_PS, 1) + torch.diag_embed(off_PS, -1)
    nodes_PS, vectors_PSS = torch.linalg.eigh(tridiagonal_PSS)
    forms = lengths.square() * (vectors_PSS[:, 0, :].square() * nodes_PS.clamp_min(0).sqrt()).sum(dim=1)
    value = float(forms[:half].sum() + forms[half:].mean())
    error = float(forms[half:].std() / math.sqrt(len(forms) - half)) / value if value > 0 else 0.0
    return Norms(value, math.sqrt(square), error)


def _lanczos(image_KL: torch.Tensor, start_KP: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonals `(P, S)` and off-diagonals `(P, S - 1)` of P Lanczos runs on `X Xᵀ`, fully re-orthogonalised."""
    basis = [start_KP]
    diagonal, off = [], []
    for step in range(steps):
        vector_KP = image_KL @ (image_KL.T @ basis[-1])
        diagonal.append((basis[-1] * vector_KP).sum(dim=0))
        for _ in range(2):
            for previous_KP in basis:
                vector_KP = vector_KP - previous_KP * (previous_KP * vector_KP).sum(dim=0)
        length = vector_KP.norm(dim=0)
        if step + 1 < steps:
            usable = length > 1e-12 * diagonal[0].abs().clamp_min(1e-300)
            off.append(torch.where(usable, length, 0.0))
            basis.append(torch.where(usable, vector_KP / length.clamp_min(1e-300), 0.0))
    return torch.stack(diagonal, dim=1), torch.stack(off, dim=1) if off else start_KP.new_zeros(start_KP.shape[1], 0)
