"""A chat completion as a server sends it, parsed strictly: anything unexpected is an error.

Only the fields that siftune uses are read: the first choice's text, refusal and finish reason, and the two token counts.
A text in parts is joined, without the parts that are reasoning. A server that streams its reply although no stream was
requested is read as well. Cost: one parse of the reply's JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 10_000_000
"""A larger token count cannot be that of one request."""
LONGEST_REASON = 100
"""Characters of a finish reason."""
REASONING_PARTS = ("thinking", "reasoning", "reasoning_content")
"""Types of the parts of a text that are no part of the answer."""


class BadReply(Exception):
    """A server's reply cannot be used; the message is a clause that names the reason."""


@dataclass(frozen=True)
class Completion:
    """The parts of a chat completion that siftune uses."""

    text: str | None
    """None where the server sent no text."""
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    refusal: str | None = None
    """The model's own words where it declines to answer."""


def read_json_reply(data: bytes) -> dict[str, Any]:
    """The JSON object of a reply's body. Raises `BadReply` for anything else, however deep or long."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise BadReply("the reply's JSON is nested too deeply") from None
    except ValueError as error:
        if data.lstrip()[:1] == b"<":
            raise BadReply("the reply is not JSON, it is a web page") from None
        raise BadReply(f"the reply is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadReply("the reply is not a JSON object")
    return value


def error_of(data: bytes) -> Any:
    """The error inside a reply of status 200, as some gateways send it: of the body, or of its first choice; else None."""
    try:
        reply = read_stream(data) if is_stream(data) else read_json_reply(data)
    except BadReply:
        return None
    if reply.get("error"):
        return reply["error"]
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice.get("error") or None if isinstance(choice, dict) else None


def read_completion(data: bytes) -> Completion:
    """The first choice and the token counts of a completion. Raises `BadReply`, which names the field.

    >>> read_completion(b'{"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]}').text
    'Yes.'
    """
    reply = read_stream(data) if is_stream(data) else read_json_reply(data)
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadReply("the reply is not a chat completion: it has no choices")
    choice = _object(choices[0], "choices[0]")
    message = _object(choice.get("message"), "choices[0].message")
    text, refusal = _text(message.get("content"))
    own = message.get("refusal")
    if own is not None and not isinstance(own, str):
        raise BadReply(f"the reply's refusal is {_kind(own)}, not a text")
    reason = choice.get("finish_reason")
    if reason is not None and (not isinstance(reason, str) or len(reason) > LONGEST_REASON):
        raise BadReply(f"the reply's finish_reason is {_kind(reason)}, not a short text")
    usage = {} if reply.get("usage") is None else _object(reply["usage"], "usage")
    tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    return Completion(text, reason or "stop", *tokens, refusal=own or refusal)


def _text(content: Any) -> tuple[str | None, str | None]:
    """A message's content as text, parts joined, and the refusal among its parts."""
    if content is None or isinstance(content, str):
        return content, None
    if not isinstance(content, list):
        raise BadReply(f"the reply's content is {_kind(content)}, not a text")
    texts: list[str] = []
    refusal: str | None = None
    for index, item in enumerate(content):
        part = _object(item, f"content[{index}]")
        kind = part.get("type", "text")
        if kind in REASONING_PARTS:
            continue
        value = part.get("refusal" if kind == "refusal" else "text")
        if kind not in ("text", "output_text", "refusal") or not isinstance(value, str):
            raise BadReply(f"the reply's content[{index}] is a part of type {str(kind)[:40]!r} without a text")
        if kind == "refusal":
            refusal = value
        else:
            texts.append(value)
    return ("".join(texts) if texts else None), refusal


# --- streams ----------------------------------------------------------------------------------------------------------


def is_stream(data: bytes) -> bool:
    """Whether a reply's body is a stream of events, which was not requested."""
    return data.lstrip()[:6] in (b"data: ", b"event:") or data.lstrip()[:5] == b"data:" or data.lstrip()[:1] == b":"


def read_stream(data: bytes) -> dict[str, Any]:
    """The completion that the events of a stream make together. Raises `BadReply` for a stream without its end."""
    message: dict[str, Any] = {"content": None}
    reply: dict[str, Any] = {}
    reason, ended = None, False
    for line in data.split(b"\n"):
        name, _, value = line.strip().partition(b":")
        if name != b"data":
            continue
        if value.strip() == b"[DONE]":
            ended = True
            break
        event = read_json_reply(value)
        reply |= {name: event[name] for name in ("usage", "error") if event.get(name)}
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices:
            continue
        choice = _object(choices[0], "choices[0]")
        delta = _object(choice.get("delta") or choice.get("message") or {}, "choices[0].delta")
        for part in ("content", "refusal"):
            if delta.get(part) is not None:
                text = _text(delta[part])[0] if part == "content" else delta[part]
                if not isinstance(text, str):
                    raise BadReply(f"the reply's {part} is {_kind(text)}, not a text")
                message[part] = (message.get(part) or "") + text
        reason = choice.get("finish_reason") or reason
    if not (ended or reason or reply.get("error")):
        raise BadReply("the reply is a stream that was not requested, and its end is missing")
    return {**reply, "choices": [{"message": message, "finish_reason": reason}]}


def read_models(data: bytes) -> list[str]:
    """The names in a server's list of models. Raises `BadReply`."""
    models = read_json_reply(data).get("data")
    if models is None:
        return []
    if not isinstance(models, list):
        raise BadReply(f"the list of models is {_kind(models)}, not a list")
    names = [_object(model, "data").get("id") for model in models]
    if not all(isinstance(name, str) and name for name in names):
        raise BadReply("the list of models holds one without a name")
    return [str(name) for name in names]


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadReply(f"the reply's {name} is {_kind(value)}, not an object")
    return value


def _count(usage: dict[str, Any], name: str) -> int:
    """A token count; 0 where the server sends none."""
    value = usage.get(name)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadReply(f"the reply's usage.{name} is {_kind(value)}, not a whole number")
    if not 0 <= value <= MOST_TOKENS:
        raise BadReply(f"the reply's usage.{name} is not between 0 and {MOST_TOKENS:,}")
    return value


def _kind(value: Any) -> str:
    """The type of a JSON value, in JSON's terms; NaN and overflows by their value."""
    if isinstance(value, float):
        return f"the number {value:g}"
    names: dict[type, str] = {type(None): "missing", bool: "a boolean", int: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")
