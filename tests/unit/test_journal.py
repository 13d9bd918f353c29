"""The journal of replies: nothing is asked twice, a torn line is cut off, one writer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from siftune.errors import UserError
from siftune.models.generate import Reply, Request
from siftune.models.journal import Journal, Journaled


class Echo:
    """Answers with the question, last first; remembers what it was asked; fails where told to."""

    key = "echo"

    def __init__(self, *, fails: str = "", dies_after: int = 10**9) -> None:
        self.asked: list[str] = []
        self.fails, self.dies_after = fails, dies_after

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in list(requests)[::-1]:
            if len(self.asked) == self.dies_after:
                raise KeyboardInterrupt
            said = request.messages[-1][1]
            self.asked.append(said)
            if said == self.fails:
                yield Reply(key=request.key, finish_reason="error", error="no reply in 3 tries")
            else:
                yield Reply(key=request.key, text=f"<{said}>\u2028é", prompt_tokens=3, completion_tokens=5)


def questions(*texts: str) -> list[Request]:
    return [Request(key=f"{index}", messages=(("user", text),)) for index, text in enumerate(texts)]


def run(path: Path, echo: Echo, requests: list[Request]) -> tuple[dict[str, str], Journaled]:
    with Journal(path) as journal:
        asking = Journaled(echo, journal)
        return {reply.key: reply.text for reply in asking.replies(requests)}, asking


def test_a_second_run_asks_nothing_and_gives_the_same(tmp_path: Path) -> None:
    path, first, second = tmp_path / "sub" / "replies.jsonl", Echo(), Echo()
    one, _ = run(path, first, questions("a", "b", "c"))
    two, asking = run(path, second, questions("a", "b", "c", "d"))
    assert {key: two[key] for key in one} == one == {"0": "<a>\u2028é", "1": "<b>\u2028é", "2": "<c>\u2028é"}
    assert second.asked == ["d"]
    assert (asking.counts.sent, asking.counts.reused, asking.counts.completion_tokens) == (1, 3, 5)


def test_equal_questions_are_asked_once_and_all_answered(tmp_path: Path) -> None:
    echo = Echo()
    answers, asking = run(tmp_path / "r.jsonl", echo, questions("a", "b", "a", "a"))
    assert len(answers) == 4
    assert answers["0"] == answers["2"] == answers["3"] == "<a>\u2028é"
    assert sorted(echo.asked) == ["a", "b"]
    assert asking.counts.reused == 2


def test_a_reply_is_on_the_disk_before_it_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    flushed: list[int] = []
    monkeypatch.setattr("siftune.models.journal.os.fsync", lambda handle: flushed.append(os.fstat(handle).st_size))
    with Journal(path) as journal:
        for count, _ in enumerate(Journaled(Echo(), journal).replies(questions("a", "b", "c")), start=1):
            assert len(path.read_bytes().splitlines()) == count
            assert flushed[-1] == path.stat().st_size
    assert len(flushed) == 3


def test_stopped_in_the_middle_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path, dying, second = tmp_path / "r.jsonl", Echo(dies_after=2), Echo()
    with pytest.raises(KeyboardInterrupt):
        run(path, dying, questions("a", "b", "c", "d"))
    answers, _ = run(path, second, questions("a", "b", "c", "d"))
    assert sorted(dying.asked + second.asked) == ["a", "b", "c", "d"]
    assert len(answers) == 4


def test_a_failure_is_handed_on_but_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Journal(path) as journal:
        asking = Journaled(Echo(fails="b"), journal)
        replies = {reply.key: reply for reply in asking.replies(questions("a", "b"))}
    assert replies["1"].error
    assert not replies["1"].final
    assert asking.counts.failed == 1
    second = Echo()
    run(path, second, questions("a", "b"))
    assert second.asked == ["b"]


@pytest.mark.parametrize("cut", [1, 10, 30, 60])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path, echo = tmp_path / "r.jsonl", Echo()
    run(path, Echo(), questions("a", "b"))
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: start + cut])
    answers, _ = run(path, echo, questions("a", "b"))
    assert len(echo.asked) == 1
    assert len(answers) == 2
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_torn_first_line_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"v": 1, "key": "00ff')
    run(path, Echo(), questions("a"))
    assert len(path.read_bytes().splitlines()) == 1


def test_a_damaged_line_costs_one_question(tmp_path: Path) -> None:
    path, echo = tmp_path / "r.jsonl", Echo()
    run(path, Echo(), questions("a", "b", "c"))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * 40 + b"\n"
    path.write_bytes(b"".join(lines))
    with Journal(path) as journal:
        assert (len(journal), journal.damaged) == (2, 1)
        assert len(list(Journaled(echo, journal).replies(questions("a", "b", "c")))) == 3
    assert echo.asked == ["b"]


def test_any_flipped_bit_costs_one_question_and_changes_no_reply(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    sound, _ = run(path, Echo(), questions("a", "b"))
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for place in range(start, len(content) - 1, 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(damaged)
        echo = Echo()
        assert run(path, echo, questions("a", "b"))[0] == sound
        assert echo.asked in (["b"], ["a"], ["a", "b"], ["b", "a"]), place


@pytest.mark.parametrize(
    "change",
    [{"text": 3}, {"prompt_tokens": "1"}, {"completion_tokens": -1}, {"finish_reason": None}, {"error": []}, {"v": 9}],
)
def test_a_line_of_wrong_types_costs_one_question(tmp_path: Path, change: dict[str, object]) -> None:
    path, echo = tmp_path / "r.jsonl", Echo()
    run(path, Echo(), questions("a", "b"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["check"]
        line["v"] = 1
    lines[1] |= change
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(path, echo, questions("a", "b"))
    assert len(echo.asked) == 1


def test_lines_of_the_version_before_are_read(tmp_path: Path) -> None:
    path, echo = tmp_path / "r.jsonl", Echo()
    sound, _ = run(path, Echo(), questions("a"))
    line = json.loads(path.read_text())
    del line["check"]
    path.write_text(json.dumps({**line, "v": 1}) + "\n")
    assert run(path, echo, questions("a"))[0] == sound
    assert not echo.asked


def test_a_nested_line_is_damage(tmp_path: Path) -> None:
    path, echo = tmp_path / "r.jsonl", Echo()
    run(path, Echo(), questions("a"))
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"\n")
    run(path, echo, questions("a"))
    assert not echo.asked


@pytest.mark.parametrize("content", [b"my notes\n", b"my notes", b'{"instruction": "a"}\n'])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a journal"), Journal(path):
        pass
    assert path.read_bytes() == content


def test_two_processes_cannot_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    code = "import sys; from siftune.models.journal import Journal; Journal(sys.argv[1]).__enter__()"
    with Journal(path):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        (tmp_path / "link.jsonl").symlink_to(path)
        with pytest.raises(UserError, match="being written by another"), Journal(tmp_path / "link.jsonl"):
            pass
    assert done.returncode != 0
    assert "being written by another siftune process" in done.stderr
    with Journal(path):
        pass
