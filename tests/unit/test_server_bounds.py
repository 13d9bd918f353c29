"""Bounds on a server: bytes of a reply, seconds of a try, no redirect; a reply of wrong types is refused, not journaled."""

from __future__ import annotations

import gzip
import json
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from siftune.errors import UserError
from siftune.models.bounded_http import MOST_BYTES, unpacked
from siftune.models.completion import BadReply, read_completion
from siftune.models.generate import Reply, Request
from siftune.models.journal import Journal, Journaled
from siftune.models.server import OpenAIGenerator
from tests.hostile import Behaviour, Hostile, _Handler, hostile

QUICK: dict[str, Any] = {"first_wait": 0.01, "timeout": 0.5, "attempts": 2}


def replies_of(server: Hostile, *texts: str, **settings: Any) -> dict[str, Reply]:
    requests = [Request(key=text, messages=(("user", text),)) for text in texts]
    return {reply.key: reply for reply in OpenAIGenerator(server.url, **{**QUICK, **settings}).replies(requests)}


def completion(**changes: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    return json.dumps({"choices": [choice], "usage": usage, **changes}).encode()


def bomb(mebibytes: int) -> bytes:
    return gzip.compress(b" " * (mebibytes << 20), compresslevel=9)


def test_a_packed_reply_is_read() -> None:
    packed = ("bytes", (gzip.compress(completion()), {"Content-Encoding": "gzip"}))
    with hostile({"a": [packed]}) as server:
        assert replies_of(server, "a")["a"].text == "fine"
        assert "Accept-Encoding: gzip\n" in server.headers_seen[0]


def test_a_reply_that_unpacks_to_more_than_the_limit_fills_no_memory() -> None:
    data = bomb(64)
    assert len(data) < MOST_BYTES
    with hostile({"a": [("bytes", (data, {"Content-Encoding": "gzip"}))] * 2}) as server:
        tracemalloc.start()
        try:
            replies = replies_of(server, "a", "b", timeout=20.0)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert str(replies["a"].error) == "no reply in 2 tries: the reply has more than 8 MiB"
    assert replies["b"].text == "<b>"
    assert most < 4 * MOST_BYTES


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (b"x" * (MOST_BYTES + 1), "", "more than 8 MiB"),
        (b"x", "zstd", "packed as 'zstd', which was not requested"),
        (b"x", "gzip, gzip", "packed as 'gzip, gzip', which was not requested"),
        (b"no gzip", "gzip", "cannot be unpacked"),
        (gzip.compress(b"text" * 99)[:-9], "gzip", "cut short"),
    ],
    # A gzip header holds the time, and two test workers must collect the same names.
    ids=["too large", "zstd", "gzip twice", "no gzip", "cut short"],
)
def test_what_cannot_be_unpacked_within_the_limit_is_refused(data: bytes, encoding: str, message: str) -> None:
    with pytest.raises(BadReply, match=message):
        unpacked([data], encoding)


@pytest.mark.parametrize("in_header", [False, True])
def test_a_server_that_drips_is_given_up_in_time(in_header: bool) -> None:
    with hostile({"a": [("drip", (0.05, in_header))] * 2}) as server:
        started = time.monotonic()
        replies = replies_of(server, "a", "b")
        spent = time.monotonic() - started
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        threads = [timer for timer in timers if not timer.finished.is_set()]  # a stopped one may still be listed
        time.sleep(0.2)
        assert server.given_up == 2, "the connection is closed, not only forgotten"
    assert str(replies["a"].error) == "no reply in 2 tries: no complete reply within 0.5 s"
    assert replies["b"].text == "<b>"
    assert spent < 4
    assert not threads


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_nothing_is_forwarded(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with hostile() as other, hostile({"a": [("redirect", (status, f"{other.url}/chat?token=hidden"))] * 9}) as server:
        with pytest.raises(UserError) as caught:
            replies_of(server, "a")
        assert not other.bodies
        assert not other.headers_seen
    message = str(caught.value)
    assert f"redirects to http://127.0.0.1:{other.server_address[1]}, and siftune follows no redirect" in message
    assert "hidden" not in message
    assert server.tries["a"] == 1


def test_a_redirect_of_the_list_of_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Handler, "do_GET", lambda self: self._send(307, {}, {"Location": "http://other/v1"}))
    with hostile() as server, pytest.raises(UserError, match="redirects to http://other, and"):
        replies_of(server, "a")
    assert not server.bodies


