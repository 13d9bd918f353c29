"""A row's residual instead of its logits: `R = softmax(L) - onehot(y)`, the gradient of the row's summed loss in L.

    intra = norm of R          R Rᵀ = P Pᵀ - P[:, y] - P[:, y]ᵀ + [y_i = y_j],  P = softmax(L), y the labels
            or of Rᵀ H         the gradient in the head: singular values from (R Rᵀ)^½ (H Hᵀ) (R Rᵀ)^½
    z     = vec(Γ₂ R Γ₁ᵀ)      sketch, as that of the logits
    loss  = mean over label tokens of -ln P[y]

Higher = the model is wrong at more tokens, and in more different ways. This score is siftune's own; UDS (arXiv
2510.16882) takes the logits. One pass over the vocabulary in blocks with a running maximum gives all of them; no N x V
matrix is formed. With E the exponentials of the logits without each row's own label and s their sum, R is
`(E - s onehot(y)) / Z`: no difference of nearly equal numbers, so rows that the model knows by heart keep their digits.
Cost: the logits of the label tokens, as for the loss alone, plus 5/8 N*N*V products in float64 and N*V*d₁.

Axes: `N` label tokens of a row (or of some rows together), `V` vocabulary or a block of it, `D` inputs of the head,
`F` and `G` sides of a sketch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ..errors import UserError
from .label_losses import shared_vocabulary_passes
from .logit_access import HeadInputs
from .nuclear import add_gram, norms_of_grams, symmetric
from .sketch import Sketch
from .terms import RowTerms


def residual_terms(
    head_inputs: HeadInputs, targets: Sequence[torch.Tensor], sketch: Sketch, *, head_gradient: bool = False
) -> Iterator[RowTerms]:
    """Terms of every row of `head_inputs`, with its loss; the sketch is bound to the vocabulary.

    `targets` are the labels `(N,)` (int64, CPU) of each of `head_inputs.rows`. With `head_gradient` the Gram matrix has the
    singular values of the summed loss's gradient in `[W b]`, multiplier and soft cap included. Raises `UserError` where
    that is requested of a head without a formula.

    >>> for terms in residual_terms(head_inputs, targets, sketch): terms.grams_RKK, terms.losses
    """
    head = head_inputs.head
    if head_gradient and head is None:
        raise UserError(
            "norm='head-gradient' needs a linear head, and this model's is none; set norm to nuclear, frobenius or blend"
        )
    place = {row: index for index, row in enumerate(head_inputs.rows)}
    for rows, blocks in shared_vocabulary_passes(head_inputs):
        row_targets = [targets[place[row]] for row in rows]
        walk = ResidualWalk(row_targets, sketch, cap=head.cap if head is not None and head_gradient else None)
        for start, stop, block_NV in blocks:
            walk.add(start, stop, block_NV if head is not None else block_NV.clone())
        for row, target, (gram_NN, sketch_GF, loss) in zip(rows, row_targets, walk.rows(), strict=True):
            tokens = len(target)
            if head_gradient and head is not None:
                gram_NN = _head_gradient_gram(gram_NN, head_inputs.inputs[place[row]])
            grams_1NN = gram_NN[None]
            yield RowTerms(
                rows=[row],
                tokens=[tokens],
                multiplier=abs(head.multiplier) if head_gradient and head is not None else 1.0,
                grams_RKK=grams_1NN,
                ranks=[min(tokens, head_inputs.vocabulary)],
                sketches_RS=sketch_GF.flatten()[None],
                by_eigenvalues=[partial(_by_eigenvalues, grams_1NN, min(tokens, head_inputs.vocabulary))],
                losses=loss[None],
            )


class ResidualWalk:
    """Sums over one pass through the vocabulary for some rows that share it, each scaled by its running maximum.

    >>> walk = ResidualWalk([targets], sketch)
    >>> for start, stop, block_NV in blocks: walk.add(start, stop, block_NV)
    >>> [(gram_NN, sketch_GF, loss)] = walk.rows()
    """

    def __init__(self, row_targets: Sequence[torch.Tensor], sketch: Sketch, *, cap: float | None = None) -> None:
        """`row_targets` are int64 `(N,)` on the CPU, a row each. With `cap` the Gram matrices are those of the gradient
        before a soft cap, `R * (1 - (L / cap)^2)`."""
        self._targets = torch.cat(list(row_targets))
        lengths = [len(target) for target in row_targets]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self._spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self._sketch, self._cap = sketch, cap
        self._started = False

    def _start(self, device: torch.device) -> None:
        count = len(self._targets)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._peak_N = zeros(count) - torch.inf
        """Largest logit so far beside the label's."""
        self._sum_N = zeros(count)
        """s, times exp(-peak)."""
        self._label_N = zeros(count) + torch.nan
        self._projected_NF = zeros(count, self._sketch[0])
        self._label_columns_NF = zeros(count, self._sketch[0])
        self._grams = [zeros(span.stop - span.start, span.stop - span.start) for span in self._spans]
        """E Eᵀ of each row, lower panels."""
        self._at_labels = [torch.zeros_like(gram_NN) for gram_NN in self._grams]
        """E[i, y_j] of each row."""
        self._started = True

    def add(self, start: int, stop: int, block_NV: torch.Tensor) -> None:
        """The logits of vocabulary rows `start .. stop - 1`, float32; the block is overwritten."""
        device = block_NV.device
        if not self._started:
            self._start(device)
        rows = ((self._targets >= start) & (self._targets < stop)).nonzero().flatten()
        rows_here, columns_here = rows.to(device), (self._targets[rows] - start).to(device)
        slope_NV = None if self._cap is None else 1 - (block_NV / self._cap).square()
        self._label_N[rows_here] = block_NV[rows_here, columns_here].double()
        block_NV[rows_here, columns_here] = -torch.inf
        peak_N = torch.maximum(self._peak_N, block_NV.amax(dim=1).double())
        usable_N = torch.where(peak_N == -torch.inf, 0.0, peak_N)  # every logit so far is -inf
        decay_N = (self._peak_N - usable_N).exp()
        self._peak_N = peak_N
        block_NV.sub_(usable_N.to(block_NV.dtype)[:, None]).exp_()
        self._sum_N.mul_(decay_N).add_(block_NV.sum(dim=1))
        columns_FV = self._sketch.columns(start, stop).to(device)
        self._projected_NF.mul_(decay_N[:, None]).add_(block_NV @ columns_FV.to(block_NV.dtype).T)
        self._label_columns_NF[rows_here] = columns_FV[:, columns_here].T
        if slope_NV is not None:
            block_NV = block_NV * slope_NV
        for span, gram_NN, at_labels_NN in zip(self._spans, self._grams, self._at_labels, strict=True):
            scale_N = decay_N[span]
            gram_NN.mul_(scale_N[:, None] * scale_N)
            row_NV = block_NV[span].double()
            add_gram(gram_NN, row_NV)
            at_labels_NN.mul_(scale_N[:, None])
            inside = (rows >= span.start) & (rows < span.stop)
            at_labels_NN[:, rows_here[inside.to(device)] - span.start] = row_NV[:, columns_here[inside.to(device)]]

    def rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each row the Gram matrix `R Rᵀ` `(N, N)`, the sketch `(G, F)` and the mean loss `()`, float64."""
        assert self._started, "a head without a vocabulary"
        label_N = self._label_N - torch.where(self._peak_N == -torch.inf, 0.0, self._peak_N)
        log_sum_N = self._sum_N.log()
        inverse_N = (-torch.logaddexp(log_sum_N, label_N)).exp()  # exp(peak) / Z
        wrong_N = self._sum_N * inverse_N  # 1 - P[i, y_i]
        loss_N = torch.logaddexp(torch.zeros_like(label_N), log_sum_N - label_N)
        slope_N = 1.0 if self._cap is None else 1 - (self._label_N / self._cap).square()
        residual_NF = inverse_N[:, None] * self._projected_NF - wrong_N[:, None] * self._label_columns_NF
        for span, gram_NN, at_labels_NN in zip(self._spans, self._grams, self._at_labels, strict=True):
            scale_N, hot_N, target_N = inverse_N[span], (wrong_N * slope_N)[span], self._targets[span]
            same_NN = (target_N[:, None] == target_N).to(gram_NN.device)
            cross_NN = scale_N[:, None] * at_labels_NN * hot_N
            gram_NN = scale_N[:, None] * symmetric(gram_NN) * scale_N - cross_NN - cross_NN.T
            time_GN = self._sketch.rows(len(target_N)).to(gram_NN.device)
            yield gram_NN + hot_N[:, None] * hot_N * same_NN, time_GN @ residual_NF[span], loss_N[span].mean()


def _head_gradient_gram(gram_NN: torch.Tensor, inputs_ND: torch.Tensor) -> torch.Tensor:
    """`(R Rᵀ)^½ (H Hᵀ) (R Rᵀ)^½`, up to a rotation: its eigenvalues are the squared singular values of `Rᵀ H`."""
    finite = bool(torch.isfinite(gram_NN).all()) and bool(torch.isfinite(inputs_ND).all())
    if not finite:
        return torch.full_like(gram_NN, torch.nan)
    values, vectors_NN = torch.linalg.eigh(gram_NN)
    image_ND = (vectors_NN * values.clamp_min(0).sqrt()).T @ inputs_ND.double()
    product_NN: torch.Tensor = image_ND @ image_ND.T
    return product_NN


def _by_eigenvalues(grams_1NN: torch.Tensor, rank: int) -> float:
    return norms_of_grams(grams_1NN, [rank])[0].nuclear
