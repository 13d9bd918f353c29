"""Nuclear and Frobenius norm of a row's logits, from hidden states alone (UDS, arXiv 2510.16882, section 3.1).

Higher = more useful and less repetitive. With G = C Cᵀ (siftune.models.head), `H Wᵀ` and `H C` have the same singular
values; they are the square roots of the eigenvalues of the Gram matrix of `H C`, formed in float64 on its smaller
side. A float32 Gram matrix loses 1e-3 on repeated tokens; this one stays below 1e-7.
Cost per row: N*D*D/2 + N*N*D products and an N^3 eigenproblem (D^3 where N > D); no N x V matrix is formed.

Axes: `N` positions of a row, `D` inputs of the head, `V` vocabulary, `P` probes, `S` Lanczos steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..models.head import Factor

FAST_TOLERANCE = 1e-4
"""Relative error that `precision="fast"` allows itself; rows that cannot show it are computed exactly."""


@dataclass(frozen=True)
class Norms:
    """Norms of one row's logits, before the head's multiplier."""

    nuclear: float
    frobenius: float
    error: float = 0.0
    """Relative standard error of `nuclear`: 0 where it is exact."""
    fell_back: bool = False
    """Whether the fast route could not show its accuracy and the exact one was taken."""


def norms(inputs: torch.Tensor, lengths: Sequence[int], factor: Factor, *, precision: str = "exact") -> list[Norms]:
    """Norms of `inputs @ [W b]ᵀ` row by row: `inputs` is `(R, N, D)`, zeros beyond each row's own length.

    `precision="exact"` is float64 throughout; `"fast"` is the polar iteration of `polar_trace`, with the exact route
    behind it. A row with NaN gives NaN and leaves the others alone.

    >>> factor, _ = factorise(head)
    >>> norms(head.inputs(states)[None], [len(states)], factor)[0].nuclear
    """
    grams = gram_of_rows(inputs, factor)
    return norms_of_grams(grams, [min(length, inputs.shape[2]) for length in lengths], precision=precision)


def gram_of_rows(inputs: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Gram matrices of `X = inputs @ C` on their smaller side, float64: `X Xᵀ` `(R, N, N)`, or `Xᵀ X` `(R, D, D)`."""
    rows, length, width = inputs.shape
    size = min(length, width)
    grams = torch.zeros(rows, size, size, dtype=torch.float64, device=inputs.device)
    if length <= width:
        for image in factor.images(inputs):
            grams.baddbmm_(image, image.mT)
        return grams
    for piece in inputs.split(512, dim=1):
        image = torch.cat(list(factor.images(piece)), dim=2)
        grams.baddbmm_(image.mT, image)
    return grams


