"""A study that is killed, run in parts or on several processes gives the same results, and repeats no finished cell."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from siftune.study.compare import compare
from siftune.study.spec import read_study
from tests.studies import Fakes, write_study

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("train_seconds", "measure_seconds", "peak_memory_mb")
ONLINE = ["regular", {"name": "half", "method": "random", "keep": 2, "candidates": 4}]


def start(study: Path, run: Path, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tests.laws.studied", str(study), str(run), str(log)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def results(run: Path) -> dict[str, Any]:
    """Everything but times."""
    cells = pq.read_table(run / "cells.parquet")
    found: dict[str, Any] = {
        "table": (run / "table.md").read_bytes(),
        "differences": (run / "differences.parquet").read_bytes(),
        "cells": cells.drop_columns(list(TIMES)).to_pylist(),
        "figures": {path.name: path.read_bytes() for path in sorted((run / "figures").glob("*"))},
        "data": {path.name: path.read_bytes() for path in sorted((run / "data").iterdir()) if path.suffix == ".jsonl"},
    }
    for path in sorted((run / "cells").glob("*/cell.json")):
        said = json.loads(path.read_text())
        found[path.parent.name] = {name: value for name, value in said.items() if name != "times"}
    return found


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes(tmp_path / "log")
    made.install(monkeypatch.setattr)
    return made


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path)
    Fakes(tmp_path / "log").install(monkeypatch.setattr, figures=True)
    compare(read_study(str(path)), run=str(tmp_path / "whole"))
    draw, run, log = random.Random(3), tmp_path / "killed", tmp_path / "killed.log"
    kills = 0
    for attempt in range(3):
        process = start(path, run, log)
        goal = len(list(run.glob("cells/*/cell.json"))) + draw.randint(1, 3)
        while attempt < 2 and process.poll() is None and len(list(run.glob("cells/*/cell.json"))) < goal:
            time.sleep(0.005)
        if attempt < 2:
            time.sleep(draw.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=250)
        assert process.returncode in (0, -signal.SIGKILL), said.decode()[-2000:]
        kills += process.returncode != 0
    assert process.returncode == 0
    assert kills == 2
    assert results(run) == results(tmp_path / "whole")
    calls = Counter(Fakes(log).calls)
    cells = {path.parent.name for path in run.glob("cells/*/cell.json")}
    assert len(cells) == 9
    again = sum(calls[f"measure {name}"] - 1 for name in cells)
    assert all(calls[f"measure {name}"] >= 1 for name in cells)
    assert again <= kills  # at most the one piece that each kill hit
    assert not list(run.glob("cells/*/train/model"))


@pytest.mark.slow
def test_a_real_study_killed_once_ends_the_same(tmp_path: Path) -> None:
    """Real selection, training and measuring of a model of a few thousand weights."""
    pytest.importorskip("trl")
    changes: dict[str, Any] = {"offline": ["random", {"name": "long", "method": "output-length"}], "seeds": [0]}
    path = write_study(tmp_path, **changes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def run(folder: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "siftune", "compare", str(path), "--run", str(folder), "--quiet"]
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole, killed = run(tmp_path / "whole"), tmp_path / "killed"
    assert whole.wait(250) == 0, whole.stderr.read().decode()[-2000:] if whole.stderr else ""
    process = run(killed)
    while process.poll() is None and not list(killed.glob("cells/*/cell.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    done = {one: one.stat().st_mtime_ns for one in killed.glob("cells/*/cell.json")}
    assert len(done) == 1
    assert run(killed).wait(250) == 0
    assert {one: one.stat().st_mtime_ns for one in done} == done
    assert results(killed) == results(tmp_path / "whole")


def test_a_finished_study_runs_nothing(tmp_path: Path, fakes: Fakes) -> None:
    study = read_study(str(write_study(tmp_path)))
    compare(study, run=str(tmp_path / "run"))
    before, calls = results(tmp_path / "run"), len(fakes.calls)
    done = compare(study, run=str(tmp_path / "run"))
    assert (done.ran, done.complete) == (0, True)
    assert len(fakes.calls) == calls
    assert results(tmp_path / "run") == before


def test_only_the_cells_that_lack_run(tmp_path: Path, fakes: Fakes) -> None:
    study = read_study(str(write_study(tmp_path)))
    compare(study, run=str(tmp_path / "run"))
    before = results(tmp_path / "run")
    for name in ("random-regular-20pct-seed1", "full-regular-seed0"):
        (tmp_path / "run" / "cells" / name / "cell.json").unlink()
    calls = len(fakes.calls)
    assert compare(study, run=str(tmp_path / "run")).ran == 2
    assert [call for call in fakes.calls[calls:] if not call.startswith("measure")] == [
        "train full-regular-seed0", "train random-regular-20pct-seed1",
    ]  # fmt: skip
    assert results(tmp_path / "run") == before


def test_parts_equal_the_whole(tmp_path: Path, fakes: Fakes) -> None:
    study = read_study(str(write_study(tmp_path, online=ONLINE, offline=["full", "random"], budgets=["20%"], baseline="random 20% + regular",
                                       cells=[["full", "regular"], ["random", "regular", "20%"], ["random", "half", "40%"]])))  # fmt: skip
    compare(study, run=str(tmp_path / "whole"))
    for part in ("3/3", "1/3", "2/3"):
        done = compare(study, run=str(tmp_path / "parts"), part=part)
        assert done.complete == (part == "2/3")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_more_seeds_and_methods_join_and_what_is_done_stays(tmp_path: Path, fakes: Fakes) -> None:
    compare(read_study(str(write_study(tmp_path, seeds=[0, 1]))), run=str(tmp_path / "run"))
    calls = len(fakes.calls)
    more: dict[str, Any] = {
        "offline": ["full", "random", {"name": "long", "method": "output-length"}, "length"],
        "seeds": [0, 1, 2],
    }
    study = read_study(str(write_study(tmp_path, **more)))
    assert compare(study, run=str(tmp_path / "run")).ran == 3 + 3
    assert not any(call.endswith(("seed0", "seed1")) and "length" not in call for call in fakes.calls[calls:])
    compare(study, run=str(tmp_path / "whole"))
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.slow
def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    """The scheduler alone: workers are new processes, where stand-ins put here would not be."""
    from functools import partial

    from siftune.study.schedule import Task, run_tasks

    outcomes = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        tasks = [
            Task(f"t{index}", partial(_write, folder, index), needs=(f"t{index - 1}",) if index % 2 else ())
            for index in range(6)
        ]
        tasks += [Task("bad", partial(_fail, "user")), Task("after", partial(_write, folder, 99), needs=("bad",)),
                  Task("worse", partial(_fail, "ours"))]  # fmt: skip
        heard: list[tuple[str, float]] = []
        failures = run_tasks(tasks, jobs=jobs, threads=1, on_event=partial(_hear, heard))
        assert heard[-1][1] == 1.0
        assert [failure.name for failure in failures] == ["bad", "worse"]
        assert [failure.internal for failure in failures] == [False, True]
        outcomes.append({path.name: path.read_text() for path in folder.iterdir()})
    assert outcomes[0] == outcomes[1]
    assert "99" not in outcomes[0]


def _hear(heard: list[tuple[str, float]], name: str, share: float) -> None:
    heard.append((name, share))


def _write(folder: Path, index: int) -> None:
    if index % 2:
        assert (folder / str(index - 1)).is_file(), "what it needs came first"
    (folder / str(index)).write_text(f"{index}")


def _fail(kind: str) -> None:
    from siftune.errors import UserError

    if kind == "user":
        raise UserError("the user's\nmistake")
    raise ZeroDivisionError("ours")


@pytest.mark.slow
def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "from functools import partial; import sys, time\n"
        "from siftune.study.schedule import Task, run_tasks\n"
        "from tests.laws.test_study_resume import _sleep\n"
        "if __name__ == '__main__':\n"
        "    run_tasks([Task(str(i), partial(_sleep, sys.argv[1], i)) for i in range(2)], jobs=2, threads=1)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, cwd=ROOT)
    limit = time.monotonic() + 200
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < limit
        assert parent.poll() is None
        time.sleep(0.05)
    workers = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < limit + 20, "a worker outlived its study"
        time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def _sleep(folder: str, index: int) -> None:
    path = Path(folder) / f"{index}.pid"
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").rename(path)
    time.sleep(300)
