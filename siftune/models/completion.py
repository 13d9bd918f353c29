"""A chat completion as a server sends it, parsed strictly: anything unexpected is an error.

Only the fields that siftune uses are read: the first choice's text and finish reason, and the two token counts.
Cost: one parse of the reply's JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 10_000_000
"""A larger token count cannot be that of one request."""
LONGEST_REASON = 100
"""Characters of a finish reason."""


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


def read_json_reply(data: bytes) -> dict[str, Any]:
    """The JSON object of a reply's body. Raises `BadReply` for anything else, however deep or long."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise BadReply("the reply's JSON is nested too deeply") from None
    except ValueError as error:
        raise BadReply(f"the reply is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadReply("the reply is not a JSON object")
    return value


def read_completion(data: bytes) -> Completion:
    """The first choice and the token counts of a completion. Raises `BadReply`, which names the field.

    >>> read_completion(b'{"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]}').text
    'Yes.'
    """
    reply = read_json_reply(data)
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadReply("the reply is not a chat completion: it has no choices")
    choice = _object(choices[0], "choices[0]")
    message = _object(choice.get("message"), "choices[0].message")
    text, reason = message.get("content"), choice.get("finish_reason")
    if text is not None and not isinstance(text, str):
        raise BadReply(f"the reply's content is {_kind(text)}, not a text")
    if reason is not None and (not isinstance(reason, str) or len(reason) > LONGEST_REASON):
        raise BadReply(f"the reply's finish_reason is {_kind(reason)}, not a short text")
    usage = {} if reply.get("usage") is None else _object(reply["usage"], "usage")
    return Completion(text, reason or "stop", _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


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
