"""The shipped recipes run as their first lines say, and the presets are recipes of every kind of model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from siftune.cli.main import main
from siftune.demo import corpus
from siftune.errors import UserError
from siftune.runs.train import TuneOptions, tune
from siftune.sft.configs import lora_config, sft_config
from siftune.sft.recipe import Recipe, presets
from siftune.sft.trainer import checked_selector
from tests.tiny import save_tiny
from tests.training_rows import write_alpaca

pytest.importorskip("trl")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("recipe-*.yaml"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_demo_recipe_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write(tmp_path / "demo" / "data", count=200, per_domain=3, held=20)
    os.symlink(ROOT / "siftune", "siftune")
    words = ["train", str(ROOT / "examples" / "recipe-demo.yaml"), "--set", "sft.max_steps=3", "--run", "run", "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"]["candidates"] == 48
    assert facts["tokens"]["trained_rows"] == 12
    assert facts["held_out"]["held-out"]["loss"] > 0
    assert Path("run/model/adapter_config.json").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_recipe(path: Path) -> None:
    recipe = Recipe.read(path, {"sft.bf16": False})
    arguments = sft_config(recipe, "out")
    assert lora_config(recipe).r == 8
    selector = checked_selector(recipe, arguments)
    assert selector is not None
    size = arguments.per_device_train_batch_size
    assert selector.count(size) < size


@pytest.mark.slow
@pytest.mark.parametrize("name", presets())
def test_presets_train(name: str) -> None:
    save_tiny(Path("model"), layers=2, width=16)
    write_alpaca(Path("pool.jsonl"), 24)
    few = {"sft.max_steps": 2, "sft.bf16": False, "sft.gradient_checkpointing": False, "sft.save_strategy": "no"}
    recipe = Recipe.read({"preset": name, "model": "./model", "train": "pool.jsonl"}, few)
    done = tune(recipe, TuneOptions(run="run", quiet=True))
    assert done.manifest["tokens"]["trained_rows"] == {"daar-paper": 24, "uds-paper": 2}[name]
    assert done.is_adapter


def test_the_daar_preset_warms_up_over_a_share_of_the_steps() -> None:
    recipe = Recipe.read({"preset": "daar-paper", "model": "m", "train": "t", "sft": {"bf16": False}})
    assert sft_config(recipe, "out").get_warmup_steps(200) == 10


def test_greats_takes_validation_rows_from_a_file_and_rho_needs_its_table() -> None:
    save_tiny(Path("model"), layers=2, width=16)
    write_alpaca(Path("pool.jsonl"), 24)
    write_alpaca(Path("held.jsonl"), 8, seed=5)
    sft = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 48, "save_strategy": "no"}
    said = {"model": "./model", "train": "pool.jsonl", "sft": sft, "text": "prompt"}
    greats = {"method": "greats", "keep": 2, "validation": "held.jsonl", "validation_rows": 4}
    done = tune(Recipe.read({**said, "online": greats}), TuneOptions(run="run", quiet=True))
    assert done.manifest["tokens"]["trained_rows"] == 4
    assert "online validation" in done.manifest["inputs"]
    for online, why in (
        ({**greats, "validation": "none.jsonl"}, "none.jsonl does not exist"),
        ({"method": "rho-loss", "keep": 2, "reference": "none.parquet"}, "make it with siftune score-reference"),
        ({"method": "rho-loss", "keep": 2, "reference": "./none"}, "'./none' is not a folder here"),
    ):
        with pytest.raises(UserError, match=why):
            tune(Recipe.read({**said, "online": online}), TuneOptions(run="no", quiet=True))
    assert not Path("no").exists()
