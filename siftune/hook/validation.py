"""Validation rows of a file, tokenised as the trainer's own rows are, for a selector that learns from them (GREATS).

The rows go through the same row -> tokens function as `siftune train` and the held-out loss
(`siftune.models.tokenize_rows`), with the trainer's tokenizer and its `max_length`. Cost: one pass over the file, when
the selector is attached.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ..data.formats import BadRow
from ..data.load import load_pool
from ..errors import UserError
from ..models.tokenize_rows import Encoder, check_text
from ..online.greats import Greats
from ..output import say

if TYPE_CHECKING:
    from transformers import Trainer

NO_LIMIT = 2**31
"""`max_length` of a trainer that has none."""


def read_validation(trainer: Trainer, selector: Any, *, quiet: bool = False) -> None:
    """Pass the tokenised rows of its validation file to `selector`; does nothing for other selectors and other
    `validation`.

    Rows without answer tokens are left out, with one line on stderr unless `quiet`. Raises `UserError` for a file that
    cannot be read, a trainer without a tokenizer, and where no row is left.

    >>> read_validation(trainer, Greats(keep="1/8", validation="held-out.jsonl"))
    """
    if not isinstance(selector, Greats) or selector.validation_file is None:
        return
    file = selector.validation_file
    tokenizer: Any = getattr(trainer, "processing_class", None)
    if not callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
        raise UserError(
            f"validation={file!r} is a file, and the trainer has no tokenizer for it; pass processing_class=tokenizer "
            "to the trainer, or pass tokenised rows"
        )
    pool = load_pool(file)
    model = getattr(getattr(trainer.model, "config", None), "_name_or_path", "") or type(trainer.model).__name__
    check_text(selector.validation_text, tokenizer, model=model, format=pool.format)
    encode = Encoder(tokenizer, selector.validation_text, getattr(trainer.args, "max_length", None) or NO_LIMIT)
    rows: list[dict[str, list[int]]] = []
    dropped: Counter[str] = Counter()
    for _, tokens in encode.over(pool, range(len(pool))):
        if isinstance(tokens, BadRow):
            dropped[str(tokens).partition(":")[0]] += 1
        else:
            rows.append({"input_ids": tokens.input_ids, "labels": tokens.labels})
    reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
    if not rows:
        raise UserError(f"validation={file!r} holds no row with a label token ({reasons}); add rows with answers")
    if dropped and not quiet and trainer.is_world_process_zero():
        say(f"siftune: {dropped.total()} of {len(pool)} validation rows are left out: {reasons}", error=True)
    selector.use_validation(rows)
