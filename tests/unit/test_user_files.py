"""Call site by call site: what siftune removes or replaces is its own, and a file of the user's beside or inside stays.

tests/contract/test_removals.py lists the call sites, and the test of each.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from siftune.data.exports import place, seal
from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.files import atomic_path, sweep_temporaries, temporary_beside
from siftune.hook.ledger import Ledger
from siftune.models.store import Store
from siftune.sft.adapters import merge
from siftune.study.cell import _drop_model
from siftune.study.data import FACTS, prepare
from siftune.study.spec import read_study
from tests.studies import write_study
from tests.training_rows import write_alpaca

MINE = "the user's own"


def plant(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MINE)
    return path


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- siftune/data ---------------------------------------------------------------------------------------------------


def test_sweeping_removes_only_temporaries_of_dead_processes() -> None:
    ours = temporary_beside(Path("file"))
    dead = Path(ours.name.replace(f"~{os.getpid()}~", "~999999999~"))
    for name in (
        "notes.tmp",
        ".notes.siftune-tmp",
        f"{dead.name}.txt",
        f"my{dead.name}",
        "file.siftune-tmp",
        "a~1~b~c",
    ):
        plant(Path(name))
    plant(ours)
    plant(dead)
    assert sweep_temporaries(".") == 1
    assert sorted(path.name for path in Path().iterdir() if path.read_text() == MINE) == sorted(
        [
            "notes.tmp",
            ".notes.siftune-tmp",
            f"{dead.name}.txt",
            f"my{dead.name}",
            "file.siftune-tmp",
            "a~1~b~c",
            ours.name,
        ]
    )


def test_a_failed_write_removes_its_own_temporary() -> None:
    beside = plant(Path("out/notes.tmp"))
    old = plant(Path("out/result"))

    def fail() -> None:
        with atomic_path("out/result") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sorted(Path("out").iterdir()) == [beside, old]
    assert old.read_text() == MINE


def damage(folder: Path) -> Path:
    """A finished cache folder that is damaged, with a file of the user's in it."""
    (folder / "meta.json").unlink()
    return plant(folder / "notes.txt")


def test_a_damaged_pool_in_the_cache_is_replaced_without_the_users_files() -> None:
    write_alpaca(Path("pool.jsonl"), 5)
    (folder,) = {load_pool("pool.jsonl", cache="cache").source.folder}  # type: ignore[attr-defined]
    neighbour = plant(folder.parent / "notes.txt")
    mine = damage(folder)
    assert len(load_pool("pool.jsonl", cache="cache")) == 5
    assert (folder / "meta.json").is_file()
    assert mine.read_text() == neighbour.read_text() == MINE


def test_damaged_tokens_in_the_cache_are_replaced_without_the_users_files() -> None:
    from transformers import AutoTokenizer

    from siftune.sft.dataset import tokenizer_key, training_rows
    from tests.tiny import save_tiny

    save_tiny(Path("model"))
    pool = load_pool(write_alpaca(Path("pool.jsonl"), 5))
    tokenizer = AutoTokenizer.from_pretrained("model")
    given: dict[str, Any] = {"key": tokenizer_key(Path("model")), "text": "prompt", "max_length": 64, "cache": "cache"}
    folder = training_rows(pool, tokenizer, **given).folder
    mine = damage(folder)
    assert training_rows(pool, tokenizer, **given).meta["rows"] == 5
    assert (folder / "meta.json").is_file()
    assert mine.read_text() == MINE


def test_an_unsound_entry_is_removed_alone() -> None:
    store = Store("cache")
    store.put("ab12", {"x": np.zeros(2)}, {})
    beside = [plant(Path("cache/ab/notes.safetensors")), plant(Path("cache/ab12.safetensors"))]
    store.path("ab12").write_bytes(b"cut")
    assert store.get("ab12") is None
    assert not store.path("ab12").exists()
    assert all(path.read_text() == MINE for path in beside)


# --- training -------------------------------------------------------------------------------------------------------


def ledger(steps: range) -> Ledger:
    made = Ledger(Path("siftune"))
    for step in steps:
        made.add(step, [0], token_ids=[b"a"], rows=[0], total=[1.0], parts={}, kept=[True], reasons={})
        made.flush(step)
    return made


