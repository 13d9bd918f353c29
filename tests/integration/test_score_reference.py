"""`siftune score-reference`: the table that rho-loss subtracts, over the very rows that `siftune train` trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from siftune.cli.main import main
from siftune.errors import UserError
from siftune.online.rho_loss import read_table
from siftune.runs import score_reference as module
from siftune.runs.score_reference import score_reference
from siftune.runs.train import TuneOptions, tune
from siftune.sft import reference_losses as parts
from siftune.sft import trainer as building
from siftune.sft.adapters import load_tuned
from siftune.sft.recipe import Recipe
from siftune.sft.trainer import prepare
from tests.tiny import save_tiny
from tests.trainers import loss_by_hand
from tests.training_rows import write_alpaca

pytest.importorskip("trl")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Rows and model in the test's own folder, a reference beside them; the trained model itself is never to be read."""
    monkeypatch.chdir(tmp_path)
    write_alpaca(Path("pool.jsonl"), 30)
    save_tiny(Path("model"), layers=2, width=16)
    save_tiny(Path("reference"), layers=1, width=16, seed=7)
    sft = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 48, "save_strategy": "no"}
    said: dict[str, Any] = {"model": "./model", "train": "pool.jsonl", "sft": {**sft, "gradient_checkpointing": False}}
    Path("recipe.yaml").write_text(json.dumps(said))
    return Recipe.read(said)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("weights were read")


def test_every_row_has_its_naive_loss_and_the_trained_model_is_not_read(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "load_model", never)
    done = score_reference(recipe, "./reference", out="t.parquet")
    table = pq.read_table("t.parquet").to_pylist()
    dataset = prepare(recipe).rows.dataset
    assert (done.rows, done.reused, len(table)) == (len(dataset), False, len(dataset))
    for row in (0, 7, len(dataset) - 1):
        naive = loss_by_hand(load_tuned(Path("reference")), [dataset[row]])
        assert table[row]["loss"] == pytest.approx(naive, rel=1e-5)
        assert table[row]["tokens"] == sum(label != -100 for label in dataset[row]["labels"])


def test_training_finds_every_candidate_in_the_table(recipe: Recipe) -> None:
    table = score_reference(recipe, "./reference", out="t.safetensors").table
    rho = Recipe.read(recipe.plain, {"online": {"method": "rho-loss", "keep": 2, "reference": str(table)}})
    done = tune(rho, TuneOptions(run="run", quiet=True))
    ledger = pq.read_table(done.folder / "siftune" / "selection.parquet").to_pylist()
    known = read_table(table)
    assert len(ledger) == 8
    assert all(line["irreducible"] == known[bytes.fromhex(line["token_id"])] for line in ledger)
    assert all(line["reason"] is None for line in ledger)


def test_a_finished_table_is_not_made_again(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    first = score_reference(recipe, "./reference", out="t.parquet")
    monkeypatch.setattr(module, "_compute", never)
    again = score_reference(Recipe.read(recipe.plain, {"seed": 3}), "./reference", out="t.parquet")
    assert (again.reused, again.rows) == (True, first.rows)
    made: list[Path] = []
    monkeypatch.setattr(module, "_compute", lambda path, *_, **__: made.append(path))
    for other in ({"sft.max_length": 40}, {"text": "prompt"}, {"max_rows": 9}):
        assert not score_reference(Recipe.read(recipe.plain, other), "./reference", out="t.parquet").reused
    assert not score_reference(recipe, "./model", out="t.parquet").reused
    Path("t.parquet").write_bytes(b"damaged")
    assert not score_reference(recipe, "./reference", out="t.parquet").reused
    assert len(made) == 5


def test_an_interrupted_table_goes_on(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    score_reference(recipe, "./reference", out="whole.parquet")
    monkeypatch.setattr(parts, "PART", 8)
    measured: list[int] = []
    inner = parts._Measure.table

    def dies(measure: Any, batches: Any, rows: list[int], names: Any) -> Any:
        if rows[0] == 16 and len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(rows[0])
        return inner(measure, batches, rows, names)

    monkeypatch.setattr(parts._Measure, "table", dies)
    with pytest.raises(KeyboardInterrupt):
        score_reference(recipe, "./reference", out="t.parquet")
    assert not Path("t.parquet").exists()
    measured.append(-1)
    score_reference(recipe, "./reference", out="t.parquet")
    assert measured == [0, 8, -1, 16, 24]
    assert pq.read_table("t.parquet") == pq.read_table("whole.parquet")


def test_the_reference_may_be_an_adapter(recipe: Recipe) -> None:
    lora = Recipe.read(recipe.plain, {"peft": {"r": 2, "target_modules": "all-linear"}, "sft.learning_rate": 0.1})
    tuned = tune(lora, TuneOptions(run="tuned", quiet=True))
    score_reference(recipe, str(tuned.model), out="a.parquet")
    score_reference(recipe, str(tuned.merged()), out="m.parquet")
    score_reference(recipe, "./model", out="b.parquet")
    adapter, merged, base = (pq.read_table(f"{name}.parquet")["loss"].to_pylist() for name in "amb")
    assert adapter == pytest.approx(merged, rel=1e-4)
    assert adapter != pytest.approx(base, rel=1e-3)


def test_the_command(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score-reference", "recipe.yaml", "--reference", "./reference"]
    assert main([*words, "--set", "max_rows=5"]) == 0
    said = capsys.readouterr().out
    assert "5 rows -> reference.parquet" in said
    assert main([*words, "--run", "r", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == "r/reference.parquet"
    assert main([*words, "--run", "r", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reused"] is True
    for more, why in (
        (["score-reference", "recipe.yaml"], "needs --reference"),
        (["score-reference", "--reference", "./reference"], "needs a recipe"),
        ([*words, "--out", "t.csv"], "--out t.csv must end in .parquet or .safetensors"),
        ([*words, "--score-tokens", "0"], "--score-tokens must be >= 1, got 0"),
        (["score-reference", "recipe.yaml", "--reference", "./none"], "model='./none' is not a folder here"),
    ):
        assert main(more) == 2
        assert why in capsys.readouterr().err


def test_mistakes_in_the_recipe_are_told_before_weights_are_read(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_compute", never)
    with pytest.raises(UserError, match=r"sft.max_step is no key"):
        score_reference(Recipe.read(recipe.plain, {"sft.max_step": 1}), "./reference", out="t.parquet")
