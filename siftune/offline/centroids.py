"""Centroids of labelled domains, from one streaming pass: e(x) of a row, its label, sums per label.

e(x) is the mean over a row's real tokens of the embedding layer's output (DaaR, arXiv 2502.04380, section 3), which
needs no decoder layer to run; or of the states after `layer` decoder layers. Sums run in float64.
Cost: a look-up per token, or a truncated forward; memory one shard of features.

Shapes: `B` rows of a shard, `N` tokens of a batch, `K` domains, `D` width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.formats import TEXT_FORM
from ..data.protect import RUN, refuse_foreign
from ..errors import UserError
from ..files import atomic_path, hash_json
from ..models.backbone import Backbone
from ..models.features import NO_TOKENS, NOT_FINITE, ROWS_AT_ONCE, TOKEN_BUDGET, FeatureTask, batches
from ..models.tokenise import texts_of, tokenise
from ..records import Pool, Shard, ShardResult
from .daar.centroids import cosines, mean_pairwise_distance

FILE = "label_centroids.safetensors"


# --- e(x) -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Embedder:
    """e(x) of one shard's rows: columns `embedding` float32 `(B, D)` and `tokens` int32."""

    backbone: Backbone
    _: KW_ONLY
    layer: int = 0
    """0 is the embedding layer; n is the truncated model's state after n layers, its final norm applied."""
    token_budget: int | None = None

    @property
    def key(self) -> str:
        return hash_json(["label-embedding", 1, TEXT_FORM, self.backbone.key, self.layer, self.token_budget])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        if self.layer:
            result = FeatureTask(self.backbone, embedding=False, token_budget=self.token_budget)(pool, shard)
            columns = {"embedding": result.columns["hidden"], "tokens": result.columns["tokens"]}
            return ShardResult(columns, result.reasons)
        good = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        embedding_BD = np.full((len(shard), self.backbone.width), np.nan, dtype=np.float32)
        tokens = np.full(len(shard), -1, dtype=np.int32)
        reasons: dict[int, str] = {}
        for start in range(0, len(good), ROWS_AT_ONCE):
            batch = pool.read(good[start : start + ROWS_AT_ONCE])
            rows = tokenise(self.backbone, texts_of(batch, self.backbone.tokenizer))
            inside = np.array([row.row - shard.start for row in batch])
            means = look_up(self.backbone, [row.ids for row in rows], token_budget=self.token_budget)
            embedding_BD[inside] = means
            tokens[inside] = [len(row.ids) for row in rows]
            for row, tokenised, mean in zip(batch, rows, means, strict=True):
                if not np.isfinite(mean).all():
                    reasons[row.row] = NOT_FINITE if len(tokenised.ids) else tokenised.reason or NO_TOKENS
                    embedding_BD[row.row - shard.start] = np.nan
        return ShardResult({"embedding": embedding_BD, "tokens": tokens}, reasons)


