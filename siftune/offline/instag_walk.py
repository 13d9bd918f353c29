"""InsTag's diverse sampling as one pass over the tags, exactly (arXiv 2308.07074, "complexity-first diverse sampling").

The definition passes over the rows repeatedly, in order of tag count: a pass begins with no tag covered and takes every
row left that adds a tag, until all rows are taken. A tag that is covered in a pass is covered in all passes before it,
so one counter per tag determines the pass in which a row adds something: the least counter of its tags. Cost: one look
at each tag of each row, where the definition looks at every row left in every pass.

Shapes: `n` rows in the order of the passes, `T` tags of a row at most.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NO_TAG = 0


def passes(tags_nT: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pass, from 0, that takes each row; rows are in the order of the passes, `NO_TAG` pads short rows.

    A row without tags adds nothing in any pass: it gets the number after the last one. Shape `(n,)`.

    >>> passes(np.array([[7, 8], [7, 0], [9, 7], [0, 0]])).tolist()
    [0, 1, 0, 2]
    """
    rows, columns = np.nonzero(tags_nT != NO_TAG)
    kinds, codes = np.unique(tags_nT[rows, columns], return_inverse=True)
    ends = np.searchsorted(rows, np.arange(1, len(tags_nT) + 1)).tolist()
    covered = [0] * len(kinds)
    flat: list[int] = codes.tolist()
    taken, start = [], 0
    for end in ends:
        row_tags = flat[start:end]
        start = end
        if not row_tags:
            taken.append(-1)
            continue
        lowest_coverage = min([covered[code] for code in row_tags])
        for code in row_tags:
            if covered[code] == lowest_coverage:
                covered[code] = lowest_coverage + 1
        taken.append(lowest_coverage)
    passes_n = np.array(taken, dtype=np.int64)
    passes_n[passes_n < 0] = max(covered, default=0)
    return passes_n
