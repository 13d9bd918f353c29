"""Deita: how complex a question is, how good its answer, and the best rows that are unlike each other.

    deita-c   expected rating of the question's complexity            Deita, arXiv 2312.15685, section 2.2
    deita-q   expected rating of the answer's quality                 section 2.3
    deita-d   complexity * quality, then a pass from the best row down that keeps a row unlike all kept before (2.4)

Higher is kept. In a chat every turn is rated; turns add up, as in the paper. Cost: one scorer forward per turn; for
deita-d two, one forward of the embedding model, and the greedy pass (see `deita_walk`).

Shapes: `n` rows of the pool, `D` width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import hash_json
from ..models.backbone import Backbone, DType
from ..models.causal_lm import CausalLM
from ..models.features import FeatureTask
from ..records import Pool, Scores, Shard, ShardResult
from .base import OfflineMethod
from .deita_walk import unlike
from .prompts import read_prompt
from .rating import Rater

Turns = Literal["sum", "mean", "last"]

COMPLEXITY = (
    "Below is a request that somebody put to an assistant. Judge how complex it is: how much knowledge, how many steps "
    "and how many conditions a good answer needs. 1 is trivial, 6 is very complex.\n\n"
    "Request:\n{question}\n\nComplexity from 1 to 6:"
)
QUALITY = (
    "Below are a request and an assistant's answer. Judge how good the answer is: correct, complete, clear and to the "
    "point. 1 is useless, 6 is excellent.\n\n"
    "Request:\n{question}\n\nAnswer:\n{answer}\n\nQuality from 1 to 6:"
)

_JOINED: dict[str, Callable[[NDArray[np.float64]], float]] = {
    "sum": lambda ratings: float(ratings.sum()),
    "mean": lambda ratings: float(ratings.mean()),
    "last": lambda ratings: float(ratings[-1]),
}


# --- ratings of a shard -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RatingTask:
    """Columns of a shard: `score` float32, the turns' ratings joined; `tokens` int32, of the row's own text."""

    rater: Rater
    turns: Turns

    @property
    def key(self) -> str:
        return hash_json(["deita", 1, self.rater.key, self.turns])

    @property
    def backbone(self) -> Backbone:
        """The scorer's configuration and tokenizer, for a check before any weight is loaded."""
        return self.rater.lm.files

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        good = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        ratings, reasons, counted = self.rater.ratings(pool, good)
        score = np.full(len(shard), np.nan, dtype=np.float32)
        tokens = np.full(len(shard), -1, dtype=np.int32)
        for row, turn_ratings in ratings.items():
            score[row - shard.start] = _JOINED[self.turns](turn_ratings)
        for row, count in counted.items():
            tokens[row - shard.start] = count
        return ShardResult({"score": score, "tokens": tokens}, reasons)


@dataclass(frozen=True, eq=False)
class DiversityTask:
    """Columns of a shard: `merit`, complexity * quality of every turn joined, `complexity` and `quality` of the row,
    `hidden` `(rows, D)`, float32; `tokens` int32. One model is in memory at a time, unless both are the same."""

    complexity: Rater
    quality: Rater
    features: FeatureTask
    turns: Turns

    @property
    def key(self) -> str:
        parts = [self.complexity.key, self.quality.key, self.features.key]
        return hash_json(["deita-d", 1, *parts, self.turns])

    @property
    def backbone(self) -> Backbone:
        """The embedding model's configuration and tokenizer, for a check before any weight is loaded."""
        return self.features.backbone

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        good = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        complexity_by_row, reasons, _ = self.complexity.ratings(pool, good)
        if self.complexity.lm is not self.quality.lm:
            self.complexity.lm.release()
        quality_by_row, quality_reasons, _ = self.quality.ratings(pool, good)
        self.quality.lm.release()
        embedded = self.features(pool, shard)
        self.features.backbone.release()
        reasons = {**embedded.reasons, **quality_reasons, **reasons}
        columns: dict[str, NDArray[Any]] = {
            name: np.full(len(shard), np.nan, dtype=np.float32) for name in ("merit", "complexity", "quality")
        }
        join = _JOINED[self.turns]
        for row in good:
            if row not in reasons:
                place, c, q = row - shard.start, complexity_by_row[row], quality_by_row[row]
                columns["merit"][place] = join(c * q)
                columns["complexity"][place], columns["quality"][place] = join(c), join(q)
        columns["hidden"], columns["tokens"] = embedded.columns["hidden"], embedded.columns["tokens"]
        return ShardResult(columns, reasons)


# --- the methods ------------------------------------------------------------------------------------------------------


