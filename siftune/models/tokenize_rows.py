"""A row as token ids and labels: the one way from text to tokens, for training and for held-out loss alike.

Two forms. `chat`: the tokenizer's chat template; rows without messages become one user turn and its answer. `prompt`: the
question and a newline, the answer, the end-of-text token; no template. Labels are the ids where the model learns and -100
elsewhere. What is learnt in a chat: every assistant turn where the template marks them (`{% generation %}`), else the last
answer with the token that ends it; in a prompt: the answer and the end; of plain text: all of it. The first token is never
learnt, since nothing comes before it, and nothing follows the last learnt token.

The tokens before an answer are those that the model sees when it is asked, so training and generation agree to the token.
Cost: one template and two tokenizer calls a row; `Encoder` asks the tokenizer about itself once, `answer_tokens` each time.

Shapes: `T` tokens of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from ..data.chat_template import Refusal, apply_template
from ..data.formats import BadRow, row_failures
from ..errors import UserError
from ..records import Pool, Row

Text = Literal["auto", "chat", "prompt"]
FORMS = ("auto", "chat", "prompt")
VERSION = 1
"""Part of a tokenised data set's cache key: raised whenever the tokens of any row change."""
IGNORED = -100
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Tokens:
    """One row as the model reads it."""

    input_ids: list[int]
    """Shape `(T,)`, at most `max_length`."""
    labels: list[int]
    """Shape `(T,)`: the id where it is learnt, -100 elsewhere; at least one is learnt."""
    cut: bool
    """The row went on beyond `max_length`."""

    @property
    def learnt(self) -> int:
        """Tokens that are learnt."""
        return sum(label != IGNORED for label in self.labels)


def check_text(text: str, tokenizer: Any, *, model: str, format: str) -> None:
    """Raise `UserError` unless rows of `format` (a pool's) can take the form `text` with this tokenizer."""
    if text not in FORMS:
        raise UserError(f"text={text!r} is not known; use one of {', '.join(FORMS)}")
    template = bool(getattr(tokenizer, "chat_template", None))
    if text == "chat" and format == "text":
        raise UserError(
            "text='chat' needs a question and an answer, and rows of plain text have none; set text: prompt"
        )
    if text == "chat" and not template:
        raise UserError(f"text='chat' needs a chat template, and model={model!r} has none; set text: prompt")
    if text == "auto" and format == "messages" and not template:
        raise UserError(
            f"the rows are messages and model={model!r} has no chat template; use a model with one, or set text: prompt to "
            "join the turns before the last answer with newlines"
        )


def answer_tokens(row: Row, tokenizer: Any, *, text: str, max_length: int) -> tuple[list[int], list[int]]:
    """Input ids and labels of a row, each of shape `(T,)`, cut on the right to `max_length`.

    `text` is `chat`, `prompt`, or `auto`: chat where the tokenizer has a template and the row is no plain text. Raises
    `BadRow` with the reason where nothing is left to learn, or template or tokenizer fail on the row.

    >>> answer_tokens(Row(0, "", "1 + 1 = ?", "", "2"), tokenizer, text="prompt", max_length=512)
    ([317, 9, 21, 1], [-100, -100, 21, 1])
    """
    found = Encoder(tokenizer, text, max_length)(row)
    return found.input_ids, found.labels


