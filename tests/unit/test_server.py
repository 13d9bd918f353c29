"""A server as generator: patience with what servers do, bounds on it, and no secret anywhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from siftune.errors import MissingExtra, UserError
from siftune.models.address import Address, is_server, lacks_scheme, read_address
from siftune.models.generate import Reply, Request, check_generator, open_generator
from siftune.models.journal import Journal, Journaled
from siftune.models.server import OpenAIGenerator
from tests.hostile import Hostile, hostile

QUICK = {"first_wait": 0.02, "timeout": 0.6, "attempts": 3}


def asked(*texts: str, **settings: object) -> list[Request]:
    return [Request(key=text, messages=(("user", text),), seed=3, **settings) for text in texts]  # type: ignore[arg-type]


def _key(reply: Reply) -> str:
    return reply.key


def answers(server: Hostile, *texts: str, **settings: object) -> dict[str, Reply]:
    generator = OpenAIGenerator(server.url, **{**QUICK, **settings})  # type: ignore[arg-type]
    return {reply.key: reply for reply in generator.replies(asked(*texts))}


@pytest.mark.parametrize(
    "step", ["500", "503", "408", ("429", None), "garbage", "html", "empty", "half", "drop", ("hang", 1.5)]
)
def test_what_passes_is_tried_again(step: object) -> None:
    with hostile({"a": [step]}) as server:  # type: ignore[list-item]
        replies = answers(server, "a", "b")
    assert {key: reply.text for key, reply in replies.items()} == {"a": "<a>", "b": "<b>"}
    assert all(reply.error is None for reply in replies.values())
    assert (server.tries["a"], server.tries["b"]) == (2, 1)
    assert (replies["a"].prompt_tokens, replies["a"].completion_tokens) == (1, 3)


@pytest.mark.parametrize("step", ["500", "garbage", "half", ("hang", 1.0)])
def test_tries_are_bounded_and_the_failure_is_said(step: object) -> None:
    with hostile({"a": [step] * 9}) as server:  # type: ignore[list-item]
        replies = answers(server, "a", "b", timeout=0.3)
    assert server.tries["a"] == 3
    assert replies["b"].text == "<b>"
    assert not replies["a"].final
    assert str(replies["a"].error).startswith("no reply in 3 tries: ")


def test_retry_after_is_respected_by_every_thread() -> None:
    with hostile({"a": [("429", 1)]}) as server:
        generator = OpenAIGenerator(server.url, concurrency=1, first_wait=0.001, timeout=5)
        started = time.monotonic()
        texts = [reply.text for reply in generator.replies(asked("a", "b"))]
    assert texts == ["<a>", "<b>"]
    assert server.times["a"][1] - server.times["a"][0] >= 0.98
    assert time.monotonic() - started < 10


def test_a_retry_after_beyond_patience_ends_the_request() -> None:
    with hostile({"a": [("429", 3600)]}) as server:
        replies = answers(server, "a", "b")
    assert server.tries["a"] == 1
    assert "the server asks to wait 3600 s" in str(replies["a"].error)
    assert replies["b"].text == "<b>"


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_refusal_is_final_and_asked_once(status: str) -> None:
    with hostile({"a": [status] * 5}) as server:
        replies = answers(server, "a", "b")
    assert server.tries["a"] == 1
    assert replies["a"].final
    assert replies["a"].finish_reason == "refused"
    assert f"status {status} for you" in str(replies["a"].error)


def test_a_wrong_key_ends_the_run_after_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    got: list[str] = []
    with hostile({"bad": ["401"] * 50, "slow": [("answer", 0.4)]}) as server:
        generator = OpenAIGenerator(server.url, concurrency=2, **QUICK)  # type: ignore[arg-type]
        generator._settled = True  # else the first request goes alone
        with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
            got.extend(map(_key, generator.replies(asked("slow", "bad", *map(str, range(50))))))
    assert got == ["slow"]
    assert "sk-very-secret" not in str(caught.value)
    assert sum(server.tries.values()) == 2


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with hostile({"a": ["500", "500", "500"], "b": ["400"]}) as server, Journal(tmp_path / "r.jsonl") as journal:
        generator = OpenAIGenerator(server.url, **QUICK)  # type: ignore[arg-type]
        said = [str(reply) for reply in Journaled(generator, journal).replies(asked("a", "b"))]
        first = generator.key
        monkeypatch.setenv("OPENAI_API_KEY", "another")
        assert OpenAIGenerator(server.url).key == first
    assert "Bearer sk-very-secret" in server.headers_seen[0]
    assert "status 400 for you with Bearer ***" in "".join(said)
    assert "sk-very-secret" not in "".join([*said, repr(generator), (tmp_path / "r.jsonl").read_text()])


def test_the_request_says_all_that_decides_the_reply() -> None:
    with hostile() as server:
        request = Request(
            key="k",
            messages=(("system", "s"), ("user", "u")),
            seed=11,
            temperature=0.9,
            top_p=0.95,
            max_new_tokens=64,
            stop=("###",),
        )
        list(OpenAIGenerator(server.url + "#other").replies([request]))
    (body,) = server.bodies
    assert body == {
        "model": "other",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "temperature": 0.9,
        "top_p": 0.95,
        "seed": 11,
        "max_tokens": 64,
        "stop": ["###"],
    }


def test_requests_run_side_by_side_up_to_the_bound_and_are_drawn_as_needed() -> None:
    drawn = []

    def source() -> object:
        for index in range(40):
            drawn.append(index)
            yield from asked(str(index))

    with hostile({str(index): [("answer", 0.05)] for index in range(40)}) as server:
        generator = OpenAIGenerator(server.url, concurrency=4)
        replies = generator.replies(source())  # type: ignore[arg-type]
        next(replies)
        assert len(drawn) <= 8
        assert len(list(replies)) == 39
        assert 2 <= server.most_at_once <= 4


def test_the_first_model_is_taken_and_named_in_the_identity() -> None:
    with hostile() as server:
        assert OpenAIGenerator(server.url).model == "tiny-chat"
        assert OpenAIGenerator(server.url).key == OpenAIGenerator(server.url + "#tiny-chat").key
        assert OpenAIGenerator(server.url).key != OpenAIGenerator(server.url + "#other").key
        server.models = []
        with pytest.raises(UserError, match="lists no model; name one with #MODEL"):
            list(OpenAIGenerator(server.url).replies(asked("a")))


def test_nobody_at_home_is_one_sentence() -> None:
    generator = open_generator("http://127.0.0.1:9/v1", timeout=1.0)
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1' does not list its models"):
        list(generator.replies(asked("a")))


def test_an_address_with_a_password_is_refused_without_repeating_it() -> None:
    for spec in ("https://me:hunter2@host/v1", "https://host/v1?api_key=hunter2"):
        with pytest.raises(UserError) as caught:
            read_address(spec)
        assert "hunter2" not in str(caught.value)
        assert "OPENAI_API_KEY" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        ("http://h:1", Address("http://h:1/v1")),
        ("http://h:1/", Address("http://h:1/v1")),
        ("http://h:1/v1", Address("http://h:1/v1")),
        ("HTTP://h:1/v1/", Address("http://h:1/v1")),
        ("http://h:1/v1/chat/completions#m", Address("http://h:1/v1", "m")),
        ("http://h:1/v1/models", Address("http://h:1/v1")),
        ("https://h/api/v3", Address("https://h/api/v3")),
        (
            "https://h/openai/deployments/gpt%204/chat/completions?api-version=2024-10-21",
            Address("https://h/openai/deployments/gpt%204", "gpt 4", "2024-10-21"),
        ),
        ("https://h/openai/v1?api-version=preview#m", Address("https://h/openai/v1", "m", "preview")),
    ],
)
def test_every_spelling_of_an_address_is_understood(spec: str, address: Address) -> None:
    assert is_server(spec)
    assert read_address(spec) == address


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("localhost/v1", "http://localhost/v1"),
        ("127.0.0.1:8000/v1/chat/completions#m", "http://127.0.0.1:8000/v1#m"),
        ("gpu-3:8000/v1", "http://gpu-3:8000/v1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
        ("api.example.com/v1", "https://api.example.com/v1"),
    ],
)
def test_an_address_without_http_is_refused_with_what_is_missing(spec: str, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        check_generator(spec)
    assert str(caught.value).endswith(f"it lacks http:// (or https://); pass {advice}")


def test_a_hub_id_is_no_address_and_a_deployment_must_be_named() -> None:
    assert not any(map(lacks_scheme, ("Qwen/Qwen2.5-7B-Instruct", "gpt2", "./v1", "org/v1", "meta-llama/Llama-3.2-1B")))
    with pytest.raises(UserError, match=r"names no deployment; pass https://HOST/openai/deployments/NAME"):
        read_address("https://h?api-version=2024-10-21")


def test_nothing_is_paid_twice_over_crashes_and_bad_manners(tmp_path: Path) -> None:
    texts = [f"q{index}" for index in range(12)]
    script = {"q1": ["429"], "q3": ["half"], "q5": ["garbage", "500"], "q7": ["drop"], "q9": [("hang", 1.0)]}
    path = tmp_path / "r.jsonl"
    with hostile(script) as server:  # type: ignore[arg-type]
        with Journal(path) as journal:
            generator = OpenAIGenerator(server.url, concurrency=1, **QUICK)  # type: ignore[arg-type]
            replies = Journaled(generator, journal).replies(asked(*texts))
            for _ in range(4):
                next(replies)
            replies.close()  # as a crash would
        with Journal(path) as journal:
            generator = OpenAIGenerator(server.url, concurrency=3, **QUICK)  # type: ignore[arg-type]
            found = {reply.key: reply.text for reply in Journaled(generator, journal).replies(asked(*texts))}
    assert found == {text: f"<{text}>" for text in texts}
    assert all(server.paid[text] == 1 for text in texts[:4])
    assert sum(server.paid.values()) <= 12 + 1  # one may have been under way when it was closed


@pytest.mark.parametrize("model", ["", "#chat"])
def test_without_openai_a_server_is_refused_with_the_extra_to_install(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    generator = OpenAIGenerator("http://127.0.0.1:9/v1" + model)
    with pytest.raises(
        MissingExtra, match=r"needs openai, which is not installed; run: pip install 'siftune\[generate\]'"
    ):
        list(generator.replies([Request(key="one", messages=(("user", "?"),))]))
