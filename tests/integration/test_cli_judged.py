"""`siftune select alpagasus`, `instag-c`, `instag-d` as a user meets them: a dry run, a server, a local model, a rerun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from siftune.cli.main import main
from siftune.demo import corpus
from tests.hostile import hostile
from tests.judges import rate, tag
from tests.tiny import save_tiny

pytest.importorskip("openai")


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with open("pool.jsonl", "w") as file:
        for row in corpus.rows(120, 0):
            file.write(json.dumps(row) + "\n")
    return tmp_path


def ratings(body: dict[str, Any]) -> str:
    prompt = body["messages"][-1]["content"]
    return "No." if body["seed"] and prompt.count("e") % 40 == 0 else rate(prompt)


def tags(body: dict[str, Any]) -> str:
    return tag(body["messages"][-1]["content"])


def test_ratings_of_a_server(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hostile({}, ratings) as server:
        words = ["select", "alpagasus", "pool.jsonl", "--judge-url", server.url, "--keep", "20%"]
        words += ["--price", "prompt=0.5,completion=2"]
        assert main([*words, "--dry-run"]) == 0
        told = capsys.readouterr().out
        assert told.count("Score: <number>") == 2
        assert "120, one per row" in told
        assert "cost" in told
        assert not server.tries
        assert main([*words, "--dry-run", "--json"]) == 0
        preview = json.loads(capsys.readouterr().out)["preview"]
        assert len(preview["prompts"]) == 2
        assert preview["cost"] > 0
        assert main([*words, "--run", "one", "--out", "one.jsonl"]) == 0
        told = capsys.readouterr().out
        asked = sum(server.tries.values())
        assert f"in this run {asked:,} requests and 0 retries, " in told
        assert "tokens, cost" in told
        assert main([*words, "--run", "two", "--out", "two.jsonl", "--cache", "elsewhere"]) == 0
        assert sum(server.tries.values()) == 2 * asked, "another cache is another journal"
        shutil.rmtree("one")
        assert main([*words, "--run", "one", "--out", "one-again.jsonl"]) == 0
        assert sum(server.tries.values()) == 2 * asked
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes() == Path("one-again.jsonl").read_bytes()
    rows = pq.read_table("two/rows.parquet").to_pylist()
    assert len(rows) == 120
    unread = [row for row in rows if row["reason"]]
    assert all((row["score"] is None) == bool(row["reason"]) for row in rows)
    assert unread
    assert all(row["reason"] == "unreadable reply: no rating: 'No.'" for row in unread)
    manifest = json.loads(Path("two/manifest.json").read_text())
    assert manifest["info"]["judge"]["unreadable"] == len(unread)
    assert manifest["rows"]["reasons"] == {"unreadable reply": len(unread)}
    assert sum(manifest["info"]["ratings"].values()) == 120 - len(unread)
    assert f"{len(unread)} unreadable" in told


def test_tags_of_a_server_and_both_rankings_of_them(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hostile({}, tags) as server:
        for method in ("instag-c", "instag-d"):
            words = ["select", method, "pool.jsonl", "--judge-url", server.url, "--judge", "tiny-chat", "--keep", "12"]
            assert main([*words, "--run", method, "--out", f"{method}.jsonl"]) == 0
            assert len(Path(f"{method}.jsonl").read_text().splitlines()) == 12
        assert max(server.paid.values()) == 1, "instag-d asked what instag-c had paid for"
        assert {body["model"] for body in server.bodies} == {"tiny-chat"}
    scores = sorted(row["score"] for row in pq.read_table("instag-d/rows.parquet").to_pylist())
    assert scores == [-place for place in reversed(range(120))]
    assert main(["keep", "instag-d", "--keep", "50%", "--out", "half.jsonl"]) == 0
    assert len(Path("half.jsonl").read_text().splitlines()) == 60


def test_a_server_that_goes_away_stops_with_a_sentence(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.txt").write_text("{question} {answer}")
    words = ["select", "alpagasus", "pool.jsonl", "--prompt", "mine.txt", "--judge-url", "http://127.0.0.1:9/v1"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "127.0.0.1:9" in said


def test_what_is_wrong_is_said_before_anything_is_asked(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([], "alpagasus needs a chat model as judge"),
        (["--judge-url", "nowhere"], "judge_url='nowhere'"),
        (["--judge", "m", "--prompt", "missing.txt"], "missing.txt"),
        (["--judge", "m", "--price", "cheap"], "--price"),
        (["--judge", "m", "--judges", "2"], "did you mean --judge"),
    ):
        assert main(["select", "alpagasus", "pool.jsonl", *words]) == 2
        assert said in capsys.readouterr().err
    assert not Path("siftune-runs").exists()


def test_a_local_model_that_cannot_rate_gives_no_score_and_no_crash(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(Path("chat"), layers=1, width=16, max_position_embeddings=4096)
    with open("few.jsonl", "w") as file:
        file.writelines(line + "\n" for line in Path("pool.jsonl").read_text().splitlines()[:3])
    Path("short.txt").write_text("{question} {answer}")
    words = ["select", "alpagasus", "few.jsonl", "--judge", "./chat", "--prompt", "short.txt", "--retries", "0"]
    assert main([*words, "--max-new-tokens", "4", "--device", "cpu", "--run", "run"]) == 2
    assert "no row has a score (3 unreadable reply)" in capsys.readouterr().err
    assert all(reason for reason in pq.read_table("run/rows.parquet")["reason"].to_pylist())
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["info"]["judge"]["unreadable"] == 3
    assert manifest["inputs"]["judge"]


# --- servers of today -------------------------------------------------------------------------------------------------

ONLY_NEW_LIMIT = {
    "error": {
        "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
        "param": "max_tokens",
        "code": "unsupported_parameter",
    }
}
GENERAL = {"error": {"message": "This server takes no requests of this kind"}}


def test_a_server_that_refuses_parameters_rates_every_row(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hostile({}, ratings) as server:
        server.rule = lambda body: ("error", (400, ONLY_NEW_LIMIT)) if "max_tokens" in body else None
        words = ["select", "alpagasus", "pool.jsonl", "--judge-url", server.url.removesuffix("/v1"), "--run", "run"]
        more = [
            "--request",
            "reasoning_effort=low",
            "--request",
            "top_k=20",
            "--request",
            'extra={"a": 1, "b": [2, 3]}',
        ]
        assert main([*words, *more, "--retries", "0"]) == 0
        summary = capsys.readouterr().out
        assert sum(server.tries.values()) == len(server.tries) + 1
        assert (server.bodies[-1]["reasoning_effort"], server.bodies[-1]["top_k"]) == ("low", 20)
        assert server.bodies[-1]["extra"] == {"a": 1, "b": [2, 3]}
    judge = json.loads(Path("run/manifest.json").read_text())["info"]["judge"]
    assert (judge["asked_now"], judge["retries_now"], judge["refused"]) == (len(server.tries), 1, 0)
    assert judge["completion_tokens_now"] == judge["completion_tokens"] > 0
    assert set(judge["parameters_left_out"]) == {"max_tokens"}
    assert "1 retries" in summary
    assert "the server refuses max_tokens, left out: Unsupported parameter" in summary
    assert "reasoning_effort: low" in Path("run/config.yaml").read_text()


def test_a_server_that_refuses_everything_stops_the_command_and_loses_no_row(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hostile({}, ratings) as server:
        server.rule = lambda body: ("error", (422, GENERAL))
        words = ["select", "alpagasus", "pool.jsonl", "--judge-url", server.url, "--run", "run", "--retries", "0"]
        assert main(words) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "refuses every request: 5 refusals in a row" in message
        assert sum(server.tries.values()) == 5
        server.rule = None
        assert main(words) == 0
    assert json.loads(Path("run/manifest.json").read_text())["info"]["judge"]["refused"] == 0


def test_refused_rows_are_asked_for_again_on_request(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(body: dict[str, Any]) -> Any:
        return ("error", (400, GENERAL)) if len(body["messages"][-1]["content"]) % 5 == 0 else None

    with hostile({}, ratings) as server:
        server.rule = refused
        words = ["select", "alpagasus", "pool.jsonl", "--judge-url", server.url, "--run", "run", "--retries", "0"]
        assert main([*words, "--concurrency", "1"]) == 0
        before = json.loads(Path("run/manifest.json").read_text())["info"]["judge"]
        assert before["refused"] > 0
        assert "--ask-again refused sends the refused requests again" in capsys.readouterr().out
        tries = sum(server.tries.values())
        server.rule = None
        assert main([*words, "--concurrency", "1"]) == 0
        assert sum(server.tries.values()) == tries, "refusals are kept"
        assert main([*words, "--concurrency", "1", "--ask-again", "refused"]) == 0
        after = json.loads(Path("run/manifest.json").read_text())["info"]["judge"]
        assert (after["refused"], after["asked_now"]) == (0, sum(server.tries.values()) - tries)
        assert 0 < after["asked_now"] <= before["refused"]
        rows = pq.read_table("run/rows.parquet").to_pylist()
        assert not any("refused" in (row["reason"] or "") for row in rows)
        tries = sum(server.tries.values())
        words[words.index("run")] = "other"
        assert main([*words, "--concurrency", "1", "--keep", "10%"]) == 0
        assert json.loads(Path("other/manifest.json").read_text())["info"]["judge"]["refused"] == 0
        assert sum(server.tries.values()) == tries


def test_a_reply_without_text_is_one_unreadable_reply(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = {"choices": [{"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"}]}
    with hostile({}, ratings) as server:
        server.rule = lambda body: ("reply", cut) if len(body["messages"][-1]["content"]) % 5 == 0 else None
        words = ["select", "alpagasus", "pool.jsonl", "--judge-url", server.url, "--run", "run", "--retries", "0"]
        assert main([*words, "--max-new-tokens", "64"]) == 0
        assert set(server.tries.values()) == {1}
        assert main([*words, "--max-new-tokens", "64", "--run", "again"]) == 0
        assert set(server.tries.values()) == {1}, "the reply is in the journal"
    reasons = {row["reason"] for row in pq.read_table("run/rows.parquet").to_pylist() if row["reason"]}
    assert (
        "unreadable reply: all of its tokens are reasoning, no answer (raise --max-new-tokens, now 64): ''" in reasons
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judge-url", "localhost:8000/v1"], "it lacks http:// (or https://); pass http://localhost:8000/v1"),
        (["--judge", "localhost:8000"], "judge='localhost:8000' is not a server's address: it lacks http://"),
        (["--judge-url", "http://h/v1", "--request", "temperature=1"], "request=temperature is set by --temperature"),
        (["--judge-url", "http://h/v1", "--request", "low"], "--request low is not KEY=VALUE"),
        (["--judge-url", "http://h/v1", "--request", "a=1,b=2"], "pass --request KEY=VALUE for each key"),
        (["--judge-url", "http://h/v1", "--request", 'a={"b": 1'], "is not JSON"),
        (["--judge", "m", "--request", "a=1"], "request= is for a judge on a server"),
        (["--judge-url", "http://h/v1", "--ask-again", "all"], "--ask-again"),
        (["--judge-url", "http://h/v1?key=hunter2"], "set OPENAI_API_KEY in the environment"),
    ],
)
def test_options_of_a_server_are_checked_first(
    pool: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["select", "alpagasus", "pool.jsonl", *more]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert "hunter2" not in errors
