"""From a row's states and the model's head to what UDS's two terms are computed from, for every kind of head.

    L = H Wᵀ            logits of the row, with Wᵀ W = C Cᵀ (siftune.models.head): L and H C have equal singular values
    intra = tr sqrt(K)  K is the Gram matrix of H C, or of L, on its smaller side
    z = vec(Γ₂ L Γ₁ᵀ)    sketch of the row; inter is its mean distance to the sketches of kept rows

A linear head needs no logits: K comes from `H C` and z from `Γ₁ W`, for some rows at once. A capped head, and a model
whose head has no formula, gives L in blocks of the vocabulary: K and z are sums over one pass.
Cost per row: N*D*D/2 + N*N*D products for a linear head; otherwise its logits and 5/8 N*N*V products.

Axes: `R` rows of a group, `N` tokens of a row, `D` inputs of the head, `K` the smaller of the two, `V` vocabulary, `F`
and `G` sides and `S` elements of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from .collected import RowEntry
from .logit_access import HeadInputs, LogitAccess
from .nuclear import gram_of_blocks, gram_of_rows, groups, lanczos_norms, norms_of_grams, ranks
from .sketch import Sketch


class RowTerms(NamedTuple):
    """Some rows that are computed together, left on their device: the caller reads them, after launching all work."""

    rows: list[int]
    """Positions in the batch."""
    tokens: list[int]
    """N of each row."""
    multiplier: float
    """|m| of the head, by which norms from `grams_RKK` have to be multiplied; `sketches_RS` are of the logits."""
    grams_RKK: torch.Tensor
    """Float64, zeros beyond a row's own size."""
    ranks: list[int]
    """Largest rank possible of each row's logits."""
    sketches_RS: torch.Tensor
    """Float64."""
    by_eigenvalues: list[Callable[[], float]]
    """The nuclear norm of each row by itself, before the multiplier: for rows that a faster route cannot decide."""
    losses: torch.Tensor | None = None
    """Mean loss over the tokens of each row, float64 `(R,)`, where the same pass gives it (siftune.online.residual)."""


def row_terms(
    head_inputs: HeadInputs, indices: Sequence[int], logit_access: LogitAccess, sketch: Sketch
) -> Iterator[RowTerms]:
    """Terms of the rows `head_inputs.rows[index]`, each once, in groups. The sketch is bound to the vocabulary.

    >>> for terms in row_terms(head_inputs, range(len(head_inputs.rows)), logit_access, sketch): ...
    """
    head = head_inputs.head
    if head is None or head.cap is not None:
        yield from (_terms_of_logits(head_inputs, index, sketch) for index in indices)
        return
    factor = logit_access.factor(head)
    projected_FD = logit_access.projected(head, sketch) * head.multiplier
    lengths = [len(head_inputs.inputs[index]) for index in indices]
    for group in groups(lengths, head.device, width=head.width):
        members, tokens = [indices[position] for position in group], [lengths[position] for position in group]
        inputs = [head_inputs.inputs[member] for member in members]
        inputs_RND = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)

        def by_eigenvalues(inputs_ND: torch.Tensor) -> float:
            grams_1KK = gram_of_rows(inputs_ND[None], factor)
            return norms_of_grams(grams_1KK, ranks([len(inputs_ND)], factor))[0].nuclear

        yield RowTerms(
            rows=[head_inputs.rows[member] for member in members],
            tokens=tokens,
            multiplier=abs(head.multiplier),
            grams_RKK=gram_of_rows(inputs_RND, factor),
            ranks=ranks(tokens, factor),
            sketches_RS=sketch.apply(inputs_RND, projected_FD),
            by_eigenvalues=[partial(by_eigenvalues, inputs_ND) for inputs_ND in inputs],
        )


def _terms_of_logits(head_inputs: HeadInputs, index: int, sketch: Sketch) -> RowTerms:
    """One row's terms from its logits, in one pass over the vocabulary."""
    sketch_GF = torch.zeros(1, dtype=torch.float64)

    def sketched_blocks() -> Iterator[torch.Tensor]:
        nonlocal sketch_GF
        for start, stop, block_NV in head_inputs.blocks(index):
            block_NV = block_NV.double()  # once, for both products
            time_GN = sketch.rows(len(block_NV)).to(block_NV.device)
            columns_FV = sketch.columns(start, stop).to(block_NV.device)
            sketch_GF = sketch_GF.to(block_NV.device) + (time_GN @ block_NV) @ columns_FV.T
            yield block_NV

    grams_1NN = gram_of_blocks(sketched_blocks())[None]
    tokens = grams_1NN.shape[1]
    return RowTerms(
        rows=[head_inputs.rows[index]],
        tokens=[tokens],
        multiplier=1.0,
        grams_RKK=grams_1NN,
        ranks=[tokens],
        sketches_RS=sketch_GF.flatten()[None],
        by_eigenvalues=[lambda: norms_of_grams(grams_1NN, [tokens])[0].nuclear],
    )


def estimated_terms(
    head_inputs: HeadInputs, index: int, logit_access: LogitAccess, sketch: Sketch, *, seed: int
) -> tuple[RowEntry, torch.Tensor]:
    """One long row of a linear head, its norms estimated by stochastic Lanczos quadrature, and its sketch `(1, S)`."""
    head = head_inputs.head
    assert head is not None
    assert head.cap is None, "logits in blocks have no factor"
    inputs_ND = head_inputs.inputs[index]
    estimate = lanczos_norms(inputs_ND, logit_access.factor(head), seed=seed)
    projected_FD = logit_access.projected(head, sketch) * head.multiplier
    entry = RowEntry(head_inputs.rows[index], len(inputs_ND), abs(head.multiplier), host_norms=estimate)
    return entry, sketch.apply(inputs_ND[None], projected_FD)
