"""Row formats: which columns hold the question and the answer, and the one text form of a row (METHODS 1, point 2).

Recognised, in this order: `messages` (chat; also ShareGPT's `conversations`), Alpaca (`instruction`, optional `input`,
`output`), `prompt`/`completion` (strings, or two message lists) and plain `text`. A pool has one format; a row that
does not fit it is bad, with a reason of the form `kind: detail`. Cost: a few dictionary look-ups per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import UserError, is_failure, one_line
from ..records import Row

TEXT_FORM = "siftune-text-1"
"""Name of the text form that `text_of` gives: a part of every feature's cache key, changed whenever the form is."""

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "input", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Fields of every format, in the order in which formats are tried."""

_OPTIONAL = frozenset({"input"})
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"} | {
    "tool": "tool"
}
_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}

Turns = tuple[tuple[str, str], ...]
Parts = tuple[str, str, str, Turns]
"""instruction, input, output, messages: what a `Row` holds."""


class BadRow(Exception):
    """A row that is excluded; its text is the reason, `kind: detail`."""


@contextmanager
def row_failures(what: str) -> Iterator[None]:
    """Turn any failure inside into a `BadRow` whose reason starts with `what`.

    `BadRow` and `UserError` pass as they are, and so does an interruption.

    >>> with row_failures("tokenizer fails"):
    ...     tokenizer(text)
    """
    try:
        yield
    except (BadRow, UserError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise BadRow(f"{what}: {one_line(error)}") from error


class ChatTokenizer(Protocol):
    """The part of a tokenizer that the text form needs."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> Any: ...


# --- how the rows of a pool are read --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How the rows of one pool are read: its format, and the user's column for a field where it differs."""

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def parts(self, original: Mapping[str, Any]) -> Parts:
        """The row's parts, as every method reads them. Raises `BadRow` with the reason when it does not fit the
        format."""
        try:
            return _READERS[self.format](original, self.columns)
        except BadRow as bad:
            actual = recognise(original, self.columns)
            if actual is not None and actual != self.format:
                raise BadRow(f"another format: {actual} in a pool of {self.format} rows") from bad
            raise

    def check(self, original: Mapping[str, Any]) -> str | None:
        """None for a row of the format's usual kind; a note for one that may be of another kind.

        Raises `BadRow` as `parts` does, and for a row that must not be imitated, or whose answer is about more than
        text.
        """
        parts = self.parts(original)
        used = {self.columns.get(field, field) for field in FIELDS[self.format]}
        for column in _MEDIA:
            if column in original and column not in used and _has_content(original[column]):
                raise BadRow(f"not text alone: the column {column} is not empty")
        if self.format == "prompt-completion" and (label := _kto_label(original.get("label"))) is not None:
            if not label:
                raise BadRow("not to imitate: label is false (KTO)")
            return "label: true (KTO), kept as rows to imitate"
        if self.format == "text" and "message_id" in original and "parent_id" in original:
            if original.get("role") == "prompter":
                raise BadRow("no answer: role is prompter, a question of a conversation tree")
            if original.get("role") == "assistant":
                return "role: assistant (single turns of conversation trees), kept as texts without their questions"
        if "<image>" in parts[0] or "<image>" in parts[1] or "<image>" in parts[2]:
            return "the placeholder <image> and no image, kept as text"
        return None

    def row(self, position: int, id: str, original: Mapping[str, Any]) -> Row:
        """A good row as a `Row`."""
        instruction, input, output, messages = self.parts(original)
        return Row(position, id, instruction, input, output, messages)


_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of rows that are about more than their text."""


def _has_content(value: Any) -> bool:
    """Whether the value has content; empty texts, empty lists and objects, null and NaN have none."""
    if isinstance(value, Mapping):
        return any(map(_has_content, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_content, value))
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value == value and bool(value)


def _kto_label(value: Any) -> bool | None:
    """KTO's mark of a completion as good or bad, which CSV spells as text; None for anything else."""
    return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())


