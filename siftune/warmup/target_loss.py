"""target-loss: rows whose loss falls most, relative to what it was, once the model has seen the target (TAP, arXiv 2605.09404).

    score(x) = (l(x; theta_0) - l(x; theta_T)) / l(x; theta_0)

l is the mean cross-entropy over a row's label tokens, theta_0 the model, theta_T the model after a short LoRA run on the
target rows alone. A part of the target is held out of that run and watched: the adapter with its lowest loss is taken.
Higher is kept. Cost: the run on the target, two forwards of the complete model over the pool; no gradient of any row.

Axes: `B` rows of a shard.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..evaluation.target import check_adapter
from ..files import hash_file, hash_json
from ..hook.row_index import preserved_random_state
from ..models.backbone import Backbone, DType
from ..models.causal_lm import CausalLM, label_losses
from ..models.hidden_states import ModelParts, unwrap_model
from ..models.tokenize_rows import VERSION as TOKENS_VERSION
from ..models.tokenize_rows import Encoder, Text, Tokens, check_text
from ..offline.draw import numbers
from ..offline.target import TargetMethod, TargetRows, without_target_rows
from ..records import Pool, Scores, Shard, ShardResult
from ..sft.adapters import ADAPTER, ADAPTER_WEIGHTS
from .tuning import WarmUp, subset, warm_up


@dataclass(frozen=True, eq=False)
class AdaptedLM(CausalLM):
    """A causal LM with a LoRA adapter beside its weights; `without_adapter` gives the model itself."""

    adapter: str = ""
    """The adapter's folder."""

    @property
    def key(self) -> str:
        """Content hash of the model and of the adapter."""
        adapter = [hash_file(Path(self.adapter) / name) for name in (ADAPTER, ADAPTER_WEIGHTS)]
        return hash_json([super().key, adapter])

    @property
    def parts(self) -> ModelParts:
        """Decoder and head with the adapter, in eval mode, on the device."""
        if "adapted" not in self._cached:
            from peft import PeftModel

            with preserved_random_state():  # PEFT draws initial weights before it reads the adapter's
                network = PeftModel.from_pretrained(super().parts.causal, self.adapter)  # type: ignore[arg-type]
            self._cached["adapted"] = unwrap_model(network.eval().requires_grad_(False))
        parts: ModelParts = self._cached["adapted"]
        return parts

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the losses are those of the model itself."""
        called: Any = self.parts.called
        with called.disable_adapter():
            yield

    def release(self) -> None:
        self._cached.pop("adapted", None)
        super().release()


@dataclass(frozen=True, eq=False)
class TargetLossTask:
    """Columns of a shard: `score`, `loss_before`, `loss_after` float32; `tokens` int32."""

    lm: AdaptedLM
    text: Text
    known: TargetRows

    @property
    def key(self) -> str:
        return hash_json(["target-loss", 1, TOKENS_VERSION, self.lm.key, self.text, self.known.key])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        left_out = without_target_rows(pool, shard.start, shard.stop, self.known)
        usable = [row for row in range(shard.start, shard.stop) if row not in pool.reasons and row not in left_out]
        encode = Encoder(self.lm.tokenizer, self.text, self.lm.length)
        reasons = dict(left_out)
        rows: list[int] = []
        encoded: list[Tokens] = []
        for row, tokens in encode.over(pool, usable):
            if isinstance(tokens, Tokens):
                rows.append(row)
                encoded.append(tokens)
            else:
                reasons[row] = str(tokens)
        after_B = label_losses(self.lm, encoded)
        with self.lm.without_adapter():
            before_B = label_losses(self.lm, encoded)
        with np.errstate(divide="ignore", invalid="ignore"):
            score_B = (before_B - after_B) / before_B
        for row, value in zip(rows, score_B.tolist(), strict=True):
            if not np.isfinite(value):
                reasons[row] = "the relative loss drop is NaN or infinite"
        positions = np.array(rows, dtype=np.int64) - shard.start
        columns: dict[str, NDArray[Any]] = {}
        finite = np.isfinite(score_B)
        for name, values in (("score", score_B), ("loss_before", before_B), ("loss_after", after_B)):
            columns[name] = np.full(len(shard), np.nan, dtype=np.float32)
            columns[name][positions[finite]] = values[finite]
        columns["tokens"] = np.full(len(shard), -1, dtype=np.int32)
        columns["tokens"][positions] = [len(tokens.input_ids) for tokens in encoded]
        return ShardResult(columns, reasons)


@dataclass(kw_only=True, eq=False)
class TargetLoss(TargetMethod):
    """Rows whose loss falls most, relatively, after a short LoRA run on the target.

    Raises `UserError` for settings, a target, an adapter or a model that cannot be used.

    >>> from siftune.warmup.target_loss import TargetLoss
    >>> TargetLoss(model="Qwen/Qwen2.5-0.5B", target="queries.jsonl").fit(pool).score(pool).keep(fraction=0.05)
    """

    name: ClassVar[str] = "target-loss"
    fit_grows: ClassVar[bool] = False

    model: str
    """The causal LM that is to be tuned: a folder or a hub id."""
    adapter: str | None = None
    """An adapter of an earlier run (RUN/adapter) for the same model: no warm-up run. None: one is made from the target."""
    steps: int = 60
    """Optimiser steps of the warm-up run."""
    learning_rate: float = 2e-4
    """Learning rate of the warm-up run, falling to 0."""
    rank: int = 8
    """Rank of the LoRA adapter, on all linear layers."""
    batch: int = 8
    """Target rows of an optimiser step."""
    held_out: float = 0.2
    """Share of the target that is not trained on but watched: the adapter with its lowest loss is taken."""
    text: Text = "auto"
    """How a row becomes tokens: `auto`, `chat` or `prompt`, as in a recipe."""
    max_length: int = 1024
    """Tokens of a row at most; label tokens beyond it do not count."""
    dtype: DType = "auto"
    """`auto`, `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch when losses are measured, padding counted; None is the device's default."""
    seed: int = 0
    """Seed of the held-out draw and of the warm-up run."""

    fitted_adapter: Path | None = field(default=None, init=False, repr=False)
    """The adapter's folder, once fitted."""
    warmup: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """Facts of the warm-up run."""

    def check(self) -> None:
        """Check settings, target, adapter and model folder before any weight is loaded. Raises `UserError`."""
        super().check()
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out={self.held_out} must be a share between 0 and 1, such as 0.2")
        target = self.read_target()
        if self.adapter is None and len(target) < 2:
            raise UserError("target: it has one row, and target-loss trains on some and watches others; add rows")
        self._settings().check()
        lm = self._lm("")
        lm.check()
        check_text(self.text, lm.tokenizer, model=str(self.model), format=target.pool.format)
        if self.adapter is not None:
            self._check_adapter(Path(self.adapter).expanduser())

    def _check_adapter(self, adapter: Path) -> None:
        for name in (ADAPTER, ADAPTER_WEIGHTS):
            if not (adapter / name).is_file():
                raise UserError(f"adapter={str(self.adapter)!r} holds no {name}; set the adapter folder of a run")
        check_adapter(adapter, self._lm("").files)

    def inputs(self) -> dict[str, str]:
        hashes = super().inputs() | {"model": self._lm("").key}
        if self.adapter is not None:
            hashes["adapter"] = hash_file(Path(self.adapter).expanduser() / ADAPTER_WEIGHTS)
        return hashes

    def backbone(self) -> Backbone:
        return self._lm("").files

    def _settings(self) -> WarmUp:
        names = ("max_length", "learning_rate", "rank", "batch", "steps", "seed", "device", "dtype")
        return WarmUp(model=str(self.model), **{name: getattr(self, name) for name in names})

    def _lm(self, adapter: str) -> AdaptedLM:
        """One model per method and adapter, so that it loads once."""
        settings = {name: getattr(self, name) for name in ("device", "dtype", "max_length", "token_budget")}
        cached: dict[Any, AdaptedLM] = self.__dict__.setdefault("_models", {})
        key = (str(self.model), adapter, *settings.values())
        if key not in cached:
            cached[key] = AdaptedLM(str(self.model), adapter=adapter, **settings)
        return cached[key]

    def fit(self, pool: Pool) -> Self:
        """Run the warm-up on the target, or take the adapter that is set."""
        self.check()
        if self.adapter is not None:
            self.fitted_adapter = Path(self.adapter).expanduser()
            self.warmup = {"adapter": str(self.adapter)}
            return self
        target = self.read_target()
        ids = target.pool.source.ids(target.rows.tolist())
        order = target.rows[np.argsort(numbers(self.seed, "held out of the target", ids), kind="stable")]
        count = min(max(1, round(self.held_out * len(order))), len(order) - 1)
        done = warm_up(
            self._settings(), subset(target.pool, order[count:]), subset(target.pool, order[:count]), cache=self.cache
        )
        self.fitted_adapter, self.warmup = done.folder, {**done.facts, "held_out_rows": count}
        self._warn_of_collapse()
        return self

    def _warn_of_collapse(self) -> None:
        losses = self.warmup["held_out_losses"]
        start, best = losses[0][1], min(losses, key=lambda entry: entry[1])
        self.warmup["best_step"] = best[0]
        if not best[1] < start:
            warnings.warn(
                f"the warm-up run did not lower the loss of the held-out target rows ({start:.4f} before, {best[1]:.4f} "
                "at best), so the scores say little; lower --learning-rate, or use more target rows",
                stacklevel=3,
            )

    def shard_task(self, pool: Pool) -> TargetLossTask:
        if self.fitted_adapter is None:
            raise UserError("target-loss is not fitted; call fit(pool) first, or set adapter=")
        check_text(self.text, self._lm("").tokenizer, model=str(self.model), format=pool.format)
        return TargetLossTask(self._lm(str(self.fitted_adapter)), self.text, TargetRows.of(self.read_target()))

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """The relative loss drop as the score; mean losses before and after, and the warm-up run, in `info`."""
        scored = ~np.isnan(columns["score"])
        info: dict[str, Any] = {"rows_scored": int(scored.sum()), "warmup": self.warmup}
        for name in ("loss_before", "loss_after"):
            values = columns[name][scored].astype(np.float64)
            info[f"mean_{name}"] = round(float(values.mean()), 6) if len(values) else None
        return Scores(
            pool=pool,
            method=self.name,
            values=columns["score"],
            reasons=reasons,
            tokens=columns["tokens"],
            info=info | {"target": self.target_facts(reasons)},
        )

    # --- save and load ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Copy the adapter into `folder`/adapter, for `--adapter` of another run. Raises `UserError` before `fit`."""
        if self.fitted_adapter is None:
            raise UserError("target-loss is not fitted, there is nothing to save; call fit(pool) first")
        return save_adapter(self.fitted_adapter, self.warmup, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, **settings: Any) -> Self:
        """A fitted method from a run folder. `settings` are its fields.

        >>> TargetLoss.load("run", model="./model", target="queries.jsonl").score(other_pool)
        """
        method = cls(**settings)
        method.fitted_adapter, method.warmup = load_adapter(Path(folder))
        return method


# --- the adapter in a run folder --------------------------------------------------------------------------------------

ADAPTER_FOLDER, WARMUP = "adapter", "warmup.json"


def save_adapter(adapter: Path, facts: Mapping[str, Any], folder: Path) -> Path:
    """Copy an adapter into a run folder, with the hashes of its files in `warmup.json`."""
    from shutil import copyfile

    from ..files import atomic_path, write_json

    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        with atomic_path(target / name) as temporary:
            copyfile(adapter / name, temporary)
    hashes = {name: hash_file(target / name) for name in (ADAPTER, ADAPTER_WEIGHTS)}
    write_json(folder / WARMUP, {"warmup": dict(facts), "files": hashes})
    return folder / WARMUP


def load_adapter(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter that `save_adapter` wrote, and its facts. Raises `UserError` where it has changed since."""
    from ..files import read_json

    adapter = folder / ADAPTER_FOLDER
    try:
        stored = read_json(folder / WARMUP)
        intact = all(hash_file(adapter / name) == digest for name, digest in stored["files"].items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no adapter of target-loss ({type(error).__name__}); fit again") from error
    if not intact:
        raise UserError(f"{adapter} has changed since its run wrote it; use another --run, which makes it again")
    return adapter, dict(stored["warmup"])
