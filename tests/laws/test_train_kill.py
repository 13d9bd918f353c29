"""`siftune train` killed at any moment and run again ends with the same weights, ledger and counts, bit for bit.

Every run is a process of its own, killed with SIGKILL; children come from a fork server that has imported the libraries.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.laws import killable
from tests.tiny import save_tiny
from tests.training_rows import write_alpaca

pytest.importorskip("trl")

PATIENCE = 120
COMMON = {
    "learning_rate": "1e-2",
    "per_device_train_batch_size": 4,
    "max_steps": 10,
    "max_length": 64,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
}
LORA = {"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear"}
PACKED = {**COMMON, "max_steps": 50, "max_length": 128}
"""trl's own `packing` and `padding_free`."""
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"sft": COMMON},
    "full-uds": {"sft": COMMON, "online": {"method": "uds", "keep": "1/2"}},
    "lora": {"sft": {**COMMON, "gradient_accumulation_steps": 2}, "peft": LORA},
    "lora-uds-stop": {
        "sft": {**COMMON, "max_steps": 40, "lr_scheduler_type": "constant"},
        "peft": LORA,
        "online": {"method": "uds", "keep": 2},
        "stop_at": {"trained_tokens": 700},
    },
    "packing": {"sft": {**PACKED, "packing": True}},
    "packing-uds": {"sft": {**PACKED, "packing": True}, "online": {"method": "uds", "keep": "1/4"}},
    "padding-free": {"sft": {**PACKED, "padding_free": True}, "peft": LORA},
    "padding-free-uds": {"sft": {**PACKED, "padding_free": True}, "online": {"method": "uds", "keep": "1/4"}},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Any]:
    """Starts `siftune train` on a recipe into a run folder, in a process of its own."""
    folder = tmp_path_factory.mktemp("train-kill")
    save_tiny(folder / "model", layers=2, width=16)
    write_alpaca(folder / "pool.jsonl", 60)
    for name, recipe in RECIPES.items():
        said = {"model": "./model", "train": "pool.jsonl", "seed": 3, **recipe}
        (folder / f"{name}.yaml").write_text(json.dumps(said))  # JSON is YAML
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [*killable.preload(), "siftune.runs.train", "siftune.sft.trainer", "trl.trainer.sft_trainer"]
    )

    def started(name: str, run: Path) -> Any:
        words = ["train", f"{name}.yaml", "--run", str(run), "--quiet", "--cache", str(folder / "cache")]
        process = context.Process(target=killable.run, args=(words, str(folder), f"{run}.log"))
        process.start()
        return process

    return started


def finish(process: Any, run: Path) -> None:
    process.join(PATIENCE)
    assert process.exitcode == 0, Path(f"{run}.log").read_text()


def kill_when(process: Any, there: Path, delay: float) -> None:
    """SIGKILL once a file is there, and a moment later."""
    limit = time.monotonic() + PATIENCE
    while not there.exists():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < limit, f"{there} never came"
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL


def outcome(run: Path) -> dict[str, Any]:
    """All that a run is for, as bytes and numbers."""
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    files = sorted([*(run / "model").glob("*.safetensors"), *(run / "siftune").glob("*.parquet"), run / "rows.parquet"])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "files": {path.name: path.read_bytes() for path in files},
        "numbers": {name: manifest[name] for name in ("tokens", "steps", "train_loss")},
        "losses": [(line["step"], line["loss"]) for line in log if "loss" in line],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_killed_equals_undisturbed(start: Callable[[str, Path], Any], tmp_path: Path, name: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(name, whole), whole)
    steps = json.loads((whole / "manifest.json").read_text())["steps"]
    moments = (("checkpoints/checkpoint-2", 0.0), ("checkpoints/checkpoint-6", 0.03))  # while it is written; once it is
    for there, delay in moments if "uds" in name else moments[1:]:
        kill_when(start(name, killed), killed / there, delay)
    finish(start(name, killed), killed)
    ours, theirs = outcome(killed), outcome(whole)
    assert ours["numbers"] == theirs["numbers"]
    assert ours["losses"] == theirs["losses"]
    assert len(theirs["losses"]) == steps
    assert ours["files"].keys() == theirs["files"].keys()
    assert all(content == theirs["files"][file] for file, content in ours["files"].items())
    said = Path(f"{killed}.log").read_text()
    assert "Traceback" not in said
