"""A command without a terminal shows a line at least every few seconds, and nothing with --quiet."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from siftune import progress
from siftune.cli.main import main
from siftune.errors import UserError
from siftune.evaluation.held_out import Encoded, measure
from siftune.models.journal import Journal, Journaled
from siftune.progress import VARIABLE, ProgressLines, counted, current, doing
from siftune.sft.progress_callback import ProgressCallback
from siftune.study.schedule import Task, run_tasks
from tests.judges import Stub
from tests.tiny import tiny_model
from tests.unit.test_daar_stage_one import stage
from tests.unit.test_daar_synthesis import Writer, bag

LINE = re.compile(r"siftune: [a-z0-9 -]+, \d+:\d\d:\d\d: \S.*")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(clock: Clock) -> Any:
    with ProgressLines("select random", every=1000, clock=clock) as shown:
        yield shown


def note_stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is named while a command runs: `label total unit`."""
    noted: list[str] = []
    push = ProgressLines.push

    def note(self: ProgressLines, label: str, total: Any = None, unit: str = "rows", done: int = 0) -> Any:
        noted.append(f"{label} {total} {unit}")
        return push(self, label, total, unit, done)

    monkeypatch.setattr(ProgressLines, "push", note)
    return noted


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_stages(monkeypatch)


def write_pool(path: Path, rows: int) -> str:
    row = {"input": "", "output": "three"}
    path.write_text("".join(json.dumps({"instruction": f"add 1 and {n}", **row}) + "\n" for n in range(rows)))
    return str(path)


# --- the line -------------------------------------------------------------------------------------------------------


def test_a_line_has_stage_rows_rate_and_time_left(lines: ProgressLines, clock: Clock) -> None:
    assert lines.line() == "siftune: select random, 0:00:00: working"
    with doing("score"):
        lines.start("length", 4000)
        clock.now += 10
        lines.advance(1000)
        assert lines.line() == (
            "siftune: select random, 0:00:10: score > length: 1,000 of 4,000 rows, 100 rows/s, about 0:00:30 left"
        )
        lines.close()
        assert lines.line() == "siftune: select random, 0:00:10: score"
    with doing("reading a.jsonl") as reading:
        clock.now += 3600
        reading.advance(90)
        assert lines.line().endswith("1:00:10: reading a.jsonl: 90 rows, 0.025 rows/s")


def test_what_a_cache_or_a_checkpoint_held_is_not_in_the_rate(lines: ProgressLines, clock: Clock) -> None:
    lines.start("training", 100, "steps")
    lines.advance(60)  # resumed
    clock.now += 20
    lines.advance(10)
    assert lines.line().endswith("training: 70 of 100 steps, 0.5 steps/s, about 0:01:00 left")


def test_the_rate_follows_a_stage_that_slows_down_and_is_left_out_where_nothing_moves(
    lines: ProgressLines, clock: Clock
) -> None:
    lines.start("score", 1000)
    for step in (100, 100, 10, 10, 10, 10, 10):
        clock.now += 10
        lines.advance(step)
        shown = lines.line()
    assert shown.endswith("250 of 1,000 rows, 1 rows/s, about 0:12:30 left")
    for _ in range(5):
        clock.now += 10
        shown = lines.line()
    assert shown.endswith("score: 250 of 1,000 rows"), "no rate and no time left without progress"


def test_items_count_once_they_are_done(lines: ProgressLines) -> None:
    batches = counted("held-out loss", [[1, 2], [3]], 3, size=len)
    assert next(batches) == [1, 2]
    assert "held-out loss: 0 of 3 rows" in lines.line()
    assert next(batches) == [3]
    assert "held-out loss: 2 of 3 rows" in lines.line()
    assert list(batches) == []
    assert lines.line().endswith("working")


def test_an_exception_ends_what_was_being_done(lines: ProgressLines) -> None:
    with pytest.raises(KeyError), doing("score"):
        raise KeyError
    assert lines.line().endswith("working")


# --- the thread -----------------------------------------------------------------------------------------------------


def test_a_stage_that_is_silent_shows_itself_and_the_thread_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLines("train", every=0.05), doing("train"), contextlib.redirect_stderr(io.StringIO()):
        time.sleep(0.4)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) >= 3, "also where a library is kept silent by a redirected stream"
    assert all(LINE.fullmatch(line) for line in printed)
    assert current() is None
    assert not [one for one in threading.enumerate() if one.name == "siftune progress"]


def test_a_closed_stream_ends_the_lines_and_not_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressLines("train", every=0.01):
        sys.stderr.close()
        time.sleep(0.1)


def test_a_fork_prints_nothing(lines: ProgressLines) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0 if current() is None and progress._printing.acquire(blocking=False) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert current() is lines
    assert progress._printing.acquire(blocking=False)
    progress._printing.release()


def test_outside_of_a_command_nothing_is_shown() -> None:
    assert current() is None
    with doing("score", 10) as score:
        score.advance(3)
    assert score.done == 3


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_seconds_that_are_none_are_refused(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match=VARIABLE):
        progress.seconds()
    assert main(["methods"]) == 2
    assert capsys.readouterr().err == (
        f"siftune: {VARIABLE}={value!r} is not a number of seconds above 0; set it to 30, or unset it\n"
    )


def test_every_thirty_seconds_where_nothing_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert progress.seconds() == 30


def test_steps_count(lines: ProgressLines, clock: Clock) -> None:
    shown = ProgressCallback(lines, lambda line: None)
    state: Any = SimpleNamespace(max_steps=10, global_step=0)
    shown.on_train_begin(None, state, None)
    clock.now += 4
    shown.on_step_end(None, state, None)
    assert lines.line().endswith("training: 1 of 10 steps, 0.25 steps/s, about 0:00:36 left")
    shown.on_train_end(None, state, None)
    assert lines.line().endswith("working")


def test_domain_rows_and_replies_count(tmp_path: Path, lines: ProgressLines, pushed: list[str]) -> None:
    stage(tmp_path).run(lines, generator=Writer(topics=8), embed=bag)
    assert pushed[0] == "writing domain rows 18 rows"
    assert pushed[1] == "requests None replies"


def test_replies_of_earlier_rounds_are_counted(tmp_path: Path, lines: ProgressLines, clock: Clock) -> None:
    from siftune.models.generate import Request

    requests = [Request(key=str(n), messages=(("user", f"q {n}"),), seed=n) for n in range(4)]
    with Journal(tmp_path / "replies.jsonl") as journal:
        judge = Journaled(Stub(lambda prompt: prompt), journal)
        assert len(list(judge.replies(requests[:3]))) == 3
        last = judge.replies(requests[3:])
        next(last)
        assert lines.line().endswith("requests: 3 replies")
        last.close()


def test_held_out_rows_count(lines: ProgressLines, pushed: list[str]) -> None:
    rows = [([1, 2, 3], [-100, 2, 3])] * 4
    measure(tiny_model("llama", layers=1, width=16), Encoded(rows, {}))
    assert pushed == ["held-out loss 4 rows"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_pieces_of_a_study_count(jobs: int, clock: Clock, pushed: list[str], lines: ProgressLines) -> None:
    seen: list[str] = []
    tasks = [Task("a", partial(print, "a")), Task("b", partial(print, "b"), needs=("a",))]
    assert run_tasks(tasks, jobs=jobs, threads=1, on_event=lambda name, share: seen.append(lines.line())) == []
    assert [line.partition("study: ")[2] for line in seen] == ["1 of 2 pieces", "2 of 2 pieces"]
    assert pushed == ["study 2 pieces"] + ["a None rows", "b None rows"] * (jobs == 1)
