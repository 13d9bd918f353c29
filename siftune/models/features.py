"""Features of a text from the first layers: the mean of its token embeddings and the mean of its layer-n states.

DaaR (arXiv 2502.04380, stages 2 and 4), both from one pass. The authors run rows one at a time, padded to 1,024, and
average over the padding; here length-sorted rows fill batches by a token budget and padding has no effect: it is on
the right of a causal model, where no real token attends to it, and the means are taken over real tokens, in float32.
Cost: one truncated forward over the real tokens, plus the padding inside a batch of near-equal lengths.

"Embedding" is what `get_input_embeddings()` returns; Gemma's includes the factor sqrt(D) (Gemma-2 only from
transformers 5 on), which cancels in every cosine. "Hidden" is the truncated model's last state, final norm applied.

Shapes: `B` rows (of the call, or of a batch), `T` tokens, `D` hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.formats import BadRow
from ..errors import UserError
from ..records import Pool, Shard, ShardResult
from .backbone import Backbone
from .grouping import consecutive_groups
from .tokenise import Tokenised, texts_of, tokenise

TOKEN_BUDGET = {"cpu": 4096, "mps": 16_384, "cuda": 32_768}
"""Tokens of a batch, padding counted: sized for the caches of a CPU and for the occupancy of a GPU."""
ROWS_AT_ONCE = 256
"""Rows of a shard whose texts are in memory at a time; only their token ids stay."""
NO_TOKENS = "no tokens in the text"
NOT_FINITE = "the model's features are NaN or infinite"


@dataclass(frozen=True, eq=False)
class Features:
    """One row of each array per text, in the caller's order; rows in `reasons` hold NaN."""

    embedding: NDArray[np.float32]
    """Shape `(B, D)`, mean of the embedding layer's output over real tokens."""
    hidden: NDArray[np.float32]
    """Shape `(B, D)`, mean of the layer-n states over real tokens."""
    tokens: NDArray[np.int32]
    """Shape `(B,)`, real tokens read, special ones included."""
    truncated: NDArray[np.bool_]
    """Shape `(B,)`, whether the text was cut."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """Why a text has no features, by position in the call."""

    def __len__(self) -> int:
        return len(self.tokens)


def extract(
    backbone: Backbone,
    texts: Sequence[str | BadRow],
    *,
    token_budget: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Features of every text, in one pass, in the caller's order; the same for any batching to 1e-5 (float32).

    `token_budget` is tokens of a batch, padding counted (one row always fits); the default is by device.
    `progress` receives the number of rows done since its last call. Raises `UserError` as `Backbone` does.

    >>> features = extract(Backbone("Qwen/Qwen2.5-7B"), ["one text", "another"])
    >>> features.hidden.shape, features.reasons
    """
    return extract_tokens(backbone, tokenise(backbone, texts), token_budget=token_budget, progress=progress)


