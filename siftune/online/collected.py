"""UDS's measurements of one micro-batch while its rows are computed: kept on their device until all are complete.

Reading a value on the host makes it wait for the device, so nothing is read before `read`, which takes one transfer per
device. Rows whose polar iteration could not show its accuracy are then computed again, by eigenvalues.
Memory: S + 3 float64 values a row, and the head inputs of rows that may have to be computed again.

Axes: `R` rows of a group, `S` elements of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .nuclear import DeviceNorms, Norms


@dataclass(frozen=True)
class RowEntry:
    """What is known of a row on the host without a transfer."""

    row: int
    """Position in the batch."""
    tokens: int
    multiplier: float
    """|m| of the head, by which the norms have to be multiplied."""
    retry: Callable[[], float] | None = None
    """The nuclear norm by eigenvalues, where the first attempt may fail."""
    host_norms: Norms | None = None
    """Norms that are on the host already."""


class DeviceMeasurements:
    """Groups of rows in the order of computation; of a row that is added twice the later values count.

    >>> measurements.add(entries, norms, sketches)
    >>> for entry, norms, sketch in measurements.read(): ...
    """

    def __init__(self) -> None:
        self._entries: dict[torch.device, list[RowEntry]] = {}
        self._values: dict[torch.device, list[torch.Tensor]] = {}

    def add(self, entries: Sequence[RowEntry], norms: DeviceNorms, sketches_RS: torch.Tensor) -> None:
        """Norms `(R,)` and sketches `(R, S)` of some rows."""
        self._put(entries, torch.stack([norms.nuclear, norms.square, norms.verified.double()], dim=1), sketches_RS)

    def add_host_norms(self, entry: RowEntry, sketch: torch.Tensor) -> None:
        """One row whose norms are `host_norms`; its sketch is `(1, S)`."""
        self._put([entry], sketch.new_zeros(1, 3), sketch)

    def _put(self, entries: Sequence[RowEntry], norms_R3: torch.Tensor, sketches_RS: torch.Tensor) -> None:
        self._entries.setdefault(sketches_RS.device, []).extend(entries)
        self._values.setdefault(sketches_RS.device, []).append(torch.cat([norms_R3, sketches_RS], dim=1))

    def read(self) -> Iterator[tuple[RowEntry, Norms, torch.Tensor]]:
        """Every row once, with its norms and its sketch `(S,)` on the CPU."""
        latest: dict[int, tuple[RowEntry, torch.Tensor]] = {}
        for device, parts in self._values.items():
            table = torch.cat(parts).cpu()
            latest |= {entry.row: (entry, values) for entry, values in zip(self._entries[device], table, strict=True)}
        for entry, values in latest.values():
            nuclear, square, verified = values[:3].tolist()
            if entry.host_norms is None and not verified:
                assert entry.retry is not None, "only a polar iteration may fail to show its accuracy"
                nuclear = entry.retry()
            yield entry, entry.host_norms or Norms(nuclear, math.sqrt(square), fell_back=not verified), values[3:]


class MeasuredColumns:
    """The measurements of one batch on the CPU while its rows arrive, in any order."""

    def __init__(self, rows: int, sketch_size: int) -> None:
        self.intra = torch.full((rows,), torch.nan, dtype=torch.float64)
        self.error = torch.full((rows,), torch.nan, dtype=torch.float64)
        self.sketch = torch.full((rows, sketch_size), torch.nan, dtype=torch.float64)
        self.reasons: dict[int, str] = {}

    def put(self, row: int, intra: float, norm: Norms, sketch: torch.Tensor) -> None:
        self.intra[row], self.error[row], self.sketch[row] = intra, norm.error, sketch

    def close(self, scored_positions: torch.Tensor, empty_reason: str) -> None:
        """Set the reason, and NaN in all columns, of every row without finite measurements."""
        finite = torch.isfinite(self.intra) & torch.isfinite(self.sketch).all(dim=1)
        for row in (~finite).nonzero().flatten().tolist():
            self.intra[row], self.error[row], self.sketch[row] = torch.nan, torch.nan, torch.nan
            self.reasons[row] = (
                "its hidden states are not finite" if bool(scored_positions[row].any()) else empty_reason
            )
