"""Base of the methods that compare every row of the pool with every target row: bm25, rds.

A shard's result holds one similarity per row and target row; `score` streams the shards and picks (see `picking`), so
that only the M x n similarities are kept, never a representation. Cost beyond the method's own: that of the pick.

Axes: `B` rows of a shard, `N` rows of the pool, `M` target rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import cache_folder
from ..records import Pool, Scores, Shard, ShardResult, ShardTask
from .base import SerialEngine
from .draw import numbers
from .picking import PICKS, Pick, matrix, round_robin, subtask_means
from .target import TargetMethod


def similarity_result(
    shard: Shard,
    rows: Sequence[int],
    ids: Sequence[str],
    similarity_BM: NDArray[Any],
    reasons: Mapping[int, str],
    tokens: NDArray[np.int32] | None = None,
) -> ShardResult:
    """The result of a shard: `similarity` float32 `(rows, M)`, `tie` int64 from the row's content, `tokens` int32.

    `rows` are the pool's rows that `similarity_BM`, `ids` and `tokens` describe, in that order; a row with a similarity
    that is not finite gets a reason.
    """
    positions = np.asarray(rows, dtype=np.int64) - shard.start
    finite = np.isfinite(similarity_BM).all(axis=1)
    columns: dict[str, NDArray[Any]] = {
        "similarity": np.full((len(shard), similarity_BM.shape[1]), np.nan, dtype=np.float32),
        "tie": np.zeros(len(shard), dtype=np.int64),
    }
    columns["similarity"][positions[finite]] = similarity_BM[finite]
    columns["tie"][positions] = (numbers(0, "pick", ids) >> np.uint64(1)).astype(np.int64)
    if tokens is not None:
        columns["tokens"] = np.full(len(shard), -1, dtype=np.int32)
        columns["tokens"][positions] = tokens
    failed = {
        int(rows[int(index)]): "the similarity to the target is NaN or infinite" for index in np.flatnonzero(~finite)
    }
    return ShardResult(columns, {**failed, **reasons})


@dataclass(kw_only=True, eq=False)
class SimilarityMethod(TargetMethod):
    """Base of methods whose shard task is made of `similarity_result`; a subclass defines `shard_task`."""

    pick: Pick = "round-robin"
    """How rows are picked: round-robin (each target row in turn takes its best free row; subtasks alternate), mean or max similarity."""

    def check(self) -> None:
        """Check the pick and read the target. Raises `UserError`."""
        if self.pick not in PICKS:
            raise UserError(f"pick={self.pick!r} is not known; use {', '.join(PICKS)}")
        super().check()

    def groups(self) -> list[NDArray[np.int64]]:
        """Columns of `similarity` by subtask. The default has one column per target row; a method that compares with
        each subtask as one has one per subtask."""
        return self.read_target().groups

    @abstractmethod
    def shard_task(self, pool: Pool) -> ShardTask:
        """Columns `similarity` `(rows, M)`, `tie` and optionally `tokens` (see `similarity_result`)."""

    def score(self, pool: Pool) -> Scores:
        """Minus the position in the round robin, or the mean or largest similarity; streamed shard by shard."""
        engine = self.engine or SerialEngine()
        target = self.read_target()
        task = self.shard_task(pool)
        tie_N = np.zeros(len(pool), dtype=np.int64)
        tokens_N = np.full(len(pool), -1, dtype=np.int32)
        nearest_N = np.full(len(pool), -1, dtype=np.int32)
        values_N = np.full(len(pool), np.nan, dtype=np.float32)
        best_N = np.full(len(pool), np.nan, dtype=np.float32)
        reasons: dict[int, str] = {}
        counted = False
        groups = self.groups()
        compared_count = sum(len(group) for group in groups)
        columns = len(pool) if self.pick == "round-robin" else 0
        with matrix(compared_count, columns, cache_folder(self.cache)) as similarity_MN:
            for shard, result in engine.run(task, pool, pool.shards(), label=self.name):
                part = slice(shard.start, shard.stop)
                similarity_BM = result.columns["similarity"]
                scored = ~np.isnan(similarity_BM[:, 0])
                best_N[part] = similarity_BM.max(axis=1)
                nearest_N[part][scored] = similarity_BM[scored].argmax(axis=1)
                tie_N[part] = result.columns["tie"]
                if "tokens" in result.columns:
                    tokens_N[part], counted = result.columns["tokens"], True
                if self.pick == "round-robin":
                    similarity_MN[:, part] = similarity_BM.T
                else:
                    compared = subtask_means(similarity_BM, groups, by_subtask=bool(target.subtasks))
                    values_N[part] = compared.mean(axis=1) if self.pick == "mean" else compared.max(axis=1)
                reasons.update(result.reasons)
            if self.pick == "round-robin":
                order, taker = round_robin(similarity_MN, tie_N, groups)
                values_N[order] = -np.arange(len(order), dtype=np.float32)
                nearest_N[order] = taker
        reasons = {**reasons, **pool.reasons}
        info = self.facts() | {"pick": self.pick, "rows_scored": int((~np.isnan(values_N)).sum())}
        if info["rows_scored"]:
            info["mean_best_similarity"] = round(float(np.nanmean(best_N.astype(np.float64))), 6)
        return Scores(
            pool=pool,
            method=self.name,
            values=values_N,
            reasons=reasons,
            tokens=tokens_N if counted else None,
            target_rows=nearest_N if compared_count == len(target) else None,
            info=info | {"target": self.target_facts(reasons)},
        )

    def facts(self) -> dict[str, Any]:
        """Plain facts of the method for `Scores.info`."""
        return {}
