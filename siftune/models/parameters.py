"""The parameters of requests to one server: what siftune sends, less what the server refuses, plus what the user adds.

Servers differ: some know only `max_completion_tokens`, some models accept no `temperature`, `top_p` or `seed`. What an
error names as unsupported is left out of every further request. The first such error comes before the second request is
sent (`OpenAIGenerator.replies`), and threads whose requests were under way learn the same once more, not twice.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..redaction import is_secret_key, shortened
from .generate import Request
from .server_errors import SHOWN, ServerError

LIMITS = ("max_tokens", "max_completion_tokens")
"""Names of a reply's longest length, the usual one first."""
OWN = {
    "model": "--judge (or #MODEL)",
    "messages": "--prompt",
    "temperature": "--temperature",
    "seed": "--seed",
    "max_tokens": "--max-new-tokens",
    "max_completion_tokens": "--max-new-tokens",
    "stream": "nothing: replies are read whole",
    "n": "nothing: a request has one reply",
}
"""Parameters that siftune sets itself, with what sets them instead."""
OF_THE_CLIENT = ("extra_headers", "extra_query", "timeout")
"""Arguments of the openai package that are no parameters of a request."""
LEAVE_OUT_FIRST = ("seed", "top_p", "stop", "temperature", *LIMITS)
"""Where an error names several: those whose absence changes least come first."""

_UNSUPPORTED = re.compile(
    r"unsupported|not (?:be )?(?:supported|permitted|allowed|available|accepted)|(?:does|do) not (?:support|accept|allow)"
    r"|unrecogni[sz]ed|unknown|unexpected|extra[_ ](?:forbidden|fields?|inputs?)|deprecated|no longer|cannot find field"
    r"|cannot (?:both )?be (?:used|specified|set)|only the default|\binstead\b|is invalid for this model",
    re.I,
)


def check_request(request: Any) -> None:
    """Check the user's further parameters. Raises `UserError`, which names the key.

    >>> check_request({"temperature": 1})
    Traceback (most recent call last):
    siftune.errors.UserError: request=temperature is set by --temperature; leave it out of request
    """
    if not isinstance(request, Mapping):
        raise UserError(f"request={request!r} is not a mapping; write KEY=VALUE, such as reasoning_effort=low")
    nested = request.get("extra_body", {})
    if not isinstance(nested, Mapping):
        raise UserError(f'request=extra_body is {nested!r}, not a mapping; write extra_body={{"name": value}}')
    for name in [*request, *nested]:
        if name in OWN:
            raise UserError(f"request={name} is set by {OWN[name]}; leave it out of request")
        if name in OF_THE_CLIENT:
            raise UserError(f"request={name} is no parameter of a request's body; leave it out")
    for name in _names(request):
        if is_secret_key(name):
            raise UserError(f"request={name} is a secret; leave it out and set OPENAI_API_KEY in the environment")
    try:
        json.dumps(request, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"request={request!r} is not JSON ({error}); use texts, numbers, lists and mappings") from None


def _names(value: Any) -> list[str]:
    """Every key of nested mappings and lists."""
    if isinstance(value, Mapping):
        return [name for key, inner in value.items() for name in (str(key), *_names(inner))]
    return [name for inner in value for name in _names(inner)] if isinstance(value, (list, tuple)) else []


class Parameters:
    """What requests to one server hold beside the model and the messages; used by several threads."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._added = {name: value for name, value in request.items() if name != "extra_body"}
        self._added |= request.get("extra_body", {})
        self._lock = threading.Lock()
        self.left_out: dict[str, str] = {}
        """Parameters that the server refuses, with its words."""

    def of(self, request: Request) -> dict[str, Any]:
        """The parameters of a request, as they are sent now."""
        sent: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        if request.stop:
            sent["stop"] = list(request.stop)
        with self._lock:
            sent[LIMITS[LIMITS[0] in self.left_out]] = request.max_new_tokens
            return {name: value for name, value in sent.items() if name not in self.left_out} | self._added

    def learn(self, sent: Mapping[str, Any], error: ServerError) -> bool:
        """Leave out what the error names as unsupported; True when the request has to be sent again without it.

        Raises `UserError` where the user added the parameter.
        """
        name = unsupported(error, sent)
        if name is None or name == LIMITS[1]:  # without any limit a reply may cost anything
            return False
        if name in self._added:
            raise UserError(f"the server refuses {name} of request ({error}); leave it out of --request")
        with self._lock:
            self.left_out.setdefault(name, shortened(error.facts.message, SHOWN))
        return True


def unsupported(error: ServerError, sent: Mapping[str, Any]) -> str | None:
    """The sent parameter that an error names as unsupported; None where it names none.

    >>> facts = ErrorFacts("Unsupported parameter: 'seed'")
    >>> unsupported(ServerError(400, facts), {"seed": 1, "temperature": 0})
    'seed'
    """
    if error.status not in (400, 422) or not _UNSUPPORTED.search(error.text):
        return None
    if error.facts.parameter in sent:
        return error.facts.parameter
    named = [name for name in sent if _is_named(name, error.facts.message)]
    neutral = [name for name in named if name == "top_p" and sent[name] == 1]
    ranked = sorted(named, key=lambda name: LEAVE_OUT_FIRST.index(name) if name in LEAVE_OUT_FIRST else -1)
    return next(iter([*neutral, *ranked]), None)


def _is_named(name: str, message: str) -> bool:
    """Whether a message speaks of the parameter: words such as `seed` and `stop` occur in other sentences too."""
    word = re.escape(name)
    if "_" in name:
        return re.search(rf"(?<!\w){word}(?!\w)", message) is not None
    before = r"(?:parameters?|arguments?|propert(?:y|ies)|fields?|names?|supplied|keywords?|options?|keys?)\W{1,3}"
    after = r"\W{0,2}(?:\s+(?:is|are|does|was|cannot|must|not)\b|:\s)"
    return re.search(rf"['\"`]{word}['\"`]|{before}{word}(?!\w)|(?<!\w){word}{after}", message, re.I) is not None
