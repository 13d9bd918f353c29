"""Choice inside strata: candidates of one domain, source or length are ranked against each other alone.

Each stratum of a choice keeps a number of rows in proportion to its candidates (largest remainder), so that a score
cannot change the mix of the strata. Strata are the values of a column, or bands of `N` tokens (`length:N`). Cost: none.
Works with every method; `random` inside the same strata is the baseline.

Axes: `B` candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import UserError
from ..models.hidden_states import real_tokens

Batch = Mapping[str, Any]
STRATUM = "stratum"
"""The column of measured candidates that holds their strata."""
LENGTH = "length:"


def length_band(strata: str) -> int | None:
    """Tokens of a band of `length:N`; None where `strata` names a column. Raises `UserError` for another N.

    >>> length_band("length:128"), length_band("domain")
    (128, None)
    """
    if not strata.startswith(LENGTH):
        return None
    number = strata.removeprefix(LENGTH)
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"strata={strata!r} must be 'length:N' with N tokens, at least 1, or the name of a column")
    return int(number)


def check_strata(strata: object, *, keep_tokens: int | None) -> None:
    """Raise `UserError` unless `strata` is None, `length:N` or a name, and no token budget is set beside it."""
    if strata is None:
        return
    if not isinstance(strata, str) or not strata:
        raise UserError(f"strata={strata!r} must be the name of a column, or 'length:N'")
    length_band(strata)
    if keep_tokens is not None:
        raise UserError(
            f"keep_tokens={keep_tokens} is a budget of all candidates and strata={strata!r} divides them; remove one"
        )


def strata_of(strata: str, batch: Batch, values: Sequence[Any] | torch.Tensor | None) -> torch.Tensor:
    """The stratum of each candidate, int64 `(B,)`: equal numbers are one stratum, in every process.

    `values` are those of the column; None where the batch has none. Raises `UserError` where they are missing, or are
    not one a candidate.
    """
    tokens_B = real_tokens(batch).sum(dim=1)
    if (band := length_band(strata)) is not None:
        return torch.div(tokens_B, band, rounding_mode="floor")
    if values is None:
        raise UserError(
            f"strata={strata!r} is no column of the batch ({', '.join(map(str, batch))}); add it, one value a row, or use "
            "strata='length:N'"
        )
    listed = values.tolist() if isinstance(values, torch.Tensor) else list(values)
    if len(listed) != len(tokens_B):
        raise UserError(f"the column {strata!r} has {len(listed)} values for {len(tokens_B)} candidates; pass one each")
    return torch.tensor([_number(value) for value in listed], dtype=torch.int64)


def _number(value: Any) -> int:
    digest = hashlib.blake2b(f"{type(value).__name__} {value!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def quotas(sizes: Sequence[int], count: int) -> list[int]:
    """`count` rows in proportion to `sizes`, by the largest remainder; ties go to the larger stratum, then the first.

    >>> quotas([6, 3, 1], 4)
    [3, 1, 0]
    """
    total = sum(sizes)
    count = min(count, total)
    result = [size * count // total if total else 0 for size in sizes]
    order = sorted(range(len(sizes)), key=lambda at: (-(sizes[at] * count % total), -sizes[at], at)) if total else []
    for at in order[: count - sum(result)]:
        result[at] += 1
    return result
