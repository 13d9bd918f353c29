"""Held-out loss and token accuracy, per domain: the cheap suite, for small models and for studies.

    loss     = sum over answer tokens t of ( logsumexp(L_t) - L_t[t + 1] ) / answer tokens       (nats per token)
    accuracy = share of answer tokens that are the largest logit

The rows become tokens by the function that training uses, and prompts are masked. Rows are sorted by length and batched
by a token budget, padded on the right where no real token sees it; the head reads only the positions that predict an
answer token, a block of the vocabulary at a time, so no array of batch x tokens x vocabulary exists.
Cost: one forward of the decoder over the real tokens, and V*D products per answer token.

Shapes: `R` rows of a file, `B` rows of a batch, `T` columns, `N` answer tokens of some rows, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.formats import BadRow
from ..data.load import load_pool
from ..errors import UserError
from ..models.features import batches, pad_right
from ..models.hidden_states import predicting_tokens, unwrap_model
from ..models.load import quiet
from ..models.tokenize_rows import IGNORED, Encoder, Text, check_text
from ..online.label_losses import MostLikely, cross_entropy, label_passes
from ..online.logit_access import LogitAccess
from ..progress import counted
from ..records import Pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Files = Mapping[str, str | Path | Sequence[str | Path]]
NOT_FINITE = "loss not finite"


@dataclass(frozen=True)
class HeldOut:
    """One domain's held-out rows under a model."""

    loss: float
    """Mean cross-entropy of an answer token, in nats; NaN where no row could be read."""
    token_accuracy: float
    """Share of answer tokens that are the model's most likely next token."""
    tokens: int
    """Answer tokens, over all rows."""
    rows: int
    """Rows that were measured."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Rows that were left out, counted by reason."""
    loss_stderr: float = math.nan
    """Standard error of `loss`, rows being the draws: sqrt(R/(R-1) sum_r (sum CE_r - loss*tokens_r)^2) / tokens."""
    accuracy_stderr: float = math.nan
    """The same of `token_accuracy`."""

    @property
    def facts(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A domain's rows as tokens."""

    rows: list[tuple[list[int], list[int]]]
    """(input ids, labels) of every usable row, each of shape `(T,)`."""
    skipped: dict[str, int]


def held_out(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    files: Files,
    *,
    text: Text = "auto",
    max_length: int = 512,
    max_rows: int | None = None,
    token_budget: int = 8192,
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    format: Literal["alpaca", "prompt-completion", "messages", "text"] | None = None,
) -> dict[str, HeldOut]:
    """Loss and token accuracy of every domain's rows, in the order of `files` (name -> anything `load_pool` reads).

    `max_rows` takes the first rows of each domain that can be measured; `max_length` cuts a row on the right, in tokens, at
    the model's own number of positions at most; `token_budget` is the tokens of a batch, padding counted, and bounds memory, not the result. The model's mode,
    gradients and random state are restored; PEFT and compiled models are measured as they are. Raises `UserError`
    for files that cannot be read, for a text form the tokenizer lacks, and for a domain without a single usable row.

    >>> held_out(model, tokenizer, {"mathematics": "held.jsonl"})["mathematics"].loss
    """
    length = min(max_length, positions(model))
    domains = encode(
        tokenizer, files, text=text, max_length=length, max_rows=max_rows, columns=columns, roles=roles, format=format
    )
    return {name: measure(model, encoded, token_budget=token_budget) for name, encoded in domains.items()}


def encode(
    tokenizer: PreTrainedTokenizerBase,
    files: Files,
    *,
    text: Text = "auto",
    max_length: int = 512,
    max_rows: int | None = None,
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    format: Literal["alpaca", "prompt-completion", "messages", "text"] | None = None,
) -> dict[str, Encoded]:
    """The rows of every domain as tokens: all that can go wrong before a model is loaded. Raises `UserError`."""
    if not files:
        raise UserError("no held-out file; pass name=file for each domain")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows must be >= 1, got {max_rows}")
    if max_length < 2:
        raise UserError(f"max_length must be >= 2, so that a token can be predicted, got {max_length}")
    return {
        name: _encode(name, source, tokenizer, text, max_length, max_rows, columns, roles, format)
        for name, source in files.items()
    }


def _encode(
    name: str,
    source: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    max_length: int,
    max_rows: int | None,
    columns: Mapping[str, str] | None,
    roles: Mapping[str, str] | None,
    format: Literal["alpaca", "prompt-completion", "messages", "text"] | None,
) -> Encoded:
    paths = str(source) if isinstance(source, (str, Path)) else [str(path) for path in source]
    pool: Pool = load_pool(paths, columns=columns, roles=roles, on_bad_row="skip", format=format)
    check_text(text, tokenizer, model=str(getattr(tokenizer, "name_or_path", "")), format=pool.format)
    skipped: dict[str, int] = {}
    for reason in pool.reasons.values():
        _count(skipped, reason)
    rows: list[tuple[list[int], list[int]]] = []
    with quiet():  # transformers warns of rows longer than the model reads before they are cut
        for _, encoded in Encoder(tokenizer, text, max_length).over(pool, pool.eligible.tolist()):
            if len(rows) == max_rows:
                break
            if isinstance(encoded, BadRow):
                _count(skipped, str(encoded))
            else:
                rows.append((encoded.input_ids, encoded.labels))
    if not rows:
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(f"held-out {name}: none of the rows of {source} can be measured ({why}); fix the file")
    return Encoded(rows, skipped)


def _count(skipped: dict[str, int], reason: str) -> None:
    kind = reason.split(":")[0]
    skipped[kind] = skipped.get(kind, 0) + 1


# --- under a model ----------------------------------------------------------------------------------------------------


def measure(model: torch.nn.Module, encoded: Encoded, *, token_budget: int = 8192) -> HeldOut:
    """`HeldOut` of rows that are tokens already."""
    if token_budget < 1:
        raise UserError(f"token_budget must be >= 1, got {token_budget}")
    loss_R, right_R, tokens_R = sums(model, encoded.rows, token_budget=token_budget)
    skipped = dict(encoded.skipped)
    finite_R = np.isfinite(loss_R)
    if not finite_R.all():
        skipped[NOT_FINITE] = int((~finite_R).sum())
        loss_R, right_R, tokens_R = loss_R[finite_R], right_R[finite_R], tokens_R[finite_R]
    loss, loss_stderr = ratio(loss_R, tokens_R)
    accuracy, accuracy_stderr = ratio(right_R, tokens_R)
    return HeldOut(loss, accuracy, int(tokens_R.sum()), len(tokens_R), skipped, loss_stderr, accuracy_stderr)


def positions(model: torch.nn.Module) -> int:
    """Tokens of a sequence that the model can read; a very large number where its configuration has no limit."""
    limit = getattr(unwrap_model(model).config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 1 << 30


def ratio(part_R: NDArray[np.float64], total_R: NDArray[np.float64]) -> tuple[float, float]:
    """sum(part) / sum(whole) and its standard error (linearised), rows being the draws; NaN where it is not defined.

    >>> ratio(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    (2.0, 1.0)
    """
    rows, total = len(total_R), float(total_R.sum())
    if rows == 0 or total == 0:
        return math.nan, math.nan
    value = float(part_R.sum()) / total
    if rows == 1:
        return value, math.nan
    rest = float(((part_R - value * total_R) ** 2).sum())
    return value, math.sqrt(rows / (rows - 1) * rest) / total


def sums(
    model: torch.nn.Module, rows: Sequence[tuple[list[int], list[int]]], *, token_budget: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Per row: summed cross-entropy, answer tokens predicted right, answer tokens. Shape `(R,)` each, float64."""
    loss_R, right_R, tokens_R = (np.zeros(len(rows)) for _ in range(3))
    vocabulary, largest = int(unwrap_model(model).config.vocab_size), max((max(ids) for ids, _ in rows), default=-1)
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {largest}, and the model's vocabulary has {vocabulary} tokens; use the model's own "
            "tokenizer"
        )
    logit_access = LogitAccess()
    length_R = np.array([len(ids) for ids, _ in rows], dtype=np.int32)
    for members in counted("held-out loss", batches(length_R, token_budget), len(rows), size=len):
        batch = _padded([rows[index] for index in members])
        for part in label_passes(logit_access, model, batch, predicting_tokens(batch)):
            most_likely = MostLikely()
            loss_N = cross_entropy(most_likely.observe(part.blocks), part.targets)
            right_N = most_likely.tokens == part.targets
            for row, loss, right in zip(
                part.rows, loss_N.split(part.lengths), right_N.split(part.lengths), strict=True
            ):
                index = members[row]
                loss_R[index], right_R[index], tokens_R[index] = float(loss.sum()), float(right.sum()), len(loss)
    return loss_R, right_R, tokens_R


def _padded(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Ids `(B, T)` and labels `(B, T)`, padded on the right."""
    ids_BT = pad_right([np.array(ids) for ids, _ in rows])
    longest = ids_BT.shape[1]
    labels_BT = [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]
    return {"input_ids": torch.from_numpy(ids_BT), "labels": torch.tensor(labels_BT)}
