"""The lines of progress of complete commands: their stages, in order, on standard error alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from siftune.cli.main import main
from siftune.progress import VARIABLE
from tests.faults.inputs import inter, write_inputs
from tests.hostile import hostile
from tests.judges import rate
from tests.tiny import save_tiny
from tests.unit.test_progress import LINE, note_stages, write_pool


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_stages(monkeypatch)


@pytest.mark.parametrize("silence", ["--quiet", "--json", "terminal"])
def test_silence(
    silence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "0.001")
    words = ["select", "random", write_pool(tmp_path / "pool.jsonl", 50), "--dry-run"]
    assert main(words) == 0
    assert "siftune: select random, " in capsys.readouterr().err
    if silence == "terminal":
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main([*words, silence] if silence != "terminal" else words) == 0
    assert capsys.readouterr().err == ""


def test_a_selection_names_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pushed: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, 60)
    assert main([word for word in inter(tmp_path, tmp_path / "run", tmp_path / "cache") if word != "--quiet"]) == 0
    for name in (f"reading {tmp_path}/pool.jsonl None rows", "fit None rows", "score None rows", "writing the page"):
        assert any(one.startswith(name) for one in pushed), (name, pushed)
    assert [one for one in pushed if one.endswith(" 60 rows")], "the engine counts rows"


def test_a_training_names_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pushed: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path / "pool.jsonl", 12)
    write_pool(tmp_path / "held.jsonl", 5)
    save_tiny(tmp_path / "model", layers=1, width=16)
    sft = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 64}
    recipe = {"model": "model", "train": "pool.jsonl", "text": "prompt", "sft": sft, "eval": {"sums": "held.jsonl"}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert main(["train", "recipe.yaml", "--run", "run", "--cache", "cache"]) == 0
    for name in ("tokenising rows 12 rows", "train None rows", "training 2 steps", "held-out loss 5 rows"):
        assert name in pushed
    pushed.clear()
    words = ["score-reference", "recipe.yaml", "--reference", "model", "--out", "r.parquet", "--cache", "cache"]
    assert main(words) == 0
    assert "loss under the reference model 12 rows" in pushed


@pytest.mark.slow
def test_a_judged_run_with_its_standard_error_in_a_file(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    write_pool(tmp_path / "pool.jsonl", 40)

    def slow(body: dict[str, Any]) -> str:
        time.sleep(0.1)
        return rate(body["messages"][-1]["content"])

    with hostile({}, slow) as server, (tmp_path / "log.txt").open("w") as log:
        words = ["select", "alpagasus", "pool.jsonl", "--judge-url", server.url, "--concurrency", "2"]
        subprocess.run(
            [sys.executable, "-m", "siftune", *words, "--run", "run", "--cache", "cache"],
            cwd=tmp_path,
            env={**os.environ, VARIABLE: "0.3"},
            stdout=subprocess.PIPE,
            stderr=log,
            check=True,
        )
    printed = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in printed
    assert "\r" not in printed
    shown = printed.splitlines()
    assert all(LINE.fullmatch(line) for line in shown), shown
    rows = re.findall(r"score > alpagasus: (\d+) of 40 rows", printed)
    assert len(rows) >= 3, shown
    assert rows == sorted(rows, key=int)
    assert re.search(r"requests: \d+ replies, [\d.]+ replies/s", printed), shown
