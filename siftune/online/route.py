"""Which of the two exact routes to a nuclear norm runs on this machine: timed once, on the first batch.

    eigenvalues   of the float64 Gram matrix: the CPU's route, and one matrix after another on many GPUs
    polar         the float64 polar iteration, matrix products of all rows at once; eigenvalues behind it, row by row

Both are exact to 1e-7 (siftune.online.nuclear), so the choice is one of time alone. Cost: the first batch's norms four
times on an accelerator, nothing on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from . import nuclear

ExactRouteName = Literal["eigenvalues", "polar"]
EXACT_ROUTES: tuple[ExactRouteName, ...] = ("eigenvalues", "polar")


def device_clock(device: torch.device) -> float:
    """Seconds of a steady clock once the device has finished what was launched on it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@dataclass
class ExactRoute:
    """The route, decided at the first call of `choose`, and again where the head is on another device by then.

    >>> route = ExactRoute("auto")
    >>> route.choose(torch.device("cpu"), lambda name: None)
    'eigenvalues'
    """

    requested: Literal["auto", "eigenvalues", "polar"] = "auto"
    clock: Callable[[torch.device], float] = device_clock
    chosen: ExactRouteName | None = None
    """What runs, once that is known."""
    seconds: dict[ExactRouteName, float] = field(default_factory=dict)
    """Time of each route on the first batch; empty where none was timed."""
    decided_for: torch.device | None = None
    """The device that it was decided for."""

    def choose(self, device: torch.device, trial: Callable[[ExactRouteName], object]) -> ExactRouteName:
        """The route for this device; `trial(route)` computes the first batch's norms and is called only to time
        them."""
        if self.chosen is None or device != self.decided_for:
            self.seconds = {}
            self.chosen, self.decided_for = self._decide(device, trial), device
        return self.chosen

    def describe(self) -> str:
        """One sentence on the choice and its reason; empty before the first batch."""
        if self.chosen is None or self.decided_for is None:
            return ""
        description = f"{self.chosen} on {_device_name(self.decided_for)}"
        if self.seconds:
            times = ", ".join(f"{route} {1000 * duration:.1f} ms" for route, duration in self.seconds.items())
            return f"{description}, the faster one on the first batch ({times})"
        if self.requested != "auto":
            return f"{description}, set by route={self.requested!r}"
        return description

    def _decide(self, device: torch.device, trial: Callable[[ExactRouteName], object]) -> ExactRouteName:
        if self.requested != "auto":
            return self.requested
        if not nuclear.is_accelerator(device):
            return "eigenvalues"
        self.seconds = seconds = {route: self._time(device, route, trial) for route in EXACT_ROUTES}
        return min(EXACT_ROUTES, key=lambda route: seconds[route])

    def _time(self, device: torch.device, route: ExactRouteName, trial: Callable[[ExactRouteName], object]) -> float:
        trial(route)  # libraries load and choose their kernels
        start = self.clock(device)
        trial(route)
        return self.clock(device) - start


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
