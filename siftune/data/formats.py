"""Row formats: which columns hold the question and the answer, and the one text form of a row (METHODS 1, point 2).

Recognised, in this order: `messages` (chat; also ShareGPT's `conversations`), Alpaca (`instruction`, optional `input`,
`output`), `prompt`/`completion` (strings, or two message lists) and plain `text`. A pool has one format; a row that
does not fit it is bad, with a reason of the form `kind: detail`. Cost: a few dictionary look-ups per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..errors import UserError, did_you_mean
from ..records import Message, Row
from .bad_row import BadRow as BadRow
from .bad_row import kind_of, shown
from .bad_row import row_failures as row_failures
from .messages import (
    KNOWN_ROLES,
    SYSTEM_ROLES,
    Chat,
    chat_of,
    joined,
    parsed,
    plain_text,
    read_messages,
    read_tools,
)

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
EXTRAS: dict[str, tuple[str, ...]] = {
    "messages": ("tools", "system", "weight"),
    "alpaca": ("system", "history", "weight"),
    "prompt-completion": ("tools", "system", "weight"),
    "text": ("weight",),
}
"""Further columns that are read where a row has them."""


@dataclass(frozen=True)
class Parts:
    """What a `Row` holds."""

    instruction: str
    input: str
    output: str
    chat: Chat | None = None
    """Of rows with several turns, tools or a system text."""


class ChatTokenizer(Protocol):
    """The part of a tokenizer that the text form needs."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> Any: ...


# --- how the rows of a pool are read --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How the rows of one pool are read: its format, the user's column for a field where it differs, and the roles
    of further names."""

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    def parts(self, original: Mapping[str, Any]) -> Parts:
        """The row's parts, as every method reads them. Raises `BadRow` with the reason when it does not fit the
        format."""
        try:
            return _READERS[self.format](original, self)
        except BadRow as bad:
            actual = recognise(original, self.columns)
            if actual is not None and actual != self.format:
                raise BadRow(f"another format: {actual} in a pool of {self.format} rows") from bad
            raise

    def check(self, original: Mapping[str, Any]) -> tuple[str, ...]:
        """Notes for a row that may be of another kind, or is used in part; none for a row of the format's usual kind.

        Raises `BadRow` as `parts` does, and for a row that must not be imitated, or whose answer is about more than
        text.
        """
        parts = self.parts(original)
        used = {self.column(field) for field in FIELDS[self.format]}
        for column in _MEDIA:
            if column in original and column not in used and _has_content(original[column]):
                raise BadRow(f"not text alone: the column {column} is not empty")
        notes = list(_chat_notes(parts.chat))
        if self.format == "prompt-completion" and (label := _kto_label(original.get("label"))) is not None:
            if not label:
                raise BadRow("not to imitate: label is false (KTO)")
            notes.append("label: true (KTO), kept as rows to imitate")
        if self.format == "text" and "message_id" in original and "parent_id" in original:
            if original.get("role") == "prompter":
                raise BadRow("no answer: role is prompter, a question of a conversation tree")
            if original.get("role") == "assistant":
                notes.append(
                    "role: assistant (single turns of conversation trees), kept as texts without their questions"
                )
        if any("<image>" in part for part in (parts.instruction, parts.input, parts.output)):
            notes.append("the placeholder <image> and no image, kept as text")
        return tuple(notes)

    def row(self, position: int, id: str, original: Mapping[str, Any]) -> Row:
        """A good row as a `Row`."""
        parts = self.parts(original)
        row = Row(
            position, id, parts.instruction, parts.input, parts.output, weight=original.get(self.column("weight"))
        )
        if parts.chat is None:
            return row
        return replace(row, messages=parts.chat.messages, tools=parts.chat.tools, supervised=parts.chat.supervised)

    def column(self, field: str) -> str:
        """The user's column that holds a field."""
        return self.columns.get(field, field)


def _chat_notes(chat: Chat | None) -> list[str]:
    if chat is None:
        return []
    notes = []
    if chat.opening:
        notes.append("messages before the first question, which are left out of the text (written rows keep them)")
    if chat.closing:
        notes.append(
            "messages after the last supervised answer, which are left out of the text (written rows keep them)"
        )
    return notes


def check_roles(roles: Mapping[str, str]) -> None:
    """Raise `UserError` for a role that siftune does not know.

    >>> check_roles({"teacher": "assistant"})
    """
    for name, role in roles.items():
        if role not in KNOWN_ROLES:
            raise UserError(
                f"roles maps {name!r} to {role!r}, which is no role; {did_you_mean(str(role), KNOWN_ROLES)}"
            )


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
    known = list(dict.fromkeys(name for fields in (*FIELDS.values(), *EXTRAS.values()) for name in fields))
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise UserError(f"columns maps the field {unknown[0]!r}, which is not one of {', '.join(known)}")
    fitting = [name for name, fields in FIELDS.items() if set(columns) <= {*fields, *EXTRAS[name]}]
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