@pytest.mark.parametrize("name", ["selection/part-9.parquet", "selection.parquet"])
def test_a_ledger_replaces_only_parts_of_ledgers(name: str) -> None:
    beside = [plant(Path("siftune/selection/notes.tmp")), plant(Path("siftune/selection/part-9.txt"))]
    made = ledger(range(1, 4))
    assert made.merge() is not None
    made.drop_after(1)
    assert sorted(path.name for path in Path("siftune/selection").glob("*.parquet")) == ["part-1.parquet"]
    assert not made.merged.exists()
    mine = plant(Path("siftune", name))
    for act in (lambda: made.drop_after(1), made.merge):
        with pytest.raises(UserError, match="is no part of a selection's ledger, so it is not replaced; move it away"):
            act()
    if mine.name == "part-9.parquet":
        with pytest.raises(UserError, match="is no part of a selection's ledger"):
            ledger(range(9, 10))
    assert mine.read_text() == MINE
    assert all(path.read_text() == MINE for path in beside)


def test_parts_of_a_table_are_known_by_their_note() -> None:
    import torch

    from siftune.sft.reference_losses import NOTE, _begin

    model = torch.nn.Linear(2, 2)
    folder = Path("table.parquet.parts")
    mine = plant(folder / "part-000000.parquet")
    with pytest.raises(UserError, match=r"holds part-000000.parquet and no made-by.json"):
        _begin(folder, model, 5, per_token=False)
    plant(folder / NOTE)
    with pytest.raises(UserError, match=r"made-by.json is not a JSON file"):
        _begin(folder, model, 5, per_token=False)
    (folder / NOTE).write_text('{"who": "me"}')
    with pytest.raises(UserError, match=r"made-by.json was not written by siftune"):
        _begin(folder, model, 5, per_token=False)
    assert mine.read_text() == MINE
    (folder / NOTE).write_text('{"model": "another", "rows": 5}')
    notes = plant(folder / "notes.txt")
    with pytest.raises(UserError, match=r"holds notes.txt, which siftune did not write"):
        _begin(folder, model, 5, per_token=False)
    assert notes.read_text() == MINE
    notes.unlink()
    _begin(folder, model, 5, per_token=False)
    assert [path.name for path in folder.iterdir()] == [NOTE]


def test_a_merged_adapter_replaces_only_a_merged_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("base", "adapter", "mine", "work"):
        Path(folder).mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    weights = plant(Path("base/model.safetensors"))
    mine = plant(Path("mine/README.md"))
    for out, why in (
        ("mine", "holds README.md, which siftune did not write"),
        ("base", "holds model.safetensors"),
        ("base/merged", "is inside"),
        ("adapter", "holds adapter_config.json"),
        (".", "is the working folder"),
        ("mine/README.md", "is a file"),
    ):
        with pytest.raises(UserError, match=why):
            merge(Path("adapter"), Path(out))
    assert weights.read_text() == mine.read_text() == MINE


def test_weights_of_a_measured_cell_go_without_the_users_files() -> None:
    for name in ("checkpoints", "model"):
        new = temporary_beside(Path("run", name))
        plant(new / "weights")
        place(new, Path("run", name))
    seal(Path("run/checkpoints"), hashed=False)
    mine = plant(Path("run/model/notes.txt"))
    beside = plant(Path("run/notes.txt"))
    study: Any = SimpleNamespace(keep_models=False)
    _drop_model(Path("run"), study)
    assert not Path("run/checkpoints").exists()
    assert sorted(path.name for path in Path("run/model").iterdir()) == [".siftune-export.json", "notes.txt", "weights"]
    assert mine.read_text() == beside.read_text() == MINE


def test_the_rows_of_a_study_are_drawn_again_beside_the_users_files() -> None:
    study = read_study(str(write_study(Path("study"))))
    prepare(study, Path("run/data"))
    mine = [plant(Path("run/data/notes.txt")), plant(Path("run/data/pool-mine.jsonl"))]
    prepare(replace(study, draw_seed=1), Path("run/data"))
    assert Path("run/data", FACTS).is_file()
    assert all(path.read_text() == MINE for path in mine)


def test_a_checkpoint_that_is_not_finished_stays() -> None:
    from siftune.runs.train import _newest

    mine = plant(Path("checkpoints/checkpoint-7/model.safetensors"))
    assert _newest(Path("checkpoints")) is None
    assert mine.read_text() == MINE


def test_a_tuning_done_again_removes_its_own_note_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from siftune.runs.loop import _tune

    rows = plant(Path("rows.jsonl"))
    mine = [plant(Path("tune-1/notes.txt")), plant(Path("tune-1/model/mine.txt")), rows]
    plant(Path("tune-1/done.json")).write_text('{"key": "another"}')
    with pytest.raises(UserError, match="wrote no model"):
        _tune(1, Path("tune-1"), ["true"], "model", rows, 0)
    assert not Path("tune-1/done.json").exists()
    assert all(path.read_text() == MINE for path in mine)