def groups(lengths: Sequence[int], device: torch.device, *, tokens: int = 16_384) -> Iterator[list[int]]:
    """Which rows are computed together: on an accelerator rows of similar length (a quarter of padding at most, some
    `tokens` in all), elsewhere each row alone, which there is as fast and needs no padding."""
    if device.type == "cpu":
        yield from ([index] for index in range(len(lengths)))
        return
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = (len(group) + 1) * lengths[group[0]] > tokens if group else False
        if group and (full or lengths[index] < 0.75 * lengths[group[0]]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def gram_of_blocks(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Gram matrix `L Lᵀ` `(N, N)` of logits that come in blocks of the vocabulary `(N, <= V)`, float64.

    Only the panels on and below the diagonal are multiplied out: 5/8 of the products at N = 512.
    """
    gram: torch.Tensor | None = None
    for block in blocks:
        block = block.double()
        if gram is None:
            gram = torch.zeros(len(block), len(block), dtype=torch.float64, device=block.device)
        for start in range(0, len(block), 128):
            panel = gram[start : start + 128, : start + 128]
            panel.addmm_(block[start : start + 128], block[: start + 128].T)
    assert gram is not None, "a head without a vocabulary"
    return gram.tril() + gram.tril(-1).T


def norms_of_grams(grams: torch.Tensor, ranks: Sequence[int], *, precision: str = "exact") -> list[Norms]:
    """Norms of any matrices from their float64 Gram matrices `(R, N, N)`: `sum sqrt(eigenvalues)`, `sqrt(trace)`.

    `ranks` are the largest ranks possible: eigenvalues beyond them belong to the padding and are left out.
    """
    squares = grams.diagonal(dim1=1, dim2=2).sum(dim=1).tolist()
    results = [Norms(math.nan, math.nan) for _ in squares]
    open_rows = [row for row, square in enumerate(squares) if math.isfinite(square)]
    if precision == "fast" and open_rows:
        values = polar_traces(grams[open_rows])
        for row, value in zip(open_rows, values, strict=True):
            if value is not None:
                results[row] = Norms(value, math.sqrt(max(squares[row], 0.0)))
        open_rows = [row for row, value in zip(open_rows, values, strict=True) if value is None]
    if open_rows:
        roots = torch.linalg.eigvalsh(grams[open_rows]).clamp_min(0).sqrt()
        for row, root in zip(open_rows, roots, strict=True):
            nuclear = float(root[len(root) - ranks[row] :].sum())
            results[row] = Norms(nuclear, math.sqrt(max(squares[row], 0.0)), fell_back=precision == "fast")
    return results


# --- the fast route: matrix products only ---------------------------------------------------------------------------


def polar_traces(
    grams: torch.Tensor, *, smallest: float = 1e-8, dtype: torch.dtype = torch.float32
) -> list[float | None]:
    """`tr sqrt` of Gram matrices `(R, N, N)` by Newton-Schulz on a Cholesky factor; None for a row that cannot show
    `FAST_TOLERANCE`.

    With `gram + ridge = F Fᵀ` (float64), the polar factor U of F gives `tr(Uᵀ F)`, the nuclear norm. The iteration runs
    on F, not on the Gram matrix: directions far below the largest need not converge, since they weigh next to
    nothing, so a dominant direction does no harm. Each step `X <- X (3 - X Xᵀ)/2` is rescaled for the interval that
    the singular values are known to lie in, which multiplies the small ones by 2.6 instead of 1.5.
    Shown afterwards: U is no longer than 1, the value has stopped moving, `(Uᵀ F)² = Fᵀ F`, and the ridge's share.
    """
    size = grams.shape[1]
    ridge = 1e-14 * grams.diagonal(dim1=1, dim2=2).sum(dim=1)
    eye = torch.eye(size, dtype=grams.dtype, device=grams.device)
    lower, info = torch.linalg.cholesky_ex(grams + ridge[:, None, None] * eye)
    scale = grams.norm(dim=(1, 2)).sqrt() * (1 + 1e-6)  # at least the largest singular value
    factor = (lower / scale[:, None, None]).to(dtype)
    polar, low = factor, smallest
    while low < 0.999:
        mu = math.sqrt(3 / (1 + low + low * low))
        polar = polar * (1.5 * mu) - (polar @ polar.mT @ polar) * (0.5 * mu**3)
        low = mu * low * (3 - (mu * low) ** 2) / 2
    before = (polar * factor).sum(dim=(1, 2), dtype=torch.float64)
    polar = 1.5 * polar - 0.5 * (polar @ polar.mT @ polar)
    value = (polar * factor).sum(dim=(1, 2), dtype=torch.float64)
    root, square = polar.mT @ factor, factor.mT @ factor
    sound = (
        (info == 0)
        & ((value - before).abs() <= 0.2 * FAST_TOLERANCE * value)
        & ((root @ root - square).norm(dim=(1, 2)) <= 0.2 * FAST_TOLERANCE * square.norm(dim=(1, 2)))
        & (size * ridge.sqrt() <= 0.5 * FAST_TOLERANCE * value * scale)
        & ((polar @ polar.mT).norm(dim=(1, 2)) <= math.sqrt(size) * (1 + 1e-3))
    )
    found = zip(sound.tolist(), (value * scale).tolist(), strict=True)
    return [result if fine and math.isfinite(result) else None for fine, result in found]


# --- the long-row route: an estimate with its error ------------------------------------------------------------------


def lanczos_norms(inputs: torch.Tensor, factor: Factor, *, seed: int = 0, probes: int = 32, steps: int = 48) -> Norms:
    """Nuclear norm of a long row by stochastic Lanczos quadrature, with its relative standard error.

    `tr f(X Xᵀ)`, f = square root, in two parts: on the span Q of the P/2 strongest directions as the sum of `qᵀ f q`,
    and off it as the mean of `zᵀ f z` over random signs z with Q taken out (Hutch++, Meyer et al. 2021). Each form is
    found by Gauss quadrature on S Lanczos steps (Ubaru, Chen & Saad 2017). The error is the spread of the second part
    over the root of its probes. Cost: P*S products with X, no eigenproblem of its size. Deterministic: the signs come
    from `seed` and the row's length alone.
    """
    image = torch.cat(list(factor.images(inputs)), dim=1)
    square = float(image.square().sum())
    if not math.isfinite(square):
        return Norms(math.nan, math.nan)
    if image.shape[0] > image.shape[1]:
        image = image.T
    rows, half = image.shape[0], min(probes // 2, image.shape[0])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + inputs.shape[0])
    signs = (torch.randint(0, 2, (rows, probes), generator=generator).double() * 2 - 1).to(image.device)
    strong = torch.linalg.qr(image @ (image.T @ signs[:, :half])).Q
    rest = signs[:, half:] - strong @ (strong.T @ signs[:, half:])
    starts = torch.cat([strong, rest], dim=1)
    lengths = starts.norm(dim=0)
    diagonal, off = _lanczos(image, starts / lengths.clamp_min(1e-300), min(steps, rows))
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    forms = lengths.square() * (vectors[:, 0, :].square() * nodes.clamp_min(0).sqrt()).sum(dim=1)
    value = float(forms[:half].sum() + forms[half:].mean())
    error = float(forms[half:].std() / math.sqrt(len(forms) - half)) / value if value > 0 else 0.0
    return Norms(value, math.sqrt(square), error)


def _lanczos(image: torch.Tensor, start: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonals `(P, S)` and off-diagonals `(P, S - 1)` of P Lanczos runs on `X Xᵀ`, fully re-orthogonalised."""
    basis = [start]
    diagonal, off = [], []
    for step in range(steps):
        vector = image @ (image.T @ basis[-1])
        diagonal.append((basis[-1] * vector).sum(dim=0))
        for _ in range(2):
            for old in basis:
                vector = vector - old * (old * vector).sum(dim=0)
        length = vector.norm(dim=0)
        if step + 1 < steps:
            usable = length > 1e-12 * diagonal[0].abs().clamp_min(1e-300)
            off.append(torch.where(usable, length, 0.0))
            basis.append(torch.where(usable, vector / length.clamp_min(1e-300), 0.0))
    return torch.stack(diagonal, dim=1), torch.stack(off, dim=1) if off else start.new_zeros(start.shape[1], 0)
