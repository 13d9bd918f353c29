"""Inner products of per-row gradients from their factors, without forming the gradients ("ghost" products).

    gradient of a weight for row i   g_i = Σ_t l_it r_itᵀ               l: layer input, r: gradient of its output
    inner product                    ⟨g_i, g_j⟩ = Σ_tt' ⟨l_it, l_jt'⟩ ⟨r_it, r_jt'⟩
    with a formed gradient G         ⟨g_i, G⟩ = Σ_t l_itᵀ G r_it

A weight that is used in several places (tied embeddings, shared layers) has one such sum per place, and the cross terms
between places count. An embedding's l are one-hot and kept as ids. Vectors (biases, norm weights) are formed per row.
A weight's gradients are formed where that is cheaper: T·I·O against T²(I + O), the latter in float64.
Cost per row and weight: the smaller of the two. Source: GREATS (NeurIPS 2024); for norms already
Goodfellow, arXiv 1510.01799.

Axes: `R`, `S` rows of a group, `T` and `U` tokens, `I` x `O` the weight, `P` elements of a formed gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

SLICE_ELEMENTS = 16_000_000
"""Elements of one intermediate product: 128 MB in float64. More rows are processed in slices."""
COLUMNS = 2**17
"""Elements of a formed gradient that are multiplied in float32 before their sum is added up in float64."""
NORM_SIZE_FACTOR = 2.0
"""PerExampleGradients whose norms are wanted are formed up to this many times the size of their factors: sums over T²
cancel and run in float64, at twice the cost, while a formed gradient is as exact in float32 as any explicit one."""
PAIRS_SIZE_FACTOR = 4.0
"""The same for gradients that are multiplied with many others: forming costs once, a product of factors every time."""


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """Gradients of R rows from one use of a weight, in factors: row i's gradient is `Σ_t left_it right_itᵀ`."""

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

    def part(self, rows: slice) -> GradientFactors:
        """Some of the rows."""
        return GradientFactors(None if self.left is None else self.left[rows], self.right[rows], self.height)


FactorList = Sequence[GradientFactors]


def cheaper_form(terms: FactorList, size_factor: float = NORM_SIZE_FACTOR) -> list[GradientFactors]:
    """The same gradients in the cheaper form. Where one use is formed already, all become one, formed.

    `size_factor` is how many times the factors' size formed gradients may have.
    """
    if any(term.left is None for term in terms):
        return [form_gradients(terms)]
    tokens = sum(term.right.shape[1] for term in terms)
    inputs, outputs = terms[0].height, terms[0].right.shape[2]
    if inputs * outputs <= size_factor * tokens * (inputs + outputs):
        return [form_gradients(terms)]
    return list(terms)


def form_gradients(terms: FactorList) -> GradientFactors:
    """All uses of one weight as formed gradients `(R, 1, P)`."""
    total_RP: torch.Tensor | None = None
    for term in terms:
        piece_RP = _form_one(term)
        total_RP = piece_RP if total_RP is None else total_RP + piece_RP
    assert total_RP is not None, "a weight without a use"
    return GradientFactors(None, total_RP[:, None])


def _form_one(term: GradientFactors) -> torch.Tensor:
    """`(R, P)` in float32 (float64 of float64)."""
    if term.left is None:
        return term.right[:, 0]
    dtype = torch.float64 if term.right.dtype == torch.float64 else torch.float32
    rows, _, width = term.right.shape
    gradients: list[torch.Tensor] = []
    for part in _row_slices(term, term.height * width):
        right_RTO = part.right.to(dtype)
        if part.left is None or part.left.ndim == 3:
            assert part.left is not None
            gradient = part.left.to(dtype).mT @ right_RTO
        else:
            offsets = torch.arange(len(part), device=right_RTO.device)[:, None] * term.height
            gradient = right_RTO.new_zeros(len(part) * term.height, width)
            gradient.index_add_(0, (part.left + offsets).flatten(), right_RTO.flatten(0, 1))
        gradients.append(gradient.reshape(len(part), -1))
    if len(gradients) == 1:
        return gradients[0]
    return torch.cat(gradients) if rows else term.right.new_zeros(0, term.height * width, dtype=dtype)


def squares(terms: FactorList) -> torch.Tensor:
    """Squared norms of one weight's gradients, float64 `(R,)` on the CPU."""
    terms = cheaper_form(terms)
    if terms[0].left is None:
        formed_RP = terms[0].right[:, 0]
        summed = torch.zeros(len(formed_RP), dtype=_to_product_dtype(formed_RP[:0]).dtype, device=formed_RP.device)
        for columns in _column_slices(formed_RP):
            summed += torch.linalg.vector_norm(formed_RP[:, columns], dim=1).to(summed.dtype).square()
        return summed.double().cpu()
    total = torch.zeros(len(terms[0]), dtype=torch.float64)
    for first, term in enumerate(terms):
        for second in range(first, len(terms)):
            total += (1 if second == first else 2) * _rowwise_products(term, terms[second])
    return total


def inner(row_terms: FactorList, column_terms: FactorList) -> torch.Tensor:
    """Inner products of one weight's gradients, float64 `(R, S)` on the CPU.

    >>> inner([Use(a, b)], [Use(a, b)]).diagonal()      # = squares([Use(a, b)])
    """
    if any(term.left is None for term in (*row_terms, *column_terms)):  # where one side is formed, form the other
        return _formed_products(form_gradients(row_terms).right[:, 0], form_gradients(column_terms).right[:, 0])
    rows, columns = len(row_terms[0]), len(column_terms[0])
    total_RS = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for row_term in row_terms:
            for column_term in column_terms:
                one_row = row_term.part(slice(row, row + 1))
                start = 0
                for part in _row_slices(column_term, column_term.right.shape[1] * _elements_per_token(column_term)):
                    total_RS[row, start : start + len(part)] += _rowwise_products(_repeat_row(one_row, len(part)), part)
                    start += len(part)
    return total_RS


