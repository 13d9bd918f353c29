"""A row's chat through a model's own template: the one place where messages become the model's text.

Templates differ in the form in which they take a call's arguments (an object, or its JSON text), a content (a text, or
a list of parts) and a system text (a role of its own, or none). The row's own form is tried first, then the others,
until the rendering holds every message: a template that leaves something out without an error is a reason, not a
text. Cost: one render for rows that their template holds as they are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import Message
from .bad_row import BadRow
from .chat_template import Overrun, Refusal, apply_template

Turns = list[dict[str, Any]]


class Dropped(BadRow):
    """A rendering that lacks a part of the row."""


class SystemDropped(Dropped, Refusal):
    """A rendering that lacks the system text alone."""


@dataclass(frozen=True)
class Rendered:
    """A chat's text, and the messages in the form in which the template took them."""

    text: str
    turns: Turns
    tools: tuple[Any, ...] = ()

    def options(self) -> dict[str, Any]:
        """The template's options for these tools; none for a chat without."""
        return {"tools": list(self.tools)} if self.tools else {}


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    merge_system: bool = False,
    **options: Any,
) -> Rendered:
    """The text of a chat that holds every message, call and tool. `merge_system` puts a system text that the template
    does not take before the first question.

    Raises `Refusal` where the template refuses the row, `Dropped` where it leaves out a part of it, and another
    `BadRow` where it fails.

    >>> render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]).text
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n'
    """
    failures: list[BadRow] = []
    passed = {"tools": list(tools)} if tools else {}
    for turns in _forms(messages, merge_system):
        try:
            text = str(apply_template(tokenizer, turns, tokenize=False, **passed, **options))
            check_holds(text, messages, tools)
        except Overrun:
            raise
        except BadRow as bad:
            failures.append(bad)
            continue
        return Rendered(text, turns, tuple(tools))
    raise _reason(failures)


def _reason(failures: Sequence[BadRow]) -> BadRow:
    """Of what every form failed with, the reason that says most: a refusal, else what the last form lacks."""
    refusals = [bad for bad in failures if isinstance(bad, Refusal)]
    dropped = [bad for bad in failures if isinstance(bad, Dropped)]
    return (refusals or dropped[-1:] or list(failures))[0]


# --- the forms in which a template may take a chat --------------------------------------------------------------------


def _forms(messages: Sequence[Message], merge_system: bool) -> Iterator[Turns]:
    """The row's messages as they are, then in every other form that they may be given in."""
    turns = [dict(message) for message in messages]
    roles: list[Callable[[Turns], Turns]] = [list]
    if any(turn["role"] == "developer" for turn in turns):
        roles.append(_developer_as_system)
    if merge_system and len(turns) > 2 and turns[0]["role"] in ("system", "developer"):
        roles.append(merged)
    contents: list[Callable[[Turns], Turns]] = [list]
    calls = [turn for turn in turns if turn.get("tool_calls")]
    if calls:
        contents.append(_arguments_as_text)
        if not all(turn["content"] for turn in calls):
            contents += [_without_content, lambda turns: _without_content(_arguments_as_text(turns))]
    if any(turn.get("reasoning_content") for turn in turns):
        contents.append(_reasoning_by_other_names)
    contents.append(_as_parts)
    for role, content in itertools.product(roles, contents):
        yield content(role(turns))


