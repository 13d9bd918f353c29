"""Which questions of a task are asked where there are more than wanted: a seeded draw over all of them.

A smaller number draws a part of the same questions. Cost: one permutation.
"""

from __future__ import annotations

import math

import numpy as np


def draw(held: int, limit: int | None, share: float | None, seed: int) -> list[int] | None:
    """Numbers of the questions that are asked, ascending: at most `limit`, and at most the share of `held`, rounded up as
    lm-eval rounds it. None where that is all of them.

    >>> len(draw(7, None, 0.5, seed=0))
    4
    """
    count = min(held if limit is None else limit, held if share is None else math.ceil(held * share))
    if count >= held:
        return None
    drawn: list[int] = np.sort(np.random.default_rng(seed).permutation(held)[:count]).tolist()
    return drawn
