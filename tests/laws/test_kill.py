"""A run killed at any moment and run again gives the same bytes, and repeats no stage that was finished.

Every run is a process of its own, killed with SIGKILL while it works, on a cold cache. Children come from a fork
server that has imported the libraries, so that a kill costs the run's own second and not the imports'; one kill
goes to a plain `python -m siftune`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults import said
from tests.laws import killable
from tests.tiny import save_tiny

ROWS = 9000  # three shards
FEATURE_STAGES = ("fit", "score")
SAME = ("selected.jsonl", "rows.parquet", "scores.safetensors", "domain_probe.safetensors", "reward_probe.safetensors")
PATIENCE = 120


@dataclass
class Bench:
    """The pool, the model, and what an uninterrupted run gave."""

    folder: Path
    start: Callable[[Path], Any]
    reference: Path
    seconds: dict[str, float]


def command(run: Path) -> list[str]:
    """One selection with a cold cache of its own."""
    return [
        *("select", "daar", "pool.jsonl", "--model", "model", "--seeds", "seeds.jsonl", "--keep", "20%"),
        *("--probe-rows", "600", "--max-length", "24", "--quiet", "--run", str(run), "--cache", f"{run}.cache"),
    ]


def write_inputs(folder: Path) -> None:
    draw = random.Random(5)
    words = {"sums": ["add", "seven", "twelve", "minus"], "birds": ["wren", "nest", "egg", "wing"]}

    def row(index: int, domain: str) -> dict[str, str]:
        said = [draw.choice(words[domain]) for _ in range(draw.randint(1, 4))]
        return {"instruction": f"{index} {' '.join(said)}", "output": draw.choice(words[domain])}

    with open(folder / "pool.jsonl", "w") as pool:
        for index in range(ROWS):
            pool.write(json.dumps(row(index, draw.choice(list(words)))) + "\n")
    with open(folder / "seeds.jsonl", "w") as seeds:
        for domain in words:
            for index in range(4):
                seeds.write(json.dumps({"domain": domain, **row(ROWS + index, domain)}) + "\n")
    save_tiny(folder / "model")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("kill")
    write_inputs(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(killable.preload())

    def start(run: Path) -> Any:
        process = context.Process(target=killable.run, args=(command(run), str(folder), str(run) + ".log"))
        process.start()
        return process

    finish(start(folder / "warm"), folder / "warm")  # imports on first use happen here
    finish(start(folder / "reference"), folder / "reference")
    stages = {stage["name"]: stage["seconds"] for stage in manifest(folder / "reference")["stages"]}
    return Bench(folder, start, folder / "reference", stages)


def manifest(run: Path) -> dict[str, Any]:
    """The manifest as it stands, empty before there is one."""
    try:
        found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def finish(process: Any, run: Path) -> None:
    process.join(PATIENCE)
    log = Path(f"{run}.log")
    assert process.exitcode == 0, log.read_text() if log.exists() else process.exitcode


def kill_in(process: Any, run: Path, stage: str | None, delay: float) -> str | None:
    """SIGKILL `delay` seconds after `stage` began (after the start for None); the stage it died in, None if too late."""
    limit = time.monotonic() + PATIENCE
    while stage is not None and process.is_alive() and manifest(run).get("running") != stage:
        assert time.monotonic() < limit, f"stage {stage} never began"
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join(PATIENCE)
    if process.exitcode != -signal.SIGKILL:
        return None
    return str(manifest(run).get("running") or "between")


def check(bench: Bench, run: Path, before: dict[str, Any]) -> None:
    """The rerun's files equal the uninterrupted run's, and what was finished was not done again."""
    for name in SAME:
        assert (run / name).read_bytes() == (bench.reference / name).read_bytes(), name
    after = {stage["name"]: stage for stage in manifest(run)["stages"]}
    for stage in before.get("stages", []):
        assert after[stage["name"]]["status"] == "reused", stage["name"]
        assert after[stage["name"]]["computed_seconds"] == stage["computed_seconds"]
    assert manifest(run)["status"] == "finished"
    assert not [path for path in run.iterdir() if path.name.endswith("-tmp")], "temporaries of the dead process"


def kills(bench: Bench, count: int, seed: int) -> list[str]:
    """`count` kills at random moments, the first ones inside the stages that compute features; checks every rerun."""
    draw = random.Random(seed)
    died: list[str] = []
    for attempt in range(3 * count):
        if len(died) == count:
            break
        stage: str | None = None
        if attempt % 2 == 0:
            stage = FEATURE_STAGES[attempt // 2 % 2]
        length = bench.seconds[stage] if stage else sum(bench.seconds.values())
        run = bench.folder / f"run-{seed}-{attempt}"
        where = kill_in(bench.start(run), run, stage, draw.uniform(0, 0.9) * length)
        if where is None:
            continue
        died.append(where)
        before = manifest(run)
        shards = shards_in(run)
        finish(bench.start(run), run)
        check(bench, run, before)
        done = {stage["name"]: stage["counts"] for stage in manifest(run)["stages"]}
        redone = sum(done[name]["shards_computed"] for name in FEATURE_STAGES if name not in finished(before))
        assert redone + shards == shards_in(run), "a finished shard was computed again"
    assert len(died) == count
    said.count("SIGKILL in siftune select daar", count)
    return died


def finished(before: dict[str, Any]) -> set[str]:
    return {stage["name"] for stage in before.get("stages", [])}


def shards_in(run: Path) -> int:
    return len(list(Path(f"{run}.cache").glob("shards/*/*.safetensors")))


@pytest.mark.slow
def test_ten_kills_then_a_rerun_give_the_same_bytes(bench: Bench) -> None:
    died = kills(bench, 10, seed=1)
    assert sum(stage in FEATURE_STAGES for stage in died) >= 3, died


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills(bench: Bench) -> None:
    kills(bench, 100, seed=2)


@pytest.mark.slow
def test_a_plain_process_killed_while_it_scores(bench: Bench) -> None:
    run = bench.folder / "plain"
    words = [sys.executable, "-m", "siftune", *command(run)]
    process = subprocess.Popen(words, cwd=bench.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + PATIENCE
    while manifest(run).get("running") != "score":
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    before = manifest(run)
    assert finished(before) >= {"load", "fit"}
    finish(bench.start(run), run)
    check(bench, run, before)


def test_a_finished_run_is_not_done_again(bench: Bench) -> None:
    before = {name: (bench.reference / name).stat().st_mtime_ns for name in SAME}
    finish(bench.start(bench.reference), bench.reference)
    assert {stage["status"] for stage in manifest(bench.reference)["stages"]} == {"reused"}
    assert {name: (bench.reference / name).stat().st_mtime_ns for name in SAME} == before
