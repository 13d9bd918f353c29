"""A row as token ids and labels: the only conversion from text to tokens, for training and for held-out loss alike.

Two forms. `chat`: the tokenizer's chat template; rows without messages become one user turn and its answer. `prompt`:
the question and a newline, the answer, the end-of-text token; no template. Labels are the ids of the label tokens and
-100 elsewhere. Label tokens in a chat: every assistant turn where the template marks them (`{% generation %}`), else
the last answer with the token that ends it; in a prompt: the answer and the end; of plain text: all of it. The first
token is never a label token, since nothing precedes it, and nothing follows the last label token.

The tokens before an answer are those of the prompt in generation, so training and generation agree to the token.
Cost: one template and two tokenizer calls a row; `Encoder` inspects the tokenizer once, `answer_tokens` each time.

Shapes: `T` tokens of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ..data.chat_template import apply_template
from ..data.formats import BadRow, row_failures
from ..data.render import Rendered, render
from ..errors import UserError
from ..records import Pool, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = Literal["auto", "chat", "prompt"]
FORMS = ("auto", "chat", "prompt")
VERSION = 2
"""Part of a tokenised data set's cache key: increased whenever the tokens of any row change."""
IGNORED = -100
ROWS_AT_ONCE = 256
_SENTINEL = "siftune-end"


@dataclass(frozen=True)
class Tokens:
    """One row as the model reads it."""

    input_ids: list[int]
    """Shape `(T,)`, at most `max_length`."""
    labels: list[int]
    """Shape `(T,)`: the id of a label token, -100 elsewhere; at least one is a label token."""
    cut: bool
    """Whether the row was cut at `max_length`."""

    @property
    def label_tokens(self) -> int:
        """Number of label tokens."""
        return sum(label != IGNORED for label in self.labels)


def check_text(text: str, tokenizer: PreTrainedTokenizerBase, *, model: str, format: str) -> None:
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


def answer_tokens(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, text: Text, max_length: int
) -> tuple[list[int], list[int]]:
    """Input ids and labels of a row, each of shape `(T,)`, cut on the right to `max_length`.

    `text` is `chat`, `prompt`, or `auto`: chat where the tokenizer has a template and the row is not plain text. Raises
    `BadRow` with the reason where no label token is left, or template or tokenizer fail on the row.

    >>> answer_tokens(Row(0, "", "1 + 1 = ?", "", "2"), tokenizer, text="prompt", max_length=512)
    ([317, 9, 21, 1], [-100, -100, 21, 1])
    """
    tokens = Encoder(tokenizer, text, max_length)(row)
    return tokens.input_ids, tokens.labels


