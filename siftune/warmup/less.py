"""LESS: rows whose training step points where the target's gradient does (arXiv 2402.04333).

    score(x) = max over subtasks s of  sum_i eta_i cos( P g_i(s), P a_i(x) )

over the checkpoints i of a warm-up LoRA run on a drawn part of the pool, eta_i the run's mean learning rate in epoch i;
g_i(s) the mean gradient of the subtask's target rows, a_i(x) Adam's step for the row's gradient with the checkpoint's
moments, P a projection (see `row_features`). The loss of a row is the mean over its label tokens. Higher is kept.
`subspace="gist"` compares inside the span of the target's gradients alone (GIST, arXiv 2602.18584).
Cost: the warm-up run; one forward and backward of pool and target per checkpoint. Memory: one shard of features at 2
bytes a number; they are dropped once they are compared, unless `keep_features`.

Axes: `B` rows of a shard, `C` checkpoints, `S` subtasks, `F` numbers of a feature, `M` target rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from ..errors import UserError
from ..files import hash_bytes, hash_json
from ..hook.row_index import preserved_random_state
from ..models.backbone import Backbone, DType
from ..models.causal_lm import CausalLM
from ..models.tokenize_rows import VERSION as TOKENS_VERSION
from ..models.tokenize_rows import Encoder, Text, Tokens, check_text
from ..offline.daar.scoring import StoredFeatures
from ..offline.draw import draw
from ..offline.picking import Pick
from ..offline.similarity import SimilarityMethod, similarity_result
from ..offline.target import TargetRows, refuse_unusable, without_target_rows
from ..records import Pool, Shard, ShardResult, ShardTask
from .row_features import Moments, Preconditioner, Projection, RowFeatures
from .tuning import WarmedUp, WarmUp, checkpoint_file, subset, warm_up

ROWS_AT_ONCE = 512
"""Rows whose features are in full precision at a time."""
HELD = 0.95
"""Share of the target gradients' squared singular values that GIST's subspace holds."""


@dataclass(frozen=True, eq=False)
class GradientTask:
    """Features of one shard's rows: columns `hidden` float16 `(rows, C, F)`, each of length 1, `tokens` int32."""

    lm: CausalLM
    warmup: str
    """Folder of the warm-up run: its name is the content of everything that determined it."""
    checkpoints: int
    dimension: int | None
    """Numbers of a projected gradient; None: no projection."""
    seed: int
    preconditioner: Preconditioner
    text: Text

    @property
    def key(self) -> str:
        facts = [Path(self.warmup).name, self.checkpoints, self.dimension, self.seed, self.preconditioner, self.text]
        return hash_json(["row gradients", 2, TOKENS_VERSION, self.lm.key, *facts])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_network"}

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        usable = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        rows, encoded, reasons = self.encoded(pool, usable)
        columns: dict[str, NDArray[Any]] = {"tokens": np.full(len(shard), -1, dtype=np.int32)}
        positions = np.array(rows, dtype=np.int64) - shard.start
        columns["tokens"][positions] = [len(tokens.input_ids) for tokens in encoded]
        for checkpoint in range(self.checkpoints):
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                vectors, failed = self.features(encoded[part], checkpoint, self.preconditioner)
                with np.errstate(invalid="ignore", divide="ignore"):
                    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
                if "hidden" not in columns:
                    shape = (len(shard), self.checkpoints, units.shape[1])
                    columns["hidden"] = np.full(shape, np.nan, dtype=np.float16)
                columns["hidden"][positions[part], checkpoint] = units
                reasons |= {rows[start + index]: reason for index, reason in failed.items()}
        if "hidden" not in columns:
            columns["hidden"] = np.full((len(shard), self.checkpoints, 1), np.nan, dtype=np.float16)
        return ShardResult(columns, reasons)

    def encoded(self, pool: Pool, rows: list[int]) -> tuple[list[int], list[Tokens], dict[int, str]]:
        """The rows that have label tokens, their tokens, and why the others have none."""
        encode = Encoder(self.lm.tokenizer, self.text, self.lm.length)
        kept: list[int] = []
        tokens: list[Tokens] = []
        reasons: dict[int, str] = {}
        for row, result in encode.over(pool, rows):
            if isinstance(result, Tokens):
                kept.append(row)
                tokens.append(result)
            else:
                reasons[row] = str(result)
        return kept, tokens, reasons

    def features(
        self, rows: list[Tokens], checkpoint: int, preconditioner: Preconditioner
    ) -> tuple[NDArray[Any], dict[int, str]]:
        """Features `(R, F)` of rows under a checkpoint, of any length, and why a row has none."""
        features: RowFeatures | None = self.__dict__.get("_network")
        if features is None:
            features = RowFeatures(self._adapted(), Projection(self.dimension, self.seed), self.lm.token_budget)
            self.__dict__["_network"] = features
        stored = load_file(str(checkpoint_file(Path(self.warmup), checkpoint)))
        weights = {name: weight for name, weight in features.model.named_parameters() if weight.requires_grad}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(stored[f"weight.{name}"])
        moments = None
        if preconditioner == "adam":
            step = float(stored["step"])
            moments = {name: Moments(stored[f"first.{name}"], stored[f"second.{name}"], step) for name in weights}
        return features.of(rows, moments=moments)

    def _adapted(self) -> Any:
        from peft import PeftModel

        network = self.lm.parts.causal
        with preserved_random_state():  # PEFT draws initial weights before it reads the adapter's
            return PeftModel.from_pretrained(network, self.warmup, is_trainable=True).eval()  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class TargetDirections:
    """What rows are compared with."""

    mean_CSF: NDArray[np.float64]
    """Mean gradient of every subtask under every checkpoint."""
    basis: tuple[NDArray[np.float64], ...]
    """Per checkpoint `(F, k)`, orthonormal, of the span of the target's gradients; `()` without a subspace."""
    rates: tuple[float, ...]
    """eta_i."""

    @property
    def key(self) -> str:
        """Content hash."""
        arrays = [hash_bytes(np.ascontiguousarray(array).tobytes()) for array in (self.mean_CSF, *self.basis)]
        return hash_json(["less target", 1, list(self.mean_CSF.shape), arrays, list(self.rates)])

    def similarity(self, features_BCF: NDArray[Any]) -> NDArray[np.float64]:
        """`sum_i eta_i cos(mean target gradient, feature)` for every row and subtask, `(B, S)`."""
        total = np.zeros((len(features_BCF), self.mean_CSF.shape[1]))
        for checkpoint, rate in enumerate(self.rates):
            mean_SF, row_BF = self.mean_CSF[checkpoint], features_BCF[:, checkpoint].astype(np.float64)
            if self.basis:
                mean_SF, row_BF = mean_SF @ self.basis[checkpoint], row_BF @ self.basis[checkpoint]
            with np.errstate(invalid="ignore", divide="ignore"):
                mean_SF = mean_SF / np.linalg.norm(mean_SF, axis=1, keepdims=True)
                row_BF = row_BF / np.linalg.norm(row_BF, axis=1, keepdims=True)
            total += rate * (row_BF @ mean_SF.T)
        return total


