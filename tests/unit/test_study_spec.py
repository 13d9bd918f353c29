"""A study's YAML: what is read, and every mistake in one sentence before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from siftune.errors import UserError
from siftune.study.cells import arms_of, cells_of, part_of
from siftune.study.spec import Study, read_study
from tests.studies import write_study


def study(folder: Path, **changes: Any) -> Study:
    return read_study(str(write_study(folder, with_model=False, **changes)))


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        arms_of(study(folder, **changes))
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offline": ["full", "dar"]}, "no offline method 'dar'"),
        ({"online": ["udz"]}, "no online method 'udz'"),
        ({"seed": [0]}, "has no key seed; did you mean seeds?"),
        ({"offline": [{"method": "output-length", "rewrd": 1}]}, "has no setting rewrd"),
        ({"offline": ["full", "random", "random"]}, "two entries named random"),
        ({"offline": [{"method": "random", "name": "a/b"}]}, "letters, digits"),
        ({"offline": [{"method": "random", "name": "long" * 99}]}, "at most 60 letters"),
        ({"name": "../elsewhere"}, "name: '../elsewhere' names folders too"),
        ({"offline": [{"name": "full", "keep": 3}]}, "full selects nothing and has no setting keep"),
        ({"baseline": "uds"}, "baseline 'uds' is none of its cells (full, random, long)"),
        ({"seeds": []}, "must be a list of whole numbers"),
        ({"seeds": [0, 0]}, "seeds has 0 twice"),
        ({"seeds": ["a"]}, "must be a list of whole numbers"),
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": ["20%", 0.2]}, "budgets has 20% twice"),
        ({"budgets": ["120%"]}, "is not a fraction"),
        ({"rows": 0}, "rows=0"),
        ({"jobs": "two"}, "jobs='two'"),
        ({"equal": "steps"}, "equal='steps'"),
        ({"equal": "tokens"}, "lr_scheduler_type=linear"),
        ({"tokens": 100}, "goes with equal: tokens"),
        ({"recipe": {"train": "x.jsonl"}}, "recipe holds train"),
        ({"recipe": {"preset": "paper"}}, "preset: paper is not known"),
        ({"recipe": None}, "lacks recipe"),
        ({"model": None}, "lacks model"),
        ({"held_out": None}, "measures nothing"),
        ({"held_out": {"sums": "absent.jsonl"}}, "held_out sums: there is no file absent.jsonl"),
        ({"pool": ["gone/pool.jsonl.gz"]}, "pool pool: there is no file gone/pool.jsonl.gz"),
        ({"pool": ["a/x.jsonl", "b/x.jsonl"]}, "two pool files are named x"),
        ({"online": [{"method": "uds"}]}, "uds needs keep"),
        ({"online": [{"method": "rho-loss", "keep": 2, "reference": "{refrence}"}]}, "contains {refrence}"),
        ({"online": [{"method": "random", "keep": 2, "candidates": 0}]}, "candidates=0"),
        ({"cells": [["full"]]}, "write [offline name, online name, budget]"),
        ({"cells": [["random", "regular"]]}, "without a budget"),
        ({"cells": [["daar", "regular", "20%"]]}, "'daar', which is not one of offline"),
        ({"cells": [["full", "regular"], ["full", "regular"]]}, "cells has"),
        ({"variables": {"data": None}, "model": "{data}/m"}, "the variable data has no value; pass --set data=VALUE"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, **changes)


def test_no_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_study(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not YAML"):
        read_study(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="holds a list"):
        read_study(str(tmp_path / "list.yaml"))


def test_variables_and_keys_are_set_from_outside(tmp_path: Path) -> None:
    path = write_study(tmp_path, with_model=False)
    said = yaml.safe_load(path.read_text())
    said["variables"] = {"data": None, "kept": "30%"}
    said["pool"] = {"sums": "{data}/pool-sums.jsonl"}
    said["budgets"] = ["{kept}"]
    path.write_text(yaml.safe_dump(said))
    found = read_study(str(path), {"data": str(tmp_path), "recipe.sft.learning_rate": 5e-4, "seeds": [7]})
    assert found.pool == {"sums": f"{tmp_path}/pool-sums.jsonl"}
    assert found.budgets == ("30%",)
    assert found.seeds == (7,)
    assert found.recipe["sft"]["learning_rate"] == 5e-4
    assert found.recipe["sft"]["max_length"] == 64
    with pytest.raises(UserError, match="no variable or key dta; did you mean data"):
        read_study(str(path), {"dta": "x"})
    with pytest.raises(UserError, match="rows is no mapping"):
        read_study(str(path), {"data": str(tmp_path), "rows.first": 1})


def test_numbers_with_exponents_and_presets(tmp_path: Path) -> None:
    path = write_study(tmp_path, with_model=False)
    path.write_text(path.read_text().replace("max_length: 64", "learning_rate: 5e-4"))
    assert read_study(str(path)).recipe["sft"]["learning_rate"] == 5e-4
    found = study(tmp_path, recipe={"preset": "uds-paper", "sft": {"max_length": 100}})
    assert "online" not in found.recipe
    assert found.recipe["sft"]["per_device_train_batch_size"] == 4
    assert found.max_length == 100


def test_product_and_labels(tmp_path: Path) -> None:
    found = study(
        tmp_path, online=["regular", {"name": "half", "method": "random", "keep": 2}], baseline="random + half"
    )
    labels = [arm.label for arm in arms_of(found)]
    assert labels == [f"{one} + {other}" for one in ("full", "random", "long") for other in ("regular", "half")]
    names = [cell.name for cell in cells_of(found)]
    assert len(set(names)) == len(names) == 18
    assert names[0] == "full-regular-seed0"
    assert names[3] == "random-half-20pct-seed0"


def test_several_budgets_are_groups_and_all_rows_belong_to_each(tmp_path: Path) -> None:
    arms = arms_of(study(tmp_path, budgets=["20%", 6]))
    assert [(arm.label, arm.group) for arm in arms] == [
        ("full", None), ("random", "20%"), ("random", "6"), ("long", "20%"), ("long", "6"),
    ]  # fmt: skip


def test_listed_cells_are_one_group_with_the_budget_in_the_label(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "online": ["regular", {"name": "half", "method": "random", "keep": 2}],
        "cells": [["random", "regular", "20%"], ["long", "half", "40%"], ["full", "half"]],
        "baseline": "random 20% + regular",
    }
    found = arms_of(study(tmp_path, **changes))
    assert [arm.label for arm in found] == ["random 20% + regular", "long 40% + half", "full + half"]
    assert {arm.group for arm in found} == {""}


def test_only_what_a_seed_changes_is_chosen_again(tmp_path: Path) -> None:
    shared = {cell.arm.label: {one.selection for one in cells_of(study(tmp_path)) if one.arm.label == cell.arm.label}
              for cell in cells_of(study(tmp_path))}  # fmt: skip
    assert shared["full"] == {None}
    assert shared["long"] == {"long-20pct"}
    assert shared["random"] == {f"random-20pct-seed{seed}" for seed in (0, 1, 2)}


def test_parts_cover_every_cell_once(tmp_path: Path) -> None:
    cells = cells_of(study(tmp_path))
    parts = [part_of(cells, f"{index}/4") for index in (1, 2, 3, 4)]
    assert sorted(cell.name for part in parts for cell in part) == sorted(cell.name for cell in cells)
    for wrong in ("0/4", "5/4", "a/b", "3"):
        with pytest.raises(UserError, match="is not a part"):
            part_of(cells, wrong)