def inner_with_gradient(terms: FactorList, gradient_IO: torch.Tensor) -> torch.Tensor:
    """Inner products of one weight's gradients with one formed gradient, float64 `(R,)` on the CPU."""
    total = torch.zeros(len(terms[0]), dtype=torch.float64)
    for term in terms:
        if term.left is None:
            total += _formed_products(term.right[:, 0], gradient_IO.reshape(1, -1))[:, 0]
            continue
        products: list[torch.Tensor] = []
        wide_gradient_IO = _to_product_dtype(gradient_IO)
        for part in _row_slices(term, term.right.shape[1] * _elements_per_token(term)):
            assert part.left is not None
            projected_RTO = (
                part.left.to(wide_gradient_IO.dtype) @ wide_gradient_IO
                if part.left.ndim == 3
                else wide_gradient_IO[part.left]
            )
            products.append((projected_RTO * part.right.to(wide_gradient_IO.dtype)).sum(dim=(1, 2)).double().cpu())
        total += torch.cat(products) if products else 0.0
    return total


def _formed_products(first_RP: torch.Tensor, second_SP: torch.Tensor) -> torch.Tensor:
    """`(R, P)` and `(S, P)` -> float64 `(R, S)` on the CPU. In slices: a cast to float64 would cost more than the
    products."""
    dtype = torch.float64 if first_RP.dtype == second_SP.dtype == torch.float64 else torch.float32
    total_RS = torch.zeros(
        len(first_RP), len(second_SP), dtype=_to_product_dtype(first_RP[:0]).dtype, device=first_RP.device
    )
    for columns in _column_slices(first_RP):
        total_RS += first_RP[:, columns].to(dtype) @ second_SP[:, columns].to(dtype).mT
    return total_RS.double().cpu()


def _column_slices(formed_RP: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + COLUMNS) for start in range(0, formed_RP.shape[1], COLUMNS))


def _repeat_row(term: GradientFactors, rows: int) -> GradientFactors:
    assert term.left is not None
    left = term.left.expand(rows, *term.left.shape[1:])
    return GradientFactors(left, term.right.expand(rows, *term.right.shape[1:]), term.height)


def _rowwise_products(first: GradientFactors, second: GradientFactors) -> torch.Tensor:
    """`⟨g_i, h_i⟩` of two uses by the same rows, float64 `(R,)` on the CPU."""
    cost = max(
        first.right.shape[1] * second.right.shape[1],
        _elements_per_token(first) * first.right.shape[1],
        _elements_per_token(second),
    )
    products: list[torch.Tensor] = []
    start = 0
    for first_part in _row_slices(first, cost):
        second_part = second.part(slice(start, start + len(first_part)))
        start += len(first_part)
        right_RTO, second_right_RUO = _to_product_dtype(first_part.right), _to_product_dtype(second_part.right)
        dtype = torch.float64 if right_RTO.dtype == second_right_RUO.dtype == torch.float64 else torch.float32
        product_RTU = right_RTO.to(dtype) @ second_right_RUO.to(dtype).mT
        if first_part.left is not None and second_part.left is not None:
            product_RTU = product_RTU * _left_products(first_part.left, second_part.left, product_RTU)
        products.append(product_RTU.sum(dim=(1, 2)).double().cpu())
    return torch.cat(products) if products else torch.zeros(0, dtype=torch.float64)


def _left_products(left: torch.Tensor, second: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`⟨l_it, l'_it'⟩` as `(R, T, T')`: of dense rows, of one-hot rows, or of one of each."""
    if left.ndim == 3 and second.ndim == 3:
        return _to_product_dtype(left, like=like) @ _to_product_dtype(second, like=like).mT
    if left.ndim == 2 and second.ndim == 2:
        return (left[:, :, None] == second[:, None, :]).to(like.dtype)
    if left.ndim == 3:
        return left.gather(2, second[:, None, :].expand(-1, left.shape[1], -1)).to(like.dtype)
    return second.gather(2, left[:, None, :].expand(-1, second.shape[1], -1)).mT.to(like.dtype)


def _elements_per_token(term: GradientFactors) -> int:
    return term.right.shape[2] + (term.left.shape[2] if term.left is not None and term.left.ndim == 3 else 1)


def _row_slices(term: GradientFactors, elements: int) -> Iterator[GradientFactors]:
    """Rows in slices of which `elements` each fit into `SLICE_ELEMENTS`."""
    step = max(1, SLICE_ELEMENTS // max(1, elements))
    for start in range(0, len(term), step):
        yield term.part(slice(start, start + step))


def _to_product_dtype(values: torch.Tensor, *, like: torch.Tensor | None = None) -> torch.Tensor:
    """In the dtype that products run in: float64, because sums over T² terms cancel; float32 where the values were
    rounded to 16 bits anyway, or the device has no float64."""
    if like is not None:
        return values.to(like.dtype)
    wide = values.dtype in (torch.float32, torch.float64) and values.device.type != "mps"
    return values.to(torch.float64 if wide else torch.float32)