@torch.no_grad()
def look_up(
    backbone: Backbone, ids: Sequence[NDArray[np.int32]], *, token_budget: int | None = None
) -> NDArray[np.float32]:
    """Mean over each text's tokens of the embedding layer's output, in float32, no decoder layer run. Shape `(B, D)`;
    NaN for a text without tokens."""
    layer = backbone.network.get_input_embeddings()  # type: ignore[operator]
    device = backbone.torch_device
    means_BD = np.full((len(ids), backbone.width), np.nan, dtype=np.float32)
    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    for batch in batches(lengths, token_budget or TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"])):
        flat_1N = torch.from_numpy(np.concatenate([ids[index] for index in batch]).astype(np.int64))[None]
        states_ND = layer(flat_1N.to(device))[0].float()
        pieces = states_ND.split([int(lengths[index]) for index in batch])
        means_BD[batch] = torch.stack([piece.mean(dim=0) for piece in pieces]).cpu().numpy()
    return means_BD


# --- labels -----------------------------------------------------------------------------------------------------------


def labels_of(
    pool: Pool, shard: Shard, column: str, domains: Sequence[str] | None, labels_seen: set[str] | None = None
) -> tuple[NDArray[np.int16], dict[int, str]]:
    """Index into `domains` of every row's label, int16 `(B,)`, -1 for rows without one, and the reasons; `labels_seen`
    collects the labels where `domains` is None. A label is text or a number; white space around it is ignored."""
    index = {name: number for number, name in enumerate(domains or ())}
    label_B = np.full(len(shard), -1, dtype=np.int16)
    reasons: dict[int, str] = {}
    good = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
    for start in range(0, len(good), ROWS_AT_ONCE):
        rows = good[start : start + ROWS_AT_ONCE]
        for row, original in zip(rows, pool.source.originals(rows), strict=True):
            value = original.get(column)
            if isinstance(value, (bool, list, dict)) or value is None or not str(value).strip():
                fault = "is absent" if value is None else "holds none"
                reasons[row] = f"no label: column {column} {fault}"
                continue
            label = str(value).strip()
            if labels_seen is not None:
                labels_seen.add(label)
            if domains is None:
                continue
            if label in index:
                label_B[row - shard.start] = index[label]
            else:
                reasons[row] = f"unknown label: {label[:60]} was not in the pool that was fitted"
    return label_B, reasons


# --- sums and centroids -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SumTask:
    """Sums of a shard: `sum` `(K, D)`, `square` (of the rows' squared lengths) `(K,)`, float64; `count` int64 `(K,)`.

    One line per domain, not per row: this task is streamed by `fit` alone and never gathered over rows.
    """

    embedder: Embedder
    label_column: str
    domains: tuple[str, ...]

    @property
    def key(self) -> str:
        return hash_json(["label-sums", 1, self.embedder.key, self.label_column, list(self.domains)])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        wide_BD = self.embedder(pool, shard).columns["embedding"].astype(np.float64)
        label_B, _ = labels_of(pool, shard, self.label_column, self.domains)
        label_B[~np.isfinite(wide_BD).all(axis=1)] = -1
        sums = Sums(len(self.domains), wide_BD.shape[1])
        for label in range(len(self.domains)):
            members = wide_BD[label_B == label]
            sums.sum[label], sums.square[label] = members.sum(axis=0), np.square(members).sum()
            sums.count[label] = len(members)
        return ShardResult({"sum": sums.sum, "square": sums.square, "count": sums.count})


class Sums:
    """Running sums over shards."""

    def __init__(self, domains: int, width: int) -> None:
        self.sum = np.zeros((domains, width))
        self.square = np.zeros(domains)
        self.count = np.zeros(domains, dtype=np.int64)

    def add(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """One more shard."""
        self.sum += columns["sum"]
        self.square += columns["square"]
        self.count += columns["count"]

    def centroids(self, domains: tuple[str, ...]) -> LabelCentroids:
        """C_k and the variance about it. Raises `UserError` for a domain without a row that has features."""
        for name, count in zip(domains, self.count.tolist(), strict=True):
            if not count:
                raise UserError(f"no row of the domain {name!r} has features (empty text?); remove the domain")
        mean_KD = self.sum / self.count[:, None]
        variance_K = np.maximum(self.square / self.count - np.square(mean_KD).sum(axis=1), 0.0)
        return LabelCentroids(domains, mean_KD, variance_K, self.count)


@dataclass(frozen=True, eq=False)
class LabelCentroids:
    """The result of `fit`: every domain's centroid, variance about it, and rows."""

    domains: tuple[str, ...]
    centroids: NDArray[np.float64]
    """Shape `(K, D)`."""
    variance: NDArray[np.float64]
    """Shape `(K,)`: mean squared distance of a domain's rows to its centroid."""
    rows: NDArray[np.int64]
    """Shape `(K,)`."""

    @property
    def key(self) -> str:
        """Content hash."""
        return hash_json([list(self.domains), self.centroids.tobytes().hex()])

    def facts(self) -> dict[str, Any]:
        """The global figures, for the manifest and the report."""
        return {
            "domains": list(self.domains),
            "domain_rows": dict(zip(self.domains, self.rows.tolist(), strict=True)),
            "domain_variance": dict(zip(self.domains, self.variance.round(9).tolist(), strict=True)),
            "centroid_distance": mean_pairwise_distance(self.centroids) if len(self.domains) > 1 else None,
            "centroid_cosines": cosines(self.centroids, self.centroids).round(6).tolist(),
        }

    def save(self, folder: str | Path) -> Path:
        """Write one safetensors file. Raises `UserError` for a file of that name that siftune did not write."""
        from safetensors.numpy import save

        if (Path(folder) / FILE).exists():
            try:
                self.load(folder)
            except UserError:
                refuse_foreign(Path(folder), [FILE], RUN)
        arrays = {"centroids": self.centroids, "variance": self.variance, "rows": self.rows}
        with atomic_path(Path(folder) / FILE) as temporary:
            temporary.write_bytes(save(arrays, {"domains": json.dumps(list(self.domains))}))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> LabelCentroids:
        """Read what `save` wrote. Raises `UserError` where it is absent."""
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / FILE
        try:
            with safe_open(path, framework="np") as stored:
                domains = tuple(json.loads(stored.metadata()["domains"]))
                return cls(domains, *(stored.get_tensor(name) for name in ("centroids", "variance", "rows")))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} holds no centroids of labelled domains; fit again") from error