class _Scored(OfflineMethod):
    """Base of deita-c and deita-q."""

    scorer: str
    prompt: str | None
    turns: Turns
    max_length: int
    dtype: DType
    device: str
    token_budget: int | None

    default: ClassVar[str]
    answer: ClassVar[bool]

    def check(self) -> None:
        """Check settings, prompt file and scorer before any weight is loaded. Raises `UserError`."""
        _check_turns(self.turns)
        self.feature_task(for_fit=True).rater.lm.check()

    def feature_task(self, *, for_fit: bool) -> RatingTask:
        """The task that reads the scorer; the same for `fit`, which learns nothing, and for `score`."""
        prompt = read_prompt(self.prompt, self.default, answer=self.answer)
        return RatingTask(Rater(_model(self, self.scorer), prompt), self.turns)

    def backbone(self) -> Backbone:
        return self.feature_task(for_fit=True).backbone

    def shard_task(self, pool: Pool) -> RatingTask:
        self.check()
        _need_questions(self.name, pool)
        return self.feature_task(for_fit=False)

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """The joined rating as the score; its mean in `info`."""
        values, info = columns["score"], {"turns": self.turns, "mean_score": _mean(columns["score"])}
        return Scores(pool=pool, method=self.name, values=values, reasons=reasons, tokens=columns["tokens"], info=info)


