"""Replies from any OpenAI-compatible server, several requests at a time with retries, through the `openai` client.

Retried with exponential back-off and jitter, at most `attempts` times: 408, 409, 429, 5xx, time-outs, dropped
connections, replies that are not chat completions or exceed the bounds (see `bounded_http`). `Retry-After` delays every
thread, not only the one that received it. A request that the server refuses permanently (400, 413, 422) gets a reply
with that reason; a wrong key, an unknown model or a redirect ends the run.
The API key comes from OPENAI_API_KEY alone and is in no message, no cache key and no file.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, dataclass, field
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from ..errors import MissingExtra, UserError
from ..files import hash_json
from ..redaction import redact_text
from .bounded_http import Redirected, bounded_client
from .completion import BadReply, read_completion, read_models
from .generate import Reply, Request

API_KEY = "OPENAI_API_KEY"
REFUSED = (400, 413, 422)
"""Statuses about one request; a retry would not help."""
FATAL = (401, 403, 404)
"""Statuses about every request."""


def read_address(spec: str) -> tuple[str, str | None]:
    """Base address and model of `http(s)://HOST:PORT/v1[#MODEL]`. Raises `UserError`; a password in it is refused.

    >>> read_address("http://127.0.0.1:8000/v1/#my-model")
    ('http://127.0.0.1:8000/v1', 'my-model')
    """
    address, _, model = spec.partition("#")
    parts = urlsplit(address)
    try:
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if "@" in parts.netloc or parts.query:
        raise UserError(
            f"generator={parts.scheme}://{host or ''}... holds a password or a query; put the key into {API_KEY} and "
            "pass http://HOST:PORT/v1"
        )
    if not host:
        raise UserError(
            f"generator={spec!r} is not a server's address; pass http://HOST:PORT/v1, optionally with #MODEL"
        )
    return address.rstrip("/"), model or None


@dataclass(eq=False)
class OpenAIGenerator:
    """A server that speaks the OpenAI chat-completions protocol (vLLM, llama.cpp, Ollama, `transformers serve`, ...).

    Raises `UserError` on first use for a server that cannot be reached, lists no model, or refuses the key.

    >>> OpenAIGenerator("http://127.0.0.1:8000/v1#my-model", concurrency=16)
    """

    address: str
    """`http(s)://HOST:PORT/v1`, the model's name after `#`; without one, the first model that the server lists."""
    _: KW_ONLY
    concurrency: int = 8
    """Requests in progress at a time."""
    attempts: int = 6
    """Tries of one request, the first included; then its reply is an error."""
    timeout: float = 300.0
    """Seconds after which an attempt is abandoned, whether the server is silent or slow."""
    first_wait: float = 1.0
    """Seconds before the second try; doubled for each further one, times a jitter of 0.5 to 1.5."""
    longest_wait: float = 120.0
    """Seconds at most between two tries, a server's `Retry-After` included: a longer one ends the request."""

    _cached: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _not_before: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        read_address(self.address)
        for name in ("concurrency", "attempts", "timeout", "longest_wait"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} of the generator's server must be above 0")

    @property
    def key(self) -> str:
        """Hash of the address and the model's name: a server does not report its weights."""
        return hash_json(["openai", 1, read_address(self.address)[0], self.model])

    @property
    def model(self) -> str:
        """The model's name on the server."""
        if "model" not in self._cached:
            self._cached["model"] = read_address(self.address)[1] or self._first_model()
        return str(self._cached["model"])

    # --- requests -----------------------------------------------------------------------------------------------------

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies as they arrive. Requests are read as they can be sent, so a long list need not be in memory.

        When one reply shows that no request can succeed, those in progress are still yielded before `UserError` is
        raised.
        """
        self._client()
        assert self.model
        source, fatal = iter(requests), None
        stopped = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="siftune-ask")
        in_progress: set[Future[Reply]] = set()
        try:
            while True:
                if fatal is None:
                    next_requests = islice(source, self.concurrency - len(in_progress))
                    in_progress |= {pool.submit(self._reply, request, stopped) for request in next_requests}
                if not in_progress:
                    break
                done, in_progress = wait(in_progress, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        reply = future.result()
                    except UserError as error:
                        fatal = error
                        continue
                    yield reply
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if fatal is not None:
            raise fatal

    def _reply(self, request: Request, stopped: threading.Event) -> Reply:
        """One request, tried until it has a reply, a refusal, or no attempt left."""
        self._client()  # raises where openai is not installed
        from openai import APIError, APIStatusError, APITimeoutError

        jitter, message = random.Random(request.seed), ""
        for attempt in range(self.attempts):
            self._wait_until_allowed(stopped)
            retry_after: float | None = None
            try:
                return self._once(request)
            except APITimeoutError:
                message = f"no answer within {self.timeout:g} s"
            except APIStatusError as error:
                message = f"status {error.status_code}: {_short(error)}"
                if error.status_code in FATAL:
                    raise UserError(self._fatal(error.status_code, message)) from None
                if error.status_code in REFUSED and not self._other_limit(error):
                    return Reply(key=request.key, finish_reason="refused", error=self._clean(message))
                retry_after = _retry_after(error.response.headers.get("retry-after"))
            except (APIError, ValueError, BadReply) as error:  # dropped, truncated, not JSON, not a completion
                self._refuse_redirect(error)
                message = _short(error)
            if retry_after is not None and retry_after > self.longest_wait:
                message += f" (the server asks to wait {retry_after:g} s)"
                break
            back_off = min(self.longest_wait, self.first_wait * 2**attempt) * (0.5 + jitter.random())
            if retry_after is not None:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + retry_after)
            elif attempt + 1 < self.attempts:
                stopped.wait(back_off)
            if stopped.is_set():
                break
        return Reply(
            key=request.key, finish_reason="error", error=self._clean(f"no reply in {attempt + 1} tries: {message}")
        )

    def _once(self, request: Request) -> Reply:
        limit = self._cached.get("limit", "max_tokens")
        raw = self._client().chat.completions.with_raw_response.create(
            model=self.model,
            messages=[{"role": role, "content": content} for role, content in request.messages],
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            **({"stop": list(request.stop)} if request.stop else {}),
            **{limit: request.max_new_tokens},
        )
        completion = read_completion(raw.http_response.content)
        text, reason = completion.text, completion.finish_reason
        if text is None and reason != "content_filter":
            raise BadReply("the reply has no text")
        if text is None:
            return Reply(
                key=request.key, finish_reason="refused", error="the server's content filter removed the reply"
            )
        return Reply(
            key=request.key,
            text=self._clean(text),  # a server that repeats the key
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            finish_reason=reason if reason not in ("error", "refused") else f"server reports {reason}",
        )

    def _wait_until_allowed(self, stopped: threading.Event) -> None:
        """Wait until the server's latest `Retry-After` has passed."""
        while (remaining := self._not_before - time.monotonic()) > 0 and not stopped.is_set():
            stopped.wait(min(remaining, 1.0))

    def _other_limit(self, error: Any) -> bool:
        """Some servers accept only the newer name of the reply's limit; switch to it, and retry."""
        if "max_completion_tokens" not in str(error) or "limit" in self._cached:
            return False
        self._cached["limit"] = "max_completion_tokens"
        return True

    # --- the server ---------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        with self._lock:
            if "client" not in self._cached:
                try:
                    from openai import OpenAI
                except ImportError as error:
                    raise MissingExtra("openai", extra="generate", needed_for="a server as generator") from error
                base, _ = read_address(self.address)
                key = os.environ.get(API_KEY) or "none"
                self._cached["client"] = OpenAI(
                    base_url=base,
                    api_key=key,
                    max_retries=0,
                    timeout=self.timeout,
                    http_client=bounded_client(self.timeout),
                )
            return self._cached["client"]

    def _first_model(self) -> str:
        client = self._client()  # raises where openai is not installed
        from openai import OpenAIError

        server = f"generator={self.address!r}"
        try:
            client = client.with_options(max_retries=2, timeout=min(30.0, self.timeout))
            names = read_models(client.models.with_raw_response.list().http_response.content)
        except (OpenAIError, ValueError, BadReply) as error:
            self._refuse_redirect(error)
            status = getattr(error, "status_code", None)
            if status in FATAL[:2]:
                raise UserError(self._fatal(status, _short(error))) from None
            reason = self._clean(_short(error))
            raise UserError(
                f"{server} does not list its models ({reason}); check that it runs, or name one with #MODEL"
            ) from error
        if not names:
            raise UserError(f"{server} lists no model; name one with #MODEL")
        return names[0]

    def _fatal(self, status: int, message: str) -> str:
        base, _ = read_address(self.address)
        if status == 404:
            return f"generator={base!r} has no model {self.model!r} ({self._clean(message)}); choose one of its models with #MODEL"
        return f"generator={base!r} refuses the key ({self._clean(message)}); set {API_KEY} in the environment"

    def _refuse_redirect(self, error: Exception) -> None:
        """Raise `UserError` where the error is a redirect: following it would send the rows to another address."""
        for cause in (error, error.__cause__):
            if isinstance(cause, Redirected):
                base, _ = read_address(self.address)
                raise UserError(
                    f"generator={base!r} redirects to {cause}, and siftune follows no redirect, so that rows and key go "
                    "to no other address; pass the address of the server itself"
                ) from None

    def _clean(self, message: str) -> str:
        return redact_text(message)


def _short(error: Exception) -> str:
    """An error on one line of at most 200 characters, with the cause that the client hides, secrets masked."""
    if isinstance(error.__cause__, BadReply):  # older versions of the client wrap it
        error = error.__cause__
    message = str(getattr(error, "message", "") or error) or type(error).__name__
    if error.__cause__ is not None and str(error.__cause__):
        message += f" ({error.__cause__})"
    message = message.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written to a file
    message = " ".join(redact_text(message).split())  # masked before it is cut: part of a key is a secret too
    return message if len(message) <= 200 else message[:197] + "..."


def _retry_after(header: str | None) -> float | None:
    """Seconds of a `Retry-After` header: a number, or a date; None where it is absent or invalid."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