def span(gradients_MF: NDArray[np.float64], held: float = HELD) -> NDArray[np.float64]:
    """Orthonormal columns `(F, k)`: the fewest right singular vectors that hold this share of the squared singular values."""
    _, values, vectors = np.linalg.svd(gradients_MF, full_matrices=False)
    energy = np.cumsum(values**2) / max(float((values**2).sum()), 1e-300)
    count = int(np.searchsorted(energy, held - 1e-12)) + 1
    result: NDArray[np.float64] = vectors[:count].T
    return result


@dataclass(frozen=True, eq=False)
class LessTask:
    """Similarities of a shard's rows with every subtask: see `similarity_result`."""

    features: ShardTask
    directions: TargetDirections
    known: TargetRows

    @property
    def key(self) -> str:
        return hash_json(["less", 1, self.features.key, self.directions.key, self.known.key])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        left_out = without_target_rows(pool, shard.start, shard.stop, self.known)
        result = self.features(pool, shard)  # of the target's rows too, so that it serves any target
        features_BCF = result.columns["hidden"]
        usable = np.isfinite(features_BCF).all(axis=(1, 2))
        usable[np.array(sorted(left_out), dtype=np.int64) - shard.start] = False
        places = np.flatnonzero(usable)
        parts = [
            self.directions.similarity(features_BCF[places[start : start + ROWS_AT_ONCE]])
            for start in range(0, len(places), ROWS_AT_ONCE)
        ]
        similarity_BS = np.concatenate([np.empty((0, self.directions.mean_CSF.shape[1])), *parts])
        rows = (shard.start + places).tolist()
        done = similarity_result(shard, rows, pool.source.ids(rows), similarity_BS, {**result.reasons, **left_out})
        return ShardResult({**done.columns, "tokens": result.columns["tokens"].astype(np.int32)}, done.reasons)


