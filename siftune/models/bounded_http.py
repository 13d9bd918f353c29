"""The HTTP client under `openai`, with bounds on time and memory per reply.

A reply has at most `MOST_BYTES` once unpacked, and one try ends after the request's timeout however slowly bytes come:
the timeouts of HTTP clients count silence only, and a server that sends a byte a second is never silent. Packing other
than gzip is neither requested nor read. No redirect is followed: it would take the rows' text to another address.
Every request has a connection of its own, so that its end can close it. Cost: one timer and one connection per request.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import zlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from .completion import BadReply

KEY_HEADER = "api-key"
"""Azure's header for the key; a request with it must not have the usual one besides, which names another kind of key."""
MOST_BYTES = 8 << 20
"""Size of one reply, unpacked; a reply of 100,000 tokens has less than one MiB."""


class Redirected(BadReply):
    """The server redirects the request."""


def bounded_client(timeout: float) -> Any:
    """A client for `openai.OpenAI(http_client=...)`; `timeout` in seconds, for every step of a request and for all.

    Its requests raise `BadReply` beyond the bounds, and `Redirected` for a redirect. Needs the package `openai`.

    >>> client = openai.OpenAI(http_client=bounded_client(300))
    """
    from openai import DefaultHttpxClient  # httpx or its successor, as the installed version has it

    class BoundedClient(DefaultHttpxClient):
        def send(self, request: Any, **options: Any) -> Any:
            deadline = _Deadline((request.extensions.get("timeout") or {}).get("read") or timeout)
            request.extensions = {**request.extensions, "trace": deadline.trace}
            if KEY_HEADER in request.headers:
                request.headers.pop("Authorization", None)
            with deadline:
                response = super().send(request, **{**options, "stream": True, "follow_redirects": False})
                try:
                    if 300 <= response.status_code < 400:
                        raise Redirected(_origin(response.headers.get("location", "")))
                    content = unpacked(response.iter_raw(), response.headers.get("content-encoding", ""))
                finally:
                    response.close()
            dropped = ("content-encoding", "content-length", "transfer-encoding")
            headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in dropped]
            return type(response)(response.status_code, headers=headers, content=content, request=request)

    return BoundedClient(timeout=timeout, headers={"Accept-Encoding": "gzip", "Connection": "close"})


def unpacked(chunks: Iterable[bytes], encoding: str = "") -> bytes:
    """A reply's bytes, unpacked as far as they stay within `MOST_BYTES`. Raises `BadReply`.

    >>> unpacked([gzip.compress(b"text")], "gzip")
    b'text'
    """
    encoding = encoding.strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise BadReply(f"the reply is packed as {encoding[:40]!a}, which was not requested")
    packed = zlib.decompressobj(16 + zlib.MAX_WBITS) if encoding.endswith("gzip") else None
    content, received = bytearray(), 0
    for chunk in chunks:
        received += len(chunk)
        try:
            content += chunk if packed is None else packed.decompress(chunk, MOST_BYTES + 1 - len(content))
        except zlib.error as error:
            raise BadReply(f"the reply cannot be unpacked ({error})") from None
        if max(len(content), received) > MOST_BYTES:
            raise BadReply(f"the reply has more than {MOST_BYTES >> 20} MiB")
    if packed is not None and not packed.eof:
        raise BadReply("the packed reply is cut short")
    return bytes(content)


class _Deadline:
    """Closes the connection of one request at its deadline, and reports that instead of the resulting connection
    error."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over = seconds, False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def trace(self, event: str, facts: dict[str, Any]) -> None:
        """The client's own events; a completed connection is recorded."""
        if not event.endswith((".connect_tcp.complete", ".connect_unix_socket.complete")):
            return
        opened = facts["return_value"].get_extra_info("socket")
        with self._lock:
            if isinstance(opened, socket.socket):
                self._socket = opened.dup()  # TLS detaches the original
            if self.over:
                self._shut()

    def _end(self) -> None:
        with self._lock:
            self.over = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the peer may have closed it already
                self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        if self.over and isinstance(error, Exception):
            raise BadReply(f"no complete reply within {self.seconds:g} s") from None


def _origin(location: str) -> str:
    """Scheme, host and port of a redirect's target: the rest may hold a secret."""
    try:
        parts = urlsplit(location)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "an address that cannot be read"
    if not host:
        return "another of its paths"
    return ascii(f"{parts.scheme or 'http'}://{host}{f':{port}' if port else ''}")[1:-1][:200]
