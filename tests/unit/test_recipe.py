"""Recipes: read, overridden, merged over presets, and every mistake told in one sentence that names the way out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.errors import UserError
from siftune.sft.config_values import fitting
from siftune.sft.recipe import Recipe, merged, presets
from siftune.yaml_io import parse_yaml

BASE: dict[str, Any] = {"model": "./model", "train": "rows.jsonl"}


def test_a_file_is_read_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: ./model\ntrain: [a.jsonl, b.jsonl]\neval: {maths: held.jsonl}\nonline: uds\n"
        "sft: {learning_rate: 5e-5, max_steps: 3}\npeft: {r: 8}\nstop_at: {trained_tokens: 900}\n"
    )
    recipe = Recipe.read(path, {"sft.learning_rate": 1e-4, "online.keep": "1/4", "seed": 7, "eval.code": "c.jsonl"})
    assert recipe.train == ("a.jsonl", "b.jsonl")
    assert recipe.eval == {"maths": ("held.jsonl",), "code": ("c.jsonl",)}
    assert recipe.sft == {"learning_rate": 1e-4, "max_steps": 3}
    assert recipe.online == {"method": "uds", "keep": "1/4"}
    assert (recipe.seed, recipe.stop_at, recipe.peft) == (7, {"trained_tokens": 900}, {"r": 8})
    assert recipe.max_length == 1024


def test_plain_is_taken_back_as_the_same_recipe() -> None:
    recipe = Recipe.read(
        {**BASE, "preset": "uds-paper", "eval": "h.jsonl", "columns": {"instruction": "q"}, "peft": None}
    )
    assert recipe.peft is None
    assert Recipe.read({"command": "train", **json.loads(json.dumps(recipe.plain))}) == dataclasses.replace(
        recipe, preset=None
    )


@pytest.mark.parametrize("text", ["5e-5", "5E-5", "+5e-5", "0.5e-4", ".5e-4", "5.e-5"])
def test_numbers_with_an_exponent_are_numbers(text: str) -> None:
    assert parse_yaml(text, "here") == 5e-5
    assert parse_yaml(f"[{text}, e5, 1e, 12ab]", "here") == [5e-5, "e5", "1e", "12ab"]


def test_presets_are_the_papers_and_give_way_key_by_key() -> None:
    assert presets() == ["daar-paper", "uds-paper"]
    daar = Recipe.read({**BASE, "preset": "daar-paper", "sft": {"learning_rate": 1e-3}, "peft": {"r": 4}})
    assert daar.sft["learning_rate"] == 1e-3
    assert daar.sft["gradient_accumulation_steps"] == 4
    assert daar.peft == {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    assert daar.online is None
    assert daar.preset == "daar-paper"
    uds = Recipe.read({**BASE, "preset": "uds-paper"})
    assert uds.online is not None
    assert (uds.online["keep"], uds.online["compat"], uds.online["alpha"]) == (1, "paper", 1.5e-3)
    assert uds.sft["learning_rate"] == 1.5e-4


def test_another_online_method_keeps_the_budget_and_nothing_else() -> None:
    under = {"online": {"method": "uds", "keep": 2, "compat": "paper"}}
    assert merged(under, {"online": "maxloss"})["online"] == {"keep": 2, "method": "maxloss"}
    assert merged(under, {"online": {"method": "random", "keep": 3}})["online"] == {"method": "random", "keep": 3}
    assert merged(under, {"online": {"alpha": 1}})["online"] == {
        "method": "uds",
        "keep": 2,
        "compat": "paper",
        "alpha": 1,
    }
    assert merged(under, {"online": None})["online"] is None
    assert Recipe.read({**BASE, **under}, {"online": "maxloss"}).online == {"method": "maxloss", "keep": 2}
    assert Recipe.read({**BASE, "online": "uds"}, {"online.keep": 4}).online == {"method": "uds", "keep": 4}


@given(
    st.dictionaries(
        st.sampled_from(["sft", "peft"]), st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3)
    ),
    st.dictionaries(
        st.sampled_from(["sft", "peft"]), st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3)
    ),
)
def test_merging_is_key_by_key(below: dict[str, Any], above: dict[str, Any]) -> None:
    found = merged(below, above)
    for section in {*below, *above}:
        for key in {*below.get(section, {}), *above.get(section, {})}:
            wanted = above.get(section, {}).get(key, below.get(section, {}).get(key))
            assert found[section][key] == wanted


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"train": "a"}, "the recipe lacks model; write model: ./model-or-hub-id"),
        ({"model": "m"}, "lacks train"),
        ({**BASE, "modle": "m"}, "has the key modle, which no recipe has; did you mean model?"),
        ({**BASE, "sft": 3}, "sft is 3; write its keys below it"),
        ({**BASE, "text": "chats"}, "text: chats is not one of auto, chat, prompt"),
        ({**BASE, "on_bad_row": "drop"}, "on_bad_row: drop is not one of error, skip"),
        ({**BASE, "max_rows": 0}, "max_rows: 0 is not a whole number of at least 1"),
        ({**BASE, "seed": "x"}, "seed: 'x' is not a whole number"),
        ({**BASE, "stop_at": {"tokens": 5}}, "stop_at holds tokens; set one of trained_tokens"),
        ({**BASE, "stop_at": {"trained_tokens": 0}}, "stop_at.trained_tokens: 0 is not a whole number of at least 1"),
        ({**BASE, "preset": "dar-paper"}, "preset: dar-paper is not known; choose one of daar-paper, uds-paper"),
        ({**BASE, "train": [[]]}, "train: \\[\\] is not a path"),
        ({**BASE, "eval": {"a": 3}}, "eval.a: 3 is not a path"),
    ],
)
def test_mistakes_are_told(said: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        Recipe.read(said)


def test_overrides_that_cannot_be_set_are_told() -> None:
    for key, why in (
        ("sff.learning_rate", "sff has no keys of its own; did you mean sft?"),
        ("model.path", "model is './model', which has no keys of its own"),
        ("learning_rate", "has the key learning_rate, which no recipe has"),
    ):
        with pytest.raises(UserError, match=why):
            Recipe.read(BASE, {key: 1})


def test_files_that_are_no_recipe_are_told(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content, why in ((b"- a", "holds a list"), (b"a: [", "is not YAML"), (b"\xff\xfe\xfa", "is not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=why):
            Recipe.read(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Recipe.read(tmp_path / "none.yaml")
    path.write_text("model: !!python/object/apply:os.system ['true']\ntrain: a\n")
    with pytest.raises(UserError, match="is not YAML"):
        Recipe.read(path)


def test_max_length_must_leave_something() -> None:
    for length in (1, True, "512", None):
        with pytest.raises(UserError, match=r"sft.max_length=.* leaves no label token"):
            _ = Recipe.read({**BASE, "sft": {"max_length": length}}).max_length


@dataclasses.dataclass
class Theirs:
    """Options as a library has them."""

    rate: float = 1.0
    steps: int = 1
    share: float | None = None
    flag: bool = False
    free: str | list[str] | None = None


def test_values_fit_the_field_they_are_for() -> None:
    given = {"rate": "1e-4", "steps": 3.0, "share": None, "flag": True, "free": [1]}
    assert fitting(Theirs, given, section="sft") == {"rate": 1e-4, "steps": 3, "share": None, "flag": True, "free": [1]}
    assert isinstance(fitting(Theirs, {"steps": 3.0}, section="sft")["steps"], int)
    for wrong, why in (
        ({"raet": 1}, "sft.raet is no key of .*Theirs; did you mean rate?"),
        ({"rate": "fast"}, "sft.rate: 'fast' is not a number"),
        ({"rate": True}, "sft.rate: True is not a number"),
        ({"steps": 1.5}, "sft.steps: 1.5 is not a whole number"),
        ({"steps": None}, "sft.steps: None is not a whole number"),
        ({"flag": "yes"}, "sft.flag: 'yes' is not true or false"),
        ({"share": [1]}, "sft.share: \\[1\\] is not a number or null"),
    ):
        with pytest.raises(UserError, match=why):
            fitting(Theirs, wrong, section="sft")