@dataclass(kw_only=True, eq=False)
class Less(SimilarityMethod):
    """Rows whose training step points where the target's gradient does, over the checkpoints of a warm-up run.

    Raises `UserError` for settings, a target, a pool or a model that cannot be used.

    >>> from siftune.warmup.less import Less
    >>> Less(model="Qwen/Qwen2.5-0.5B", target="queries.jsonl").fit(pool).score(pool).keep(fraction=0.05)
    """

    name: ClassVar[str] = "less"

    pick: Pick = "max"
    """How rows are picked from their similarity to each subtask: max (paper), mean, or round-robin (subtasks take turns)."""
    model: str
    """The causal LM that is to be tuned: a folder or a hub id."""
    share: float = 0.05
    """Share of the pool's usable rows that the warm-up run trains on (paper: 0.05)."""
    epochs: int = 4
    """Epochs of the warm-up run; each gives a checkpoint (paper: 4)."""
    learning_rate: float = 2e-5
    """Learning rate of the warm-up run, falling to 0 (paper: 2e-5)."""
    rank: int = 8
    """Rank of the LoRA adapter, on all linear layers."""
    batch: int = 8
    """Rows of an optimiser step of the warm-up run."""
    preconditioner: Preconditioner = "adam"
    """A row's gradient as it is (none), or as the step that Adam would take with the checkpoint's moments (adam, paper)."""
    subspace: Literal["gist"] | None = None
    """`gist`: compare only inside the span of the target's gradients."""
    dimension: int | None = 8192
    """Numbers of a row's projected gradient (paper: 8192); None: not projected, for tiny models."""
    keep_features: bool = False
    """Keep every row's features in the cache, 2 bytes for each number and checkpoint: another target then costs no pass over the pool."""
    text: Text = "auto"
    """How a row becomes tokens: `auto`, `chat` or `prompt`, as in a recipe."""
    max_length: int = 1024
    """Tokens of a row at most."""
    dtype: DType = "auto"
    """`auto`, `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch of the gradient pass, padding counted; None is half of the device's default for a forward."""
    seed: int = 0
    """Seed of the drawn part, of the warm-up run and of the projection."""

    warmed: WarmedUp | None = field(default=None, init=False, repr=False)
    """The warm-up run, once fitted."""
    directions: TargetDirections | None = field(default=None, init=False, repr=False)
    """The result of `fit`."""

    def check(self) -> None:
        """Check settings, target and model folder before any weight is loaded. Raises `UserError`."""
        super().check()
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share} must be above 0 and at most 1; the paper's is 0.05")
        if self.preconditioner not in ("none", "adam"):
            raise UserError(f"preconditioner={self.preconditioner!r} is not known; use none or adam")
        if self.subspace not in (None, "gist"):
            raise UserError(f"subspace={self.subspace!r} is not known; use gist, or leave it out")
        settings = self._settings()
        settings.check()
        if self.dimension is not None and self.dimension < 1:
            raise UserError(f"dimension={self.dimension} must be at least 1; the paper's is 8192")
        lm = self._lm()
        lm.check()
        check_text(self.text, lm.tokenizer, model=str(self.model), format=self.read_target().pool.format)

    def inputs(self) -> dict[str, str]:
        return super().inputs() | {"model": self._lm().key}

    def backbone(self) -> Backbone:
        return self._lm().files

    def groups(self) -> list[NDArray[np.int64]]:
        return [np.array([index]) for index in range(len(self.read_target().groups))]

    def _settings(self) -> WarmUp:
        names = ("max_length", "learning_rate", "rank", "batch", "epochs", "seed", "device", "dtype")
        return WarmUp(model=str(self.model), **{name: getattr(self, name) for name in names})

    def _lm(self) -> CausalLM:
        """One model per method, so that it loads once."""
        settings = {name: getattr(self, name) for name in ("device", "dtype", "max_length", "token_budget")}
        cached: dict[Any, CausalLM] = self.__dict__.setdefault("_models", {})
        key = (str(self.model), *settings.values())
        if key not in cached:
            cached[key] = CausalLM(str(self.model), **settings)
        return cached[key]

    def fit(self, pool: Pool) -> Self:
        """Run the warm-up on a drawn part of the pool, and compute the target's gradients under its checkpoints."""
        self.check()
        check_text(self.text, self._lm().tokenizer, model=str(self.model), format=pool.format)
        drawn = self._drawn(pool)
        self.warmed = warm_up(self._settings(), subset(pool, drawn), None, cache=self.cache, moments=True)
        target, task = self.read_target(), self._gradient_task()
        rows, encoded, reasons = task.encoded(target.pool, target.rows.tolist())
        place = {int(row): index for index, row in enumerate(target.rows)}
        refuse_unusable(target, {place[row]: reason for row, reason in reasons.items()})
        assert len(rows) == len(target)
        means, basis = [], []
        for checkpoint in range(task.checkpoints):
            gradients, failed = task.features(encoded, checkpoint, "none")
            refuse_unusable(target, failed)
            gradients_MF = gradients.astype(np.float64)
            means.append(np.stack([gradients_MF[group].mean(axis=0) for group in target.groups]))
            if self.subspace == "gist":
                basis.append(span(gradients_MF))
        self.directions = TargetDirections(np.stack(means), tuple(basis), tuple(self.warmed.facts["learning_rates"]))
        return self

    def _drawn(self, pool: Pool) -> NDArray[np.int64]:
        """The rows of the warm-up run, by content; rows of the target are left out."""
        usable = len(pool) - len(pool.reasons)
        count = max(1, round(self.share * usable))
        drawn = draw(pool, count, seed=self.seed, purpose="warm-up of less")
        known = TargetRows.of(self.read_target())
        kept = [row.row for row in known.split(pool.read(drawn.tolist()))[0]]
        if not kept:
            raise UserError("every row that the warm-up run would train on is in the target; raise share or the pool")
        return np.array(kept, dtype=np.int64)

    def _gradient_task(self) -> GradientTask:
        if self.warmed is None:
            raise UserError("less is not fitted; call fit(pool) first")
        count = len(self.warmed.facts["learning_rates"])
        folder = str(self.warmed.folder)
        key = (folder, count, self.dimension, self.seed, self.preconditioner, self.text)
        cached: dict[Any, GradientTask] = self.__dict__.setdefault("_tasks", {})
        if key not in cached:
            cached[key] = GradientTask(self._lm(), *key)
        return cached[key]

    def shard_task(self, pool: Pool) -> LessTask:
        if self.directions is None:
            raise UserError("less is not fitted; call fit(pool) first")
        task: ShardTask = self._gradient_task()
        if self.keep_features and self.store is not None:
            task = StoredFeatures(task, self.store)
        return LessTask(task, self.directions, TargetRows.of(self.read_target()))

    def facts(self) -> dict[str, Any]:
        assert self.warmed is not None
        assert self.directions is not None
        subspace: Mapping[str, Any] = {}
        if self.directions.basis:
            subspace = {"subspace_dimensions": [array.shape[1] for array in self.directions.basis]}
        return {"warmup": dict(self.warmed.facts), "preconditioner": self.preconditioner, **subspace}
