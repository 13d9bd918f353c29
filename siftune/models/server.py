"""Replies from any OpenAI-compatible server, several requests at a time with retries, through the `openai` client.

Retried with exponential back-off and jitter, at most `attempts` times: 408, 409, 429, 5xx, time-outs, dropped
connections, replies that are not chat completions or exceed the bounds (see `bounded_http`). `Retry-After` delays every
thread, not only the one that received it. A parameter that the server names as unsupported is left out from then on
(see `parameters`); the first request goes alone, so that this is learnt once.
A refusal about one row's content (a filter, a length) is that row's. Other refusals (400, 422) are held back until some
reply shows that the server answers at all; several equal ones in a row end the run, as do a wrong key, an account without
quota, an unknown model or a redirect (see `server_errors`).
The API key comes from OPENAI_API_KEY alone and is in no message, no cache key and no file.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, dataclass, field
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, NamedTuple

from ..errors import MissingExtra, UserError
from ..files import hash_json
from ..redaction import redact_text
from .address import API_KEY, API_VERSION, Address, read_address
from .bounded_http import KEY_HEADER, Redirected, bounded_client
from .completion import BadReply, read_completion, read_models
from .generate import Reply, Request
from .parameters import Parameters, check_request
from .server_errors import (
    ABOUT_EVERY_REQUEST,
    EQUAL_REFUSALS,
    REFUSED,
    RefusalStreak,
    ServerError,
    error_in_reply,
    read_error,
)


class _Outcome(NamedTuple):
    """What a request led to."""

    reply: Reply
    unexplained: bool = False
    """A refusal that may concern every request."""


@dataclass(eq=False)
class OpenAIGenerator:
    """A server that speaks the OpenAI chat-completions protocol (vLLM, llama.cpp, Ollama, `transformers serve`, ...).

    Raises `UserError` on first use for a server that cannot be reached, lists no model, or refuses the key.

    >>> OpenAIGenerator("http://127.0.0.1:8000/v1#my-model", concurrency=16)
    """

    address: str
    """`http(s)://HOST:PORT`, with or without `/v1` and `/chat/completions`; the model's name after `#`; without one, the
    first model that the server lists, or Azure's deployment."""
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

    request: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of every request, such as `{"reasoning_effort": "low"}`; part of the key."""
    equal_refusals: int = EQUAL_REFUSALS
    """Equal refusals in a row, none about a row's content, after which the run stops."""

    _cached: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _not_before: float = field(default=0.0, init=False, repr=False)
    _settled: bool = field(default=False, init=False, repr=False)
    """A request was not refused, so further ones may be sent side by side."""
    _parameters: Parameters = field(init=False, repr=False)

    def __post_init__(self) -> None:
        read_address(self.address)
        check_request(self.request)
        self._parameters = Parameters(self.request)
        for name in ("concurrency", "attempts", "timeout", "longest_wait", "equal_refusals"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} of the generator's server must be above 0")

    @property
    def key(self) -> str:
        """Hash of the address, the model's name and the further parameters: a server does not report its weights."""
        added = [dict(self.request)] if self.request else []
        return hash_json(["openai", 1, self._address.base, self.model, *added])

    @property
    def model(self) -> str:
        """The model's name on the server."""
        if "model" not in self._cached:
            self._cached["model"] = self._address.model or self._first_model()
        return str(self._cached["model"])

    @property
    def left_out(self) -> dict[str, str]:
        """The parameters that the server refused in this run and that are no longer sent, with its words."""
        return dict(self._parameters.left_out)

    @property
    def _address(self) -> Address:
        return read_address(self.address)

    # --- requests -----------------------------------------------------------------------------------------------------

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies as they arrive. Requests are read as they can be sent, so a long list need not be in memory.

        The first request goes alone. When one reply shows that no request can succeed, those in progress are still
        yielded before `UserError` is raised.
        """
        self._client()
        assert self.model
        source, fatal = iter(requests), None
        streak = RefusalStreak(equal=self.equal_refusals)
        stopped = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="siftune-ask")
        in_progress: set[Future[_Outcome]] = set()
        try:
            while True:
                if fatal is None:
                    at_once = self.concurrency if self._settled else 1
                    next_requests = islice(source, max(0, at_once - len(in_progress)))
                    in_progress |= {pool.submit(self._reply, request, stopped) for request in next_requests}
                if not in_progress:
                    break
                done, in_progress = wait(in_progress, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        reply, unexplained = future.result()
                    except UserError as error:
                        fatal = fatal or error
                        continue
                    if unexplained:
                        streak.held.append(reply)
                        if streak.over and fatal is None:
                            fatal = self._refuses_everything(streak)
                        continue
                    if reply.finish_reason != "refused":
                        self._settled = True
                    if reply.error is None:
                        yield from streak.release()
                    yield reply
            yield from streak.release(final=fatal is None)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if fatal is not None:
            raise fatal

    def _reply(self, request: Request, stopped: threading.Event) -> _Outcome:
        """One request, tried until it has a reply, a refusal, or no attempt left."""
        jitter, message, tries, attempt = random.Random(request.seed), "", 0, 0
        while attempt < self.attempts:
            self._wait_until_allowed(stopped)
            retry_after: float | None = None
            sent = self._parameters.of(request)
            tries += 1
            try:
                return _Outcome(self._once(request, sent, tries))
            except ServerError as error:
                message = str(error)
                if not error.about_row and self._parameters.learn(sent, error):
                    continue
                if error.about_row or (error.status in REFUSED and not error.no_quota):
                    refusal = Reply(key=request.key, finish_reason="refused", error=self._clean(message), tries=tries)
                    return _Outcome(refusal, unexplained=not error.about_row)
                if error.no_quota or error.status in ABOUT_EVERY_REQUEST:
                    raise self._fatal(error) from None
                retry_after = error.retry_after
            except BadReply as error:  # dropped, truncated, not JSON, not a completion
                message = str(error)
            attempt += 1
            if retry_after is not None and retry_after > self.longest_wait:
                message += f" (the server asks to wait {retry_after:g} s)"
                break
            if retry_after is not None:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + retry_after)
            elif attempt < self.attempts:
                stopped.wait(min(self.longest_wait, self.first_wait * 2 ** (attempt - 1)) * (0.5 + jitter.random()))
            if stopped.is_set():
                break
        error_text = self._clean(f"no reply in {tries} tries: {message}")
        return _Outcome(Reply(key=request.key, finish_reason="error", error=error_text, tries=tries))

    def _once(self, request: Request, sent: Mapping[str, Any], tries: int) -> Reply:
        """One try. Raises `ServerError` for the server's errors, `BadReply` for what is no reply, `UserError` for a
        redirect."""
        completion = read_completion(self._post(request, sent))
        reason, refusal = completion.finish_reason, completion.refusal
        if completion.text is None and reason == "content_filter":
            refusal = refusal or "the server's content filter removed the reply"
        usage = {name: getattr(completion, name) for name in ("prompt_tokens", "completion_tokens")}
        if refusal is not None and not (completion.text or "").strip():
            return Reply(key=request.key, finish_reason="refused", error=_one_line(refusal), tries=tries, **usage)
        return Reply(
            key=request.key,
            text=self._clean(completion.text or ""),  # a server that repeats the key
            finish_reason=reason if reason not in ("error", "refused") else f"server reports {reason}",
            tries=tries,
            **usage,
        )

    def _post(self, request: Request, sent: Mapping[str, Any]) -> bytes:
        """The body of the reply to one request."""
        client = self._client()  # raises where openai is not installed
        from openai import APIError, APIStatusError, APITimeoutError

        try:
            raw = client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": role, "content": content} for role, content in request.messages],
                extra_body=dict(sent),  # as they are: the client knows only OpenAI's own
            )
            content: bytes = raw.http_response.content
        except APITimeoutError:
            raise BadReply(f"no answer within {self.timeout:g} s") from None
        except APIStatusError as error:
            after = _retry_after(error.response.headers.get("retry-after"))
            raise ServerError(error.status_code, read_error(error.response.content), after) from None
        except (APIError, ValueError, BadReply) as error:
            self._refuse_redirect(error)
            raise BadReply(_short(error)) from None
        if (inside := error_in_reply(content)) is not None:
            raise inside
        return content

    def _wait_until_allowed(self, stopped: threading.Event) -> None:
        """Wait until the server's latest `Retry-After` has passed."""
        while (remaining := self._not_before - time.monotonic()) > 0 and not stopped.is_set():
            stopped.wait(min(remaining, 1.0))

    # --- the server ---------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        with self._lock:
            if "client" not in self._cached:
                try:
                    from openai import OpenAI
                except ImportError as error:
                    raise MissingExtra("openai", extra="generate", needed_for="a server as generator") from error
                key = os.environ.get(API_KEY) or "none"
                self._cached["client"] = OpenAI(
                    base_url=self._address.base,
                    api_key=key,
                    max_retries=0,
                    timeout=self.timeout,
                    http_client=bounded_client(self.timeout),
                    **_azure(self._address.api_version, key),
                )
            return self._cached["client"]

    def _first_model(self) -> str:
        client = self._client()  # raises where openai is not installed
        from openai import APIStatusError, OpenAIError

        server = f"generator={self.address!r}"
        try:
            client = client.with_options(max_retries=2, timeout=min(30.0, self.timeout))
            names = read_models(client.models.with_raw_response.list().http_response.content)
        except (OpenAIError, ValueError, BadReply) as error:
            self._refuse_redirect(error)
            reason = self._clean(_short(error))
            if isinstance(error, APIStatusError):
                refused = ServerError(error.status_code, read_error(error.response.content))
                if error.status_code in (401, 403):
                    raise self._fatal(refused) from None
                reason = self._clean(str(refused))
            raise UserError(
                f"{server} does not list its models ({reason}); check that it runs, or name one with #MODEL"
            ) from error
        if not names:
            raise UserError(f"{server} lists no model; name one with #MODEL")
        return names[0]

    def _fatal(self, error: ServerError) -> UserError:
        """The error for an answer that every request would get."""
        base, message = self._address.base, self._clean(str(error))
        if error.no_quota:
            return UserError(
                f"generator={base!r} has no quota left ({message}); raise the account's limit and run the same command "
                "again, the replies received so far are kept"
            )
        if error.status == 404 and "model" in error.text.lower() and self.model.lower() not in base.lower():
            return UserError(
                f"generator={base!r} has no model {self.model!r} ({message}); choose one of its models with #MODEL"
            )
        if error.status in (404, 405):
            return UserError(
                f"generator={base!r} has no {base}/chat/completions ({message}); pass the address that ends before "
                "/chat/completions, often http://HOST:PORT/v1, and check the model's name"
            )
        return UserError(f"generator={base!r} refuses the key ({message}); set {API_KEY} in the environment")

    def _refuses_everything(self, streak: RefusalStreak) -> UserError:
        """The error for refusals that no row is the reason for."""
        return UserError(
            f"generator={self._address.base!r} refuses every request: {len(streak.held)} refusals in a row, none about a "
            f"row's content ({streak.held[-1].error}); correct the options or the server and run the same command again, "
            "which sends these requests again"
        )

    def _refuse_redirect(self, error: Exception) -> None:
        """Raise `UserError` where the error is a redirect: following it would send the rows to another address."""
        for cause in (error, error.__cause__):
            if isinstance(cause, Redirected):
                raise UserError(
                    f"generator={self._address.base!r} redirects to {cause}, and siftune follows no redirect, so that "
                    "rows and key go to no other address; pass the address of the server itself"
                ) from None

    def _clean(self, message: str) -> str:
        return redact_text(message)


def _azure(api_version: str | None, key: str) -> dict[str, Any]:
    """What Azure's addresses need: the version in every query, and the key in a header of its own."""
    if api_version is None:
        return {}
    return {"default_query": {API_VERSION: api_version}, "default_headers": {KEY_HEADER: key}}


def _one_line(text: str) -> str:
    """A model's or server's words on one line of at most 200 characters, secrets masked."""
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written to a file
    text = " ".join(redact_text(text).split())  # masked before it is cut: part of a key is a secret too
    return text if len(text) <= 200 else text[:197] + "..."


def _short(error: Exception) -> str:
    """An error on one line, with the cause that the client hides."""
    if isinstance(error.__cause__, BadReply):  # older versions of the client wrap it
        error = error.__cause__
    message = str(getattr(error, "message", "") or error) or type(error).__name__
    if error.__cause__ is not None and str(error.__cause__):
        message += f" ({error.__cause__})"
    return _one_line(message)


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