@dataclass(frozen=True, eq=False)
class Encoder:
    """`answer_tokens` for many rows: `Encoder(tokenizer, "auto", 512)(row)` is the row's `Tokens`, or raises
    `BadRow`."""

    tokenizer: PreTrainedTokenizerBase
    text: Text
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
        ids, is_label = self._chat(row) if self._is_chat(row) else self._prompt(row)
        if is_label:
            is_label[0] = False
        end = max((index for index, labelled in enumerate(is_label) if labelled), default=-1) + 1
        if not end:
            raise BadRow("no answer tokens: the answer gives none")
        kept = ids[: min(end, self.max_length)]
        labels = [token if labelled else IGNORED for token, labelled in zip(kept, is_label, strict=False)]
        if all(label == IGNORED for label in labels):
            raise BadRow(
                f"no answer tokens after truncation: {is_label.index(True)} tokens come before the answer, "
                f"max_length is {self.max_length}"
            )
        return Tokens(kept, labels, end > self.max_length)

    def over(self, pool: Pool, positions: Sequence[int]) -> Iterator[tuple[int, Tokens | BadRow]]:
        """Every row at `positions`, in that order, as its tokens or the reason that it has none; read lazily."""
        for start in range(0, len(positions), ROWS_AT_ONCE):
            chunk = [int(position) for position in positions[start : start + ROWS_AT_ONCE]]
            for position, row in zip(chunk, pool.read(chunk), strict=True):
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
        ids, is_label = self._joined(row.question + "\n" if row.question else "", row.output)
        end = self.tokenizer.eos_token_id
        ids, is_label = [*self._opening, *ids], [*(False for _ in self._opening), *is_label]
        return (ids, is_label) if end is None else ([*ids, end], [*is_label, True])

    def _joined(self, before: str, answer: str) -> tuple[list[int], list[bool]]:
        """Ids of both texts and which of them are the answer's.

        Where the last token before the answer would grow into it, the answer is tokenised alone, as it is generated.
        """
        head, joined = self._ids(before), self._ids(before + answer)
        if joined[: len(head)] != head:
            joined = head + self._ids(answer)
        return joined, [False] * len(head) + [True] * (len(joined) - len(head))

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])

    @cached_property
    def _opening(self) -> list[int]:
        """The tokens that the tokenizer puts before every text: usually the beginning-of-text token, or none."""
        plain, opened = self._ids("a"), self._ids("a", special=True)
        starts = (at for at in range(len(opened)) if opened[at : at + len(plain)] == plain)
        return opened[: next(starts, 0)]

    # --- chat -------------------------------------------------------------------------------------------------------

    def _chat(self, row: Row) -> tuple[list[int], list[bool]]:
        if not row.messages and not row.question:
            raise BadRow("no question: plain text has no turns to put into the chat template")
        messages = row.messages or (
            {"role": "user", "content": row.question},
            {"role": "assistant", "content": row.output},
        )
        answer = messages[-1]
        reasons = any(message.get("reasoning_content") for message in messages) or "</think>" in answer["content"]
        # Models that reason by default are trained to answer at once, unless the row has reasoning; other templates
        # ignore the option.
        options: dict[str, Any] = {"enable_thinking": reasons}
        chat = render(self.tokenizer, messages, row.tools, merge_system=True, **options)
        options |= chat.options()
        if self._marks:
            return self._marked(chat, options, row.supervised)
        before = str(
            apply_template(self.tokenizer, chat.turns[:-1], tokenize=False, add_generation_prompt=True, **options)
        )
        if not chat.text.startswith(before):  # a template that rewrites the conversation at every turn
            if reasons or answer.get("tool_calls"):
                raise BadRow("chat template rewrites the answer, so its tokens cannot be located")
            before = chat.text[: _place(chat.text, answer["content"])]
        return self._joined(before, self._ended(chat.text[len(before) :]))

    def _marked(
        self, chat: Rendered, options: dict[str, Any], supervised: Sequence[bool]
    ) -> tuple[list[int], list[bool]]:
        """By the template's own marks; an answer whose flag is false has no label tokens."""
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        tokens = apply_template(self.tokenizer, chat.turns, **how, **options)
        ids, marks = list(tokens["input_ids"]), [bool(mark) for mark in tokens["assistant_masks"]]
        if not all(supervised):
            flags = [
                flag
                for turn, flag in zip(chat.turns, supervised[-len(chat.turns) :], strict=True)
                if turn["role"] == "assistant"
            ]
            runs = _runs(marks)
            if len(runs) != len(flags):
                raise BadRow("chat template marks no separate text for each answer, so their flags cannot be honoured")
            for (begin, end), flag in zip(runs, flags, strict=True):
                if not flag:
                    marks[begin:end] = [False] * (end - begin)
        return self._ended_ids(ids, marks)

    def _ended_ids(self, ids: list[int], marks: list[bool]) -> tuple[list[int], list[bool]]:
        """The last answer's mark, extended to the token that ends it."""
        end = max((index for index, mark in enumerate(marks) if mark), default=-1) + 1
        special = {self.tokenizer.convert_tokens_to_ids(token) for token in self._special}
        if (
            not end
            or ids[end - 1] in special
            or (str(self.tokenizer.decode(ids[end - 1])).strip() == "" and (end > 1 and ids[end - 2] in special))
        ):
            return ids, marks
        if end < len(ids) and ids[end] in special:
            return ids, [*marks[:end], True, *marks[end + 1 :]]
        ending = self._ids(self._ending)
        return [*ids[:end], *ending], [*marks[:end], *(True for _ in ending)]

    def _ended(self, answer: str) -> str:
        """The assistant's text up to its end token, without the white space that a template writes after it.

        Where the template writes none (GLM-4 ends an answer by the next turn's mark), that mark is put there, else the
        end-of-text token: without it the model never learns to stop.
        """
        stripped = answer.rstrip()
        if any(stripped.endswith(token) for token in self._special):
            return stripped
        return answer + self._ending

    @cached_property
    def _ending(self) -> str:
        """What ends an answer that the template leaves open."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
        try:
            text = str(apply_template(self.tokenizer, [*turns, turns[0]], tokenize=False))
        except BadRow:
            text = ""
        after = text.partition(_SENTINEL)[2].lstrip()
        fitting = [token for token in self._special if after.startswith(token)]
        ending = max(fitting, key=len, default=self.tokenizer.eos_token)
        if not ending:
            raise BadRow("chat template does not end an answer, and the tokenizer has no end-of-text token")
        return str(ending)

    @cached_property
    def _template(self) -> str:
        template = getattr(self.tokenizer, "chat_template", None) or ""
        return str(template.get("default", "")) if isinstance(template, dict) else str(template)

    @cached_property
    def _marks(self) -> bool:
        """Whether the template marks the assistant's text, and the tokenizer supports the marks."""
        marked = re.search(r"{%[-+]?\s*generation\b", self._template) is not None
        return marked and bool(getattr(self.tokenizer, "is_fast", False))

    @cached_property
    def _special(self) -> set[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return {token for token in (*added, *self.tokenizer.all_special_tokens) if token}


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, one past the last) of every run of true marks."""
    edges = [
        index
        for index in range(len(marks) + 1)
        if (index > 0 and marks[index - 1]) != (index < len(marks) and marks[index])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _place(rendered: str, answer: str) -> int:
    """The position where the answer's text starts."""
    for text in (answer, answer.strip()):
        if (begin := rendered.rfind(text)) >= 0:
            return begin
    raise BadRow("chat template rewrites the answer, so its tokens cannot be located")
