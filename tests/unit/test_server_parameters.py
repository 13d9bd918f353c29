"""Servers that refuse parameters, refuse every request, or reply in unusual forms: nothing is lost, nothing paid twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftune.errors import UserError
from siftune.models.generate import Reply, Request
from siftune.models.journal import Journal, Journaled
from siftune.models.parameters import check_request, unsupported
from siftune.models.server import OpenAIGenerator
from siftune.models.server_errors import ServerError, read_error
from tests.hostile import Behaviour, Hostile, hostile

pytest.importorskip("openai")

QUICK: dict[str, Any] = {"first_wait": 0.01, "timeout": 20.0, "attempts": 3}
SENT = {"temperature": 0, "top_p": 1.0, "seed": 3, "max_tokens": 9}


def requests(*texts: str) -> list[Request]:
    return [Request(key=text, messages=(("user", text),), seed=3) for text in texts]


def replies_of(server: Hostile, *texts: str, **settings: Any) -> dict[str, Reply]:
    generator = OpenAIGenerator(server.url, **{**QUICK, **settings})
    return {reply.key: reply for reply in generator.replies(requests(*texts))}


def openai_error(message: str, code: str | None = None, param: str | None = None) -> Any:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def refuses(*errors: tuple[str, int, Any]) -> Callable[[dict[str, Any]], Behaviour | None]:
    """A rule that refuses requests with one of these parameters."""

    def rule(body: dict[str, Any]) -> Behaviour | None:
        return next((("error", (status, error)) for name, status, error in errors if name in body), None)

    return rule


TEMPERATURE = openai_error(
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
    "unsupported_value",
    "temperature",
)
LIMIT = openai_error(
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "unsupported_parameter",
    "max_tokens",
)

# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "name"),
    [
        (400, TEMPERATURE, "temperature"),
        (400, LIMIT, "max_tokens"),
        (400, openai_error("Unrecognized request argument supplied: seed"), "seed"),
        (400, openai_error("property 'seed' is unsupported"), "seed"),
        (400, {"message": "`top_p` is deprecated for this model"}, "top_p"),
        (400, openai_error("`temperature` and `top_p` cannot both be specified for this model."), "top_p"),
        (400, [{"error": {"message": 'Invalid JSON payload. Unknown name "seed": Cannot find field.'}}], "seed"),
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Not permitted"}]}, "seed"),
        (
            422,
            {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_p"], "msg": "Extra inputs"}]}},
            "top_p",
        ),
        (400, openai_error("'max_tokens' is too large: 99999. At most 16384 are supported"), None),
        (400, openai_error("Unknown role in messages; stop here, at the seed of it"), None),
        (500, TEMPERATURE, None),
    ],
)
def test_the_unsupported_parameter_is_recognised_in_every_wording(status: int, error: Any, name: str | None) -> None:
    facts = read_error(json.dumps(error).encode())
    assert unsupported(ServerError(status, facts), SENT) == name


def test_refused_parameters_are_left_out_and_no_row_of_the_first_ones_is_lost() -> None:
    with hostile() as server:
        server.rule = refuses(
            ("max_tokens", 400, LIMIT),
            ("temperature", 400, TEMPERATURE),
            ("seed", 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Not permitted"}]}),
        )
        texts = [f"q{index}" for index in range(20)]
        generator = OpenAIGenerator(server.url, concurrency=8, **QUICK)
        replies = {reply.key: reply for reply in generator.replies(requests(*texts))}
        assert {key: reply.text for key, reply in replies.items()} == {text: f"<{text}>" for text in texts}
        assert sum(server.tries.values()) == 20 + 3, "the first request alone learns, once for each parameter"
        assert replies["q0"].tries == 4
        assert set(server.bodies[-1]) == {"model", "messages", "top_p", "max_completion_tokens"}
        assert set(generator.left_out) == {"max_tokens", "temperature", "seed"}
        assert "Only the default (1) value" in generator.left_out["temperature"]


def test_requests_under_way_that_are_refused_learn_the_same_and_lose_nothing() -> None:
    with hostile({f"q{index}": [("answer", 0.05)] for index in range(8)}) as server:
        generator = OpenAIGenerator(server.url, concurrency=8, **QUICK)
        generator._settled = True  # all eight go at once
        server.rule = refuses(("temperature", 400, TEMPERATURE))
        texts = [f"q{index}" for index in range(8)]
        replies = list(generator.replies(requests(*texts)))
    assert sorted(reply.text for reply in replies) == [f"<{text}>" for text in texts]


def test_further_parameters_are_sent_and_part_of_the_key() -> None:
    request = {
        "reasoning_effort": "low",
        "extra_body": {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}},
    }
    with hostile() as server:
        replies_of(server, "a", request=request)
        (body,) = server.bodies
        plain, low = OpenAIGenerator(server.url), OpenAIGenerator(server.url, request={"reasoning_effort": "low"})
        assert len({plain.key, low.key, OpenAIGenerator(server.url, request=request).key}) == 3
    assert (body["reasoning_effort"], body["top_k"]) == ("low", 20)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "extra_body" not in body


def test_a_further_parameter_that_the_server_refuses_ends_the_run() -> None:
    error = openai_error("Unknown parameter: 'reasoning_effort'.", "unknown_parameter", "reasoning_effort")
    with hostile() as server:
        server.rule = refuses(("reasoning_effort", 400, error))
        with pytest.raises(UserError, match=r"refuses reasoning_effort of request .*leave it out of --request"):
            replies_of(server, "a", "b", request={"reasoning_effort": "low"})
        assert sum(server.tries.values()) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"temperature": 1}, "request=temperature is set by --temperature"),
        ({"extra_body": {"max_tokens": 1}}, "request=max_tokens is set by --max-new-tokens"),
        ({"extra_body": 3}, "request=extra_body is 3, not a mapping"),
        ({"extra_headers": {"a": "b"}}, "request=extra_headers is no parameter"),
        ({"metadata": {"api_key": "x"}}, "request=api_key is a secret"),
        ({"a": float("nan")}, "is not JSON"),
        ("low", "is not a mapping"),
    ],
)
def test_further_parameters_are_checked(request_: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_request(request_)


@pytest.mark.parametrize("end", ["", "/v1", "/v1/chat/completions"])
def test_every_spelling_of_the_address_reaches_the_server(end: str) -> None:
    with hostile() as server:
        generator = OpenAIGenerator(server.url.removesuffix("/v1") + end + "#tiny-chat", **QUICK)
        assert [reply.text for reply in generator.replies(requests("a"))] == ["<a>"]
        assert server.paths == ["/v1/chat/completions"]


def test_azure_gets_its_version_and_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "azure-secret")
    with hostile() as server:
        base = server.url.removesuffix("/v1") + "/openai/deployments/mine"
        generator = OpenAIGenerator(f"{base}/chat/completions?api-version=2024-10-21", **QUICK)
        assert [reply.text for reply in generator.replies(requests("a"))] == ["<a>"]
        assert server.paths == ["/openai/deployments/mine/chat/completions?api-version=2024-10-21"]
        headers = server.headers_seen[0].lower()
    assert "api-key: azure-secret" in headers
    assert "authorization" not in headers


# --- refusals ---------------------------------------------------------------------------------------------------------

GENERAL = openai_error("This deployment accepts no requests of this kind")


def test_equal_refusals_end_the_run_and_are_sent_again_by_the_next(tmp_path: Path) -> None:
    texts = [f"q{index}" for index in range(30)]
    with hostile() as server:
        server.rule = lambda body: ("error", (400, GENERAL))
        with Journal(tmp_path / "r.jsonl") as journal:
            generator = OpenAIGenerator(server.url, concurrency=8, **QUICK)
            got = []
            with pytest.raises(UserError, match=r"refuses every request: 5 refusals in a row.*accepts no requests"):
                got.extend(Journaled(generator, journal).replies(requests(*texts)))
            assert len(got) == sum(server.tries.values()) == 5
            assert len(journal) == 0
        server.rule = None
        with Journal(tmp_path / "r.jsonl") as journal:
            generator = OpenAIGenerator(server.url, **QUICK)
            again = {reply.key: reply.text for reply in Journaled(generator, journal).replies(requests(*texts))}
    assert again == {text: f"<{text}>" for text in texts}


def test_refusals_that_differ_end_the_run_later() -> None:
    with hostile() as server:
        server.rule = lambda body: ("error", (400, openai_error(f"no: {body['messages'][0]['content']}")))
        texts = [f"{chr(97 + index % 26)}{chr(97 + index // 26)}" for index in range(60)]
        with pytest.raises(UserError, match="refuses every request: 20 refusals in a row"):
            replies_of(server, *texts)
        assert sum(server.tries.values()) == 20


def test_refusals_between_replies_are_their_rows() -> None:
    script: dict[str, list[Behaviour]] = {f"q{index}": [("error", (400, GENERAL))] for index in range(30) if index % 3}
    with hostile(script) as server:
        replies = replies_of(server, *(f"q{index}" for index in range(30)), concurrency=1)
    assert sum(reply.finish_reason == "refused" for reply in replies.values()) == 20
    assert all(reply.final for reply in replies.values())


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai_error("The response was filtered due to the prompt", "content_filter")),
        (400, {"error": {"message": "Refused", "code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
        (403, openai_error("Your input was flagged by moderation")),
        (400, openai_error("This model's maximum context length is 2048 tokens", "context_length_exceeded")),
        (400, {"object": "error", "message": "'max_tokens' is too large: the maximum context length is 2048 tokens"}),
        (413, {"detail": "too large"}),
    ],
)
def test_a_refusal_of_a_rows_content_is_that_rows_however_many(status: int, error: Any) -> None:
    script: dict[str, list[Behaviour]] = {f"q{index}": [("error", (status, error))] for index in range(25)}
    with hostile(script) as server:
        replies = replies_of(server, *(f"q{index}" for index in range(26)))
        assert sum(server.tries.values()) == 26
    assert all(replies[f"q{index}"].finish_reason == "refused" for index in range(25))
    assert replies["q25"].text == "<q25>"


def test_refused_requests_can_be_sent_again(tmp_path: Path) -> None:
    with hostile({"a": [("error", (400, GENERAL))]}) as server:
        generator = OpenAIGenerator(server.url, **QUICK)
        with Journal(tmp_path / "r.jsonl") as journal:
            first = {reply.key: reply for reply in Journaled(generator, journal).replies(requests("a", "b"))}
            assert first["a"].finish_reason == "refused"
            kept = {reply.key: reply for reply in Journaled(generator, journal).replies(requests("a", "b"))}
            assert kept["a"].finish_reason == "refused"
            again = Journaled(generator, journal, ask_again=set())
            assert {reply.key: reply.text for reply in again.replies(requests("a", "b"))} == {"a": "<a>", "b": "<b>"}
        with Journal(tmp_path / "r.jsonl") as journal:
            assert {r.key: r.text for r in Journaled(generator, journal).replies(requests("a"))} == {"a": "<a>"}
        assert server.tries == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (("error", (429, openai_error("You exceeded your current quota", "insufficient_quota"))), "has no quota left"),
        (("error", (402, {"error": "Payment required"})), "has no quota left"),
        (
            ("page", (404, "<html><title>404 Not Found</title></html>")),
            "a web page, not a model's reply .404 Not Found",
        ),
        (("error", (404, openai_error("The model `m` does not exist", "model_not_found"))), "has no model 'tiny-chat'"),
        (("error", (403, openai_error("Forbidden"))), "refuses the key"),
    ],
)
def test_what_concerns_every_request_ends_the_run_at_once(step: Behaviour, message: str) -> None:
    with hostile() as server:
        server.rule = lambda body: step
        with pytest.raises(UserError, match=message):
            replies_of(server, "a", "b")
        assert sum(server.tries.values()) == 1


# --- replies of unusual form ------------------------------------------------------------------------------------------


def completion(message: dict[str, Any], reason: str = "stop", **more: Any) -> Behaviour:
    usage = {"prompt_tokens": 5, "completion_tokens": 9}
    return ("reply", {"choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": usage, **more})


def event(content: str | None, reason: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason}]})


PARTS = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
USAGE = json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}})


@pytest.mark.parametrize(
    ("step", "text", "reason", "error"),
    [
        (completion({"content": None}, "length"), "", "length", None),
        (completion({"content": None, "reasoning_content": "hm"}, "stop"), "", "stop", None),
        (completion({"content": PARTS}), "one two", "stop", None),
        (completion({"content": None, "refusal": "I will not."}), "", "refused", "I will not."),
        (completion({"content": [{"type": "refusal", "refusal": "No."}]}), "", "refused", "No."),
        (completion({"content": None}, "content_filter"), "", "refused", "content filter removed the reply"),
        (("stream", [event("on"), event("e"), event(None, "stop"), USAGE, "[DONE]"]), "one", "stop", None),
    ],
)
def test_a_reply_is_read_once_in_every_form(step: Behaviour, text: str, reason: str, error: str | None) -> None:
    with hostile({"a": [step]}) as server:
        reply = replies_of(server, "a")["a"]
        assert server.tries["a"] == 1, "a reply that was paid for is final"
    assert (reply.text, reply.finish_reason, reply.final) == (text, reason, True)
    assert (error is None) == (reply.error is None)
    assert error is None or error in str(reply.error)
    assert (reply.prompt_tokens, reply.completion_tokens) == (5, 9)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (("reply", {"error": {"message": "Provider returned error", "code": 502}}), "Provider returned error"),
        (("reply", {"choices": [{"error": {"message": "Upstream gone"}, "message": {}}]}), "Upstream gone"),
        (("stream", [event("on")]), "a stream that was not requested, and its end is missing"),
        (("stream", [json.dumps({"error": {"message": "Overloaded"}})]), "Overloaded"),
        (("page", (502, "<html><head><title>Bad gateway</title></head></html>")), r"a web page.* \(Bad gateway\)"),
        (("page", (200, "<html>Log in</html>")), "not JSON, it is a web page"),
        (("bytes", (b'{"choices": [{', {})), "not JSON"),
    ],
)
def test_an_error_of_any_form_is_shown_and_tried_again(step: Behaviour, message: str) -> None:
    with hostile({"a": [step] * 3, "b": [step]}) as server:
        replies = replies_of(server, "a", "b")
    assert not replies["a"].final
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(replies["a"].error)
    assert (replies["b"].text, replies["b"].tries) == ("<b>", 2)


def test_an_error_about_the_row_inside_a_reply_of_status_200_is_its_refusal() -> None:
    with hostile({"a": [("reply", {"error": {"message": "flagged by moderation", "code": 403}})]}) as server:
        reply = replies_of(server, "a")["a"]
    assert reply.finish_reason == "refused"
    assert "an error inside a reply of status 200: flagged" in str(reply.error)


def test_retries_and_tokens_are_counted(tmp_path: Path) -> None:
    script: dict[str, list[Behaviour]] = {"a": [("429", 0), "drop"], "b": ["500"], "c": [("bytes", (b"{", {}))]}
    with hostile(script) as server, Journal(tmp_path / "r.jsonl") as journal:
        judge = Journaled(OpenAIGenerator(server.url, **QUICK), journal)
        list(judge.replies(requests("a", "b", "c", "d", "d2")))
        counts = judge.counts
        assert (counts.sent, counts.retries, counts.failed) == (5, 4, 0)
        assert counts.sent + counts.retries == sum(server.tries.values())
        assert counts.completion_tokens == sum(len(f"<{text}>") for text in ("a", "b", "c", "d", "d2"))
        assert set(server.paid.values()) == {1}
