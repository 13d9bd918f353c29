"""All that crosses folders: `Pool`, `Row`, `Scores`, `Subset` (offline) and `RowScores`, `Kept` (online).

Frozen records with the few rules that belong to them; every other module makes or reads them. Nothing here knows a
file format, a model or a method: a `Pool` holds a `RowSource` that `siftune.data` hands in.

Shapes: `n` rows of the pool (bad ones included), `K` domains, `B` candidates of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from . import budget
from .errors import UserError

if TYPE_CHECKING:
    import torch

SHARD_ROWS = 4096
"""Rows of a shard. Lengths are sorted and batches cut inside one, so where a shard runs never changes a number."""


Message = Mapping[str, Any]
"""One message of a chat: `role`, `content` (a text), and, where it has them, `tool_calls`, `tool_call_id`, `name`,
`reasoning_content` and any further key of the user's."""

# --- offline: rows, scores, subsets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One good row in the words every method understands, whatever columns the user has.

    Alpaca rows fill `instruction`, `input`, `output`; prompt/completion rows `instruction` and `output`; plain text
    only `output`; chat rows fill `messages`, with `instruction` the turns before the last answer and `output` the
    last answer in plain text, so that methods which ask for a question and an answer work on them too.
    """

    row: int
    """0-based position in the pool as read, bad rows counted."""
    id: str
    """blake2b-128, as hex, of the canonical JSON of the row's original columns."""
    instruction: str
    input: str
    output: str
    messages: tuple[Message, ...] = ()
    """The messages of a chat row, as a chat template is given them; else empty."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools that the row offers, as a chat template is given them."""
    supervised: tuple[bool, ...] = ()
    """Of each message whether it is supervised; empty where the row does not say so."""
    weight: Any = None
    """The row's `weight` column as it is; read by training alone."""

    @property
    def question(self) -> str:
        """`instruction` and `input` on lines of their own; empty for plain text."""
        return "\n".join(part for part in (self.instruction, self.input) if part)


class RowSource(Protocol):
    """Where a pool's rows live: random access by position, memory independent of the pool's size, picklable.

    `rows` are positions of good rows for `read`, any positions for the others.
    """

    def __len__(self) -> int: ...
    def read(self, rows: Sequence[int]) -> list[Row]: ...
    def originals(self, rows: Sequence[int]) -> list[dict[str, Any]]: ...
    def ids(self, rows: Sequence[int]) -> list[str]: ...
    def locations(self, rows: Sequence[int]) -> list[tuple[str, int]]: ...
    def write(self, rows: Sequence[int], path: Path) -> None: ...


@dataclass(frozen=True, eq=False)
class Pool:
    """A pool of rows as read, bad ones included. Made by `siftune.load_pool`.

    >>> pool = siftune.load_pool("pool.jsonl")
    >>> len(pool), len(pool.eligible), pool.reasons
    """

    source: RowSource
    format: str
    """`alpaca`, `prompt-completion`, `messages` or `text`."""
    fingerprint: str
    """Content hash over every row's id in order, the reasons and the columns read: the pool's part of a cache key."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """Why a row takes no part (unparsable, missing field, duplicate dropped, ...), by row. Few, so a mapping."""
    duplicates: int = 0
    """Rows whose id an earlier row already has, kept or dropped."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def eligible(self) -> NDArray[np.int64]:
        """Positions of the rows that take part, ascending. Shape `(<= n,)`."""
        if not self.reasons:
            return np.arange(len(self), dtype=np.int64)
        mask = np.ones(len(self), dtype=bool)
        mask[np.fromiter(self.reasons, dtype=np.int64, count=len(self.reasons))] = False
        return np.flatnonzero(mask)

    def read(self, rows: Sequence[int]) -> list[Row]:
        """The rows at these positions, all of them eligible."""
        return self.source.read(rows)

    def shards(self) -> list[Shard]:
        """The pool cut into runs of `SHARD_ROWS` consecutive rows."""
        return [
            Shard(index, start, min(start + SHARD_ROWS, len(self)))
            for index, start in enumerate(range(0, len(self), SHARD_ROWS))
        ]


