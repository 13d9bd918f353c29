"""A row's logits as d₁·d₂ numbers: `Z = Γ₂ L Γ₁ᵀ`, from hidden states alone (UDS, arXiv 2510.16882, section 3.2).

Γ = scale · S F D: random signs D, the real part of a Fourier transform F, some of its rows S. Distances between rows
are kept to a relative error that shrinks with d₁ and d₂ (Johnson-Lindenstrauss). With `L = H Wᵀ`,
`Z = (Γ₂ H)(Γ₁ W)ᵀ`, so Γ₁ W `(d₁, D)` is formed once per version of the head and no logits are.
Cost per row: N*D*d₂ + D*d₁*d₂ products.

Axes: `V` vocabulary (or a block of it), `N` positions of a row, `D` inputs of the head, `R` rows; `F` = d₁ frequencies
over the vocabulary and `G` = d₂ over positions, the two sides of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..errors import UserError

PERIOD = 512
"""Length of the transform over positions (the paper's N_max). Beyond it the cosines repeat, with further signs."""


class Signs(NamedTuple):
    """The diagonals of D, as float64 numbers of +1 and -1."""

    vocabulary: torch.Tensor
    """`(V,)`"""
    time: torch.Tensor
    """`(512,)`: the first period; `Sketch.time_signs` has any length."""


class Indices(NamedTuple):
    """The rows of F that S picks, int64."""

    vocabulary: torch.Tensor
    """`(d₁,)`, of a transform of length V"""
    time: torch.Tensor
    """`(d₂,)`, of a transform of length 512"""


class Sketch(tuple[int, int]):
    """The shape `(d₁, d₂)`, and, once a vocabulary is known, the signs and indices behind it.

    By default the scale keeps norms in expectation (√(2/d) per side, since cos² is a half on average) and no
    frequency is drawn twice while others are left. `paper=True` is the authors' scaling: √(V/d₁) and √(512/d₂) on the
    real part of unnormalised transforms, frequencies drawn with replacement from all V and all 512.

    >>> sketch = Sketch((128, 8), seed=0); sketch.bind(151_936)
    >>> sketch.signs.vocabulary.shape, sketch.indices.time.shape
    (torch.Size([151936]), torch.Size([8]))
    """

    seed: int
    paper: bool
    _signs: Signs | None
    _indices: Indices | None
    _time_columns: torch.Tensor | None
    _time_on_device: torch.Tensor | None
    _block: torch.Tensor | None

    def __new__(cls, shape: Iterable[int], *, seed: int = 0, paper: bool = False) -> Sketch:
        self = super().__new__(cls, shape)  # type: ignore[arg-type]
        self.seed, self.paper = seed, paper
        self._signs = self._indices = self._time_columns = self._time_on_device = self._block = None
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (tuple(self), self.seed, self.paper, self.vocabulary))

    @property
    def vocabulary(self) -> int | None:
        """V, or None before the first batch."""
        return None if self._signs is None else len(self._signs.vocabulary)

    @property
    def signs(self) -> Signs:
        """Raises `UserError` before a vocabulary is known."""
        self._check_bound()
        assert self._signs is not None
        return self._signs

    @property
    def indices(self) -> Indices:
        """Raises `UserError` before a vocabulary is known."""
        self._check_bound()
        assert self._indices is not None
        return self._indices

    @property
    def scales(self) -> tuple[float, float]:
        """The factors in front of the real parts of the two unnormalised transforms: (vocabulary, time)."""
        first, second = self
        if self.paper:
            return math.sqrt(len(self.signs.vocabulary) / first), math.sqrt(PERIOD / second)
        return math.sqrt(2 / first), math.sqrt(2 / second)

    def bind(self, vocabulary: int) -> None:
        """Draw signs and indices for a vocabulary, from the seed alone; nothing happens when it is the same."""
        if self.vocabulary == vocabulary:
            return
        generator = torch.Generator().manual_seed(self.seed)
        signs = _signs(vocabulary, generator)
        first = self._draw(vocabulary, self[0], generator)
        second = self._draw(PERIOD, self[1], generator)
        self._signs = Signs(signs, self.time_signs(PERIOD))
        self._indices = Indices(first, second)
        self._time_columns = self._time_on_device = self._block = None

    def time_signs(self, length: int) -> torch.Tensor:
        """Signs of the positions `0 .. length - 1`: a longer row's begin with a shorter row's. `(length,)`."""
        periods = range(max(1, math.ceil(length / PERIOD)))
        seeds = [self.seed * 1_000_003 + 7_919 * (period + 1) for period in periods]
        return torch.cat([_signs(PERIOD, torch.Generator().manual_seed(seed)) for seed in seeds])[:length]

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Columns `start .. stop - 1` of Γ₁, float64 `(F, stop - start)`."""
        # cos(a + b) from the angles of a block that starts at 0 and of `start`: a few multiplications per block
        offset_2F1 = self._angles(torch.arange(start, start + 1))
        block_2FV = self._block
        if block_2FV is None or block_2FV.shape[2] < stop - start:
            block_2FV = self._block = self._angles(torch.arange(stop - start))
        cosines_FV, sines_FV = block_2FV[:, :, : stop - start]
        columns_FV: torch.Tensor = cosines_FV * offset_2F1[0] - sines_FV * offset_2F1[1]
        return columns_FV.mul_(self.signs.vocabulary[start:stop] * self.scales[0])

    def rows(self, length: int) -> torch.Tensor:
        """The first `length` columns of Γ₂, float64 `(G, length)`; position t is the row's t-th real token."""
        if self._time_columns is None or self._time_columns.shape[1] < length:
            size = max(PERIOD, length)
            turns_GN = self.indices.time[:, None] * torch.arange(size) % PERIOD
            self._time_columns = _cosines(PERIOD)[turns_GN] * self.time_signs(size) * self.scales[1]
        return self._time_columns[:, :length]

    def apply(self, inputs_RND: torch.Tensor, projected_FD: torch.Tensor) -> torch.Tensor:
        """Sketches of rows: `inputs_RND` `(R, N, D)`, zeros beyond a row's length, `projected_FD` = Γ₁ W `(F, D)`.

        Float64 `(R, G·F)`.
        """
        rows_GN = self._rows_on(inputs_RND.device, inputs_RND.shape[1])
        return ((rows_GN @ inputs_RND.double()) @ projected_FD.T).flatten(1)

    def _rows_on(self, device: torch.device, length: int) -> torch.Tensor:
        """`rows(length)` on a device, copied there once."""
        rows_GN = self.rows(length)
        if rows_GN.device == device:
            return rows_GN
        if (
            self._time_on_device is None
            or self._time_on_device.device != device
            or self._time_on_device.shape[1] < length
        ):
            assert self._time_columns is not None
            self._time_on_device = self._time_columns.to(device)
        return self._time_on_device[:, :length]

    def _draw(self, size: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` frequencies. k and size - k have the same cosines, so half of them (less 0) are distinct."""
        if self.paper:
            return torch.randint(0, size, (count,), generator=generator)
        distinct = (size - 1) // 2
        if count > distinct:
            return torch.randint(0, size, (count,), generator=generator)
        return torch.randperm(distinct, generator=generator)[:count] + 1

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines and sines of the drawn frequencies at some places of the vocabulary, `(2, F, places)`."""
        size = len(self.signs.vocabulary)
        turns_FV = (self.indices.vocabulary[:, None] * positions % size).double() * (2 * math.pi / size)
        return torch.stack([turns_FV.cos(), turns_FV.sin()])

    def _check_bound(self) -> None:
        if self._signs is None:
            raise UserError(
                "the sketch's signs and indices depend on the vocabulary, which is unknown before the first batch; "
                "score a batch first, or call sketch.bind(vocabulary)"
            )


def _rebuild(shape: tuple[int, int], seed: int, paper: bool, vocabulary: int | None) -> Sketch:
    sketch = Sketch(shape, seed=seed, paper=paper)
    if vocabulary is not None:
        sketch.bind(vocabulary)
    return sketch


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1


def _cosines(size: int) -> torch.Tensor:
    """`cos(2 pi k / size)` for k = 0 .. size - 1, float64."""
    return torch.cos(torch.arange(size, dtype=torch.float64) * (2 * math.pi / size))
