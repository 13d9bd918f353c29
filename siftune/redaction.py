"""Masks secrets in everything that siftune writes or prints: the only definition of what a secret looks like.

Three kinds: the value of a key that holds one (`hub_token`, `api_key`, `password`, ...), a password or a key inside a
text (an address, a header, a command's flag), and the values of the environment's secret variables. What is masked
becomes `***`; everything else is returned as it is. Cost: about a microsecond per text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

MASK = "***"
SHORTEST = 6
"""Characters of an environment's secret at least: placeholders such as `none` and `EMPTY` are words of other texts
too."""

_KEY = re.compile(
    r"(?:.*_)?(?:api_?key|access_?key|secret_?key|private_?key|signing_?key|password|passwd|passphrase|secret|credentials?"
    r"|authorization|bearer|cookie"
    r"|(?:hub|hf|huggingface|auth|access|api|bearer|refresh|session|security|personal|client|github|gitlab|wandb|openai"
    r"|judge|generator|server)_?token)|token"
)
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ADDRESS = re.compile(r"(?<=://)[^\s/@'\"?#<>]+@")
_QUERY = re.compile(r"(?<=[?&])(?P<name>[\w.%-]+)=(?P<value>[^&#\s'\"<>]+)")
_QUERY_KEY = re.compile(r".*(?:key|token|secret|passw(?:or)?d|signature|sig|auth|authorization|credential)", re.I)
_HEADER = re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic|token)\s+)?[^\s'\",}]+")
_BEARER = re.compile(r"(?i)(\bbearer\s+)(?=[^\s'\"]*\d)[\w.~+/=-]{8,}")
_FLAG = re.compile(r"(?<![\w-])--(?P<name>[A-Za-z][\w-]*)(?P<between>=|\s+)(?P<value>[^\s'\"-][^\s'\"]*)")
_ASSIGNED = re.compile(r"(?<![?&\w-])(?P<name>[A-Za-z_][\w-]*)(?P<between>=)(?P<value>[^\s&'\"][^\s&'\"]*)")
_WORTH_A_LOOK = re.compile(r"[@=]|--|authorization|bearer", re.I)


@lru_cache(maxsize=4096)
def is_secret_key(name: object) -> bool:
    """Whether a key of this name holds a secret, in any spelling.

    >>> is_secret_key("X-Api-Key"), is_secret_key("hub_token"), is_secret_key("eos_token"), is_secret_key("tokens")
    (True, True, False, False)
    """
    return _KEY.fullmatch(_CAPITAL.sub("_", str(name)).replace("-", "_").lower()) is not None


def mask_patterns(text: str) -> str:
    """`text` without passwords in addresses, keys in queries, authorization headers, and values of secret flags.

    >>> mask_patterns("http://me:pw@host/v1?api_key=k")
    'http://***@host/v1?api_key=***'
    """
    if not _WORTH_A_LOOK.search(text):
        return text
    text = _ADDRESS.sub(MASK + "@", text)
    text = _QUERY.sub(lambda m: f"{m['name']}={MASK}" if _QUERY_KEY.fullmatch(m["name"]) else m[0], text)
    text = _BEARER.sub(rf"\1{MASK}", _HEADER.sub(rf"\1{MASK}", text))
    return _ASSIGNED.sub(_without_value, _FLAG.sub(_without_value, text))


def _without_value(match: re.Match[str]) -> str:
    placeholder = match["value"].startswith(("$", "{", MASK))
    if placeholder or not is_secret_key(match["name"]):
        return match[0]
    return match[0][: match.start("value") - match.start()] + MASK


def redact_text(text: str) -> str:
    """`text` without secrets: those that its form reveals, and the values of the environment's secret variables."""
    masked: str = _redacted(text, _environment())
    return masked


def redact(value: Any) -> Any:
    """A copy of a value of mappings, lists and texts without secrets; anything else in it is passed on.

    >>> redact({"sft": {"hub_token": "hf_x"}, "url": "http://me:pw@host/v1", "rows": 3})
    {'sft': {'hub_token': '***'}, 'url': 'http://***@host/v1', 'rows': 3}
    """
    return _redacted(value, _environment())


def shortened(text: object, most: int) -> str:
    """A library's message on one line of at most `most` characters, masked before it is cut: part of a key is a secret
    too."""
    return " ".join(redact_text(str(text)).split())[:most]


def _environment() -> list[str]:
    """The values of the environment's secret variables, the longest first: one may be a part of another."""
    values = {value for name, value in os.environ.items() if is_secret_key(name) or name.upper().endswith("_TOKEN")}
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
        return mask_patterns(value)
    if isinstance(value, Mapping):
        return {
            key: _masked(inner) if is_secret_key(key) else _redacted(inner, secrets) for key, inner in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(_redacted(inner, secrets) for inner in value)
    return value


def _masked(value: Any) -> Any:
    """What is stored under a secret key: every text in it masked; a domain of that name has counts, which are kept."""
    if isinstance(value, Mapping):
        return {key: _masked(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(inner) for inner in value]
    return MASK if isinstance(value, (str, bytes)) and value else value
