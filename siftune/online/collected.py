"""UDS's measurements of one micro-batch while its rows are computed: kept on their device until all are there.

Reading a value on the host makes it wait for the device, so nothing is read before `read`, which takes one transfer per
device. Rows whose polar iteration could not show its accuracy are computed again there, by eigenvalues.
Memory: S + 3 float64 numbers a row, and the head inputs of rows that may have to be computed again.

Axes: `R` rows of a group, `S` numbers of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .nuclear import DeviceNorms, Norms


@dataclass(frozen=True)
class Entry:
    """What the host knows of a row without reading anything."""

    row: int
    """Position in the batch."""
    tokens: int
    multiplier: float
    """|m| of the head, by which the norms are still to be multiplied."""
    again: Callable[[], float] | None = None
    """The nuclear norm by eigenvalues, where the first attempt may fail."""
    known: Norms | None = None
    """Norms that the host has read already."""


class Collected:
    """Groups of rows as they come; a row that comes twice counts as it came last.

    >>> collected.add(entries, norms, sketches)
    >>> for entry, norms, sketch in collected.read(): ...
    """

    def __init__(self) -> None:
        self._entries: dict[torch.device, list[Entry]] = {}
        self._values: dict[torch.device, list[torch.Tensor]] = {}

    def add(self, entries: Sequence[Entry], norms: DeviceNorms, sketches: torch.Tensor) -> None:
        """Norms `(R,)` and sketches `(R, S)` of some rows."""
        self._put(entries, torch.stack([norms.nuclear, norms.square, norms.shown.double()], dim=1), sketches)

    def add_known(self, entry: Entry, sketch: torch.Tensor) -> None:
        """One row whose norms are `known`; its sketch is `(1, S)`."""
        self._put([entry], sketch.new_zeros(1, 3), sketch)

    def _put(self, entries: Sequence[Entry], figures: torch.Tensor, sketches: torch.Tensor) -> None:
        self._entries.setdefault(sketches.device, []).extend(entries)
        self._values.setdefault(sketches.device, []).append(torch.cat([figures, sketches], dim=1))

    def read(self) -> Iterator[tuple[Entry, Norms, torch.Tensor]]:
        """Every row once, with its norms and its sketch `(S,)` on the CPU."""
        last: dict[int, tuple[Entry, torch.Tensor]] = {}
        for device, values in self._values.items():
            table = torch.cat(values).cpu()
            last |= {entry.row: (entry, line) for entry, line in zip(self._entries[device], table, strict=True)}
        for entry, line in last.values():
            nuclear, square, shown = line[:3].tolist()
            if entry.known is None and not shown:
                assert entry.again is not None, "only a polar iteration may fail to show its accuracy"
                nuclear = entry.again()
            yield entry, entry.known or Norms(nuclear, math.sqrt(square), fell_back=not shown), line[3:]


class Columns:
    """The measurements of one batch on the CPU while its rows arrive, in any order."""

    def __init__(self, rows: int, numbers: int) -> None:
        self.intra = torch.full((rows,), torch.nan, dtype=torch.float64)
        self.error = torch.full((rows,), torch.nan, dtype=torch.float64)
        self.sketch = torch.full((rows, numbers), torch.nan, dtype=torch.float64)
        self.reasons: dict[int, str] = {}

    def put(self, row: int, intra: float, norm: Norms, sketch: torch.Tensor) -> None:
        self.intra[row], self.error[row], self.sketch[row] = intra, norm.error, sketch

    def close(self, wanted: torch.Tensor, empty: str) -> None:
        """Give every row without finite measurements its reason, and NaN in all columns."""
        finite = torch.isfinite(self.intra) & torch.isfinite(self.sketch).all(dim=1)
        for row in (~finite).nonzero().flatten().tolist():
            self.intra[row], self.error[row], self.sketch[row] = torch.nan, torch.nan, torch.nan
            self.reasons[row] = "its hidden states are not finite" if bool(wanted[row].any()) else empty
