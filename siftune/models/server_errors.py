"""What a server's error means: its text in whatever form it comes, and whether it is about one row or about every request.

Servers word their errors freely, so the kinds are recognised by codes first and by words second. Nothing is sent here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..redaction import shortened
from .completion import BadReply, error_of
from .generate import Reply

REFUSED = (400, 413, 422)
"""Statuses of a request that the server does not accept; sending it again does not help."""
ABOUT_EVERY_REQUEST = (401, 402, 403, 404, 405)
SHOWN = 200
"""Characters of a server's message that a reason or an error shows."""

EQUAL_REFUSALS = 5
"""Equal refusals in a row, none of them about a row's content, after which a run stops."""
MOST_REFUSALS = 20
"""The same for refusals that differ: some servers put a request's number into the message."""

_FILTER = re.compile(
    r"content[ _-]?(?:filter|policy|management|moderation|exists[ _-]risk)|responsible_?ai|data_?inspection|moderation"
    r"|\bflagged\b|inappropriate content|sensitive (?:content|words?)|invalid_prompt|usage polic|safety (?:system|filter|polic)",
    re.I,
)
_LENGTH = re.compile(
    r"context[ _-]?(?:length|window|size)|maximum (?:context|input|sequence)|too many (?:input |prompt )?tokens"
    r"|reduce the length|string_above_max_length|(?:prompt|input|messages?|request|content)\b.{0,40}\btoo (?:long|large)"
    r"|(?:input|prompt)\b.{0,60}\bexceeds?\b|exceeds? .{0,40}\b(?:context|input)",
    re.I,
)
_NO_QUOTA = re.compile(
    r"insufficient[_ ](?:quota|balance|credits?|funds)|billing_hard_limit|credit balance|out of credits", re.I
)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.I | re.S)


@dataclass(frozen=True)
class ErrorFacts:
    """The parts of an error's body."""

    message: str
    codes: str = ""
    """Its codes and types, for recognition."""
    parameter: str | None = None
    """The parameter that the server names in a field of its own."""


class ServerError(BadReply):
    """A server answers with an error: by its status, or inside a reply with status 200."""

    def __init__(self, status: int, facts: ErrorFacts, retry_after: float | None = None) -> None:
        message = facts.message.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written to a file
        super().__init__(f"status {status}: {shortened(message, SHOWN)}")
        self.status, self.facts, self.retry_after = status, facts, retry_after

    @property
    def text(self) -> str:
        """Codes and message, for recognition."""
        return f"{self.facts.codes} {self.facts.message}"

    @property
    def about_row(self) -> bool:
        """Whether the request's own content is the reason: a filter removed it, or it is too long."""
        if self.status == 413:
            return True
        if self.status in (400, 403, 422, 451) and _FILTER.search(self.text):
            return True
        return self.status in (400, 422) and _LENGTH.search(self.text) is not None

    @property
    def no_quota(self) -> bool:
        """Whether the account has nothing left, so that no waiting helps."""
        return self.status == 402 or (self.status in (400, 403, 429) and _NO_QUOTA.search(self.text) is not None)


def read_error(data: bytes) -> ErrorFacts:
    """The text, codes and parameter of an error's body: OpenAI's, FastAPI's, Mistral's, Google's, a web page, any text.

    >>> read_error(b'{"error": {"message": "No such model", "code": "model_not_found"}}')
    ErrorFacts(message='No such model', codes='model_not_found', parameter=None)
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        text = data[:100_000].decode("utf-8", "replace")
        if text.lstrip()[:1] == "<":
            title = _TITLE.search(text)
            return ErrorFacts(
                f"a web page, not a model's reply ({' '.join(title[1].split()) if title else 'no title'})"
            )
        return ErrorFacts(text.strip() or "no message")
    return _facts(value)


def _facts(value: Any) -> ErrorFacts:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "msg" in item for item in value):
        return _validation(value)
    if isinstance(value, list) and value:
        return _facts(value[0])
    if not isinstance(value, Mapping):
        return ErrorFacts(str(value) if isinstance(value, str) and value else f"the body {json.dumps(value)[:100]}")
    codes = " ".join(str(value[name]) for name in ("code", "type", "status") if isinstance(value.get(name), (str, int)))
    for name in ("error", "message", "detail", "innererror"):
        if isinstance(value.get(name), (Mapping, list)) and value[name]:
            inner = _facts(value[name])
            outer = value.get("message")
            message = outer if isinstance(outer, str) and outer else inner.message
            return ErrorFacts(message, f"{codes} {inner.codes}".strip(), inner.parameter or _parameter(value))
    text = next((value[name] for name in ("message", "msg", "error", "detail") if isinstance(value.get(name), str)), "")
    return ErrorFacts(text or json.dumps(value)[:1000], codes, _parameter(value))


def _parameter(value: Mapping[str, Any]) -> str | None:
    named = value.get("param")
    return named if isinstance(named, str) else None


def _validation(items: list[Mapping[str, Any]]) -> ErrorFacts:
    """A list of FastAPI: the place and the text of every fault."""
    places = [str((item.get("loc") or [""])[-1]) if isinstance(item.get("loc"), list) else "" for item in items]
    message = "; ".join(f"{place!r}: {item['msg']}" for place, item in zip(places, items, strict=True))
    return ErrorFacts(message, " ".join(str(item.get("type", "")) for item in items), places[0] or None)


def error_in_reply(data: bytes) -> ServerError | None:
    """The error inside a reply with status 200, as some gateways send it; None for any other reply."""
    value = error_of(data)
    if value is None:
        return None
    facts = _facts(value)
    code = value.get("code", value.get("status")) if isinstance(value, Mapping) else None
    status = int(str(code)) if re.fullmatch(r"[45]\d\d", str(code)) else 500
    return ServerError(status, replace(facts, message=f"an error inside a reply of status 200: {facts.message}"))


@dataclass
class RefusalStreak:
    """Refusals in a row that are about no row's content. They are held back until another reply shows that the server
    answers requests of this kind; then each is its row's reason. Where none does, no row is to blame."""

    equal: int = EQUAL_REFUSALS
    most: int = MOST_REFUSALS
    held: list[Reply] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether there are as many that the server refuses every request."""
        kinds = Counter(re.sub(r"\d+", "#", str(reply.error)) for reply in self.held)
        return len(self.held) >= self.most or max(kinds.values(), default=0) >= self.equal

    def release(self, *, final: bool = True) -> list[Reply]:
        """The held replies: refusals, or with `final=False` requests that are still without a reply."""
        held, self.held = self.held, []
        return held if final else [replace(reply, finish_reason="error") for reply in held]
