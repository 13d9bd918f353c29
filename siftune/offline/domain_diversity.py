"""Diversity between and within domains, for pools whose rows carry a label (DaaR, arXiv 2502.04380, section 3).

    phi_inter(x in D_k) = sum over j != k of cos(x, C_j)         inter-diversity scores -phi: far from the others first
    phi_intra(x in D_k) = cos(x, C_k)                            intra-diversity scores phi: near its own first
    C_k = mean of e(x) over D_k, e(x) = mean over a row's tokens of the embedding layer's output

Global figures (in `Scores.info`): the mean distance between two centroids, and of every domain the variance about its
centroid. Cost: two passes over the pool, each a look-up per token (`layer` 0) or a truncated forward; memory one shard.

Shapes: `n` rows of the pool, `B` rows of a shard, `K` domains, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import hash_json
from ..models.backbone import Backbone, DType
from ..records import SHARD_ROWS, Pool, Scores, Shard, ShardResult
from .base import OfflineMethod, SerialEngine
from .centroids import Embedder, LabelCentroids, Sums, SumTask, labels_of
from .daar.centroids import cosines

MOST_DOMAINS = 1000
"""Labels of a pool at most: a column with more does not hold domains."""
LONGEST = 100
"""Characters of a label at most: what is longer, or has several lines, is text."""
BANDS = ((0, 20), (20, 40), (40, 60), (60, 80), (80, 100))


@dataclass(frozen=True, eq=False)
class PhiTask:
    """Columns of a shard: `inter` and `intra`, phi of every row, float32; `label` int16; `tokens` int32."""

    embedder: Embedder
    label_column: str
    learned: LabelCentroids

    @property
    def key(self) -> str:
        return hash_json(["phi", 1, self.embedder.key, self.label_column, self.learned.key])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        embedded = self.embedder(pool, shard)
        label_B, reasons = labels_of(pool, shard, self.label_column, self.learned.domains)
        reasons = {**embedded.reasons, **reasons}
        cosine_BK = cosines(embedded.columns["embedding"], self.learned.centroids)
        own_domain = (np.arange(len(shard)), np.maximum(label_B, 0))
        intra_B = cosine_BK[own_domain]
        others_BK = cosine_BK.copy()
        others_BK[own_domain] = 0.0
        inter_B = others_BK.sum(axis=1)
        without_features = [row - shard.start for row in reasons]
        label_B[without_features] = -1
        has_label = label_B >= 0
        columns: dict[str, NDArray[Any]] = {
            "inter": np.where(has_label, inter_B, np.nan).astype(np.float32),
            "intra": np.where(has_label, intra_B, np.nan).astype(np.float32),
            "label": label_B,
            "tokens": embedded.columns["tokens"],
        }
        return ShardResult(columns, reasons)


@dataclass(kw_only=True, eq=False)
class _LabelledDiversity(OfflineMethod):
    """Base of the two methods: their options, the centroids that both learn, and the bands."""

    phi: ClassVar[str]
    """The column of `PhiTask` that the method ranks by."""
    sign: ClassVar[float]
    """-1 where a small phi is kept."""
    min_domains: ClassVar[int]

    model: str
    """Model whose embedding layer is read: a folder or a hub id."""
    label_column: str
    """Your column that holds a row's domain: text or a number."""
    band: str | None = None
    """Only this part of every domain, in the score's order: 0-20, 20-40, 40-60, 60-80, 80-100 (paper), or any such."""
    layer: int = 0
    """0 is the embedding layer (paper); n is the mean state after n decoder layers."""
    max_length: int = 512
    """Tokens read of a row (paper: 512)."""
    dtype: DType = "auto"
    """`auto`, `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch; None is the device's default."""

    learned: LabelCentroids | None = field(default=None, init=False, repr=False)
    """The result of `fit` or `load`."""

    def check(self) -> None:
        """Check settings and model before any weight is loaded. Raises `UserError`."""
        if self.layer < 0:
            raise UserError(f"layer={self.layer} is not a layer; set it to 0 for the embedding layer, or 1 and more")
        read_band(self.band)
        _ = self._embedder().backbone.config, self._embedder().backbone.tokenizer

    def feature_task(self, *, for_fit: bool) -> Embedder:
        """The task that reads the model; the same for `fit` and for `score`."""
        return self._embedder()

    def backbone(self) -> Backbone:
        return self._embedder().backbone

    def _embedder(self) -> Embedder:
        settings = (self.model, max(1, self.layer), self.max_length, self.dtype, self.device)
        cached: dict[Any, Backbone] = self.__dict__.setdefault("_backbones", {})
        if settings not in cached:
            model, layer, length, dtype, device = settings
            cached[settings] = Backbone(model, layer=layer, max_length=length, dtype=dtype, device=device)
        return Embedder(cached[settings], layer=self.layer, token_budget=self.token_budget)

    def labels(self, pool: Pool) -> tuple[str, ...]:
        """The pool's domains, sorted; read once per pool. Raises `UserError` for a column that holds none, or too
        few."""
        read: dict[tuple[str, str], tuple[str, ...]] = self.__dict__.setdefault("_labels", {})
        settings = (pool.fingerprint, self.label_column)
        if settings not in read:
            read[settings] = _domains(pool, self.label_column)
        domains = read[settings]
        if len(domains) < self.min_domains:
            raise UserError(
                f"{self.name} needs at least {self.min_domains} domains, and column {self.label_column!r} holds "
                f"{len(domains)} ({', '.join(domains)}); name another --label-column"
            )
        return domains

    def fit(self, pool: Pool) -> Self:
        """Learn every domain's centroid from the pool's rows that have a label."""
        self.check()
        domains = self.labels(pool)
        embedder = self._embedder()
        engine = self.engine or SerialEngine()
        task = SumTask(embedder, self.label_column, domains)
        sums = Sums(len(domains), embedder.backbone.width)
        pending: dict[int, ShardResult] = {}
        due = 0
        for shard, part in engine.run(task, pool, pool.shards(), label="centroids"):
            pending[shard.index] = part
            while due in pending:  # in the pool's order, whatever order they arrive in
                sums.add(pending.pop(due).columns)
                due += 1
        self.learned = sums.centroids(domains)
        return self

    def shard_task(self, pool: Pool) -> PhiTask:
        if self.learned is None:
            raise UserError(f"{self.name} is not fitted; call fit(pool) first")
        return PhiTask(self._embedder(), self.label_column, self.learned)

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """phi, signed so that higher is kept; rows outside the band of their own domain have none."""
        assert self.learned is not None
        domains, label_n = self.learned.domains, columns["label"]
        values = (self.sign * columns[self.phi]).astype(np.float32)
        place_n = places(values, label_n)
        info = {
            "label_column": self.label_column,
            "phi": self.phi,
            "bands": _band_facts(columns[self.phi], place_n),
            **self.learned.facts(),
        }
        reasons = dict(reasons)
        if (band := read_band(self.band)) is not None:
            low, high = band
            outside = np.flatnonzero(~np.isnan(values) & ~((place_n >= low / 100) & (place_n < high / 100)))
            reasons |= {int(row): f"outside the band {low:g}-{high:g} of its domain" for row in outside}
            values[outside] = np.nan
            info["band"] = [low, high]
        return Scores(
            pool=pool,
            method=self.name,
            values=values,
            reasons=reasons,
            tokens=columns["tokens"],
            domains=domains,
            pseudo_labels=label_n,
            info=info,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the centroids (safetensors). Raises `UserError` before `fit`."""
        if self.learned is None:
            raise UserError(f"{self.name} is not fitted, there is nothing to save; call fit(pool) first")
        return self.learned.save(folder)

    @classmethod
    def load(cls, folder: str | Path, **fields: Any) -> Self:
        """A fitted method from a run folder; `fields` are its options."""
        method = cls(**fields)
        method.learned = LabelCentroids.load(folder)
        return method


@dataclass(kw_only=True, eq=False)
class InterDiversity(_LabelledDiversity):
    """Rows far from the other domains first: minus the sum of a row's cosines to the other domains' centroids.

    Raises `UserError` for settings, a model or a label column that cannot be used.

    >>> from siftune.offline.domain_diversity import InterDiversity
    >>> InterDiversity(model="Qwen/Qwen2.5-7B", label_column="source", band="0-20").fit(pool).score(pool)
    """

    name: ClassVar[str] = "inter-diversity"
    phi: ClassVar[str] = "inter"
    sign: ClassVar[float] = -1.0
    min_domains: ClassVar[int] = 2


@dataclass(kw_only=True, eq=False)
class IntraDiversity(_LabelledDiversity):
    """Rows near the centroid of their own domain first: the cosine of a row to it.

    Raises `UserError` for settings, a model or a label column that cannot be used.

    >>> from siftune.offline.domain_diversity import IntraDiversity
    >>> IntraDiversity(model="Qwen/Qwen2.5-7B", label_column="source", band="80-100").fit(pool).score(pool)
    """

    name: ClassVar[str] = "intra-diversity"
    phi: ClassVar[str] = "intra"
    sign: ClassVar[float] = 1.0
    min_domains: ClassVar[int] = 1


# --- domains and bands ------------------------------------------------------------------------------------------------


def _domains(pool: Pool, column: str) -> tuple[str, ...]:
    """The labels of the pool's rows, sorted. Raises `UserError` for a column without labels, or with too many."""
    labels: set[str] = set()
    for start in range(0, len(pool), SHARD_ROWS):
        labels_of(pool, Shard(0, start, min(start + SHARD_ROWS, len(pool))), column, None, labels)
        if len(labels) > MOST_DOMAINS:
            raise UserError(f"column {column!r} holds more than {MOST_DOMAINS} labels; name one that holds domains")
    if text := next((label for label in sorted(labels) if len(label) > LONGEST or "\n" in label), None):
        raise UserError(
            f"column {column!r} holds text, not domains ({text[:40]!r}...); name one that holds a row's domain"
        )
    if not labels:
        raise UserError(f"no row has a label in column {column!r}; name the column that holds domains (--label-column)")
    return tuple(sorted(labels))


def read_band(band: str | None) -> tuple[float, float] | None:
    """`20-40` as (20.0, 40.0), percent. Raises `UserError` for anything but 0 <= low < high <= 100.

    >>> read_band("0-20")
    (0.0, 20.0)
    """
    if band is None:
        return None
    low, separator, high = str(band).replace("\N{EN DASH}", "-").replace("%", "").partition("-")
    try:
        read = float(low), float(high)
    except ValueError:
        separator = ""
        read = 0.0, 0.0
    if not separator or not 0 <= read[0] < read[1] <= 100:
        raise UserError(f"band={band!r} is not a band of a domain; use LOW-HIGH in percent, such as 0-20 or 80-100")
    return read


def places(values: NDArray[np.float32], label_n: NDArray[np.int16]) -> NDArray[np.float64]:
    """Of every row the share of its domain's rows that come before it, best first, in [0, 1); NaN without a score.

    Ties go to the lower row. Shape `(n,)`.

    >>> places(np.array([1, 3, 2, 9], np.float32), np.array([0, 0, 0, 1], np.int16)).round(2).tolist()
    [0.67, 0.0, 0.33, 0.0]
    """
    place_n = np.full(len(values), np.nan)
    for label in np.unique(label_n[~np.isnan(values)]):
        rows = np.flatnonzero((label_n == label) & ~np.isnan(values))
        ordered = rows[np.argsort(-values[rows].astype(np.float64), kind="stable")]
        place_n[ordered] = np.arange(len(ordered)) / len(ordered)
    return place_n


def _band_facts(phi_n: NDArray[np.float32], place_n: NDArray[np.float64]) -> dict[str, Any]:
    """Rows and mean phi of the paper's five bands."""
    facts = {}
    for low, high in BANDS:
        inside = (place_n >= low / 100) & (place_n < high / 100)
        mean = round(float(phi_n[inside].astype(np.float64).mean()), 6) if inside.any() else None
        facts[f"{low}-{high}"] = {"rows": int(inside.sum()), "mean_phi": mean}
    return facts
