"""The writing stage put together: real rows, journal and cache, a local model, a server, and what is told before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftune.errors import UserError
from siftune.models.generate import Request
from siftune.offline.daar.seeds import read_seeds
from siftune.offline.daar.stage_one import StageOne
from siftune.offline.daar.written import SEEDS, copy_written
from tests.hostile import hostile
from tests.tiny import save_tiny
from tests.unit.test_daar_synthesis import Writer, bag

DOMAINS = {
    "domains": {"law": "Questions of law.", "music": "Musical notation."},
    "settings": {"rows": 9, "attempts": 30, "max_new_tokens": 64},
}


def stage(tmp_path: Path, **more: Any) -> StageOne:
    given = {"generator": "http://127.0.0.1:9/v1#chat", "domains": DOMAINS, "seeds": None, "model": "none", "seed": 0}
    return StageOne(**{**given, "cache": tmp_path / "cache", **more})


def write(body: dict[str, Any]) -> str:
    """What the scripted writer answers to a request that came over the wire."""
    request = Request(key="x", messages=(("user", body["messages"][-1]["content"]),), seed=body["seed"])
    return Writer(topics=8).write(request)


def test_it_writes_once_whatever_the_run_folder(tmp_path: Path) -> None:
    writer, again = Writer(topics=8), Writer(topics=8)
    folder = stage(tmp_path).run(generator=writer, embed=bag)
    assert read_seeds(folder / SEEDS).counts == {"law": 9, "music": 9}
    assert stage(tmp_path).run(generator=again, embed=bag) == folder
    assert not again.asked
    other = stage(tmp_path, seed=1).run(generator=again, embed=bag)
    assert other != folder
    assert again.asked


def test_a_changed_setting_asks_only_what_is_new(tmp_path: Path) -> None:
    first, second = Writer(topics=8), Writer(topics=8)
    stage(tmp_path).run(generator=first, embed=bag)
    more = {**DOMAINS, "settings": {**DOMAINS["settings"], "rows": 12}}
    folder = stage(tmp_path, domains=more).run(generator=second, embed=bag)
    assert read_seeds(folder / SEEDS).counts == {"law": 12, "music": 12}
    asked = {(request.messages, request.seed) for request in first.asked}
    assert not asked & {(request.messages, request.seed) for request in second.asked}
    facts = json.loads((folder / "written.json").read_text())
    assert facts["replies"]["reused"] > 0


def test_copies_for_the_run_folder_leave_edited_files_alone(tmp_path: Path) -> None:
    folder = stage(tmp_path).run(generator=Writer(topics=8), embed=bag)
    copy_written(folder, tmp_path / "run")
    edited = tmp_path / "run" / "domains" / "law.jsonl"
    edited.write_text(edited.read_text().splitlines()[0] + "\n")
    assert sorted(path.name for path in copy_written(folder, tmp_path / "run")) == [
        "rejected.jsonl",
        "seeds.jsonl",
        "written.json",
    ]
    assert read_seeds(tmp_path / "run" / "domains").counts == {"law": 1, "music": 9}


def test_real_rows_of_one_domain_are_joined_by_written_ones(tmp_path: Path) -> None:
    path = tmp_path / "real.jsonl"
    rows = [{"domain": "law", "prompt": f"Real {n}", "completion": f"topic{n} topic{n + 1}"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    writer = Writer(topics=8)
    folder = stage(tmp_path, seeds=path).run(generator=writer, embed=bag)
    written = [json.loads(line) for line in (folder / SEEDS).read_text().splitlines()]
    assert Counter((row["domain"], row["how"]) for row in written)["law", "real"] == 9
    assert all(request.messages[-1][1].count('belong to the domain "law"') == 0 for request in writer.asked)
    path.write_text(json.dumps({**rows[0], "domain": "food"}))
    with pytest.raises(UserError, match="'food', which the generator has no description of"):
        stage(tmp_path, seeds=path).check()


def test_a_server_writes_the_rows_bad_manners_included(tmp_path: Path) -> None:
    with hostile({}, write) as server:
        calm = stage(tmp_path, generator=server.url).run(embed=bag)
    served = sum(server.tries.values())
    asked = list(server.tries)
    script: Any = {
        text: [step] for text, step in zip(asked, [("429", 0), "500", "half", "garbage", "drop"], strict=False)
    }
    with hostile(script, write) as server:
        rough = stage(tmp_path / "other", generator=server.url + "#tiny-chat").run(embed=bag)
    assert (calm / SEEDS).read_bytes() == (rough / SEEDS).read_bytes()
    assert sum(server.tries.values()) == served + 5


@pytest.mark.slow
def test_killed_while_writing_it_pays_for_nothing_twice(tmp_path: Path) -> None:
    code = (
        "import sys, json, pathlib; sys.path.insert(0, sys.argv[3])\n"
        "from tests.unit.test_daar_stage_one import stage, bag\n"
        "print(stage(pathlib.Path(sys.argv[1]), generator=sys.argv[2]).run(embed=bag))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    slow = write

    def patient(body: dict[str, Any]) -> str:
        time.sleep(0.03)
        return slow(body)

    with hostile({}, patient) as server:
        command = [sys.executable, "-c", code, str(tmp_path), server.url + "#chat", root]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        while sum(server.paid.values()) < 6:
            time.sleep(0.02)
            assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        (journal,) = (tmp_path / "cache" / "replies").glob("*.jsonl")
        kept = len(journal.read_bytes().splitlines())
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        folder = Path(done.stdout.strip())
    paid = sum(server.paid.values())
    whole = Writer(topics=8)
    expected = stage(tmp_path / "whole", generator=server.url + "#chat").run(
        generator=_Same(whole, server.url), embed=bag
    )
    assert (folder / SEEDS).read_bytes() == (expected / SEEDS).read_bytes()
    assert kept >= 1
    assert len(whole.asked) <= paid <= len(whole.asked) + 8, "only replies under way at the kill may be asked again"


class _Same(Writer):
    """The scripted writer under the server's identity."""

    def __init__(self, writer: Writer, url: str) -> None:
        from siftune.models.server import OpenAIGenerator

        self.key = OpenAIGenerator(url + "#chat").key
        self.writer = writer

    def replies(self, requests: Any) -> Any:
        return self.writer.replies(requests)


