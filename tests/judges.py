"""Chat models for the tests of judged methods: replies are a function of the prompt, and everything asked is noted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from siftune.models.generate import Reply, Request


def between_marks(prompt: str, name: str) -> str:
    """What stands between the last marks of this name, as a careful judge reads our own prompts."""
    found = re.findall(rf"<{name} (\w+)>\n(.*?)\n</{name} \1>", prompt, flags=re.DOTALL)
    assert len(found) == 1, prompt
    return str(found[0][1])


def rate(prompt: str) -> str:
    """A rating in halves, from the answer alone."""
    halves = blake2b(between_marks(prompt, "answer").encode(), digest_size=1).digest()[0] % 11
    return f"It is what it is.\nScore: {halves / 2:g}"


def tag(prompt: str) -> str:
    """The first letters of the question's words as tags."""
    return json.dumps(sorted({word[:1] for word in between_marks(prompt, "question").split()}))


def nowhere(prompt: str) -> bool:
    """Fails on no prompt."""
    return False


@dataclass(eq=False)
class Stub:
    """A generator that answers by a function; the prompts it was asked, and those it fails on for now, are fields."""

    answer: Callable[[str], Any]
    name: str = "stub"
    asked: list[Request] = field(default_factory=list)
    broken: Callable[[str], bool] = nowhere
    """True for the prompts that nobody answers."""

    @property
    def key(self) -> str:
        return blake2b(self.name.encode(), digest_size=16).hexdigest()

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            prompt = request.messages[-1][1]
            self.asked.append(request)
            if self.broken(prompt):
                yield Reply(key=request.key, finish_reason="error", error="nobody there")
                continue
            said = self.answer(prompt)
            reply = said if isinstance(said, dict) else {"text": said}
            tokens = {"prompt_tokens": len(prompt.split()), "completion_tokens": 7}
            yield Reply(key=request.key, **{**tokens, **reply})
