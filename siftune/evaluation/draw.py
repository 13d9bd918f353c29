"""Which questions of a task are used where it has more than the limit: a seeded draw over all of them.

A smaller limit draws a subset of the same questions. Cost: one permutation.
"""

from __future__ import annotations

import math

import numpy as np


def draw(total: int, limit: int | None, share: float | None, seed: int) -> list[int] | None:
    """Indices of the drawn questions, ascending: at most `limit`, and at most the share of `total`, rounded up as lm-eval
    rounds it. None where that is all of them.

    >>> len(draw(7, None, 0.5, seed=0))
    4
    """
    count = min(total if limit is None else limit, total if share is None else math.ceil(total * share))
    if count >= total:
        return None
    drawn: list[int] = np.sort(np.random.default_rng(seed).permutation(total)[:count]).tolist()
    return drawn
