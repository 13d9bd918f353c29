"""Requests to a chat model and their replies, from a local model or any OpenAI-compatible server.

A reply depends on its request alone: sampling is seeded per request, so neither the batch nor the order changes it.
Nothing heavy is imported here; `siftune.models.sampling` runs a local model, `siftune.models.server` sends requests to
a server, `siftune.models.journal` makes either resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError
from ..files import hash_json
from .address import is_server, lacks_scheme, read_address, scheme_error

if TYPE_CHECKING:
    from .backbone import DType

Message = tuple[str, str]
"""(role, content), role one of `system`, `user`, `assistant`."""


@dataclass(frozen=True)
class Ending:
    """Where a reply that is still being written may end."""

    length: int
    """Characters of the text that belong to the reply."""
    finish_reason: str
    """`stop` where the reply is complete, `repetition` where it only repeats itself."""


EndRule = Callable[[str], Ending | None]
"""The text of a reply so far to where it may end; None while it has to be continued."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to a chat model, with everything that determines the reply."""

    key: str
    """The caller's name for it, unique among the requests of one call; neither sent nor part of the content."""
    messages: tuple[Message, ...]
    """The conversation so far; the model writes the next turn."""
    seed: int = 0
    """Seed of this reply's sampling, 0 <= seed < 2**31 (what servers accept)."""
    temperature: float = 1.0
    """0 takes the likeliest token always."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this much probability, 0 < top_p <= 1."""
    max_new_tokens: int = 512
    """Tokens of the reply at most; a reply that reaches it has `finish_reason` `length`."""
    stop: tuple[str, ...] = ()
    """Strings that end the reply; not part of it. Servers take four at most."""
    end_rule: EndRule | None = field(default=None, compare=False, repr=False)
    """Ends a local model's reply early. Not sent to a server, so a reply must be usable without it; not part of the
    content."""

    def __post_init__(self) -> None:
        assert self.messages, "a request without messages"
        assert 0 <= self.seed < 2**31, self.seed
        assert self.temperature >= 0, self.temperature
        assert 0 < self.top_p <= 1, self.top_p
        assert self.max_new_tokens >= 1, self.max_new_tokens

    @property
    def content(self) -> dict[str, Any]:
        """Everything but the key and the rule for ending early, as JSON."""
        return {name: value for name, value in asdict(self).items() if name not in ("key", "end_rule")}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply to one request: a text, or the reason why there is none.

    `finish_reason` is `stop`, `length`, `repetition` (an end rule's), or a server's own value; `refused` where this one
    request can never be answered (it is too long, a filter removed it), `error` where no reply was received in this
    run. The last two come with `error` and without text.
    """

    key: str
    """The request's."""
    text: str = ""
    prompt_tokens: int = 0
    """As the model or the server counts; 0 where it does not report it."""
    completion_tokens: int = 0
    finish_reason: str = "stop"
    error: str | None = None
    """One sentence, or None for a real reply."""
    tries: int = field(default=1, compare=False)
    """Times that the request was sent in this run."""

    @property
    def final(self) -> bool:
        """Whether another request would not help: a real reply, or a refusal."""
        return self.finish_reason != "error"


class Generator(Protocol):
    """A chat model. Replies come in any order, each under its request's key, exactly one for each request."""

    @property
    def key(self) -> str:
        """Content hash of the generator: the model's files, or a server's address and its model's name. No secret."""
        ...

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """One reply per request. Raises `UserError` when no request at all can be answered (no model, wrong key)."""
        ...


def request_key(generator_key: str, request: Request) -> str:
    """Content hash of a request to a generator: equal requests to the same model are one request.

    >>> one, two = Request(key="a", messages=(("user", "Hi"),)), Request(key="b", messages=(("user", "Hi"),))
    >>> request_key("m", one) == request_key("m", two)
    True
    """
    return hash_json(["request", 1, generator_key, request.content])


def check_generator(spec: str) -> None:
    """Check a generator's name before anything is loaded or sent. Raises `UserError`."""
    if is_server(spec):
        read_address(spec)
    elif lacks_scheme(spec):
        raise scheme_error("generator", spec)
    elif "://" in spec:
        raise UserError(f"generator={spec!r} is not a supported address; use http://HOST:PORT/v1, a folder or a hub id")
    elif not spec.strip():
        raise UserError("generator='' names no model; pass a folder, a hub id or http://HOST:PORT/v1")
    elif Path(spec).expanduser().exists() or spec.startswith((".", "/", "~")):
        from .sampling import TransformersGenerator

        TransformersGenerator(spec).check()


def open_generator(spec: str, *, device: str = "auto", dtype: DType = "auto", **settings: Any) -> Generator:
    """A generator by name: a folder or hub id runs here with `transformers`, `http(s)://HOST:PORT/v1` is a server.

    A server's address may end before `/v1` or with `/chat/completions`, and hold Azure's `?api-version=`. Its model is
    named after `#` (`http://127.0.0.1:8000/v1#Qwen/Qwen2.5-7B-Instruct`), else it is the first of its `/v1/models`. `device` and `dtype` are for local models; `settings` are fields of the class. An API key comes
    from the environment variable OPENAI_API_KEY alone. Raises `UserError` for a name that cannot be used; a model is
    loaded, and a server contacted, on first use.

    >>> generator = open_generator("http://127.0.0.1:8000/v1")
    >>> [reply.text for reply in generator.replies([Request(key="a", messages=(("user", "Hello"),))])]
    """
    check_generator(spec)
    if is_server(spec):
        from .server import OpenAIGenerator

        return OpenAIGenerator(spec, **settings)
    from .sampling import TransformersGenerator

    return TransformersGenerator(spec, device=device, dtype=dtype, **settings)