DEEP = b'{"choices": ' + b"[" * 200_000
WRONG = [
    (DEEP, "nested too deeply"),
    (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    (b'"text"', "not a JSON object"),
    (b"\xff\xfe", "not JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    (completion(choices=None), "no choices"),
    (completion(choices={}), "no choices"),
    (completion(choices=[3]), r"choices\[0\] is a number, not an object"),
    (completion(choices=[{}]), r"message is missing, not an object"),
    (completion(choices=[{"message": "x"}]), "message is a text, not an object"),
    (completion(choices=[{"message": {"content": ["x"]}}]), r"content\[0\] is a text, not an object"),
    (completion(choices=[{"message": {"content": {"a": 1}}}]), "content is an object, not a text"),
    (completion(choices=[{"message": {"content": [{"type": "image"}]}}]), "part of type 'image' without a text"),
    (completion(choices=[{"message": {"refusal": 3}}]), "refusal is a number, not a text"),
    (completion(choices=[{"message": {"content": "x"}, "finish_reason": 3}]), "finish_reason is a number"),
    (completion(choices=[{"message": {"content": "x"}, "finish_reason": "x" * 101}]), "not a short text"),
    (completion(usage=[]), "usage is a list, not an object"),
    (completion(usage={"prompt_tokens": "3"}), "prompt_tokens is a text, not a whole number"),
    (completion(usage={"prompt_tokens": True}), "prompt_tokens is a boolean"),
    (completion(usage={"prompt_tokens": float("nan")}), "prompt_tokens is the number nan"),
    (completion(usage={"completion_tokens": float("inf")}), "completion_tokens is the number inf"),
    (completion(usage={"completion_tokens": -1}), "completion_tokens is not between 0 and"),
    (completion(usage={"completion_tokens": int("9" * 400)}), "completion_tokens is not between 0 and"),
    (completion().replace(b'"completion_tokens": 2', b'"completion_tokens": 1e999'), "is the number inf"),
]


@pytest.mark.parametrize(("data", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_reply_of_wrong_types_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadReply, match=message):
        read_completion(data)


def test_counts_may_be_missing() -> None:
    for usage in (None, {}, {"prompt_tokens": None}):
        assert read_completion(completion(usage=usage)).prompt_tokens == 0


def test_a_refused_reply_is_not_journaled_and_the_others_come(tmp_path: Path) -> None:
    script: dict[str, list[Behaviour]] = {f"q{at}": [("bytes", (data, {}))] * 2 for at, (data, _) in enumerate(WRONG)}
    requests = [Request(key=text, messages=(("user", text),)) for text in [*script, "fine"]]
    with hostile(script) as server:
        for again in (False, True):
            with Journal(tmp_path / "r.jsonl") as journal:
                # Not QUICK's timeout: on a loaded machine half a second also ends tries that the server answers.
                generator = OpenAIGenerator(server.url, **{**QUICK, "timeout": 30.0})
                replies = {reply.key: reply for reply in Journaled(generator, journal).replies(requests)}
                assert len(journal) == (len(requests) if again else 1)
            assert replies["fine"].text == "<fine>"
            for at, (_, message) in enumerate(WRONG):
                reply = replies[f"q{at}"]
                assert reply.final == again
                assert reply.text == (f"<q{at}>" if again else "")
                assert again or str(reply.error).startswith("no reply in 2 tries: "), message


def test_an_error_message_that_no_file_can_hold_is_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    error = json.dumps({"error": {"message": "odd \ud800 sign"}}).encode()
    monkeypatch.setattr(_Handler, "do_POST", lambda self: self._send_bytes(400, error, "application/json"))
    with hostile() as server:
        reply = replies_of(server, "a")["a"]
    assert "sign" in str(reply.error)
    str(reply.error).encode()
