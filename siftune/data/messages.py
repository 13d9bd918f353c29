"""Chats as rows hold them: OpenAI's and ShareGPT's spellings read into one list of messages, nothing dropped.

A message is what a chat template is given: `role`, `content` (a text), and, where the row has them, `tool_calls` (each
`{"type": "function", "function": {"name", "arguments"}}`, the arguments an object where they are one),
`tool_call_id`, `name`, `reasoning_content` and any further key of the user's. Keys whose value is null count as absent
at any depth, because a column of a table holds every key of every row. Cost: a few dictionary look-ups per message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..records import Message
from .bad_row import BadRow, kind_of, shown

ROLES: dict[str, str] = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "ipython", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""Role names of common data sets, in lower case; `function_call` is an assistant's call, written as JSON."""

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
FLAGS = ("weight", "train", "loss")
"""Keys of a message that say whether it is supervised; 0 and false: it is not."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold its reasoning, read as the first of them."""
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Chat:
    """A chat to train on, and what of the row's own list is not part of it."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    supervised: tuple[bool, ...] = ()
    """Of each message whether it is supervised; empty where no message has a flag."""
    opening: int = 0
    """Messages of the assistant (or tools) before the first question, left out."""
    closing: int = 0
    """Messages after the last supervised answer, left out."""
    notes: tuple[str, ...] = field(default=())


# --- reading ----------------------------------------------------------------------------------------------------------


def read_messages(value: Any, column: str, roles: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """The messages of a list (or of its JSON text), and of each its flag: None where it has none.

    Raises `BadRow` for anything that is no list of messages. `roles` maps further role names.
    """
    name = shown(column)
    value = parsed(value, list)
    if not isinstance(value, list):
        raise BadRow(f"wrong type: {name} is {kind_of(value)}, not a list of messages")
    messages, flags = [], []
    for number, message in enumerate(value, 1):
        where = f"message {number} of {name}"
        message = parsed(message, dict)
        if not isinstance(message, dict):
            raise BadRow(f"wrong type: {where} is {kind_of(message)}, not an object")
        messages.append(_message(without_nulls(message), where, roles))
        flags.append(_flag(message, where))
    return messages, flags


def parsed(value: Any, kind: type) -> Any:
    """The list or object that a text holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == ("[" if kind is list else "{"):
        try:
            content = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return content if isinstance(content, kind) else value
    return value