def recognise(original: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The first format whose required fields the row holds, or None. Mapped fields rule out formats without them."""
    for name in candidates(columns):
        if all(_column(original, field, columns) is not None for field in FIELDS[name] if field not in _OPTIONAL):
            return name
    return None


def candidates(columns: Mapping[str, str]) -> list[str]:
    """Formats that have every field of `columns`. Raises `UserError` for a field that no format has, or fields that no
    single format has."""
    known = [name for fields in FIELDS.values() for name in fields]
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise UserError(f"columns maps the field {unknown[0]!r}, which is not one of {', '.join(known)}")
    fitting = [name for name, fields in FIELDS.items() if set(columns) <= set(fields)]
    if not fitting:
        shapes = "; ".join(", ".join(fields) for fields in FIELDS.values())
        raise UserError(f"columns maps {', '.join(columns)}, which no single format has; the formats are: {shapes}")
    return fitting


def check_format(format: str, columns: Mapping[str, str]) -> None:
    """Raise `UserError` unless `format` is known and has every mapped field."""
    if format not in FIELDS:
        raise UserError(f"format={format!r} is not known; use one of {', '.join(FIELDS)}")
    if format not in candidates(columns):
        raise UserError(f"columns maps {', '.join(columns)}, but the {format} format has {', '.join(FIELDS[format])}")


def _column(original: Mapping[str, Any], field: str, columns: Mapping[str, str]) -> Any:
    """The value of a field, None where it is absent or null."""
    value = original.get(columns.get(field, field))
    if value is None and field == "messages" and field not in columns:
        return original.get("conversations")
    return value


# --- one reader per format ------------------------------------------------------------------------------------------


def _alpaca(original: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    instruction = _text(original, "instruction", columns)
    input = _text(original, "input", columns)
    return instruction, input, _answer(_text(original, "output", columns), "output", columns), ()


def _prompt_completion(original: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    prompt, completion = (_column(original, field, columns) for field in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        where = columns.get("completion", "completion")
        if not completion:
            raise BadRow(f"missing field: {_shown(where)} holds no message")
        return _chat(_turns(prompt, columns.get("prompt", "prompt")) + _turns(completion, where), where)
    question = _text(original, "prompt", columns)
    return question, "", _answer(_text(original, "completion", columns), "completion", columns), ()


def _messages(original: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    where = columns.get("messages", "messages")
    if original.get(where) is None and "messages" not in columns and original.get("conversations") is not None:
        where = "conversations"
    value = original.get(where)
    if value is None:
        raise BadRow(f"missing field: {_shown(where)}")
    return _chat(_turns(value, where), where)


def _plain_text(original: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    return "", "", _answer(_text(original, "text", columns), "text", columns), ()


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, str]], Parts]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}


def _text(original: Mapping[str, Any], field: str, columns: Mapping[str, str]) -> str:
    column = columns.get(field, field)
    value = original.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        if field in _OPTIONAL:
            return ""
        raise BadRow(f"missing field: {_shown(column)}")
    raise BadRow(f"wrong type: {_shown(column)} is {_kind(value)}, not a string")


def _answer(value: str, field: str, columns: Mapping[str, str]) -> str:
    if not value or value.isspace():
        raise BadRow(f"empty answer: {_shown(columns.get(field, field))}")
    return value


def _turns(value: Any, column: str) -> Turns:
    """(role, content) of a message list; both the role/content and the from/value spelling."""
    shown = _shown(column)
    if not isinstance(value, list):
        raise BadRow(f"wrong type: {shown} is {_kind(value)}, not a list of messages")
    turns = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise BadRow(f"wrong type: message {number} of {shown} is {_kind(message)}, not an object")
        role_name = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        role = _ROLES.get(role_name) if isinstance(role_name, str) else None
        if role is None:
            raise BadRow(f"wrong roles: message {number} of {shown} has the role {_shown(role_name)}")
        if not isinstance(content, str):
            raise BadRow(f"wrong type: the content of message {number} of {shown} is {_kind(content)}, not a string")
        turns.append((role, content))
    return tuple(turns)


def _chat(turns: Turns, column: str) -> Parts:
    """Check the order of the roles; the question is every turn before the last answer."""
    shown = _shown(column)
    if not turns:
        raise BadRow(f"missing field: {shown} holds no message")
    roles = [role for role, _ in turns]
    first = next((role for role in roles if role != "system"), None)
    if first != "user":
        raise BadRow(f"wrong roles: {shown} starts with {first or 'system'}, not with user")
    if "system" in roles[1:]:
        raise BadRow(f"wrong roles: {shown} has a system message that is not the first")
    if roles[-1] != "assistant":
        raise BadRow(f"wrong roles: {shown} ends with {roles[-1]}, not with assistant")
    answer = turns[-1][1]
    if not answer or answer.isspace():
        raise BadRow(f"empty answer: the last message of {shown}")
    return _joined(content for _, content in turns[:-1]), "", answer, turns


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def _shown(name: Any) -> str:
    """A name from the data, short and printable whatever it holds."""
    text = name if isinstance(name, str) else repr(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."


# --- the one text form ----------------------------------------------------------------------------------------------


def text_of(row: Row, tokenizer: ChatTokenizer | None = None) -> str:
    """The text of a row, the same for every feature: instruction, input and output, the non-empty ones, on lines.

    A chat row goes through the tokenizer's chat template where it has one; without one, or where the template refuses
    the row (some know no system role), its contents are put on separate lines. Raises `BadRow` where the template
    fails.

    >>> text_of(Row(0, "", "Add.", "1 + 1", "2"))
    'Add.\\n1 + 1\\n2'
    """
    if not row.messages:
        return _joined((row.instruction, row.input, row.output))
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        from .chat_template import Refusal, apply_template

        turns = [{"role": role, "content": content} for role, content in row.messages]
        try:
            return str(apply_template(tokenizer, turns, tokenize=False))
        except Refusal:
            pass
    return _joined(content for _, content in row.messages)


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)