@dataclass(frozen=True, eq=False)
class Encoder:
    """`answer_tokens` for many rows: `Encoder(tokenizer, "auto", 512)(row)` is the row's `Tokens`, or raises `BadRow`."""

    tokenizer: Any
    text: str
    max_length: int

    def __post_init__(self) -> None:
        if self.text not in FORMS:
            raise UserError(f"text={self.text!r} is not known; use one of {', '.join(FORMS)}")
        if self.text == "chat" and not self._template:
            raise UserError("text='chat' needs a chat template, and this tokenizer has none; set text='prompt'")

    def __call__(self, row: Row) -> Tokens:
        with row_failures("tokenizer fails"):
            return self._tokens(row)

    def _tokens(self, row: Row) -> Tokens:
        ids, learnt = self._chat(row) if self._is_chat(row) else self._prompt(row)
        if learnt:
            learnt[0] = False
        whole = max((index for index, yes in enumerate(learnt) if yes), default=-1) + 1
        if not whole:
            raise BadRow("no answer tokens: the answer gives none")
        kept = ids[: min(whole, self.max_length)]
        labels = [token if yes else IGNORED for token, yes in zip(kept, learnt, strict=False)]
        if all(label == IGNORED for label in labels):
            raise BadRow(
                f"no answer tokens after truncation: {learnt.index(True)} tokens come before the answer, "
                f"max_length is {self.max_length}"
            )
        return Tokens(kept, labels, whole > self.max_length)

    def over(self, pool: Pool, positions: Sequence[int]) -> Iterator[tuple[int, Tokens | BadRow]]:
        """Every row at `positions`, in that order, as its tokens or the reason that it has none; read as it is asked for."""
        for start in range(0, len(positions), ROWS_AT_ONCE):
            some = [int(position) for position in positions[start : start + ROWS_AT_ONCE]]
            for position, row in zip(some, pool.read(some), strict=True):
                try:
                    yield position, self(row)
                except BadRow as bad:
                    yield position, bad

    def _is_chat(self, row: Row) -> bool:
        if self.text != "auto":
            return self.text == "chat"
        return bool(self._template) and bool(row.messages or row.question)

    # --- prompt -----------------------------------------------------------------------------------------------------

    def _prompt(self, row: Row) -> tuple[list[int], list[bool]]:
        ids, learnt = self._joined(row.question + "\n" if row.question else "", row.output)
        end = self.tokenizer.eos_token_id
        ids, learnt = [*self._opening, *ids], [*(False for _ in self._opening), *learnt]
        return (ids, learnt) if end is None else ([*ids, end], [*learnt, True])

    def _joined(self, before: str, answer: str) -> tuple[list[int], list[bool]]:
        """Ids of both texts and which of them are the answer's.

        Where the last token before the answer would grow into it, the answer is tokenised alone, as it is generated.
        """
        head, whole = self._ids(before), self._ids(before + answer)
        if whole[: len(head)] != head:
            whole = head + self._ids(answer)
        return whole, [False] * len(head) + [True] * (len(whole) - len(head))

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])

    @cached_property
    def _opening(self) -> list[int]:
        """What the tokenizer puts before every text by itself: the beginning-of-text token, mostly; or nothing."""
        plain, opened = self._ids("a"), self._ids("a", special=True)
        starts = (at for at in range(len(opened)) if opened[at : at + len(plain)] == plain)
        return opened[: next(starts, 0)]

    # --- chat -------------------------------------------------------------------------------------------------------

    def _chat(self, row: Row) -> tuple[list[int], list[bool]]:
        if not row.messages and not row.question:
            raise BadRow("no question: plain text has no turns to put into the chat template")
        said = row.messages or (("user", row.question), ("assistant", row.output))
        turns = [{"role": role, "content": content} for role, content in said]
        try:
            return self._templated(turns, row.output)
        except Refusal:
            if turns[0]["role"] != "system" or len(turns) < 3:
                raise
        # some templates know no system turn: its text opens the user's
        joined = {"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        return self._templated([joined, *turns[2:]], row.output)

    def _templated(self, turns: Sequence[dict[str, str]], answer: str) -> tuple[list[int], list[bool]]:
        # Models that think aloud by default are taught to answer at once; other templates ignore the word.
        apply, thinking = partial(apply_template, self.tokenizer), {"enable_thinking": False}
        if self._marks:
            found = apply(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **thinking)
            return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
        whole = str(apply(turns, tokenize=False, **thinking))
        before = str(apply(turns[:-1], tokenize=False, add_generation_prompt=True, **thinking))
        if not whole.startswith(before):  # a template that writes a conversation anew at every turn
            before = whole[: _place(whole, answer)]
        return self._joined(before, self._without_tail(whole[len(before) :]))

    def _without_tail(self, said: str) -> str:
        """What the assistant says up to its end token, without the white space that a template writes after it."""
        bare = said.rstrip()
        return bare if any(bare.endswith(token) for token in self._special) else said

    @cached_property
    def _template(self) -> str:
        template = getattr(self.tokenizer, "chat_template", None) or ""
        return str(template.get("default", "")) if isinstance(template, dict) else str(template)

    @cached_property
    def _marks(self) -> bool:
        """Whether the template marks what the assistant says, and the tokenizer can follow the marks."""
        marked = re.search(r"{%[-+]?\s*generation\b", self._template) is not None
        return marked and bool(getattr(self.tokenizer, "is_fast", False))

    @cached_property
    def _special(self) -> set[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return {token for token in (*added, *self.tokenizer.all_special_tokens) if token}


def _place(whole: str, answer: str) -> int:
    """Where the answer starts, by its own words."""
    for text in (answer, answer.strip()):
        if (begin := whole.rfind(text)) >= 0:
            return begin
    raise BadRow("chat template rewrites the answer, so its tokens cannot be located")
