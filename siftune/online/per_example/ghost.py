"""Inner products of per-row gradients from their factors, without forming the gradients ("ghost" products).

    gradient of a weight for row i   g_i = Σ_t l_it r_itᵀ               l, r: what went in, what came back
    inner product                    ⟨g_i, g_j⟩ = Σ_tt' ⟨l_it, l_jt'⟩ ⟨r_it, r_jt'⟩
    with a formed gradient G         ⟨g_i, G⟩ = Σ_t l_itᵀ G r_it

A weight that is used in several places (tied embeddings, shared layers) has one such sum per place, and the cross terms
between places count. An embedding's l are one-hot and kept as ids. Vectors (biases, norm weights) are formed per row.
A weight's gradients are formed where that is cheaper: T·I·O against T²(I + O), the latter in float64.
Cost per row and weight: the smaller of the two. Source: GREATS (NeurIPS 2024); for norms already
Goodfellow, arXiv 1510.01799.

Axes: `R`, `S` rows of a group, `T` tokens, `I` x `O` the weight, `P` numbers of a formed gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

AT_ONCE = 16_000_000
"""Numbers of one intermediate product: 128 MB in float64. Rows beyond it are walked in slices."""
COLUMNS = 2**17
"""Numbers of a formed gradient that are multiplied in float32 before their sum is added up in float64."""
NORM = 2.0
"""Gradients whose norms are wanted are formed up to this many times the size of their factors: sums over T² cancel and
run in float64, at twice the cost, while a formed gradient is as exact in float32 as any explicit one."""
PAIRS = 4.0
"""The same for gradients that meet many others: forming is paid once, a product of factors every time."""


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a weight by R rows: row i's gradient is `Σ_t left_it right_itᵀ`."""

    left: torch.Tensor | None
    """`(R, T, I)`; or ids `(R, T)` of one-hot rows; or None where `right` holds the gradients themselves."""
    right: torch.Tensor
    """`(R, T, O)`; or formed gradients `(R, 1, P)`."""
    height: int = 1
    """I, the weight's first axis."""

    def __len__(self) -> int:
        return len(self.right)

    @property
    def bytes(self) -> int:
        """Memory held."""
        tensors = [self.right] if self.left is None else [self.left, self.right]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def part(self, rows: slice) -> Use:
        """Some of the rows."""
        return Use(None if self.left is None else self.left[rows], self.right[rows], self.height)


Uses = Sequence[Use]


def compact(uses: Uses, larger: float = NORM) -> list[Use]:
    """The same gradients in the cheaper form. Where one use is formed already, all become one, formed.

    `larger` is how many times the factors' size formed gradients may have.
    """
    if any(use.left is None for use in uses):
        return [form(uses)]
    tokens = sum(use.right.shape[1] for use in uses)
    height, width = uses[0].height, uses[0].right.shape[2]
    if height * width <= larger * tokens * (height + width):
        return [form(uses)]
    return list(uses)


def form(uses: Uses) -> Use:
    """All uses of one weight as formed gradients `(R, 1, P)`."""
    total: torch.Tensor | None = None
    for use in uses:
        piece = _formed(use)
        total = piece if total is None else total + piece
    assert total is not None, "a weight without a use"
    return Use(None, total[:, None])


def _formed(use: Use) -> torch.Tensor:
    """`(R, P)` in float32 (float64 of float64)."""
    if use.left is None:
        return use.right[:, 0]
    kept = torch.float64 if use.right.dtype == torch.float64 else torch.float32
    rows, _, width = use.right.shape
    made: list[torch.Tensor] = []
    for part in _slices(use, use.height * width):
        right = part.right.to(kept)
        if part.left is None or part.left.ndim == 3:
            assert part.left is not None
            gradient = part.left.to(kept).mT @ right
        else:
            offsets = torch.arange(len(part), device=right.device)[:, None] * use.height
            gradient = right.new_zeros(len(part) * use.height, width)
            gradient.index_add_(0, (part.left + offsets).flatten(), right.flatten(0, 1))
        made.append(gradient.reshape(len(part), -1))
    if len(made) == 1:
        return made[0]
    return torch.cat(made) if rows else use.right.new_zeros(0, use.height * width, dtype=kept)


def squares(uses: Uses) -> torch.Tensor:
    """Squared norms of one weight's gradients, float64 `(R,)` on the CPU."""
    uses = compact(uses)
    if uses[0].left is None:
        formed = uses[0].right[:, 0]
        summed = torch.zeros(len(formed), dtype=_work(formed[:0]).dtype, device=formed.device)
        for columns in _columns(formed):
            summed += torch.linalg.vector_norm(formed[:, columns], dim=1).to(summed.dtype).square()
        return summed.double().cpu()
    total = torch.zeros(len(uses[0]), dtype=torch.float64)
    for first, ours in enumerate(uses):
        for second in range(first, len(uses)):
            total += (1 if second == first else 2) * _matched(ours, uses[second])
    return total


