"""Budgets: from one score per row to the rows that are kept. Pure numpy, no model, no state.

A budget rule is separate from a score, so a stored score is re-cut at any budget without touching the model.
Ties go to the lower row; a row whose score is NaN is never kept.

Shapes: `n` rows of the pool, `K` domains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

Floats = NDArray[np.float32] | NDArray[np.float64]
Rows = NDArray[np.int64]
Keep = int | float | str

LONGEST = 100
"""Characters of an amount at most."""


@dataclass(frozen=True)
class Amount:
    """How much to keep, as the user wrote it: exactly one of `count` (rows) and `fraction` (of the rows, 0 < f <=
    1)."""

    count: int | None = None
    fraction: float | None = None

    def rows(self, total: int) -> int:
        """Rows kept out of `total`: K = floor(keep * total + 0.5) for a fraction; an int above `total` keeps all.

        >>> Amount(fraction=0.2).rows(8), Amount(count=3).rows(2)
        (2, 2)
        """
        if self.count is not None:
            return min(self.count, total)
        assert self.fraction is not None
        return min(total, math.floor(self.fraction * total + 0.5))


def parse_keep(keep: Keep) -> Amount:
    """Read `keep` the same way in Python, YAML and on the command line.

    An int is a number of rows, a float below 1 a fraction; the text forms are `20%`, `0.2`, `1/8`, `2` and `all`.
    Raises `UserError` for anything else, and for 1.0, which could mean one row or all of them.

    >>> parse_keep("20%"), parse_keep("1/8").fraction, parse_keep(2).count
    (Amount(count=None, fraction=0.2), 0.125, 2)
    """
    wrong = UserError(
        f"cannot parse keep={keep!r}; expected a number of rows (8), a fraction (0.2 or 1/8), a percentage (20%) or 'all'"
    )
    if isinstance(keep, bool):
        raise wrong
    if isinstance(keep, (int, np.integer)):
        if keep < 1:
            raise UserError(f"keep={keep} keeps no row; pass at least 1 row or a fraction above 0")
        return Amount(count=int(keep))
    if isinstance(keep, (float, np.floating)):
        return _unambiguous(float(keep), keep)
    if not isinstance(keep, str):
        raise wrong
    text = keep.strip()
    if len(text) > LONGEST:
        raise UserError(
            f"cannot parse keep={text[:LONGEST]!r}...; expected a number of rows, a fraction or a percentage"
        )
    if re.fullmatch(r"[+]?\d+", text):
        return parse_keep(int(text))
    number = r"(\d+(?:\.\d*)?|\.\d+)"
    if match := re.fullmatch(number + r"\s*%", text):
        return share(float(match[1]) / 100, keep)
    if match := re.fullmatch(number + r"\s*/\s*" + number, text):
        if float(match[2]) == 0:
            raise wrong
        return share(float(match[1]) / float(match[2]), keep)
    if re.fullmatch(number, text):
        return _unambiguous(float(text), keep)
    if text.lower() == "all":
        return Amount(fraction=1.0)
    raise wrong


def _unambiguous(value: float, keep: Keep) -> Amount:
    if value == 1:
        raise UserError(f"keep={keep!r} could mean all rows or one row; write keep='all' or keep=1")
    return share(value, keep)


def share(value: float, keep: Keep | None = None) -> Amount:
    """A fraction in (0, 1], 1 being all. Raises `UserError` for anything else, naming `keep` where the user wrote
    that."""
    if not 0 < value <= 1:
        raise UserError(
            f"keep={value if keep is None else keep!r} is not a fraction in (0, 1]; write a whole number for rows, or a share such as 20%"
        )
    return Amount(fraction=value)


def ranking(values: Floats) -> Rows:
    """Rows that have a score, best first; ties go to the lower row. Shape `(scored rows,)`.

    >>> ranking(np.array([1.0, np.nan, 2.0, 1.0])).tolist()
    [2, 0, 3]
    """
    scored = np.flatnonzero(~np.isnan(values))
    return scored[np.argsort(-values[scored].astype(np.float64), kind="stable")]


def top(values: Floats, count: int) -> Rows:
    """The `count` best rows, ascending by row. Shape `(min(count, scored rows),)`."""
    return np.sort(ranking(values)[:count])


def within_tokens(values: Floats, tokens: NDArray[np.int32], budget: int) -> Rows:
    """Best rows first while their token counts fit into `budget`, stopping at the first that does not; ascending.

    Stopping (instead of filling up with short rows further down) keeps the cut a prefix of the ranking, so a larger
    budget always contains a smaller one. Raises `UserError` when not even the best row fits.
    """
    order = ranking(values)
    if len(order) and (tokens[order] < 0).any():
        raise UserError("tokens= needs token counts, and this method has none; pass fraction= or count=")
    used = np.cumsum(tokens[order].astype(np.int64))
    kept = order[: int(np.searchsorted(used, budget, side="right"))]
    if len(order) and not len(kept):
        raise UserError(f"tokens={budget} is less than the best row alone ({int(used[0])} tokens); raise tokens=")
    return np.sort(kept)


def by_quota(values: Floats, labels: NDArray[np.int16], domains: Sequence[str], quota: Mapping[str, Keep]) -> Rows:
    """The best rows of every domain, each domain at its own amount of its own rows; `"*"` covers the other domains.

    The paper's customised selection (DaaR section 5, "7'") is `{"mathematics": "50%", "*": "10%"}`. A domain that is
    not named, with no `"*"`, keeps nothing. Raises `UserError` for a domain that the pool does not know.
    """
    unknown = [name for name in quota if name != "*" and name not in domains]
    if unknown:
        raise UserError(f"quota names the domain {unknown[0]!r}, which is not one of {', '.join(domains)}")
    kept = []
    for index, name in enumerate(domains):
        keep = quota.get(name, quota.get("*"))
        if keep is None:
            continue
        masked = np.where(labels == index, values, np.nan)
        kept.append(top(masked, parse_keep(keep).rows(int((~np.isnan(masked)).sum()))))
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=np.int64)


def importance_weights(probabilities: Floats, domains: Sequence[str], target_mix: Mapping[str, float]) -> Floats:
    """`w(x) = sum_k lambda_k p_k(x)` with `lambda_k = q(k) / p(k)` (DaaR, Prop. 3.2). Shape `(n,)`, NaN where p is.

    `target_mix` gives the target shares q(k), normalised to 1 (domains not named get 0); p(k) is the mean of p_k over
    the pool. Raises `UserError` for unknown domains, negative shares or shares that sum to 0.
    """
    unknown = [name for name in target_mix if name not in domains]
    if unknown:
        raise UserError(f"target_mix names the domain {unknown[0]!r}, which is not one of {', '.join(domains)}")
    shares = np.array([float(target_mix.get(name, 0.0)) for name in domains])
    if not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise UserError(f"target_mix={dict(target_mix)!r} must hold shares >= 0, at least one of them above 0")
    p = probabilities.astype(np.float64)
    present = np.nanmean(p, axis=0)
    with np.errstate(divide="ignore"):
        priorities = np.where(present > 0, (shares / shares.sum()) / present, 0.0)
    return p @ priorities