@dataclass(frozen=True, order=True)
class Shard:
    """Rows `start .. stop - 1` of a pool: the unit of work, of caching and of distribution."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What a method computed for one shard.

    `columns` are arrays whose first axis is the shard's rows (`score` float32, `tokens` int32, `probabilities`
    float32 `(rows, K)`, ...); rows that could not be scored have NaN and an entry in `reasons`, keyed by pool row.
    """

    columns: Mapping[str, NDArray[Any]]
    reasons: Mapping[int, str] = field(default_factory=dict)


class ShardTask(Protocol):
    """A picklable function of one shard; heavy parts (a model) are made on first call and not pickled."""

    @property
    def key(self) -> str:
        """Content hash of all that determines the result beside the rows: text form, model files, parameters."""
        ...

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult: ...


class Engine(Protocol):
    """Where shards run. Results are the same for every engine; order of arrival is not."""

    def run(
        self, task: ShardTask, pool: Pool, shards: Sequence[Shard], *, label: str
    ) -> Iterator[tuple[Shard, ShardResult]]: ...


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per row of a pool, higher is better, NaN with a reason where there is none.

    >>> scores = siftune.DaaR(model="Qwen/Qwen2.5-7B", seeds="seeds.jsonl").fit(pool).score(pool)
    >>> subset = scores.keep(fraction=0.2)
    """

    pool: Pool
    method: str
    values: NDArray[np.float32]
    """Shape `(n,)`, NaN where there is none."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """Why a row has no score, by row: the pool's own reasons and the method's."""
    tokens: NDArray[np.int32] | None = None
    """Shape `(n,)`, real tokens per row under the method's tokenizer, -1 where unknown."""
    domains: tuple[str, ...] = ()
    probabilities: NDArray[np.float32] | None = None
    """Shape `(n, K)`: p(domain | row), NaN rows where there is none."""
    pseudo_labels: NDArray[np.int16] | None = None
    """Shape `(n,)`: index into `domains`, -1 where there is none."""
    target_rows: NDArray[np.int32] | None = None
    """Shape `(n,)`: the target row, 0-based, that brought the row in or is most similar to it, -1 where there is none."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Plain facts of the fit (accuracies, correlations, counts), JSON-able, for the manifest and the report."""

    def __post_init__(self) -> None:
        n = len(self.pool)
        assert self.values.shape == (n,), self.values.shape
        assert self.values.dtype == np.float32, self.values.dtype
        silent = np.flatnonzero(np.isnan(self.values))
        assert all(int(row) in self.reasons for row in silent), "a row without a score needs a reason"

    def keep(
        self,
        *,
        fraction: float | str | None = None,
        count: int | None = None,
        tokens: int | None = None,
        quota: Mapping[str, budget.Keep] | None = None,
        target_mix: Mapping[str, float] | None = None,
    ) -> Subset:
        """Cut the ranking at a budget; exactly one of `fraction`, `count`, `tokens`, `quota`.

        `fraction` is of the eligible rows; `tokens` is a total of real tokens; `quota` is an amount per pseudo-domain
        (`{"mathematics": "50%", "*": "10%"}`). `target_mix` (shares per domain) replaces the score by the importance
        weight w(x) of DaaR's Prop. 3.2 and is cut by `fraction`, `count` or `tokens`. Raises `UserError` for a budget
        that does not fit.
        """
        budgets = {"fraction": fraction, "count": count, "tokens": tokens, "quota": quota}
        named = [name for name, value in budgets.items() if value is not None]
        if len(named) != 1:
            raise UserError(f"keep() needs exactly one of fraction, count, tokens and quota, not {named or 'none'}")
        values: Any = self.values
        if target_mix is not None:
            if quota is not None:
                raise UserError("quota and target_mix are two budgets; pass one of them")
            values = np.where(np.isnan(self.values), np.nan, self.weights(target_mix))
        rows: NDArray[np.int64]
        if quota is not None:
            if self.pseudo_labels is None:
                raise UserError(f"quota= needs domains, and {self.method} has none; pass fraction= or count=")
            rows = budget.by_quota(values, self.pseudo_labels, self.domains, quota)
        elif tokens is not None:
            if self.tokens is None:
                raise UserError(f"tokens= needs token counts, and {self.method} has none; pass fraction= or count=")
            rows = budget.within_tokens(values, self.tokens, tokens)
        else:
            rows = budget.top(values, self._rows_for(fraction, count))
        rule = {named[0]: budgets[named[0]]} | ({"target_mix": dict(target_mix)} if target_mix else {})
        self._warn_of_small_budget(len(rows))
        return Subset(self, rows, rule)

    def _warn_of_small_budget(self, kept: int) -> None:
        """Warn where the target has more rows than the budget keeps: some target rows then bring in nothing."""
        target_rows = self.info.get("target", {}).get("rows", 0)
        if 0 < kept < target_rows:
            warnings.warn(
                f"the target has {target_rows} rows and the budget keeps {kept}, so some target rows bring in nothing; "
                "raise the budget, or use fewer target rows",
                stacklevel=3,
            )

    def _rows_for(self, fraction: float | str | None, count: int | None) -> int:
        eligible = len(self.pool) - len(self.pool.reasons)
        if count is not None:
            if isinstance(count, bool) or int(count) != count or count < 1:
                raise UserError(f"count={count!r} is not a number of rows; it must be at least 1")
            if count > eligible:
                raise UserError(f"count={count} exceeds the {eligible} usable rows of the pool; lower it")
            return int(count)
        assert fraction is not None
        if isinstance(fraction, (int, float)) and not isinstance(fraction, bool):
            amount = budget.share(float(fraction))
        else:
            amount = budget.parse_keep(fraction)
        if amount.fraction is None:
            raise UserError(f"fraction={fraction!r} is a number of rows; pass count= or a share such as 20%")
        return amount.rows(eligible)

    def weights(self, target_mix: Mapping[str, float]) -> NDArray[Any]:
        """Importance weight w(x) of every row for the wanted shares (DaaR, Prop. 3.2). Shape `(n,)`."""
        if self.probabilities is None:
            raise UserError(f"target_mix= needs p(domain | row), and {self.method} has none; use daar")
        return budget.importance_weights(self.probabilities, self.domains, target_mix)


