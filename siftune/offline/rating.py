"""A rating from 1 to 6 as a scorer model expects it: sum over k of k * p(k), p from the logits of "1" .. "6" (Deita).

The scorer reads a prompt with a row's turn in it, and predicts one token; nothing is generated.
Source: Deita, arXiv 2312.15685, section 2. Cost: one forward over the prompt, the head on its last token.

Shapes: `N` prompts, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.formats import TEXT_FORM
from ..data.messages import plain_text
from ..errors import UserError
from ..files import hash_json
from ..models.causal_lm import CausalLM, Ids, logits
from ..models.tokenise import texts_of
from ..records import Pool, Row
from .prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RATINGS = 6
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    instruction: str
    input: str
    output: str


def turns_of(row: Row) -> list[Turn]:
    """A row's question-answer turns: one, or in a chat one per answer, with all messages since the answer before.

    >>> turns_of(Row(0, "", "", "", "", ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})))
    [Turn(instruction='Hi', input='', output='Ho')]
    """
    if not row.messages:
        return [Turn(row.instruction, row.input, row.output)]
    turns: list[Turn] = []
    unanswered: list[str] = []
    for message in row.messages:
        content = plain_text(message)
        if message["role"] != "assistant":
            unanswered.append(content)
        elif unanswered:
            turns.append(Turn("\n".join(part for part in unanswered if part), "", content))
            unanswered = []
        else:  # an answer in two messages
            turns[-1] = Turn(turns[-1].instruction, "", f"{turns[-1].output}\n{content}")
    return turns


@dataclass(frozen=True, eq=False)
class Rater:
    """A scorer model with its prompt. Picklable; the model loads on first use."""

    lm: CausalLM
    prompt: Prompt

    @property
    def key(self) -> str:
        """Content hash of model, prompt and reading."""
        return hash_json(["rating", 1, TEXT_FORM, self.lm.key, self.prompt.text])

    def ratings(
        self, pool: Pool, rows: Sequence[int]
    ) -> tuple[dict[int, NDArray[np.float64]], dict[int, str], dict[int, int]]:
        """Of every row: the rating of each of its turns, or why there is none, and the tokens of its text."""
        prompts: list[Ids] = []
        owner: list[int] = []
        reasons: dict[int, str] = {}
        tokens: dict[int, int] = {}
        for start in range(0, len(rows), ROWS_AT_ONCE):
            block = pool.read(rows[start : start + ROWS_AT_ONCE])
            encoded_rows = self.lm.encode(texts_of(block, self.lm.tokenizer))
            tokens |= {
                row.row: min(len(text.ids), self.lm.length)
                for row, text in zip(block, encoded_rows, strict=True)
                if text.reason is None
            }
            for row, text, prompts_or_reason in zip(block, encoded_rows, self._prompts(block), strict=True):
                if text.reason is not None:
                    reasons[row.row] = text.reason
                elif isinstance(prompts_or_reason, str):
                    reasons[row.row] = prompts_or_reason
                else:
                    prompts += prompts_or_reason
                    owner += [row.row] * len(prompts_or_reason)
        by_row: dict[int, list[float]] = {}
        for number, rating in zip(owner, self.rate(prompts).tolist(), strict=True):
            by_row.setdefault(number, []).append(rating)
        for number in [number for number, ratings in by_row.items() if not np.isfinite(ratings).all()]:
            reasons[number] = "the scorer's logits are NaN or infinite"
            del by_row[number]
        return {number: np.array(ratings) for number, ratings in by_row.items()}, reasons, tokens

    def _prompts(self, rows: Sequence[Row]) -> list[list[Ids] | str]:
        """Of each row the token ids of its filled prompts, one per turn, or why there are none."""
        turns = [turns_of(row) for row in rows]
        flat = [turn for block in turns for turn in block]
        fill = self.prompt.fill
        encoded = iter(self.lm.encode([fill(instruction=t.instruction, input=t.input, output=t.output) for t in flat]))
        prompts_per_row: list[list[Ids] | str] = []
        for block in turns:
            encoded_rows = [next(encoded) for _ in block]
            failed = next((encoded_row.reason for encoded_row in encoded_rows if encoded_row.reason is not None), None)
            if failed is not None:
                prompts_per_row.append(failed)
            elif not all(turn.instruction or turn.input for turn in block):
                prompts_per_row.append("no question to rate")
            elif any(not encoded_row.complete or len(encoded_row.ids) > self.lm.length for encoded_row in encoded_rows):
                prompts_per_row.append(f"truncated: the scorer's prompt has more than {self.lm.length} tokens")
            else:
                prompts_per_row.append([encoded_row.ids for encoded_row in encoded_rows])
        return prompts_per_row

    def rate(self, prompts: Sequence[Ids]) -> NDArray[np.float64]:
        """The expected rating after each prompt, between 1 and 6. Shape `(N,)`."""
        rating_N = np.full(len(prompts), np.nan)
        if not len(prompts):
            return rating_N
        ids = rating_tokens(self.lm.tokenizer, self.lm.model)
        last = [(len(prompt) - 1, len(prompt)) for prompt in prompts]
        for owner_N, _, logits_NV in logits(self.lm, prompts, last):
            logits_per_rating = [logits_NV[:, same].double().logsumexp(dim=1) for same in ids]
            p_N6 = torch.stack(logits_per_rating, dim=1).softmax(dim=1).cpu()
            rating_N[owner_N] = (p_N6 @ torch.arange(1, RATINGS + 1, dtype=torch.float64)).numpy()
        return rating_N


def rating_tokens(tokenizer: PreTrainedTokenizerBase, model: str) -> list[list[int]]:
    """For each of "1" .. "6" the ids of its token, alone and after a space (often the same one).

    Looked up in the tokenizer: the last token of each form, where that token is the digit. Raises `UserError` for a
    tokenizer that has no token for each of them.
    """
    ids: list[list[int]] = [[] for _ in range(RATINGS)]
    for form in ("{}", " {}"):
        last = []
        for rating in range(1, RATINGS + 1):
            token_ids = tokenizer(form.format(rating), add_special_tokens=False)["input_ids"]
            if token_ids and str(tokenizer.decode([token_ids[-1]])).strip() == str(rating):
                last.append(int(token_ids[-1]))
        if len(set(last)) == RATINGS:
            ids = [same if token in same else [*same, token] for same, token in zip(ids, last, strict=True)]
    if not all(ids):
        raise UserError(f"the tokenizer of model={model!r} has no single tokens for 1 to 6; use another scorer")
    return ids
