"""Texts to token ids: fast, cut to the model's length, with the truth about what was cut.

Cost: the tokenizer's own, over at most `CUT_CHARACTERS * length` characters of a text wherever that is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backbone import Backbone
from .checkpoint import quiet

CUT_CHARACTERS = 32
"""Characters per wanted token that are handed to the tokenizer first: natural text has 1 to 6 per token."""
TEXTS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Tokenised:
    """One text's token ids as the model reads them."""

    ids: NDArray[np.int32]
    """Shape `(T,)`, special tokens included; empty where the text itself gives no token."""
    truncated: bool
    """The text went on."""


def tokenise(backbone: Backbone, texts: Sequence[str]) -> list[Tokenised]:
    """Ids of every text, with the tokenizer's own special tokens, truncated on the right to `backbone.length`.

    A text that already opens with the beginning-of-text token (chat templates write it) gets no second one. A text
    that gives no token of its own has no ids, special tokens notwithstanding.
    """
    done: list[Tokenised] = []
    with quiet():
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            done += _some(backbone, texts[start : start + TEXTS_AT_ONCE])
    return done


def _some(backbone: Backbone, texts: Sequence[str]) -> list[Tokenised]:
    """As `tokenise`, for a handful.

    A very long text is cut before it is tokenised. Tokenizers work from left to right with bounded look-ahead, so a
    cut can only change the tokens next to it: the cut is accepted when it leaves at least twice the tokens wanted,
    i.e. when a whole `length` of tokens lies between the ones used and the cut; else the whole text is tokenised.
    """
    limit = CUT_CHARACTERS * backbone.length
    plain = [text.removeprefix(backbone.opening) for text in texts]
    fast = bool(getattr(backbone.tokenizer, "is_fast", False))
    first = [text[:limit] if fast else text for text in plain]
    done, chunks = _encode(backbone, first)
    again = [index for index, text in enumerate(plain) if len(first[index]) < len(text) and chunks[index] < 3]
    if again:
        whole, _ = _encode(backbone, [plain[index] for index in again])
        for index, found in zip(again, whole, strict=True):
            done[index] = found
    return done


def _encode(backbone: Backbone, texts: Sequence[str]) -> tuple[list[Tokenised], list[int]]:
    """Ids, and into how many chunks of `length` tokens each text falls (at most 2 is known of a slow tokenizer)."""
    if not texts:
        return [], []
    tokenizer, length = backbone.tokenizer, backbone.length
    special = tokenizer.num_special_tokens_to_add()
    if special >= length:
        length = special + 1  # only a model of one or two positions, and then the forward says so
    batch = tokenizer(list(texts), truncation=True, max_length=length, return_attention_mask=False)
    done, chunks = [], []
    for index, ids in enumerate(batch["input_ids"]):
        parts = 1
        if len(ids) >= length:
            if batch.encodings is not None:
                parts += len(batch.encodings[index].overflowing)
            else:
                parts += len(tokenizer(texts[index])["input_ids"]) > length
        own = ids if len(ids) > special else []
        done.append(Tokenised(np.asarray(own, dtype=np.int32), parts > 1))
        chunks.append(parts)
    return done, chunks
