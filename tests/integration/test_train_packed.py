"""`siftune train` on recipes with trl's own `packing` and `padding_free`: the rows of a padded run, sifted and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from siftune.cli.main import main
from siftune.runs.train import Tuned, TuneOptions, tune
from siftune.sft.recipe import Recipe
from tests.tiny import save_tiny
from tests.training_rows import write_alpaca

pytest.importorskip("trl")


@pytest.fixture
def recipe_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A recipe on 40 rows in the test's own folder, sections set over it."""
    monkeypatch.chdir(tmp_path)
    write_alpaca(tmp_path / "pool.jsonl", 40)
    save_tiny(tmp_path / "model", layers=2, width=16)
    common = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }

    def recipe(*, sft: dict[str, Any], **more: Any) -> Recipe:
        return Recipe.read({"model": "./model", "train": "pool.jsonl", "sft": {**common, **sft}, **more})

    return recipe


def run(recipe: Recipe, folder: str = "run") -> Tuned:
    return tune(recipe, TuneOptions(run=folder, quiet=True))


PACKINGS: dict[str, dict[str, Any]] = {
    "packing": {"packing": True, "max_length": 128},
    "padding-free": {"padding_free": True},
}


@pytest.mark.parametrize("name", PACKINGS)
def test_a_packed_recipe_trains_the_rows_of_a_padded_one(recipe_of: Callable[..., Recipe], name: str) -> None:
    """One epoch over all rows: the same rows and tokens, whichever way they are joined; none is cut."""
    epoch = {"max_steps": -1, "num_train_epochs": 1, "max_length": 128}
    padded, packed = run(recipe_of(sft=epoch)), run(recipe_of(sft={**epoch, **PACKINGS[name]}), "packed")
    counts = ("trained_rows", "trained_tokens", "trained_label_tokens", "candidates", "forward_tokens")
    assert {key: packed.manifest["tokens"][key] for key in counts} == {
        key: padded.manifest["tokens"][key] for key in counts
    }
    assert packed.manifest["tokens"]["trained_rows"] == 40
    if name == "packing":
        assert packed.manifest["steps"] < padded.manifest["steps"]
        lengths = [sum(line) for line in Dataset.from_file("packed/checkpoints/packed-lines.arrow")["seq_lengths"]]
        assert max(lengths) <= 128
    else:
        assert packed.manifest["train_loss"] == pytest.approx(padded.manifest["train_loss"], rel=1e-4)


@pytest.mark.parametrize("name", PACKINGS)
def test_a_packed_recipe_is_sifted_from_the_command_line(
    recipe_of: Callable[..., Recipe], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    sft = {"max_steps": 6, "max_length": 128, **PACKINGS[name]}
    recipe = recipe_of(sft=sft, online={"method": "uds", "keep": "1/4"}, eval={"held-out": "pool.jsonl"})
    Path("recipe.json").write_text(json.dumps(recipe.plain))
    assert main(["train", "recipe.json", "--run", "run"]) == 0
    printed = capsys.readouterr().err
    assert "packed batches (rows begin where" in printed
    assert "reads across" not in printed  # without a mask, sdpa separates rows by their positions
    assert ("reads 4 packed lines of at most 128 tokens per step" in printed) == (name == "packing")
    manifest = json.loads(Path("run/manifest.json").read_text())
    lines = pq.read_table("run/siftune/selection.parquet").to_pylist()
    kept = [line for line in lines if line["kept"]]
    assert manifest["tokens"]["trained_rows"] == len(kept) < manifest["tokens"]["candidates"] == len(lines)
    rows = {line["position"]: line for line in pq.read_table("run/rows.parquet").to_pylist()}
    assert manifest["tokens"]["trained_tokens"] == sum(rows[line["row"]]["tokens"] for line in kept)
    assert manifest["tokens"]["forward_tokens"] == sum(rows[line["row"]]["tokens"] for line in lines + kept)
    assert manifest["info"]["held_out"]["held-out"]["loss"] > 0


@pytest.mark.parametrize("online", [None, {"method": "random", "keep": "1/2"}, {"method": "maxloss", "keep": "1/2"}])
def test_a_model_that_reads_across_packed_rows_is_reported_in_one_line(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], online: Any
) -> None:
    from siftune.hook import attach as hook
    from siftune.sft import packing

    for module in (hook, packing):
        monkeypatch.setattr(module, "separates", lambda *_: False)
    recipe = recipe_of(sft={"max_steps": 1, "padding_free": True}, **({} if online is None else {"online": online}))
    Path("recipe.json").write_text(json.dumps(recipe.plain))
    assert main(["train", "recipe.json", "--run", "run"]) == 0
    reported = capsys.readouterr().err.count("this model reads across the rows of a packed line")
    assert reported == (0 if online and online["method"] == "random" else 1)
