"""IFD, instruction-following difficulty: how little the question helps a small model to expect the answer.

    IFD(x) = PPL(answer | question) / PPL(answer)         SuperFiltering, arXiv 2402.00530, equation 3
    IFD(x) =  CE(answer | question) /  CE(answer)         Cherry LLM, arXiv 2308.12032, equation 4 (ratio="loss")

Higher is kept, up to 1: above it the question does not help, and the row is dropped with that reason. The text is tokenised
once; the answer's tokens are located by their offsets and are the same in numerator and denominator.
Cost: two forwards of the model, over question and answer and over the answer alone, heads on answer tokens only.

Shapes: `B` rows of a shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..data.formats import TEXT_FORM, BadRow
from ..errors import UserError
from ..files import hash_json
from ..models.backbone import Backbone, DType
from ..models.causal_lm import CausalLM, Encoded, Ids, mean_losses
from ..records import Pool, Row, Scores, Shard, ShardResult
from .answer_text import AnswerText, answer_text
from .base import OfflineMethod
from .prompts import Prompt, read_prompt

ROWS_AT_ONCE = 256
Ratio = Literal["perplexity", "loss"]


@dataclass(frozen=True, eq=False)
class _Pair:
    """A row's two sequences and the span of the answer's tokens in each."""

    conditioned: Ids
    conditioned_span: tuple[int, int]
    alone: Ids
    alone_span: tuple[int, int]


@dataclass(frozen=True, eq=False)
class IFDTask:
    """Columns of a shard: `score` and the two mean losses `loss_asked`, `loss_alone`, float32; `tokens` int32."""

    lm: CausalLM
    ratio: Ratio
    prompt: Prompt | None
    start_token: bool
    """Begin every sequence with the tokenizer's start token, so that the answer's first token is predicted too."""

    @property
    def key(self) -> str:
        text = TEXT_FORM if self.prompt is None else self.prompt.text
        return hash_json(["ifd", 1, text, self.lm.key, self.ratio, self.start_token])

    @property
    def backbone(self) -> Backbone:
        """The model's configuration and tokenizer, for a check before any weight is loaded."""
        return self.lm.files

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        good = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        tokens = np.full(len(shard), -1, dtype=np.int32)
        reasons: dict[int, str] = {}
        pairs: dict[int, _Pair] = {}
        for start in range(0, len(good), ROWS_AT_ONCE):
            rows = pool.read(good[start : start + ROWS_AT_ONCE])
            texts = [self._text(row) for row in rows]
            sequences = self.lm.encode([text if isinstance(text, BadRow) else text.text for text in texts])
            for row, text, encoded in zip(rows, texts, sequences, strict=True):
                tokens[row.row - shard.start] = min(len(encoded.ids), self.lm.length) if encoded.reason is None else -1
                if isinstance(text, BadRow):
                    reasons[row.row] = str(text)
                    continue
                pair = encoded.reason or self._pair(row, encoded, text.begin, text.end)
                if isinstance(pair, str):
                    reasons[row.row] = pair
                else:
                    pairs[row.row] = pair
        kept = list(pairs)
        conditioned_B = mean_losses(
            self.lm, [p.conditioned for p in pairs.values()], [p.conditioned_span for p in pairs.values()]
        )
        alone_B = mean_losses(self.lm, [p.alone for p in pairs.values()], [p.alone_span for p in pairs.values()])
        ratio_B = _ratio(conditioned_B, alone_B, self.ratio)
        reasons |= _dropped(kept, ratio_B)
        positions = np.array(kept, dtype=np.int64) - shard.start
        columns: dict[str, NDArray[Any]] = {"tokens": tokens}
        usable_B = np.array([row not in reasons for row in kept], dtype=np.bool_)
        for name, values in (("score", ratio_B), ("loss_asked", conditioned_B), ("loss_alone", alone_B)):
            columns[name] = np.full(len(shard), np.nan, dtype=np.float32)
            columns[name][positions] = np.where(usable_B, values, np.nan) if name == "score" else values
        return ShardResult(columns, reasons)

    def _text(self, row: Row) -> AnswerText | BadRow:
        """The row's text, or why there is none."""
        try:
            return answer_text(row, self.lm.tokenizer, self.prompt)
        except BadRow as bad:
            return bad

    def _pair(self, row: Row, encoded: Encoded, begin: int, end: int) -> _Pair | str:
        """The row's two sequences, or why there are none."""
        if not (row.instruction or row.input):
            return "no question to compare the answer with"
        start = self.lm.start if self.start_token else None
        encoded = encoded.opened(start)
        first, last = encoded.span(begin, end)
        if not encoded.complete or last > self.lm.length:
            return f"truncated: the row has more than {self.lm.length} tokens"
        if first == last:
            return "no answer tokens"
        answer = encoded.ids[first:last]
        if start is not None:
            alone = np.concatenate([np.array([start], dtype=np.int32), answer])
            return _Pair(encoded.ids[:last], (first, last), alone, (1, len(alone)))
        if len(answer) < 2:
            return "one answer token alone, which nothing comes before"
        skipped = 1 if self.start_token else 0  # a tokenizer without a start token: the same tokens above and below
        return _Pair(encoded.ids[:last], (max(first + skipped, 1), last), answer, (1, len(answer)))