def _alpaca(original: Mapping[str, Any], reading: Reading) -> Parts:
    instruction = _text(original, "instruction", reading)
    input = _text(original, "input", reading)
    output = _answer(_text(original, "output", reading), "output", reading)
    system, history = _system(original, reading), _history(original, reading)
    if not system and not history:
        return Parts(instruction, input, output)
    turns = [{"role": "user", "content": joined((instruction, input))}, {"role": "assistant", "content": output}]
    return _of_chat(_chat([*history, *turns], [], reading.column("output"), system))


def _prompt_completion(original: Mapping[str, Any], reading: Reading) -> Parts:
    prompt, completion = (parsed(_column(original, field, reading.columns), list) for field in ("prompt", "completion"))
    system = _system(original, reading)
    where = reading.column("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise BadRow(f"missing field: {shown(where)} holds no message")
        before, flags = read_messages(prompt, reading.column("prompt"), reading.roles)
        after, more = read_messages(completion, where, reading.roles)
        return _of_chat(_chat([*before, *after], [*flags, *more], where, system, _tools(original, reading)))
    question = _text(original, "prompt", reading)
    output = _answer(_text(original, "completion", reading), "completion", reading)
    if not system:
        return Parts(question, "", output)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return _of_chat(_chat(turns, [], where, system))


def _messages(original: Mapping[str, Any], reading: Reading) -> Parts:
    where = reading.column("messages")
    if original.get(where) is None and "messages" not in reading.columns and original.get("conversations") is not None:
        where = "conversations"
    value = original.get(where)
    if value is None:
        raise BadRow(f"missing field: {shown(where)}")
    messages, flags = read_messages(value, where, reading.roles)
    return _of_chat(_chat(messages, flags, where, _system(original, reading), _tools(original, reading)))


def _plain_text(original: Mapping[str, Any], reading: Reading) -> Parts:
    return Parts("", "", _answer(_text(original, "text", reading), "text", reading))


_READERS: dict[str, Callable[[Mapping[str, Any], Reading], Parts]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}


def _text(original: Mapping[str, Any], field: str, reading: Reading) -> str:
    column = reading.column(field)
    value = original.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        if field in _OPTIONAL:
            return ""
        raise BadRow(f"missing field: {shown(column)}")
    raise BadRow(f"wrong type: {shown(column)} is {kind_of(value)}, not a string")


def _answer(value: str, field: str, reading: Reading) -> str:
    if not value or value.isspace():
        raise BadRow(f"empty answer: {shown(reading.column(field))}")
    return value


def _system(original: Mapping[str, Any], reading: Reading) -> str:
    """The text of the `system` column; empty where there is none."""
    value = original.get(reading.column("system"))
    if value is not None and not isinstance(value, str):
        raise BadRow(f"wrong type: {shown(reading.column('system'))} is {kind_of(value)}, not a string")
    return value if value and not value.isspace() else ""


def _tools(original: Mapping[str, Any], reading: Reading) -> tuple[Any, ...]:
    return read_tools(original.get(reading.column("tools")), reading.column("tools"))


def _history(original: Mapping[str, Any], reading: Reading) -> list[dict[str, Any]]:
    """Earlier turns of an Alpaca row: pairs of a question and its answer."""
    column = reading.column("history")
    pairs = parsed(original.get(column), list)
    if pairs is None or pairs == [] or pairs == "":
        return []
    if not isinstance(pairs, list):
        raise BadRow(f"wrong type: {shown(column)} is {kind_of(pairs)}, not a list of pairs")
    messages: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"wrong type: entry {number} of {shown(column)} is not a question and its answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _chat(
    messages: list[dict[str, Any]],
    flags: list[bool | None],
    column: str,
    system: str,
    tools: tuple[Any, ...] = (),
) -> Chat:
    """The chat to learn from, with the text of the `system` column in front, unless the messages begin with one."""
    flags = flags or [None] * len(messages)
    if system and not (messages and messages[0]["role"] in SYSTEM_ROLES):
        messages, flags = [{"role": "system", "content": system}, *messages], [None, *flags]
    return chat_of(messages, flags, column, tools)


def _of_chat(chat: Chat) -> Parts:
    """The question is every turn before the last answer, in plain text."""
    *before, answer = chat.messages
    return Parts(joined(map(plain_text, before)), "", plain_text(answer), chat)


# --- the one text form ----------------------------------------------------------------------------------------------


def text_of(row: Row, tokenizer: ChatTokenizer | None = None) -> str:
    """The text of a row, the same for every feature: instruction, input and output, the non-empty ones, on lines.

    A chat row goes through the tokenizer's chat template where it has one; without one, or where the template refuses
    a row without tools (some know no system role), its contents are put on separate lines. Raises `BadRow` where the
    template fails, or cannot hold the row.

    >>> text_of(Row(0, "", "Add.", "1 + 1", "2"))
    'Add.\\n1 + 1\\n2'
    """
    if not row.messages:
        return joined((row.instruction, row.input, row.output))
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        from .chat_template import Refusal
        from .render import render

        try:
            return render(tokenizer, row.messages, row.tools).text
        except Refusal:
            if has_tools(row):
                raise
    return joined(map(plain_text, row.messages))


def has_tools(row: Row) -> bool:
    """Whether a row is about tools: it lists some, or calls one, or holds a result."""
    return bool(row.tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in row.messages)


__all__ = ["BadRow", "Message", "row_failures"]
