"""Every long command, killed with SIGKILL at random moments and run again: the same bytes, nothing finished done twice.

`make test` kills two of the commands a few times, `make soak` each of them fifty times. Children come from a fork server that has imported
the libraries, so that a kill lands in a command's work and not in its imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.inputs import LEARNT, RESULTS, inter, write_inputs
from tests.faults.said import add_up, count, no_torn_files
from tests.laws import killable
from tests.studies import write_study

PATIENCE = 240
ROWS = 9000  # three shards
RECIPE = {
    "sft": {
        "learning_rate": "1e-2",
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "max_length": 64,
        "save_steps": 3,
        "gradient_checkpointing": False,
    },
    "peft": {"r": 4, "target_modules": "all-linear"},
    "online": {"method": "uds", "keep": "1/2"},
}
PRELOAD = ["siftune.offline.domain_diversity", "siftune.reports", "sklearn.cluster"]
TRAINING = ["siftune.runs.train", "siftune.sft.trainer", "trl.trainer.sft_trainer", "siftune.study.compare"]
"""For the soak alone: some seconds."""


@dataclass
class Ground:
    """The inputs, and how a command is started."""

    folder: Path
    start: Callable[[list[str], Path], Any]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Ground:
    folder = write_inputs(tmp_path_factory.mktemp("kills"), ROWS)
    (folder / "few.jsonl").write_text("".join((folder / "pool.jsonl").read_text().splitlines(keepends=True)[:60]))
    recipe = {"model": "./model", "train": "few.jsonl", "seed": 3, **RECIPE}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    long = any(item.get_closest_marker("soak") for item in request.session.items)
    context.set_forkserver_preload([*killable.preload(), *PRELOAD, *(TRAINING if long else [])])

    def start(words: list[str], run: Path) -> Any:
        process = context.Process(target=killable.run, args=(words, str(folder), f"{run}.log"))
        process.start()
        return process

    return Ground(folder, start)


# --- the commands -----------------------------------------------------------------------------------------------------


def select_words(ground: Ground, run: Path) -> list[str]:
    return inter(ground.folder, run, Path(f"{run}.cache"))


def workers_words(ground: Ground, run: Path) -> list[str]:
    return inter(ground.folder, run, Path(f"{run}.cache"), "--workers", "2")


def select_result(run: Path) -> dict[str, Any]:
    add_up(run)
    return {name: (run / name).read_bytes() for name in (*RESULTS, *LEARNT)}


def train_words(ground: Ground, run: Path) -> list[str]:
    return ["train", "recipe.yaml", "--run", str(run), "--quiet", "--cache", f"{run}.cache"]


def train_result(run: Path) -> dict[str, Any]:
    manifest = json.loads((run / "manifest.json").read_text())
    files = [*(run / "model").glob("*.safetensors"), run / "siftune" / "selection.parquet", run / "rows.parquet"]
    found: dict[str, Any] = {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}
    return found | {name: manifest[name] for name in ("tokens", "steps", "train_loss")}


def report_words(ground: Ground, run: Path) -> list[str]:
    scored = ground.folder / "scored"
    if not scored.exists():
        finish(ground.start(inter(ground.folder, scored, ground.folder / "scored.cache"), scored), scored)
    words = ["report", str(scored), "--out", f"{run}/page.html", "--map-rows", "0", "--quiet"]
    return [*words, "--cache", str(ground.folder / "scored.cache")]


def report_result(run: Path) -> dict[str, Any]:
    return {"page.html": (run / "page.html").read_bytes()}


def compare_words(ground: Ground, run: Path) -> list[str]:
    study = ground.folder / "study"
    if not study.exists():
        write_study(study, offline=["random", {"name": "long", "method": "output-length"}], seeds=[0])
    return ["compare", str(study / "study.yaml"), "--run", str(run), "--quiet", "--cache", f"{run}.cache"]


def compare_result(run: Path) -> dict[str, Any]:
    found = {
        str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "selections").rglob("selected.jsonl"))
    }
    weights = sorted((run / "cells").rglob("model/*.safetensors"))
    assert found
    return found | {str(path.relative_to(run)): path.read_bytes() for path in weights}


@dataclass
class Killed:
    """A command, and what a run of it is for."""

    words: Callable[[Ground, Path], list[str]]
    result: Callable[[Path], dict[str, Any]]
    needs: tuple[str, ...] = ()


COMMANDS = {
    "select": Killed(select_words, select_result),
    "select --workers 2": Killed(workers_words, select_result),
    "report": Killed(report_words, report_result, ("plotly", "jinja2")),
    "train": Killed(train_words, train_result, ("trl", "peft")),
    "compare": Killed(compare_words, compare_result, ("trl", "peft")),
}


# --- killing ----------------------------------------------------------------------------------------------------------


def finish(process: Any, run: Path) -> None:
    process.join(PATIENCE)
    log = Path(f"{run}.log")
    assert process.exitcode == 0, log.read_text() if log.exists() else process.exitcode
    assert "Traceback" not in log.read_text()


def stages(run: Path) -> dict[str, Any]:
    """The stages that a run folder's manifest calls finished."""
    try:
        found = json.loads((run / "manifest.json").read_text())
    except FileNotFoundError:
        return {}
    return {stage["name"]: stage for stage in found.get("stages", [])}


def kill(process: Any, delay: float) -> bool:
    """SIGKILL after a while; False where it had ended by itself."""
    time.sleep(delay)
    process.kill()
    process.join(PATIENCE)
    return bool(process.exitcode == -signal.SIGKILL)


def kills(ground: Ground, name: str, wanted: int, seed: int) -> None:
    """So many kills, one to three in a row on the same folder, each series followed by a run that ends."""
    command = COMMANDS[name]
    for package in command.needs:
        pytest.importorskip(package)
    safe = name.replace(" ", "").replace("-", "")
    whole = ground.folder / f"{safe}-whole-{seed}"
    finish(ground.start(command.words(ground, whole), whole), whole)  # imports on first use
    again = ground.folder / f"{safe}-timed-{seed}"
    started = time.monotonic()
    finish(ground.start(command.words(ground, again), again), again)
    took = time.monotonic() - started
    expected = command.result(whole)
    assert command.result(again) == expected, "two undisturbed runs differ"
    draw = random.Random(seed)
    died = 0
    for attempt in range(5 * wanted):
        if died >= wanted:
            break
        run = ground.folder / f"{safe}-{seed}-{attempt}"
        before: dict[str, Any] = {}
        for _ in range(draw.randint(1, 3)):
            done = kill(ground.start(command.words(ground, run), run), draw.uniform(0.05, 0.95) * took)
            died += done
            if run.exists():
                no_torn_files(run, killed=True)
            before |= stages(run)
        finish(ground.start(command.words(ground, run), run), run)
        assert command.result(run) == expected
        no_torn_files(run)
        after = stages(run)
        for stage, record in before.items():
            assert after[stage]["computed_seconds"] == record["computed_seconds"], f"{stage} was done again"
    assert died >= wanted, f"{died} kills landed, in {took:.1f} s long runs"
    count(f"SIGKILL in siftune {name}", died)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wanted"), [("select", 5), ("report", 3)])
def test_a_few_kills_then_a_rerun_give_the_same_bytes(ground: Ground, name: str, wanted: int) -> None:
    kills(ground, name, wanted, seed=1)


FEWER = {"select --workers 2": 20}
"""Its processes import the libraries anew in every run."""


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_fifty_kills_then_a_rerun_give_the_same_bytes(ground: Ground, name: str) -> None:
    kills(ground, name, FEWER.get(name, 50), seed=2)
