"""Metrics of the selection in the trainer's log: the share kept, the scores of kept and skipped rows, and the cost.

Keys start with `sift/`. Scores are means over the steps since the last log line, token counts run from the start of
training. Cost: a few sums a step; on CUDA two events.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .selection_step import Selection


@dataclass
class SelectionMetrics:
    """Running sums; `report` returns and resets those of the log window."""

    tokens_trained: int = 0
    tokens_skipped: int = 0
    _window_start: float = field(default_factory=time.perf_counter)
    _scoring_seconds: float = 0.0
    _candidates: int = 0
    _kept: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def scoring(self, device: torch.device) -> Iterator[None]:
        """Count the time inside as scoring; on CUDA the device's own time, not that of work queued before."""
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            end.synchronize()
            self._scoring_seconds += begin.elapsed_time(end) / 1000
        else:
            started = time.perf_counter()
            yield
            self._scoring_seconds += time.perf_counter() - started

    def add(self, selection: Selection) -> None:
        """Add one step."""
        kept = selection.kept
        self._candidates += len(kept)
        self._kept += int(kept.sum())
        self.tokens_trained += int(selection.tokens[kept].sum())
        self.tokens_skipped += int(selection.tokens[~kept].sum())
        for name, values in {"total": selection.total, **selection.parts}.items():
            for outcome, rows in (("kept", kept), ("skipped", ~kept)):
                scored = values[rows & ~torch.isnan(values)]
                key = f"{name}_{outcome}"
                self._sums[key] = self._sums.get(key, 0.0) + float(scored.sum())
                self._counts[key] = self._counts.get(key, 0) + len(scored)

    def report(self) -> dict[str, float]:
        """The metrics of the log window, which is reset."""
        now = time.perf_counter()
        seconds = max(now - self._window_start, 1e-9)
        report: dict[str, float] = {}
        if self._candidates:
            report = {
                "sift/kept_fraction": self._kept / self._candidates,
                **{f"sift/{key}": self._sums[key] / count for key, count in self._counts.items() if count},
                "sift/candidates_per_second": self._candidates / seconds,
                "sift/scoring_share": self._scoring_seconds / seconds,
                "sift/tokens_trained": self.tokens_trained,
                "sift/tokens_skipped": self.tokens_skipped,
            }
        self._window_start, self._scoring_seconds, self._candidates, self._kept = now, 0.0, 0, 0
        self._sums, self._counts = {}, {}
        return report

    def restart(self, totals: Mapping[str, int]) -> None:
        """Begin a training run, at the totals of the checkpoint it resumes from (or none)."""
        self.report()
        self.tokens_trained = int(totals.get("tokens_trained", 0))
        self.tokens_skipped = int(totals.get("tokens_skipped", 0))

    def totals(self) -> dict[str, int]:
        """The totals that a checkpoint stores."""
        return {"tokens_trained": self.tokens_trained, "tokens_skipped": self.tokens_skipped}
