"""One vector per row from a complete model: the position-weighted mean of its last hidden states (RDS+, arXiv 2503.01807).

    representation(x) = sum_t w_t h_t,   w_t = t / sum_t t,   t = 1 .. T over real tokens,   h = last layer, final norm applied

The row is read in the chat form: its own messages, or one user turn and its answer, through the model's chat template;
plain text, and every row where there is no template, as it is. Length-sorted rows fill batches by a token budget, on the
path of `features`. Cost: one forward of the model over the real tokens, plus the padding among near-equal lengths.

Axes: `B` rows (of a call, or of a batch), `T` tokens, `D` hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.formats import TEXT_FORM, BadRow
from ..files import hash_json
from ..records import Pool, Row, Shard, ShardResult
from .backbone import Backbone
from .features import NO_TOKENS, NOT_FINITE, ROWS_AT_ONCE, TOKEN_BUDGET, batches, check_ids, padded
from .tokenise import Tokenised, texts_of, tokenise


def chat_texts(rows: Sequence[Row], tokenizer: Any) -> list[str | BadRow]:
    """The rows' texts in the chat form, or why there is none."""

    def as_chat(row: Row) -> Row:
        if row.messages or not row.question:
            return row
        return replace(
            row, messages=({"role": "user", "content": row.question}, {"role": "assistant", "content": row.output})
        )

    template = bool(getattr(tokenizer, "chat_template", None))
    return texts_of([as_chat(row) if template else row for row in rows], tokenizer)


@dataclass(frozen=True, eq=False)
class Represented:
    """One row of each array per row of the call, in its order; rows in `reasons` hold NaN."""

    vectors: NDArray[np.float32]
    """Shape `(B, D)`."""
    tokens: NDArray[np.int32]
    """Shape `(B,)`, real tokens read, special ones included."""
    truncated: NDArray[np.bool_]
    """Shape `(B,)`, whether the text was cut."""
    reasons: dict[int, str]
    """Why a row has no representation, by position in the call."""


def complete_backbone(model: str, **settings: Any) -> Backbone:
    """A model with all its decoder layers. Raises `UserError` as `Backbone` does.

    >>> complete_backbone("Qwen/Qwen2.5-7B", max_length=2048).layer
    28
    """
    layers = int(Backbone(model, layer=1, **settings).config.num_hidden_layers)
    return Backbone(model, layer=layers, **settings)


def backbone_of(method: Any) -> Backbone:
    """The complete backbone of a method with `model`, `max_length`, `dtype` and `device`; loaded once per method."""
    settings: dict[str, Any] = {name: getattr(method, name) for name in ("max_length", "dtype", "device")}
    cached: dict[Any, Backbone] = method.__dict__.setdefault("_backbones", {})
    key = (str(method.model), *settings.values())
    if key not in cached:
        cached[key] = complete_backbone(str(method.model), **settings)
    return cached[key]


def represent(backbone: Backbone, rows: Sequence[Tokenised], *, token_budget: int | None = None) -> Represented:
    """Representations of tokenised rows, the same for any batching to 1e-5 (float32)."""
    lengths = np.fromiter((len(row.ids) for row in rows), dtype=np.int32, count=len(rows))
    check_ids(backbone, rows)
    budget = token_budget or TOKEN_BUDGET.get(backbone.torch_device.type, TOKEN_BUDGET["cuda"])
    vectors_BD = np.full((len(rows), backbone.width), np.nan, dtype=np.float32)
    order: list[int] = []
    parts: list[torch.Tensor] = []
    for batch in batches(lengths, budget):
        parts.append(weighted_means(backbone, [rows[index].ids for index in batch]))
        order += batch
    if parts:
        vectors_BD[order] = torch.cat(parts).cpu().numpy()
    reasons = {index: rows[index].reason or NO_TOKENS for index in np.flatnonzero(lengths == 0).tolist()}
    finite = np.isfinite(vectors_BD).all(axis=1)
    reasons |= {int(index): NOT_FINITE for index in np.flatnonzero(~finite & (lengths > 0))}
    vectors_BD[~finite] = np.nan
    truncated = np.fromiter((row.truncated for row in rows), dtype=np.bool_, count=len(rows))
    return Represented(vectors_BD, lengths, truncated, reasons)


@torch.no_grad()
def weighted_means(backbone: Backbone, ids: Sequence[NDArray[np.int32]]) -> torch.Tensor:
    """Position-weighted means of one batch's last states, float32 `(B, D)`, on the backbone's device, asynchronously."""
    input_BT, length_B1, padding_BT1 = padded(ids, backbone.torch_device)
    hidden_BTD = backbone.network(input_ids=input_BT, use_cache=False).last_hidden_state
    if padding_BT1 is not None:
        hidden_BTD = hidden_BTD.masked_fill(padding_BT1, 0)
    place_T = torch.arange(1, hidden_BTD.shape[1] + 1, device=hidden_BTD.device, dtype=torch.float32)
    weight_BT = 2 * place_T / (length_B1 * (length_B1 + 1.0))
    return torch.einsum("bt,btd->bd", weight_BT, hidden_BTD.float())


@dataclass(frozen=True)
class RepresentationTask:
    """Representations of one shard's rows, for an engine: columns `hidden` `(rows, D)`, `tokens`, `truncated`."""

    backbone: Backbone
    _: KW_ONLY
    token_budget: int | None = None
    """Tokens of a batch; None is the device's default."""

    @property
    def key(self) -> str:
        """Content hash of the backbone and the text form."""
        return hash_json(["representations", 1, TEXT_FORM, self.backbone.key, self.token_budget])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        rows = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        done = representations_of(self.backbone, pool, rows, token_budget=self.token_budget)
        positions = np.asarray(rows, dtype=np.int64) - shard.start
        columns: dict[str, NDArray[Any]] = {
            "hidden": np.full((len(shard), self.backbone.width), np.nan, dtype=np.float32),
            "tokens": np.full(len(shard), -1, dtype=np.int32),
            "truncated": np.zeros(len(shard), dtype=np.bool_),
        }
        columns["hidden"][positions] = done.vectors
        columns["tokens"][positions] = done.tokens
        columns["truncated"][positions] = done.truncated
        return ShardResult(columns, {rows[index]: reason for index, reason in done.reasons.items()})


def representations_of(
    backbone: Backbone, pool: Pool, rows: Sequence[int], *, token_budget: int | None = None
) -> Represented:
    """Representations of any eligible rows of a pool, in the order given; texts are read a few hundred at a time."""
    tokenised: list[Tokenised] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        read = pool.read(rows[start : start + ROWS_AT_ONCE])
        tokenised += tokenise(backbone, chat_texts(read, backbone.tokenizer))
    return represent(backbone, tokenised, token_budget=token_budget)
