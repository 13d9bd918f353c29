"""Texts to token ids: fast, cut to the model's length, with a record of what was cut.

Cost: the tokenizer's own, over at most `CUT_CHARACTERS * length` characters of a text wherever that is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..data.formats import BadRow, row_failures, text_of
from ..errors import UserError, is_failure
from ..records import Row
from .backbone import Backbone
from .load import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT_CHARACTERS = 32
"""Characters per requested token that are passed to the tokenizer first: natural text has 1 to 6 per token."""
TEXTS_AT_ONCE = 256

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Tokenised:
    """One text's token ids as the model reads them."""

    ids: NDArray[np.int32]
    """Shape `(T,)`, special tokens included; empty where the text itself has no token."""
    truncated: bool
    """Whether the text was cut."""
    reason: str | None = None
    """Why there are no ids, where the text could not be built or tokenised."""

    @classmethod
    def failed(cls, bad: BadRow) -> Tokenised:
        """No ids, and why."""
        return cls(np.empty(0, dtype=np.int32), False, str(bad))


# --- rows whose text cannot be built or tokenised ----------------------------------------------------------------------


def texts_of(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str | BadRow]:
    """Every row's text, or, where the chat template fails on the row, why it has none.

    >>> tokenise(backbone, texts_of(pool.read([0, 1]), backbone.tokenizer))
    """
    return [_attempt(lambda row=row: text_of(row, tokenizer)) for row in rows]  # type: ignore[misc]


def in_isolation(
    tokenize: Callable[[Sequence[str]], list[Result]],
    texts: Sequence[str | BadRow],
    failed: Callable[[BadRow], Result],
) -> list[Result]:
    """`tokenize` of every text, some hundreds at a time, in order; `failed(reason)` for the others.

    Where `tokenize` raises anything, the panic of a tokenizer written in Rust included, the texts are halved until
    those that fail alone are left, so that every other text has the result that it has without them. `UserError` and
    interruptions pass.

    >>> in_isolation(lambda some: [len(text) for text in some], ["one", BadRow("no text")], lambda bad: -1)
    [3, -1]
    """
    done: list[Result] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        chunk = texts[start : start + TEXTS_AT_ONCE]
        results: Iterator[Result | BadRow] = iter(_halved(tokenize, [text for text in chunk if isinstance(text, str)]))
        for text in chunk:
            result = next(results) if isinstance(text, str) else text
            done.append(failed(result) if isinstance(result, BadRow) else result)
    return done


def _halved(tokenize: Callable[[Sequence[str]], Sequence[Result]], texts: Sequence[str]) -> list[Result | BadRow]:
    """Each text's result, or the reason why it fails alone."""
    if not texts:
        return []
    if len(texts) == 1:
        return [_attempt(lambda: tokenize(texts)[0])]
    try:
        return list(tokenize(texts))
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
    middle = len(texts) // 2
    return [*_halved(tokenize, texts[:middle]), *_halved(tokenize, texts[middle:])]


def _attempt(make: Callable[[], Result]) -> Result | BadRow:
    """`make()`, or the reason why it failed."""
    try:
        with row_failures("tokenizer fails"):
            return make()
    except BadRow as bad:
        return bad


# --- texts to ids -----------------------------------------------------------------------------------------------------


def tokenise(backbone: Backbone, texts: Sequence[str | BadRow]) -> list[Tokenised]:
    """Ids of every text, with the tokenizer's own special tokens, truncated on the right to `backbone.length`.

    A text that already opens with the beginning-of-text token (chat templates write it) gets no second one. A text
    without a token of its own has no ids, special tokens notwithstanding; a text that could not be built, or that the
    tokenizer fails on, has no ids and a reason (see `in_isolation`).
    """
    with quiet():
        return in_isolation(lambda chunk: _few(backbone, chunk), texts, Tokenised.failed)


def _few(backbone: Backbone, texts: Sequence[str]) -> list[Tokenised]:
    """As `tokenise`, for one block of texts.

    A very long text is cut before it is tokenised. Tokenizers work from left to right with bounded look-ahead, so a
    cut can only change the tokens next to it: the cut is accepted when it leaves at least twice the requested tokens,
    i.e. when `length` tokens lie between the ones used and the cut; else the complete text is tokenised.
    """
    limit = CUT_CHARACTERS * backbone.length
    plain = [text.removeprefix(backbone.opening) for text in texts]
    fast = bool(getattr(backbone.tokenizer, "is_fast", False))
    first = [text[:limit] if fast else text for text in plain]
    done, chunks = _encode(backbone, first)
    incomplete = [index for index, text in enumerate(plain) if len(first[index]) < len(text) and chunks[index] < 3]
    if incomplete:
        untruncated, _ = _encode(backbone, [plain[index] for index in incomplete])
        for index, tokenised in zip(incomplete, untruncated, strict=True):
            done[index] = tokenised
    return done


def _encode(backbone: Backbone, texts: Sequence[str]) -> tuple[list[Tokenised], list[int]]:
    """Ids, and into how many chunks of `length` tokens each text falls (at most 2 for a slow tokenizer)."""
    if not texts:
        return [], []
    tokenizer, length = backbone.tokenizer, backbone.length
    special = tokenizer.num_special_tokens_to_add()
    if special >= length:
        length = special + 1  # only a model of one or two positions; the forward then fails
    batch = tokenizer(list(texts), truncation=True, max_length=length, return_attention_mask=False)
    done, chunks = [], []
    for index, ids in enumerate(batch["input_ids"]):
        parts = 1
        if len(ids) >= length:
            if batch.encodings is not None:
                parts += len(batch.encodings[index].overflowing)
            else:
                parts += len(tokenizer(texts[index])["input_ids"]) > length
        kept_ids = ids if len(ids) > special else []
        done.append(Tokenised(np.asarray(kept_ids, dtype=np.int32), parts > 1))
        chunks.append(parts)
    return done, chunks
