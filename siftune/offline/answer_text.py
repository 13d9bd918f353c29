"""The position of a row's answer in its text, so that its tokens are located by offsets and nothing is tokenised twice.

The text is the one of every feature (`siftune.data.formats.text_of`), or a prompt of the user followed by the
answer. In a chat the answer is the last turn's content, without the template's marks around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.chat_template import Refusal, apply_template
from ..data.formats import BadRow, has_tools, text_of
from ..data.render import Rendered, render
from ..records import Row
from .prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerText:
    """A row's text, and the characters `begin .. end - 1` of it that are the answer."""

    text: str
    begin: int
    end: int


def answer_text(row: Row, tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None = None) -> AnswerText:
    """The row's text with the position of its answer. Raises `BadRow` where the chat template fails on the row.

    >>> answer_text(Row(0, "", "Add.", "1 + 1", "2"), tokenizer)
    AnswerText(text='Add.\\n1 + 1\\n2', begin=11, end=12)
    """
    if prompt is not None:
        before = prompt.fill(instruction=row.instruction, input=row.input)
        return AnswerText(before + row.output, len(before), len(before) + len(row.output))
    text = text_of(row)
    if row.messages and getattr(tokenizer, "chat_template", None):
        try:
            chat = render(tokenizer, row.messages, row.tools)
        except Refusal:
            if has_tools(row):
                raise
        else:
            if located := _in_chat(row, tokenizer, chat):
                return located
            if chat.text.endswith(row.output):
                text = chat.text
    return AnswerText(text, len(text) - len(row.output), len(text))


def _in_chat(row: Row, tokenizer: PreTrainedTokenizerBase, chat: Rendered) -> AnswerText | None:
    """The answer in the template's text: after all that the template writes before an answer, as it was or trimmed."""
    text, content = chat.text, row.messages[-1]["content"]
    try:
        before = str(
            apply_template(tokenizer, chat.turns[:-1], tokenize=False, add_generation_prompt=True, **chat.options())
        )
    except Refusal:
        return None
    if row.messages[-1].get("tool_calls"):  # a call's text is the template's own
        if not text.startswith(before):
            raise BadRow("chat template rewrites the answer, so its tokens cannot be located")
        return AnswerText(text, len(before), len(text.rstrip()))
    for answer in (content, content.strip()):
        begin = text.find(answer, len(before)) if text.startswith(before) else text.rfind(answer)
        if begin >= 0:
            return AnswerText(text, begin, begin + len(answer))
    return None
