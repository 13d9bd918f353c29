"""Scoring one shard with fitted probes: h(x) streams through both and is dropped (DaaR, arXiv 2502.04380, stage 7).

Cost: the truncated forward over the shard's real tokens, plus two small MLPs; memory one shard of features, whatever
the pool's size.

Axes: `B` rows of the shard, `D` width, `K` domains.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...data.formats import TEXT_FORM
from ...errors import UserError
from ...files import hash_json
from ...records import Pool, Shard, ShardResult, ShardTask
from ..base import ArrayStore
from .probes import apply, entropy
from .state import Learned


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """A feature task that keeps every shard's features in a store, keyed by the content of the shard's rows."""

    features: ShardTask
    store: ArrayStore

    @property
    def key(self) -> str:
        return self.features.key

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        rows = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        content = [{**asdict(row), "row": row.row - shard.start} for row in pool.read(rows)]
        key = hash_json(["daar-features", self.key, TEXT_FORM, len(shard), content])
        if stored := self.store.get(key):
            columns, meta = stored
            return ShardResult(columns, {shard.start + int(offset): why for offset, why in meta["reasons"].items()})
        result = self.features(pool, shard)
        reasons = {str(row - shard.start): why for row, why in result.reasons.items()}
        self.store.put(key, dict(result.columns), {"reasons": reasons})
        return result


@dataclass(frozen=True, eq=False)
class ScoreTask:
    """Columns of a shard: `diversity` (psi_div), `entropy` (of psi_dom), `probabilities` `(B, K)`, all float32;
    `tokens` int32, `truncated` int8. Picklable with the probes inside; the model loads on first use."""

    features: ShardTask
    learned: Learned

    @property
    def key(self) -> str:
        return hash_json(["daar-score", 1, TEXT_FORM, self.features.key, self.learned.key])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        result = self.features(pool, shard)
        hidden_BD = result.columns["hidden"]
        width = self.learned.domain_probe.width
        if hidden_BD.shape[1] != width:
            raise UserError(
                f"the model's features have width {hidden_BD.shape[1]}, the probes {width}; use the model that the probes were fitted on"
            )
        sound = np.flatnonzero(np.isfinite(hidden_BD).all(axis=1))
        rows_BD = torch.from_numpy(np.ascontiguousarray(hidden_BD[sound], dtype=np.float32))
        h, p = entropy(apply(self._placed("domain_probe"), rows_BD))
        reward = apply(self._placed("reward_probe"), rows_BD).squeeze(1).cpu().numpy()
        columns: dict[str, NDArray[Any]] = {
            "diversity": _spread(reward, sound, len(shard)),
            "entropy": _spread(h, sound, len(shard)),
            "probabilities": _spread(p, sound, len(shard)),
            "tokens": result.columns["tokens"].astype(np.int32),
            "truncated": result.columns["truncated"].astype(np.int8),
        }
        reasons = dict(result.reasons)
        for offset in np.flatnonzero(np.isnan(columns["diversity"]) | np.isnan(columns["entropy"])).tolist():
            row = shard.start + offset
            if row not in pool.reasons and row not in reasons:
                reasons[row] = "the features or the probes gave NaN"
            for name in ("diversity", "entropy", "probabilities"):
                columns[name][offset] = np.nan
        return ShardResult(columns, reasons)

    def _placed(self, name: str) -> Any:
        """A probe on the device of the features' model: beside a GPU backbone a CPU probe would be the bottleneck."""
        inner: Any = self.features.features if isinstance(self.features, StoredFeatures) else self.features
        backbone = getattr(inner, "backbone", None)
        return getattr(self.learned, name).to(backbone.torch_device if backbone is not None else "cpu")


def _spread(values: NDArray[Any], rows: NDArray[np.int64], length: int) -> NDArray[np.float32]:
    """Values at `rows` of an array of `length` rows, NaN elsewhere."""
    spread = np.full((length, *values.shape[1:]), np.nan, dtype=np.float32)
    spread[rows] = values
    return spread