def inner(ours: Uses, theirs: Uses) -> torch.Tensor:
    """Inner products of one weight's gradients, float64 `(R, S)` on the CPU.

    >>> inner([Use(a, b)], [Use(a, b)]).diagonal()      # = squares([Use(a, b)])
    """
    if any(use.left is None for use in (*ours, *theirs)):  # one side formed: the other has to be
        return _dots(form(ours).right[:, 0], form(theirs).right[:, 0])
    rows, others = len(ours[0]), len(theirs[0])
    total = torch.zeros(rows, others, dtype=torch.float64)
    for row in range(rows):
        for mine in ours:
            for use in theirs:
                repeated = mine.part(slice(row, row + 1))
                start = 0
                for part in _slices(use, use.right.shape[1] * _row_numbers(use)):
                    total[row, start : start + len(part)] += _matched(_repeat(repeated, len(part)), part)
                    start += len(part)
    return total


def against(uses: Uses, gradient_IO: torch.Tensor) -> torch.Tensor:
    """Inner products of one weight's gradients with one formed gradient, float64 `(R,)` on the CPU."""
    total = torch.zeros(len(uses[0]), dtype=torch.float64)
    for use in uses:
        if use.left is None:
            total += _dots(use.right[:, 0], gradient_IO.reshape(1, -1))[:, 0]
            continue
        found: list[torch.Tensor] = []
        gradient = _work(gradient_IO)
        for part in _slices(use, use.right.shape[1] * _row_numbers(use)):
            assert part.left is not None
            through = part.left.to(gradient.dtype) @ gradient if part.left.ndim == 3 else gradient[part.left]
            found.append((through * part.right.to(gradient.dtype)).sum(dim=(1, 2)).double().cpu())
        total += torch.cat(found) if found else 0.0
    return total


def _dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`(R, P)` and `(S, P)` -> float64 `(R, S)` on the CPU. In slices: a cast to float64 would cost more than the products."""
    dtype = torch.float64 if one.dtype == other.dtype == torch.float64 else torch.float32
    total = torch.zeros(len(one), len(other), dtype=_work(one[:0]).dtype, device=one.device)
    for columns in _columns(one):
        total += one[:, columns].to(dtype) @ other[:, columns].to(dtype).mT
    return total.double().cpu()


def _columns(formed: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + COLUMNS) for start in range(0, formed.shape[1], COLUMNS))


def _repeat(use: Use, rows: int) -> Use:
    assert use.left is not None
    left = use.left.expand(rows, *use.left.shape[1:])
    return Use(left, use.right.expand(rows, *use.right.shape[1:]), use.height)


def _matched(ours: Use, theirs: Use) -> torch.Tensor:
    """`⟨g_i, h_i⟩` of two uses by the same rows, float64 `(R,)` on the CPU."""
    cost = max(
        ours.right.shape[1] * theirs.right.shape[1], _row_numbers(ours) * ours.right.shape[1], _row_numbers(theirs)
    )
    found: list[torch.Tensor] = []
    start = 0
    for part in _slices(ours, cost):
        other = theirs.part(slice(start, start + len(part)))
        start += len(part)
        right, right2 = _work(part.right), _work(other.right)
        dtype = torch.float64 if right.dtype == right2.dtype == torch.float64 else torch.float32
        product = right.to(dtype) @ right2.to(dtype).mT
        if part.left is not None and other.left is not None:
            product = product * _alike(part.left, other.left, product)
        found.append(product.sum(dim=(1, 2)).double().cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _alike(left: torch.Tensor, other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`⟨l_it, l'_it'⟩` as `(R, T, T')`: of dense rows, of one-hot rows, or of one of each."""
    if left.ndim == 3 and other.ndim == 3:
        return _work(left, like=like) @ _work(other, like=like).mT
    if left.ndim == 2 and other.ndim == 2:
        return (left[:, :, None] == other[:, None, :]).to(like.dtype)
    if left.ndim == 3:
        return left.gather(2, other[:, None, :].expand(-1, left.shape[1], -1)).to(like.dtype)
    return other.gather(2, left[:, None, :].expand(-1, other.shape[1], -1)).mT.to(like.dtype)


def _row_numbers(use: Use) -> int:
    return use.right.shape[2] + (use.left.shape[2] if use.left is not None and use.left.ndim == 3 else 1)


def _slices(use: Use, numbers: int) -> Iterator[Use]:
    """Rows in slices of which `numbers` each fit into `AT_ONCE`."""
    step = max(1, AT_ONCE // max(1, numbers))
    for start in range(0, len(use), step):
        yield use.part(slice(start, start + step))


def _work(values: torch.Tensor, *, like: torch.Tensor | None = None) -> torch.Tensor:
    """In the dtype that products run in: float64, because sums over T² terms cancel; float32 where the values were
    rounded to 16 bits anyway, or the device has no float64."""
    if like is not None:
        return values.to(like.dtype)
    wide = values.dtype in (torch.float32, torch.float64) and values.device.type != "mps"
    return values.to(torch.float64 if wide else torch.float32)