def test_a_local_model_that_cannot_write_is_one_sentence_with_its_replies(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "chat")
    with pytest.raises(
        UserError, match=r"no usable row of the domain 'law' in 5 replies.*leaves no token.*what was not used is in"
    ) as e:
        stage(tmp_path, generator=str(folder), model=str(folder), device="cpu").run()
    path = Path(str(e.value).rpartition("what was not used is in ")[2].rstrip(")"))
    assert len(path.read_text().splitlines()) >= 10


def test_what_is_wrong_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    for more, said in (
        ({"generator": "./nowhere"}, "generator='./nowhere' is not a folder"),
        ({"generator": "http://me:pw@host/v1"}, "OPENAI_API_KEY"),
        ({"domains": "nowhere.yaml"}, "domains nowhere.yaml cannot be read"),
        ({"domains": {"settings": {"attempt": 3}}}, "unknown key 'attempt'; did you mean attempts"),
        ({"seeds": "nowhere.jsonl"}, "seeds: "),
    ):
        with pytest.raises(UserError, match=said):
            stage(tmp_path, **more).check()
    assert stage(tmp_path).check().domains == ("law", "music")
    assert stage(tmp_path, compat="paper").settings()[1].at_once == 1


def test_identities_follow_the_content(tmp_path: Path) -> None:
    assert stage(tmp_path).inputs().keys() == {"domains"}
    folder = save_tiny(tmp_path / "chat")
    local = stage(tmp_path, generator=str(folder), device="cpu").inputs()
    assert local["domains"] == stage(tmp_path).inputs()["domains"]
    assert len(local["generator"]) == 32
    assert np.isfinite(bag(["topic1"])).all()


def test_a_server_that_refuses_parameters_writes_all_rows_and_a_note_says_so(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    message = "Unsupported parameter: 'top_p' is not supported with this model."
    refusal = {"error": {"message": message, "param": "top_p", "code": "unsupported_parameter"}}
    with hostile({}, write) as server:
        server.rule = lambda body: ("error", (400, refusal)) if "top_p" in body else None
        server_stage = stage(tmp_path, generator=server.url, request={"reasoning_effort": "low"})
        server_stage.check()
        folder = server_stage.run(embed=bag)
        assert {body["reasoning_effort"] for body in server.bodies} == {"low"}
        facts = json.loads((folder / "written.json").read_text())
        assert facts["told"][-1] == f"the server refuses top_p, left out: {message}"
        assert facts["replies"]["retries"] == sum(server.tries.values()) - facts["replies"]["sent"] == 1
        assert stage(tmp_path, generator=server.url).run(embed=bag) != folder, "other parameters, other replies"
    assert read_seeds(folder / SEEDS).counts == {"law": 9, "music": 9}
    with pytest.raises(UserError, match="request= is for a generator on a server"):
        stage(tmp_path, generator="org/chat", request={"a": 1}).check()


def test_replies_that_are_all_reasoning_say_what_to_raise(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    cut = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    with hostile({}, write) as server:
        server.rule = lambda body: ("reply", cut) if body["seed"] % 3 == 0 else None
        folder = stage(tmp_path, generator=server.url).run(embed=bag)
    reasons = {json.loads(line)["reason"] for line in (folder / "rejected.jsonl").read_text().splitlines()}
    assert any(reason.startswith("empty reply: all of its tokens are reasoning; raise") for reason in reasons)