def without_nulls(value: Any) -> Any:
    """The same value without keys whose value is null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _message(message: dict[str, Any], where: str, roles: Mapping[str, str]) -> dict[str, Any]:
    role_name = message.get("role", message.get("from"))
    role = role_of(role_name, roles)
    if role is None:
        known = "" if not isinstance(role_name, str) else "; map it with --roles"
        raise BadRow(f"wrong roles: {where} has the role {shown(role_name)}{known}")
    content = message.get("content", message.get("value"))
    kept = {key: item for key, item in message.items() if key not in ("role", "from", "content", "value", *FLAGS)}
    calls = _calls(kept, where)
    if role == "function_call":
        if not isinstance(content, str):
            raise BadRow(f"wrong type: {where} is a function_call without a text")
        calls, content, role = _written_calls(content, where), "", "assistant"
    text = _content(content, where, may_be_absent=bool(calls) or any(key in kept for key in THOUGHTS))
    kept.pop("function_call", None)
    for key in THOUGHTS[1:]:
        if isinstance(kept.get(key), str):
            kept["reasoning_content"] = kept.get("reasoning_content") or kept.pop(key)
    return {"role": role, "content": text, **kept, **({"tool_calls": calls} if calls else {})}


def role_of(name: Any, roles: Mapping[str, str]) -> str | None:
    """The role of a name; None for one that is not known."""
    if not isinstance(name, str):
        return None
    return roles.get(name) or ROLES.get(name.lower())


def _content(content: Any, where: str, *, may_be_absent: bool) -> str:
    """A content as one text: parts of text are joined by line breaks."""
    if content is None and may_be_absent:
        return ""
    if isinstance(content, list):
        texts = []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, dict) and isinstance(text := part.get("text", part.get("content")), str):
                texts.append(text)
            else:
                kind = part.get("type", "unknown") if isinstance(part, dict) else kind_of(part)
                raise BadRow(f"not text alone: the content of {where} has a part of the type {shown(kind)}")
        return "\n".join(texts)
    if not isinstance(content, str):
        raise BadRow(f"wrong type: the content of {where} is {kind_of(content)}, not a string")
    return content


def _calls(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls of a message in one form; OpenAI's older `function_call` is a list of one."""
    calls = parsed(message.pop("tool_calls", None) or [], list)
    if "function_call" in message and not calls:
        calls = [parsed(message["function_call"], dict)]
    if not isinstance(calls, list):
        raise BadRow(f"wrong type: the tool_calls of {where} are {kind_of(calls)}, not a list")
    return [_call(parsed(call, dict), where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = parsed(call.get("function", call), dict) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise BadRow(f"wrong type: a tool call of {where} has no function name")
    arguments = function.get("arguments", function.get("parameters", {}))
    extra = {key: call[key] for key in ("id", "index") if key in call}
    return {**extra, "type": "function", "function": {"name": name, "arguments": parsed(arguments, dict)}}


def _written_calls(text: str, where: str) -> list[dict[str, Any]]:
    """The calls that ShareGPT's `function_call` holds as JSON: one object, or a list of them."""
    calls = parsed(parsed(text, list), dict)
    if isinstance(calls, str):
        raise BadRow(f"wrong type: {where} is a function_call that is no JSON object with name and arguments")
    return [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]


def _flag(message: Mapping[str, Any], where: str) -> bool | None:
    flag: bool | None = None
    for key in FLAGS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow(f"wrong type: {key} of {where} is {shown(value)}; set it to 0 or 1, false or true")
        flag = bool(value) and flag is not False
    return flag


def read_tools(value: Any, column: str) -> tuple[Any, ...]:
    """The tools of a row: a list of objects, or its JSON text; null and empty ones are none."""
    value = parsed(value, list)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return ()
    tools = [parsed(tool, dict) for tool in value] if isinstance(value, list) else None
    if tools is None or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"wrong type: {shown(column)} is {kind_of(value)}, not a list of tools")
    return tuple(_tool(without_nulls(tool)) for tool in tools)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in the form of the templates, also where the row has the function alone."""
    return {"type": "function", "function": tool} if "function" not in tool and "name" in tool else tool


# --- what is supervised ---------------------------------------------------------------------------------------------


def chat_of(
    messages: Sequence[dict[str, Any]], flags: Sequence[bool | None], column: str, tools: tuple[Any, ...] = ()
) -> Chat:
    """A chat from the first question to the last supervised answer. Raises `BadRow` where there is none."""
    name = shown(column)
    if not messages:
        raise BadRow(f"missing field: {name} holds no message")
    roles = [message["role"] for message in messages]
    head = next((index for index, role in enumerate(roles) if role not in SYSTEM_ROLES), len(roles))
    if any(role in SYSTEM_ROLES for role in roles[head:]):
        raise BadRow(f"wrong roles: {name} has a system message that is not the first")
    begin = next((index for index in range(head, len(roles)) if roles[index] == "user"), None)
    if begin is None:
        raise BadRow(f"wrong roles: {name} starts with {roles[head] if head < len(roles) else 'system'}, not with user")
    supervised = [role == "assistant" and flag is not False for role, flag in zip(roles, flags, strict=True)]
    answers = [index for index in range(begin, len(roles)) if roles[index] == "assistant"]
    if not answers:
        raise BadRow(f"wrong roles: {name} ends with {roles[-1]}, not with assistant")
    endings = [index for index in answers if supervised[index]]
    if not endings:
        raise BadRow(f"not to imitate: no answer of {name} is supervised (weight, train or loss is 0 in all of them)")
    end = endings[-1] + 1
    kept = [*range(head), *range(begin, end)]
    answer = messages[end - 1]
    if not (answer["content"].strip() or answer.get("tool_calls")):
        raise BadRow(f"empty answer: the last message of {name}")
    flagged = any(flag is not None for flag in flags)
    return Chat(
        messages=tuple(messages[index] for index in kept),
        tools=tools,
        supervised=tuple(supervised[index] for index in kept) if flagged else (),
        opening=begin - head,
        closing=len(roles) - end,
    )


# --- in plain text ----------------------------------------------------------------------------------------------------


def plain_text(message: Message) -> str:
    """A message as a reader takes it: its content, then its calls; a tool's result is marked as one.

    >>> plain_text({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]})
    'tool call: add({"a": 1})'
    """
    lines = [message["content"]]
    if message["role"] == "tool":
        lines = [f"tool result: {message['content']}"]
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        lines.append(f"tool call: {call['function']['name']}({text})")
    return joined(lines)


def joined(parts: Iterable[str]) -> str:
    """The parts that hold something, on lines of their own."""
    return "\n".join(part for part in parts if part)