@dataclass(frozen=True, eq=False)
class Subset:
    """The rows a budget kept, ascending by position."""

    scores: Scores
    rows: NDArray[np.int64]
    """Shape `(kept,)`, positions in the pool, ascending."""
    rule: Mapping[str, Any]
    """The budget, as it was given."""

    def __len__(self) -> int:
        return len(self.rows)

    def ordered(self, order: Literal["original", "score"] = "original") -> NDArray[np.int64]:
        """The kept rows in the pool's order or best first."""
        if order == "original":
            return self.rows
        if order == "score":
            return self.rows[np.argsort(-self.scores.values[self.rows].astype(np.float64), kind="stable")]
        raise UserError(f"order={order!r} is not known; pass original or score")

    def write(self, path: str | Path, *, order: Literal["original", "score"] = "original") -> Path:
        """Write the user's own rows, every original column and type, as JSONL or Parquet by the file's suffix.

        An ordinary file of that name is replaced. Raises `UserError` for a file that the pool was read from, by any link.
        """
        self.scores.pool.source.write(self.ordered(order).tolist(), Path(path))
        return Path(path)


# --- online: what one batch's candidates scored, and which were kept ------------------------------------------------


@dataclass(frozen=True, eq=False)
class RowScores:
    """Scores of the B candidates of a batch: `total` and the method's own parts, float64 `(B,)`, on the CPU.

    A row that cannot be scored has NaN in every tensor and an entry in `reasons`. Parts read as attributes:
    `scores.intra`, `scores.inter` for UDS.
    """

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)

    def __getattr__(self, name: str) -> torch.Tensor:
        parts: Mapping[str, torch.Tensor] = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        raise AttributeError(f"RowScores has total and {', '.join(parts) or 'no parts'}, not {name!r}")

    def __len__(self) -> int:
        return len(self.total)


@dataclass(frozen=True, eq=False)
class Kept:
    """What `select` kept of one batch: `indices` int64 ascending (original order), every candidate's `scores`, and
    `batch`, the cut sub-batch, ready for the training forward."""

    indices: torch.Tensor
    scores: RowScores
    batch: Mapping[str, Any]