def _ratio(conditioned_B: NDArray[np.float64], alone_B: NDArray[np.float64], ratio: Ratio) -> NDArray[np.float64]:
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.exp(conditioned_B - alone_B) if ratio == "perplexity" else conditioned_B / alone_B


def _dropped(rows: list[int], ratio_B: NDArray[np.float64]) -> dict[int, str]:
    reasons = {}
    for row, value in zip(rows, ratio_B.tolist(), strict=True):
        if not np.isfinite(value):
            reasons[row] = "the model's losses are NaN or infinite"
        elif value > 1:
            reasons[row] = f"ratio above 1: {value:.4g}, the question does not help"
    return reasons


@dataclass(kw_only=True, eq=False)
class IFD(OfflineMethod):
    """Keeps the rows whose answers remain hard to predict although the question is given.

    Raises `UserError` for settings or a model that cannot be used, and for pools of plain text, which have no questions.

    >>> from siftune.offline.ifd import IFD
    >>> IFD(model="gpt2").fit(pool).score(pool).keep(fraction=0.1)
    """

    name: ClassVar[str] = "ifd"

    model: str
    """Any causal LM, small ones rank much like large ones: a folder or a hub id (SuperFiltering: gpt2)."""
    ratio: Ratio = "perplexity"
    """Ratio of perplexities (SuperFiltering) or of mean losses (Cherry LLM); the two rank differently."""
    prompt: str | None = None
    """Text file with {question}, or {instruction} and {input}: the text before the answer. None: the row's own text."""
    compat: Literal["paper"] | None = None
    """`paper`: no start token before a text, so the answer's first token counts only where the question is given."""
    max_length: int = 1024
    """Tokens of a row at most; longer rows are dropped with that reason (gpt2's own 1,024)."""
    dtype: DType = "auto"
    """`auto`, `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""

    def check(self) -> None:
        """Check settings, prompt file and model before any weight is loaded. Raises `UserError`."""
        if self.ratio not in ("perplexity", "loss"):
            raise UserError(f"ratio={self.ratio!r} is not known; use perplexity or loss")
        if self.compat not in (None, "paper"):
            raise UserError(f"compat={self.compat!r} is not known; use paper or leave it out")
        self.feature_task(for_fit=True).lm.check()

    def feature_task(self, *, for_fit: bool) -> IFDTask:
        """The task that reads the model; the same for `fit`, which learns nothing, and for `score`."""
        settings = {"device": self.device, "dtype": self.dtype, "max_length": self.max_length}
        lm: CausalLM | None = self.__dict__.get("_lm")
        if lm is None or (lm.model, lm.token_budget) != (self.model, self.token_budget) or settings != _settings(lm):
            lm = CausalLM(self.model, token_budget=self.token_budget, **settings)  # type: ignore[arg-type]
            self.__dict__["_lm"] = lm
        prompt = None if self.prompt is None else read_prompt(self.prompt, "", answer=False)
        return IFDTask(lm, self.ratio, prompt, start_token=self.compat != "paper")

    def backbone(self) -> Backbone:
        return self.feature_task(for_fit=True).backbone

    def shard_task(self, pool: Pool) -> IFDTask:
        self.check()
        if pool.format == "text":
            raise UserError(
                "ifd compares an answer with and without its question, and rows of plain text have none; use another method"
            )
        return self.feature_task(for_fit=False)

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """The ratio as the score; means of it and of the two losses in `info`."""
        scored = ~np.isnan(columns["score"])
        info: dict[str, Any] = {"ratio": self.ratio, "rows_scored": int(scored.sum())}
        for name, column in (("ratio", "score"), ("loss_asked", "loss_asked"), ("loss_alone", "loss_alone")):
            values = columns[column][scored].astype(np.float64)
            info[f"mean_{name}"] = round(float(values.mean()), 6) if len(values) else None
        return Scores(
            pool=pool,
            method=self.name,
            values=columns["score"],
            reasons=reasons,
            tokens=columns["tokens"],
            info=info,
        )


def _settings(lm: CausalLM) -> dict[str, Any]:
    return {"device": lm.device, "dtype": lm.dtype, "max_length": lm.max_length}