def extract_tokens(
    backbone: Backbone,
    rows: Sequence[Tokenised],
    *,
    token_budget: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """As `extract`, for texts already tokenised."""
    lengths = np.fromiter((len(row.ids) for row in rows), dtype=np.int32, count=len(rows))
    check_ids(backbone, rows)
    budget = token_budget or TOKEN_BUDGET.get(backbone.torch_device.type, TOKEN_BUDGET["cuda"])
    order: list[int] = []
    means = []
    for batch in batches(lengths, budget):
        means.append(pooled(backbone, [rows[index].ids for index in batch]))
        order += batch
        if progress is not None:
            progress(len(batch))
    features_2BD = np.full((2, len(rows), backbone.width), np.nan, dtype=np.float32)
    if means:
        features_2BD[:, order] = torch.cat(means, dim=1).cpu().numpy()
    reasons = {index: rows[index].reason or NO_TOKENS for index in np.flatnonzero(lengths == 0).tolist()}
    if progress is not None and reasons:
        progress(len(reasons))
    finite = np.isfinite(features_2BD).all(axis=(0, 2))
    reasons |= {int(index): NOT_FINITE for index in np.flatnonzero(~finite & (lengths > 0))}
    features_2BD[:, ~finite] = np.nan
    truncated = np.fromiter((row.truncated for row in rows), dtype=np.bool_, count=len(rows))
    return Features(features_2BD[0], features_2BD[1], lengths, truncated, reasons)


def check_ids(backbone: Backbone, rows: Sequence[Tokenised]) -> None:
    largest = max((int(row.ids.max()) for row in rows if len(row.ids)), default=-1)
    if largest >= int(backbone.config.vocab_size):
        raise UserError(
            f"the tokenizer of model={backbone.model!r} produces token {largest}, but the model's vocabulary has "
            f"{backbone.config.vocab_size} tokens; use the model's own tokenizer"
        )


def batches(lengths: NDArray[np.int32], token_budget: int) -> Iterator[list[int]]:
    """Positions in batches of near-equal length, longest first, ties by position; empty texts are left out.

    A batch holds rows while rows times longest stays within `token_budget`; the first row always fits. Longest first:
    a lack of memory shows at once.

    >>> list(batches(np.array([3, 9, 3, 0], np.int32), 9))
    [[1], [0, 2]]
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    order = order[lengths[order] > 0]
    sizes: list[int] = lengths.tolist()
    yield from consecutive_groups(order.tolist(), lambda group, _: (len(group) + 1) * sizes[group[0]] <= token_budget)


@torch.no_grad()
def pooled(backbone: Backbone, ids: Sequence[NDArray[np.int32]]) -> torch.Tensor:
    """Embedding and hidden means of one batch, float32 `(2, B, D)`, on the backbone's device, asynchronously."""
    network = backbone.network
    input_BT, length_B1, padding_BT1 = padded(ids, backbone.torch_device)

    def mean(states_BTD: torch.Tensor) -> torch.Tensor:
        if padding_BT1 is not None:
            states_BTD = states_BTD.masked_fill(padding_BT1, 0)
        return states_BTD.sum(dim=1, dtype=torch.float32) / length_B1

    means: list[torch.Tensor] = []
    layer = network.get_input_embeddings()  # type: ignore[operator]
    hook = layer.register_forward_hook(lambda _m, _i, out: means.append(mean(out)))
    try:
        hidden_BTD = network(input_ids=input_BT, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    assert len(means) == 1, "the embedding layer runs once per forward"
    return torch.stack([means[0], mean(hidden_BTD)])


def pad_right(ids: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Rows of token ids as one array `(B, T)`. The padding repeats a row's last token: any real id works, since no real
    token of a causal model attends to it.

    >>> pad_right([np.array([1, 2]), np.array([3])])
    array([[1, 2],
           [3, 3]])
    """
    longest = max(len(row) for row in ids)
    return np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in ids]).astype(np.int64)


def padded(
    ids: Sequence[NDArray[np.int32]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows of token ids as one batch on a device: ids `(B, T)`, lengths `(B, 1)`, and where padding is `(B, T, 1)`,
    None where there is none."""
    ids_BT = pad_right(ids)
    longest = ids_BT.shape[1]
    length_B1 = torch.tensor([[len(row)] for row in ids])
    input_BT, length_B1 = _to(torch.from_numpy(ids_BT), device), _to(length_B1, device)
    padding_BT1 = None
    if any(len(row) < longest for row in ids):
        padding_BT1 = (torch.arange(longest, device=device)[None, :] >= length_B1)[:, :, None]
    return input_BT, length_B1, padding_BT1


def _to(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


@dataclass(frozen=True)
class FeatureTask:
    """Features of one shard's rows, for an engine: columns `hidden`, `tokens`, `truncated`, and optionally `embedding`.

    Rows that are left out hold NaN, -1 and False.

    >>> task = FeatureTask(Backbone("Qwen/Qwen2.5-7B"))
    >>> for shard, result in engine.run(task, pool, pool.shards(), label="features"): ...
    """

    backbone: Backbone
    _: KW_ONLY
    embedding: bool = True
    """Return the embedding means too; they come from the same pass."""
    token_budget: int | None = None
    """Tokens of a batch; None is the device's default."""

    @property
    def key(self) -> str:
        """Content hash of the backbone, the text form and the requested columns."""
        settings = f"features 1|{self.backbone.key}|{self.embedding}|{self.token_budget}"
        return blake2b(settings.encode(), digest_size=16).hexdigest()

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        rows, features = self.features(pool, shard)
        positions = np.asarray(rows, dtype=np.int64) - shard.start
        columns: dict[str, NDArray[Any]] = {
            "hidden": np.full((len(shard), self.backbone.width), np.nan, dtype=np.float32)
        }
        columns["hidden"][positions] = features.hidden
        if self.embedding:
            columns["embedding"] = np.full_like(columns["hidden"], np.nan)
            columns["embedding"][positions] = features.embedding
        columns["tokens"] = np.full(len(shard), -1, dtype=np.int32)
        columns["tokens"][positions] = features.tokens
        columns["truncated"] = np.zeros(len(shard), dtype=np.bool_)
        columns["truncated"][positions] = features.truncated
        return ShardResult(columns, {rows[index]: reason for index, reason in features.reasons.items()})

    def features(self, pool: Pool, shard: Shard) -> tuple[list[int], Features]:
        """The shard's eligible rows, and their features in that order."""
        rows = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        return rows, features_of(self.backbone, pool, rows, token_budget=self.token_budget)


def features_of(backbone: Backbone, pool: Pool, rows: Sequence[int], *, token_budget: int | None = None) -> Features:
    """Features of any eligible rows of a pool, in the order given; texts are read a few hundred at a time."""
    tokenised: list[Tokenised] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        read = pool.read(rows[start : start + ROWS_AT_ONCE])
        tokenised += tokenise(backbone, texts_of(read, backbone.tokenizer))
    return extract_tokens(backbone, tokenised, token_budget=token_budget)
