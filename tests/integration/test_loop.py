"""The closed loop: choose, tune by the user's command, choose the next rows with the tuned model; nothing done twice."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from siftune.cli.main import main
from siftune.demo import corpus
from siftune.errors import UserError
from siftune.runs.loop import LoopOptions, command_of, loop
from tests.tiny import save_tiny

TUNE = """
import pathlib, shutil, sys
from safetensors.torch import load_file, save_file
model, rows, out = sys.argv[1:4]
count = len(open(rows).read().splitlines())
with open("tuned.log", "a") as log:
    print(model, rows, out, *sys.argv[4:], count, file=log)
if pathlib.Path("fail").exists():
    print("CUDA is out of memory"); sys.exit(3)
if not pathlib.Path("silent").exists():
    shutil.copytree(model, out, dirs_exist_ok=True)
    path = pathlib.Path(out) / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "embed" in name)
    tensors[name] = tensors[name] * 1.5 + 0.1
    save_file(tensors, path, {"format": "pt"})
"""


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    corpus.write(tmp_path, count=240, per_domain=3, held=10)
    save_tiny(tmp_path / "model")
    (tmp_path / "tune.py").write_text(TUNE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(*more: str) -> list[str]:
    tune = f"{shlex.quote(sys.executable)} tune.py {{model}} {{train_file}} {{out_model}} 'round {{round}}; echo'"
    said = ["loop", "daar", "pool.jsonl", "--model", "./model", "--seeds", "seeds.jsonl", "--keep", "40"]
    return [*said, "--probe-rows", "60", "--run", "run", "--tune", tune, *more]


def rows(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def test_each_round_probes_the_model_that_was_tuned_last(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("--rounds", "3", "--out", "all.jsonl")) == 0
    told = capsys.readouterr().out
    assert "round 2: choosing with run/tune-1/model" in told
    log = rows("tuned.log")
    assert [line.split()[0] for line in log] == ["./model", "run/tune-1/model", "run/tune-2/model"]
    assert all("round" in line and "; echo 40" in line for line in log), "a shell has read the command"
    parts = [rows(f"run/round-{number}/selected.jsonl") for number in (1, 2, 3)]
    assert len({line for part in parts for line in part}) == 120, "a row was chosen twice"
    assert rows("all.jsonl") == [line for part in parts for line in part]
    keys = [
        json.loads(Path(f"run/round-{number}/manifest.json").read_text())["inputs"]["model"] for number in (1, 2, 3)
    ]
    assert len(set(keys)) == 3, "a tuned model was not probed again"
    facts = json.loads(Path("run/loop.json").read_text())["rounds"]
    assert [item["rows"]["usable"] for item in facts] == [240, 200, 160]


@pytest.mark.slow
def test_a_rerun_repeats_no_round(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (prepared / "fail").touch()
    assert main(words()) == 2
    said = capsys.readouterr().err
    assert "ended with code 3 in round 1 (CUDA is out of memory); its output is in run/tune-1/log.txt" in said
    (prepared / "fail").unlink()
    assert main(words("--quiet")) == 0
    assert capsys.readouterr().out.strip() == "run/tune-2/model"
    assert len(rows("tuned.log")) == 3
    before = Path("run/round-2/selected.jsonl").read_bytes()
    assert main(words("--json")) == 0
    facts = json.loads(capsys.readouterr().out)["rounds"]
    assert [item["tune_seconds"] for item in facts] == [0.0, 0.0]
    assert len(rows("tuned.log")) == 3, "a finished tuning was repeated"
    assert Path("run/round-2/selected.jsonl").read_bytes() == before
    stages = json.loads(Path("run/round-2/manifest.json").read_text())["stages"]
    assert {stage["status"] for stage in stages if stage["name"] != "load"} == {"reused"}


def test_rows_may_be_chosen_again_when_asked(prepared: Path) -> None:
    assert main(words("--again", "--keep", "200", "--quiet")) == 0
    first, second = (set(rows(f"run/round-{number}/selected.jsonl")) for number in (1, 2))
    assert len(first & second) >= 160


def test_a_command_that_leaves_no_model_is_told(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (prepared / "silent").touch()
    assert main(words()) == 2
    assert "wrote no model to run/tune-1/model" in capsys.readouterr().err


def test_a_pool_that_runs_out_is_told(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("--keep", "100%")) == 2
    assert "every usable row has been chosen; lower --keep" in capsys.readouterr().err


def test_a_dry_run_checks_and_does_nothing(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("--dry-run")) == 0
    assert "nothing was computed" in capsys.readouterr().out
    assert not Path("run").exists()
    assert main(words("--dry-run", "--keep", "1000")) == 2


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, "needs a command that fine-tunes"),
        ("python t.py {train_file}", "--tune has no {out_model}"),
        ("python t.py {trainfile} {out_model}", "{trainfile}, which is not one of"),
        ("python 't.py {train_file} {out_model}", "fix its quotes"),
    ],
)
def test_commands_that_cannot_work(said: str | None, why: str) -> None:
    with pytest.raises(UserError) as caught:
        command_of(said)
    assert why in str(caught.value)


def test_options_that_cannot_work(prepared: Path) -> None:
    tune = "true {train_file} {out_model}"
    for options, settings, why in (
        (LoopOptions(pool=["pool.jsonl"], tune=tune), {}, "needs --model"),
        (LoopOptions(pool=["pool.jsonl"], tune=tune, rounds=0), {"model": "./model"}, "--rounds must be >= 1, got 0"),
        (LoopOptions(pool=["pool.jsonl"], tune=tune, shards="1/2"), {"model": "./model"}, "no --shards"),
        (
            LoopOptions(pool=["pool.jsonl"], tune="no-such-program {train_file} {out_model}", keep=9),
            {"model": "./model", "seeds": "seeds.jsonl", "probe_rows": 60},
            "'no-such-program' cannot be run",
        ),
    ):
        with pytest.raises(UserError, match=why):
            loop("daar", options, settings)
