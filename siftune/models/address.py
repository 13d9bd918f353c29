"""A server's address as users write it: with or without `/v1`, copied from a documentation, or Azure's.

`http://HOST:PORT`, `…/v1` and `…/v1/chat/completions` are one server. Of a query, `api-version` alone is allowed (Azure
requires it): any other may hold a secret. Nothing is contacted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import UserError

API_KEY = "OPENAI_API_KEY"
ENDPOINTS = ("/chat/completions", "/completions", "/models")
"""Ends of addresses that name one of a server's functions, not the server."""
API_VERSION = "api-version"

_HOST = re.compile(r"(?:[\w.-]+|\[[0-9a-f:]+\]):\d{1,5}(?:[/?#]|$)|(?:localhost|\d+(?:\.\d+){3})(?:[/?#]|$)", re.I)
_DOMAIN = re.compile(r"[\w-]+(?:\.[\w-]+)+/(?:[^#]*/)?(?:v\d+|openai|chat/completions)(?:[/?#]|$)", re.I)


@dataclass(frozen=True)
class Address:
    """Where a server is, and the model that its address names."""

    base: str
    """`http(s)://HOST:PORT/v1`: the part before `/chat/completions`."""
    model: str | None = None
    """After `#`, or Azure's deployment; None where the address names none."""
    api_version: str | None = None
    """Azure's, sent with every request; None for other servers."""


def read_address(spec: str) -> Address:
    """The address and model of `http(s)://HOST:PORT[/v1][#MODEL]`. Raises `UserError`; a password in it is refused.

    >>> read_address("http://127.0.0.1:8000/v1/chat/completions#my-model")
    Address(base='http://127.0.0.1:8000/v1', model='my-model', api_version=None)
    """
    address, _, model = spec.partition("#")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:  # brackets without an IPv6 address, a port that is no number
        parts, host = urlsplit(address.replace("[", "").replace("]", "")), None
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    version = query.pop(API_VERSION, None)
    if "@" in parts.netloc or query or (version is not None and not re.fullmatch(r"[\w.-]+", version)):
        raise UserError(
            f"generator={parts.scheme}://{host or ''}... holds a password or a query; put the key into {API_KEY} and "
            f"pass http://HOST:PORT/v1 (of a query, {API_VERSION}=DATE alone is allowed)"
        )
    if not host or parts.scheme not in ("http", "https"):
        raise UserError(
            f"generator={spec!r} is not a server's address; pass http://HOST:PORT/v1, optionally with #MODEL"
        )
    path = parts.path.rstrip("/")
    for end in ENDPOINTS:
        path = path.removesuffix(end).rstrip("/")
    if version is not None and not path:
        raise UserError(
            f"generator={spec!r} has an {API_VERSION} and names no deployment; pass "
            f"https://HOST/openai/deployments/NAME?{API_VERSION}={version}"
        )
    deployment = re.search(r"/deployments/([^/]+)$", path) if version is not None else None
    named = model or (unquote(deployment[1]) if deployment else None)
    return Address(f"{parts.scheme}://{parts.netloc}{path or '/v1'}", named, version)


def is_server(spec: str) -> bool:
    """Whether the text names a server, not a model folder or hub id."""
    return re.match(r"https?://", spec, re.IGNORECASE) is not None


def lacks_scheme(spec: str) -> bool:
    """Whether the text is a server's address but for its `http://`: a host with a port, or a domain with an API's path.

    >>> lacks_scheme("localhost:8000/v1"), lacks_scheme("Qwen/Qwen2.5-7B")
    (True, False)
    """
    return bool(_HOST.match(spec) or _DOMAIN.match(spec)) and not Path(spec).expanduser().exists()


def scheme_error(name: str, spec: str) -> UserError:
    """The error for an address without `http://`; `name` is the option's."""
    address, mark, model = spec.partition("#")
    if "@" in address or "?" in address:  # may hold a password
        return UserError(
            f"{name}=... is not a server's address: it lacks http:// (or https://); pass http://HOST:PORT/v1"
        )
    local = re.match(r"localhost|127\.|\[|[\w-]+:\d|\d+(?:\.\d+){3}", address) is not None
    try:
        advice = read_address(f"{'http' if local else 'https'}://{address}").base + mark + model
    except UserError:
        advice = "http://HOST:PORT/v1"
    return UserError(f"{name}={spec!r} is not a server's address: it lacks http:// (or https://); pass {advice}")
