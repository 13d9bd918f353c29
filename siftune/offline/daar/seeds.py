"""Seed rows: a few example rows per domain, from which the domains' centroids are computed (DaaR, arXiv 2502.04380).

The file is JSONL (or anything `load_pool` reads) whose rows carry `domain` beside the row's own fields, in any format
that a pool may have. Cost: reading a small file.

Axes: `S` seed rows, `K` domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.load import load_pool
from ...errors import UserError
from ...records import Pool

DOMAIN = "domain"
"""The column that names a seed row's domain."""

SeedSource = str | Path | Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class Seeds:
    """Seed rows by domain; domains in the order in which the file first names them."""

    pool: Pool
    domains: tuple[str, ...]
    labels: NDArray[np.int64]
    """Shape `(S,)`, index into `domains`."""

    @property
    def counts(self) -> dict[str, int]:
        """Seed rows per domain."""
        return {name: int((self.labels == index).sum()) for index, name in enumerate(self.domains)}


def read_seeds(seeds: SeedSource, *, cache: str | Path | None = None, fewest: int = 2) -> Seeds:
    """Read a seeds file, or take a mapping from domain to rows (dicts of the row's own fields).

    Raises `UserError`, by file and line, for an invalid row or one without a domain, and for fewer domains than
    `fewest`.

    >>> read_seeds("seeds.jsonl").counts
    {'coding': 15, 'mathematics': 15}
    """
    from_memory = isinstance(seeds, Mapping)
    try:
        pool = load_pool(_as_dataset(seeds) if isinstance(seeds, Mapping) else seeds, cache=cache)
    except UserError as error:
        raise UserError(f"seeds: {error}") from error
    rows = pool.eligible.tolist()
    names = [original.get(DOMAIN) for original in pool.source.originals(rows)]
    for row, name in zip(rows, names, strict=True):
        if not isinstance(name, str) or not name.strip():
            file, line = pool.source.locations([row])[0]
            place = f"seed row {row}" if from_memory else f"seeds {file} line {line}"
            raise UserError(f'{place} has domain={name!r}; name its domain, such as {{"domain": "mathematics", ...}}')
    domains = tuple(dict.fromkeys(str(name) for name in names))
    if len(domains) < fewest:
        raise UserError(
            f"seeds hold {len(domains)} domain ({', '.join(domains)}); add rows of at least {fewest} domains"
        )
    index = {name: number for number, name in enumerate(domains)}
    return Seeds(pool, domains, np.array([index[str(name)] for name in names], dtype=np.int64))


def _as_dataset(seeds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """The mapping's rows as one dataset, each with its domain."""
    from datasets import Dataset

    for name, rows in seeds.items():
        if isinstance(rows, (str, Mapping)) or not all(isinstance(row, Mapping) for row in rows):
            raise UserError(f"seeds[{name!r}] is not a list of rows; pass dicts such as {{'instruction': ..., ...}}")
    flat = [{**row, DOMAIN: name} for name, rows in seeds.items() for row in rows]
    if not flat:
        raise UserError("seeds hold no row; add at least one row for each of two domains")
    return Dataset.from_list(flat)
