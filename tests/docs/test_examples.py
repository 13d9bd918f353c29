"""The example scripts run, as a reader would run them, and select what they say."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import tests.contract.test_offline as contract
from siftune import registry
from siftune.registry import Entry
from siftune.testing import check_offline_method
from tests.pools import make_pool
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), layers=2, width=16)


def run(script: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_trl_with_and_without_the_added_line(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    common = ("--model", str(model), "--steps", "2", "--candidates", "16")
    said = run("sft_trl.py", *common, "--keep", "1/8", "--out", "sifted", folder=tmp_path)
    assert "scores 16 candidates per step and trains on 2" in said
    table = pq.read_table(tmp_path / "sifted" / "siftune" / "selection.parquet")
    assert table["kept"].to_pylist().count(True) == 4
    run("sft_trl.py", *common, "--keep", "all", "--out", "plain", folder=tmp_path)
    assert not (tmp_path / "plain" / "siftune").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["loop_torch.py", "loop_accelerate.py"])
def test_loops(script: str, model: Path, tmp_path: Path) -> None:
    said = run(script, "--model", str(model), "--steps", "3", "--candidates", "16", folder=tmp_path)
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", said)]
    assert len(losses) == 3
    assert "of 16" in said


def test_own_scorer_through_the_command_line(tmp_path: Path) -> None:
    said = run("own_scorer.py", folder=tmp_path)
    assert "60 kept" in said
    folder = tmp_path / "runs" / "own-scorer"
    chosen = [json.loads(line) for line in (folder / "selected.jsonl").read_text().splitlines()]
    shares = [len(set(words)) / len(words) for words in (row["output"].lower().split() for row in chosen)]
    assert len(shares) == 60
    assert all(len(row["output"].split()) >= 3 for row in chosen)
    everyone = [json.loads(line)["output"].lower().split() for line in (folder / "pool.jsonl").read_text().splitlines()]
    best = sorted((len(set(words)) / len(words) for words in everyone if len(words) >= 3), reverse=True)
    assert sorted(shares, reverse=True) == best[:60]


@pytest.fixture
def own_scorer(monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The example's method, registered for one test alone."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delitem(sys.modules, "own_scorer", raising=False)
    importlib.import_module("own_scorer")
    return registry.find("offline", "distinct-words")


def test_own_scorer_keeps_the_contract(own_scorer: Entry) -> None:
    rows = [row for domain in contract.WORDS for row in contract.rows_of(domain, 40)]
    pool = make_pool(rows, {3: "empty answer: output", 99: "missing field: output"})
    build = own_scorer.load()
    check_offline_method(build(), pool)
    contract.test_init_only_stores_its_arguments(own_scorer, "")
    contract.test_unknown_arguments_and_positions_are_refused(own_scorer, "")
    contract.test_the_name_is_the_registrys_and_every_field_has_a_docstring(own_scorer)


def here(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in this process, which has imported most of what it needs."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")


def test_combined_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shared = {}
    for weight in ("1", "0.5"):
        here("combine_scores.py", "--weight", weight, monkeypatch=monkeypatch)
        said = capsys.readouterr().out
        shared[weight] = [int(number) for number in re.findall(r"^(\d+) of the 120 chosen", said, re.MULTILINE)]
        assert len((tmp_path / "runs" / "combined" / "selected.jsonl").read_text().splitlines()) == 120
    assert shared["1"][0] == 120, "with DaaR's weight 1 the order is DaaR's"
    assert shared["0.5"][0] < 120
    assert shared["0.5"][1] > shared["1"][1], "IFD has its say"


@pytest.mark.slow
def test_hub_data_set(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import load_from_disk

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    here("hub_dataset.py", "--model", str(model), "--keep", "10%", monkeypatch=monkeypatch)
    chosen = load_from_disk(tmp_path / "runs" / "hub-dataset" / "chosen")
    everyone = load_from_disk(tmp_path / "runs" / "hub-dataset" / "all")
    assert len(chosen) == 60
    assert chosen.features == everyone.features
    order = {json.dumps(row): place for place, row in enumerate(everyone)}
    places = [order[json.dumps(row)] for row in chosen]
    assert places == sorted(places)


@pytest.mark.slow
def test_trl_on_a_real_pool_with_a_real_model(shared: Path, tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pool = str(shared / "data" / "pools" / "code_heldout.jsonl.gz")
    common = ("--model", str(tiny_base), "--pool", pool, "--steps", "3", "--candidates", "16")
    said = run("sft_trl.py", *common, "--keep", "1/8", "--out", "sifted", folder=tmp_path)
    assert len(re.findall(r"'train_loss'", said)) == 1
    table = pq.read_table(tmp_path / "sifted" / "siftune" / "selection.parquet")
    assert table["kept"].to_pylist().count(True) == 6
    assert table["total"].null_count == 0
    assert table["row"].null_count == 0