@dataclass(kw_only=True, eq=False)
class DeitaC(_Scored):
    """Complex questions first, by a scorer model's expected rating from 1 to 6. The answer is not used.

    Raises `UserError` for settings, a prompt or a scorer that cannot be used, and for pools of plain text.

    >>> from siftune.offline.deita import DeitaC
    >>> DeitaC(scorer="./complexity-scorer", prompt="prompt.txt").fit(pool).score(pool).keep(fraction=0.2)
    """

    name: ClassVar[str] = "deita-c"
    default: ClassVar[str] = COMPLEXITY
    answer: ClassVar[bool] = False

    scorer: str
    """Causal LM that rates: a folder or a hub id. A published scorer works best with its authors' exact prompt."""
    prompt: str | None = None
    """Text file with {question}, or {instruction} and {input}; the rating is the next token. None: our own words."""
    turns: Turns = "sum"
    """How the ratings of a chat's turns join: `sum` (paper), `mean`, or the `last` turn's alone."""
    max_length: int = 2048
    """Tokens of a filled prompt at most; a row whose prompt is longer is not rated."""
    dtype: DType = "auto"
    """`auto`, `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""


@dataclass(kw_only=True, eq=False)
class DeitaQ(_Scored):
    """Good answers first, by a scorer model's expected rating from 1 to 6 of the answer to its question.

    Raises `UserError` for settings, a prompt or a scorer that cannot be used, and for pools of plain text.

    >>> from siftune.offline.deita import DeitaQ
    >>> DeitaQ(scorer="./quality-scorer", prompt="prompt.txt").fit(pool).score(pool).keep(fraction=0.2)
    """

    name: ClassVar[str] = "deita-q"
    default: ClassVar[str] = QUALITY
    answer: ClassVar[bool] = True

    scorer: str
    """Causal LM that rates: a folder or a hub id. A published scorer works best with its authors' exact prompt."""
    prompt: str | None = None
    """Text file with {question} and {answer}; the rating is the next token. None: our own words."""
    turns: Turns = "sum"
    """How the ratings of a chat's turns join: `sum` (paper), `mean`, or the `last` turn's alone."""
    max_length: int = 2048
    """Tokens of a filled prompt at most; a row whose prompt is longer is not rated."""
    dtype: DType = "auto"
    """`auto`, `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""


@dataclass(kw_only=True, eq=False)
class DeitaD(OfflineMethod):
    """The best rows by complexity * quality that are unlike each other: a row's score is minus its place in that order.

    The pass keeps a row when its largest cosine to the rows kept before is below `threshold`; the others follow behind
    in order of complexity * quality, or are dropped (`rest`). `score` holds all embeddings in memory, n * D * 4 bytes.
    Raises `UserError` for settings, prompts or models that cannot be used, and for pools of plain text.

    >>> from siftune.offline.deita import DeitaD
    >>> DeitaD(complexity_scorer="./c", quality_scorer="./q", model="./m").fit(pool).score(pool).keep(count=6000)
    """

    name: ClassVar[str] = "deita-d"

    complexity_scorer: str
    """Causal LM that rates complexity (see deita-c): a folder or a hub id."""
    quality_scorer: str
    """Causal LM that rates quality (see deita-q): a folder or a hub id; may be the same one."""
    model: str | None = None
    """Model of the embeddings, its hidden states' mean over a row's tokens; None takes the quality scorer."""
    layer: int | None = None
    """Decoder layers before the embedding is taken; None is all of them, as in the paper."""
    threshold: float = 0.9
    """Largest cosine that a kept row may not reach, in (0, 1] (paper: 0.9)."""
    rest: Literal["after", "drop"] = "after"
    """Rows too like a kept one: behind all kept ones, so that any budget can be met, or without a score (the paper)."""
    complexity_prompt: str | None = None
    """Prompt file of the complexity scorer, with {question}. None: our own words."""
    quality_prompt: str | None = None
    """Prompt file of the quality scorer, with {question} and {answer}. None: our own words."""
    turns: Turns = "sum"
    """How complexity * quality of a chat's turns joins: `sum` (paper), `mean`, or the `last` turn's alone."""
    max_length: int = 2048
    """Tokens of a filled prompt at most; a row whose prompt is longer is not rated. Embeddings read as many of a row."""
    dtype: DType = "auto"
    """`auto`, `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""

    def check(self) -> None:
        """Check settings, prompt files and models before any weight is loaded. Raises `UserError`."""
        _check_turns(self.turns)
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold={self.threshold} is not a cosine in (0, 1]; the paper's is 0.9")
        if self.rest not in ("after", "drop"):
            raise UserError(f"rest={self.rest!r} is not known; use after or drop")
        task = self.feature_task(for_fit=True)
        task.complexity.lm.check()
        task.quality.lm.check()
        _ = task.backbone.config, task.backbone.tokenizer

    def feature_task(self, *, for_fit: bool) -> DiversityTask:
        """The task that reads the three models; the same for `fit`, which learns nothing, and for `score`."""
        complexity = read_prompt(self.complexity_prompt, COMPLEXITY, answer=False)
        quality = read_prompt(self.quality_prompt, QUALITY, answer=True)
        return DiversityTask(
            Rater(_model(self, self.complexity_scorer), complexity),
            Rater(_model(self, self.quality_scorer), quality),
            FeatureTask(self._backbone(), embedding=False, token_budget=self.token_budget),
            self.turns,
        )

    def _backbone(self) -> Backbone:
        """The embedding model, with the requested layers."""
        model = self.quality_scorer if self.model is None else self.model
        settings: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "max_length": self.max_length}
        cached: dict[Any, Backbone] = self.__dict__.setdefault("_backbones", {})
        key = (model, self.layer, *settings.values())
        if key not in cached:
            layers = self.layer
            if layers is None:
                layers = int(Backbone(model, layer=1, **settings).config.num_hidden_layers)
            cached[key] = Backbone(model, layer=layers, **settings)
        return cached[key]

    def backbone(self) -> Backbone:
        return self.feature_task(for_fit=True).backbone

    def shard_task(self, pool: Pool) -> DiversityTask:
        self.check()
        _need_questions(self.name, pool)
        return self.feature_task(for_fit=False)

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """Minus the place in the order of the pass; means of the ratings and the rows that it kept in `info`."""
        merit = columns["merit"]
        scored = np.flatnonzero(~np.isnan(merit))
        order = scored[np.argsort(-merit[scored].astype(np.float64), kind="stable")]
        kept, nearest = unlike(columns["hidden"], order, threshold=self.threshold)
        values = np.full(len(pool), np.nan, dtype=np.float32)
        reasons = dict(reasons)
        behind = order[~kept]
        if self.rest == "drop":
            reasons |= {
                int(row): f"too like a row that is kept: row {int(near)}"
                for row, near in zip(behind, nearest[~kept], strict=True)
            }
            ranked = order[kept]
        else:
            ranked = np.concatenate([order[kept], behind])
        values[ranked] = -np.arange(len(ranked), dtype=np.float32)
        info = {
            "rows_unlike": int(kept.sum()),
            "threshold": self.threshold,
            "rest": self.rest,
            "mean_complexity": _mean(columns["complexity"]),
            "mean_quality": _mean(columns["quality"]),
        }
        return Scores(pool=pool, method=self.name, values=values, reasons=reasons, tokens=columns["tokens"], info=info)


# --- shared -----------------------------------------------------------------------------------------------------------


def _model(method: Any, model: str) -> CausalLM:
    """One model per method and name, so that it loads once."""
    settings = {name: getattr(method, name) for name in ("device", "dtype", "max_length", "token_budget")}
    cached: dict[Any, CausalLM] = method.__dict__.setdefault("_models", {})
    key = (model, *settings.values())
    if key not in cached:
        cached[key] = CausalLM(model, **settings)
    return cached[key]


def _check_turns(turns: str) -> None:
    if turns not in _JOINED:
        raise UserError(f"turns={turns!r} is not known; use {', '.join(_JOINED)}")


def _need_questions(name: str, pool: Pool) -> None:
    if pool.format == "text":
        raise UserError(f"{name} rates a question, and rows of plain text have none; use another method")


def _mean(values: NDArray[Any]) -> float | None:
    scored = values[~np.isnan(values)].astype(np.float64)
    return round(float(scored.mean()), 6) if len(scored) else None
