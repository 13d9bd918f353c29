"""A real pretrained chat model as generator (SIFTUNE_PRETRAINED): its replies are its requests' own, end, and are rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from siftune.models.generate import Request
from siftune.models.sampling import TransformersGenerator
from siftune.offline.daar.descriptions import read_descriptions
from siftune.offline.daar.endings import end_after
from siftune.offline.daar.parsing import parse_rows
from siftune.offline.daar.plain import PLAIN_TOKENS, plain_messages


@pytest.mark.slow
def test_a_small_model_writes_rows_when_asked_plainly_and_alone_as_in_a_batch(pretrained: Path) -> None:
    generator = TransformersGenerator(str(pretrained), device="cpu")
    domains = read_descriptions()
    requests = [
        Request(
            key=f"{domain.name}/{seed}",
            messages=plain_messages(domain, domains.names),
            seed=seed,
            temperature=0.9,
            top_p=0.95,
            max_new_tokens=PLAIN_TOKENS,
            end_rule=end_after(1),
        )
        for domain in domains.domains
        for seed in range(2)
    ]
    replies = {reply.key: reply for reply in generator.replies(requests)}
    ended = [reply for reply in replies.values() if reply.finish_reason == "stop"]
    assert len(ended) >= 6
    assert sum(any(row.reason is None for row in parse_rows(reply.text)) for reply in ended) >= 2
    shortest = min(ended, key=lambda reply: reply.completion_tokens)
    alone = next(request for request in requests if request.key == shortest.key)
    assert list(generator.replies([alone])) == [shortest]