def merged(turns: Turns) -> Turns:
    """The chat with its system text before the first question, for templates that know no system role."""
    joined = {**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [joined, *turns[2:]]


def _developer_as_system(turns: Turns) -> Turns:
    return [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]


def _arguments_as_text(turns: Turns) -> Turns:
    def call(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        return {**call, "function": {**call["function"], "arguments": text}}

    return [
        {**turn, "tool_calls": [call(one) for one in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in turns
    ]


def _without_content(turns: Turns) -> Turns:
    return [{**turn, "content": None} if turn.get("tool_calls") and not turn["content"] else turn for turn in turns]


def _reasoning_by_other_names(turns: Turns) -> Turns:
    names = ("reasoning", "thinking")
    return [
        {**turn, **dict.fromkeys(names, turn["reasoning_content"])} if turn.get("reasoning_content") else turn
        for turn in turns
    ]


def _as_parts(turns: Turns) -> Turns:
    return [{**turn, "content": [{"type": "text", "text": turn["content"] or ""}]} for turn in turns]


# --- whether the rendering holds the row ------------------------------------------------------------------------------


def check_holds(text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> None:
    """Raise `Dropped` with the first part of the row that the text lacks, read from front to back; a system text may be
    anywhere. White space around a content may differ."""
    _check_tools(text, tools)
    position = 0
    for number, message in enumerate(messages, 1):
        last = number == len(messages)
        name = "the answer" if last else f"message {number} ({message['role']})"
        if message["role"] in ("system", "developer"):
            if _find(text, message["content"], 0) < 0:
                raise SystemDropped("chat template drops the system message")
            continue
        if last and (thoughts := message.get("reasoning_content")) and _find(text, str(thoughts), position) < 0:
            raise Dropped("chat template drops the reasoning of the answer")
        begin, position = position, _after(text, message, position, name, last=last)
        if message.get("tool_calls"):
            window = text[begin : _start_of_next(text, messages[number:], position)]
            if not all(_holds_call(window, call["function"]) for call in message["tool_calls"]):
                raise Dropped(f"chat template drops a tool call of {name}")


def _after(text: str, message: Message, position: int, name: str, *, last: bool) -> int:
    """One past a message's content in the text. Raises `Dropped` where it is nowhere after `position`."""
    place = _find_content(text, message, position, last=last)
    if place < 0 and message["role"] == "tool" and _find(text, message["content"], 0) >= 0:
        return position  # results of parallel calls may be in another order
    if place < 0:
        raise Dropped(f"chat template drops or rewrites {name}")
    return place


def _start_of_next(text: str, messages: Sequence[Message], position: int) -> int:
    """Where the content of the next message with one begins; the text's end where there is none."""
    for message in messages:
        if content := message["content"].strip():
            place = text.find(content, position)
            return place if place >= 0 else len(text)
    return len(text)


def _find_content(text: str, message: Message, start: int, *, last: bool) -> int:
    """One past the content's place in the text, or -1. Thoughts in `<think>` tags may be dropped, the answer's not."""
    content = message["content"]
    end = _find(text, content, start)
    if end >= 0 or "</think>" not in content:
        return end
    thoughts, _, answer = content.rpartition("</think>")
    if last and _find(text, thoughts.replace("<think>", ""), start) < 0:
        raise Dropped("chat template drops the reasoning of the answer")
    return _find(text, answer, start)


def _find(text: str, content: str, start: int) -> int:
    """One past the first place of a content after `start`: as it is, trimmed, or as in JSON; -1 where it is nowhere."""
    bare = content.strip()
    if not bare:
        return start
    for form in (content, bare, _in_json(content), _in_json(bare), json.dumps(bare)[1:-1]):
        if (place := text.find(form, start)) >= 0:
            return place + len(form)
    return -1


def _in_json(content: str) -> str:
    return json.dumps(content, ensure_ascii=False)[1:-1]


def _holds_call(text: str, function: Mapping[str, Any]) -> bool:
    return all(_find(text, leaf, 0) >= 0 for leaf in (function["name"], *_texts(function["arguments"])))


def _check_tools(text: str, tools: Sequence[Mapping[str, Any]]) -> None:
    for tool in tools:
        function = tool.get("function", tool)
        needed = [function.get("name"), function.get("description")] if isinstance(function, Mapping) else []
        if any(isinstance(part, str) and _find(text, part, 0) < 0 for part in needed):
            raise Dropped("chat template drops the tools")


def _texts(value: Any) -> Iterable[str]:
    """Every text in a value, keys included."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and not value.lstrip().startswith(("{", "[")):
        yield value
