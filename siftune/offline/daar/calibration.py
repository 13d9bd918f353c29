"""Calibration of psi_dom: one temperature for its logits, and the expected calibration error.

Rewards and importance weights read p(domain | row) as probabilities, and an MLP fitted to a few thousand rows is
over-confident. Temperature: Guo et al. 2017 (arXiv 1706.04599), fitted by negative log-likelihood to targets smoothed
by one pseudo-row (Platt 1999), so that a validation split without a mistake does not drive it to 0.
Cost: nothing beside the probes.

Axes: `B` validation rows, `K` domains.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

BINS = 15
"""Equal-width bins of confidence, as in the paper that defined the error."""
LOWEST, HIGHEST = 0.05, 20.0
"""Bounds of the temperature."""


def temperature(logits_BK: NDArray[np.float64], labels_B: NDArray[np.int64]) -> float:
    """T > 0 that makes softmax(logits / T) likeliest; columns of -inf (absent domains) are left out.

    1.0 where there is nothing to fit to (no rows, or one domain).

    >>> temperature(np.array([[8.0, 0.0], [0.0, 8.0], [8.0, 0.0]]), np.array([0, 1, 1])) > 1
    True
    """
    present = np.isfinite(logits_BK).all(axis=0)
    rows, domains = len(logits_BK), int(present.sum())
    if rows == 0 or domains < 2:
        return 1.0
    logits = logits_BK[:, present]
    targets = np.full((rows, domains), 1 / (rows + domains))
    targets[np.arange(rows), (np.cumsum(present) - 1)[labels_B]] = (rows + 1) / (rows + domains)

    def negative_log_likelihood(log_temperature: float) -> float:
        return -float((targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    bounds = (np.log(LOWEST), np.log(HIGHEST))
    optimum = minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(optimum.x))


def calibration_error(logits_BK: NDArray[np.float64], labels_B: NDArray[np.int64]) -> float:
    """Expected calibration error: mean |accuracy - confidence| over confidence bins, weighted by their rows."""
    p = softmax(logits_BK, axis=1)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels_B
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / max(1, len(labels_B)))
