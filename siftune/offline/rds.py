"""RDS: rows whose representations are near the target's (RDS+, arXiv 2503.01807).

    similarity(x, q) = cos(r(x), r(q)),   r = position-weighted mean of the last hidden states (`models.representations`)

Higher is more similar. Cost: one forward of the complete model over pool and target; memory one shard of
representations, whatever the pool's size: they are dropped once they are compared, unless `keep_representations`.

Axes: `B` rows of a shard, `M` target rows, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import hash_bytes, hash_json
from ..models.backbone import Backbone, DType
from ..models.representations import RepresentationTask, backbone_of, representations_of
from ..records import Pool, Shard, ShardResult, ShardTask
from .daar.scoring import StoredFeatures
from .similarity import SimilarityMethod, similarity_result
from .target import TargetRows, refuse_unusable, without_target_rows


def unit(vectors_BD: NDArray[Any]) -> NDArray[np.float64]:
    """Vectors of length 1, in float64; NaN for a vector of zeros."""
    vectors = vectors_BD.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return result


@dataclass(frozen=True, eq=False)
class RDSTask:
    """Similarities of a shard's rows: see `similarity_result`."""

    features: ShardTask
    """Representations of a shard's rows."""
    target_MD: NDArray[np.float64]
    """The target's representations, of length 1."""
    known: TargetRows

    @property
    def key(self) -> str:
        vectors = hash_bytes(np.ascontiguousarray(self.target_MD).tobytes())
        return hash_json(["rds", 1, self.features.key, list(self.target_MD.shape), vectors, self.known.key])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        left_out = without_target_rows(pool, shard.start, shard.stop, self.known)
        result = self.features(pool, shard)  # of the target's rows too, so that it serves any target
        hidden_BD = result.columns["hidden"].copy()
        hidden_BD[np.array(sorted(left_out), dtype=np.int64) - shard.start] = np.nan
        rows = (shard.start + np.flatnonzero(np.isfinite(hidden_BD).all(axis=1))).tolist()
        similarity_BM = unit(hidden_BD[np.array(rows, dtype=np.int64) - shard.start]) @ self.target_MD.T
        tokens = result.columns["tokens"]
        done = similarity_result(shard, rows, pool.source.ids(rows), similarity_BM, {**result.reasons, **left_out})
        return ShardResult({**done.columns, "tokens": tokens.astype(np.int32)}, done.reasons)


@dataclass(kw_only=True, eq=False)
class RDS(SimilarityMethod):
    """Rows whose representation in the model is nearest to the target's first.

    Raises `UserError` for settings, a target or a model that cannot be used.

    >>> from siftune.offline.rds import RDS
    >>> RDS(model="Qwen/Qwen2.5-7B", target="queries.jsonl").fit(pool).score(pool).keep(count=10_000)
    """

    name: ClassVar[str] = "rds"
    fit_grows: ClassVar[bool] = False

    model: str
    """The causal LM whose last hidden states are compared, best the one that is tuned: a folder or a hub id."""
    max_length: int = 2048
    """Tokens of a row that are read at most."""
    dtype: DType = "auto"
    """`auto` (bfloat16 for a 16-bit checkpoint on CUDA, else float32), `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""
    keep_representations: bool = False
    """Keep every row's representation in the cache, 4 D bytes each: another target then needs no forward of the pool."""

    target_vectors: NDArray[np.float64] | None = field(default=None, init=False, repr=False)
    """The result of `fit`, `(M, D)`, of length 1."""

    def check(self) -> None:
        """Check settings, target and model folder before any weight is loaded. Raises `UserError`."""
        super().check()
        backbone = self.backbone()
        _ = backbone.config, backbone.tokenizer

    def feature_task(self, *, for_fit: bool) -> RepresentationTask:
        """The task that reads the model; the same for `fit` and for `score`."""
        return RepresentationTask(self.backbone(), token_budget=self.token_budget)

    def backbone(self) -> Backbone:
        """One backbone per method, so that fit and score load the model once."""
        return backbone_of(self)

    def fit(self, pool: Pool) -> Self:
        """Compute the target's representations. Raises `UserError` where a target row has none."""
        self.check()
        target = self.read_target()
        done = representations_of(self.backbone(), target.pool, target.rows.tolist(), token_budget=self.token_budget)
        refuse_unusable(target, done.reasons)
        self.target_vectors = unit(done.vectors)
        return self

    def shard_task(self, pool: Pool) -> RDSTask:
        if self.target_vectors is None:
            raise UserError("rds is not fitted; call fit(pool) first")
        task: ShardTask = self.feature_task(for_fit=False)
        if self.keep_representations and self.store is not None:
            task = StoredFeatures(task, self.store)
        return RDSTask(task, self.target_vectors, TargetRows.of(self.read_target()))

    def facts(self) -> dict[str, Any]:
        return {"layers": self.backbone().layer, "width": self.backbone().width}
