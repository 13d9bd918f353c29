"""A rating from 1 to 6 as a scorer model expects it: sum over k of k * p(k), p from the logits of "1" .. "6" (Deita).

The scorer reads a prompt with a row's turn in it, and is asked once which token comes next; nothing is generated.
Source: Deita, arXiv 2312.15685, section 2. Cost: one forward over the prompt, the head on its last token.

Shapes: `N` prompts, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.formats import TEXT_FORM
from ..errors import UserError
from ..files import hash_json
from ..models.causal_lm import CausalLM, Ids, logits
from ..models.tokenise import texts_of
from ..records import Pool, Row
from .prompts import Prompt

RATINGS = 6
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    instruction: str
    input: str
    output: str


def turns_of(row: Row) -> list[Turn]:
    """A row's question-answer turns: one, or in a chat one per answer, with all that was said since the answer before.

    >>> turns_of(Row(0, "", "", "", "", (("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "No"))))
    [Turn(instruction='Hi', input='', output='Ho'), Turn(instruction='And?', input='', output='No')]
    """
    if not row.messages:
        return [Turn(row.instruction, row.input, row.output)]
    turns: list[Turn] = []
    said: list[str] = []
    for role, content in row.messages:
        if role != "assistant":
            said.append(content)
        elif said:
            turns.append(Turn("\n".join(part for part in said if part), "", content))
            said = []
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
            some = pool.read(rows[start : start + ROWS_AT_ONCE])
            own = self.lm.encode(texts_of(some, self.lm.tokenizer))
            tokens |= {
                row.row: min(len(text.ids), self.lm.length)
                for row, text in zip(some, own, strict=True)
                if text.reason is None
            }
            for row, text, found in zip(some, own, self._prompts(some), strict=True):
                if text.reason is not None:
                    reasons[row.row] = text.reason
                elif isinstance(found, str):
                    reasons[row.row] = found
                else:
                    prompts += found
                    owner += [row.row] * len(found)
        by_row: dict[int, list[float]] = {}
        for number, rating in zip(owner, self.rate(prompts).tolist(), strict=True):
            by_row.setdefault(number, []).append(rating)
        for number in [number for number, found in by_row.items() if not np.isfinite(found).all()]:
            reasons[number] = "the scorer's logits are NaN or infinite"
            del by_row[number]
        return {number: np.array(found) for number, found in by_row.items()}, reasons, tokens

    def _prompts(self, rows: Sequence[Row]) -> list[list[Ids] | str]:
        """Of each row the token ids of its filled prompts, one per turn, or why there are none."""
        turns = [turns_of(row) for row in rows]
        flat = [turn for some in turns for turn in some]
        fill = self.prompt.fill
        encoded = iter(self.lm.encode([fill(instruction=t.instruction, input=t.input, output=t.output) for t in flat]))
        found: list[list[Ids] | str] = []
        for some in turns:
            own = [next(encoded) for _ in some]
            failed = next((one.reason for one in own if one.reason is not None), None)
            if failed is not None:
                found.append(failed)
            elif not all(turn.instruction or turn.input for turn in some):
                found.append("no question to rate")
            elif any(not one.complete or len(one.ids) > self.lm.length for one in own):
                found.append(f"truncated: the scorer's prompt has more than {self.lm.length} tokens")
            else:
                found.append([one.ids for one in own])
        return found

    def rate(self, prompts: Sequence[Ids]) -> NDArray[np.float64]:
        """The expected rating after each prompt, between 1 and 6. Shape `(N,)`."""
        rating_N = np.full(len(prompts), np.nan)
        if not len(prompts):
            return rating_N
        ids = rating_tokens(self.lm.tokenizer, self.lm.model)
        last = [(len(prompt) - 1, len(prompt)) for prompt in prompts]
        for owner_N, _, logits_NV in logits(self.lm, prompts, last):
            found = [logits_NV[:, same].double().logsumexp(dim=1) for same in ids]
            p_N6 = torch.stack(found, dim=1).softmax(dim=1).cpu()
            rating_N[owner_N] = (p_N6 @ torch.arange(1, RATINGS + 1, dtype=torch.float64)).numpy()
        return rating_N


def rating_tokens(tokenizer: Any, model: str) -> list[list[int]]:
    """For each of "1" .. "6" the ids of its token, as it stands alone and after a space (often the same one).

    Looked up, never assumed: the last token of each form, where that token is the digit. Raises `UserError` for a
    tokenizer that has no token for each of them.
    """
    ids: list[list[int]] = [[] for _ in range(RATINGS)]
    for form in ("{}", " {}"):
        last = []
        for rating in range(1, RATINGS + 1):
            found = tokenizer(form.format(rating), add_special_tokens=False)["input_ids"]
            if found and tokenizer.decode([found[-1]]).strip() == str(rating):
                last.append(int(found[-1]))
        if len(set(last)) == RATINGS:
            ids = [same if token in same else [*same, token] for same, token in zip(ids, last, strict=True)]
    if not all(ids):
        raise UserError(f"the tokenizer of model={model!r} has no single tokens for 1 to 6; use another scorer")
    return ids
