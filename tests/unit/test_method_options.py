"""Options that every online method has are written once, on the base, and are options of each method."""

from __future__ import annotations

import dataclasses

import pytest

from siftune import registry
from siftune.errors import UserError
from siftune.hook.selector import selector_of
from siftune.runs.options import field_docs, options_of
from siftune.study.entries import read_entries

METHODS = [entry.name for entry in registry.methods("online")]
FROM_THE_MODEL = {"uds", "maxloss", "maxgrad", "rho-loss", "greats", "token-rho", "token-self"}


@pytest.mark.parametrize("name", METHODS)
def test_shared_options_are_inherited_with_their_help(name: str) -> None:
    method = registry.find("online", name).load()
    options = {option.name: option for option in options_of(method)}
    assert {"keep", "window", "scope", "start_step"} <= set(options)
    assert {"score_tokens", "keep_tokens"} <= set(options) if name in FROM_THE_MODEL else "keep_tokens" not in options
    assert all(option.help for option in options.values())
    assert all(item.kw_only for item in dataclasses.fields(method))


def test_the_nearest_class_documents_a_field() -> None:
    assert "the tokens that count" in field_docs(registry.find("online", "uds").load())["keep_tokens"]
    assert field_docs(registry.find("online", "greats").load())["window"].startswith("`micro` only")
    assert field_docs(registry.find("online", "uds").load())["window"].startswith("Choose within each micro-batch")


def test_what_a_method_needs_is_on_its_class() -> None:
    def having(flag: str) -> set[str]:
        return {name for name in METHODS if getattr(registry.find("online", name).load(), flag)}

    assert having("needs_forward") == FROM_THE_MODEL
    assert having("needs_gradients") == {"maxgrad", "greats"}
    maxgrad = registry.find("online", "maxgrad").load()
    assert maxgrad(keep=1).needs_complete_weights()
    assert not maxgrad(keep=1, variant="last-layer").needs_complete_weights()
    online = read_entries(
        ["regular", {"method": "random", "keep": 2}, {"method": "uds", "keep": 2}], "online", where="x"
    )
    assert [entry.scores_with_model for entry in online] == [False, False, True]


def test_defaults_of_a_recipe_reach_the_methods_that_have_such_options() -> None:
    assert selector_of({"method": "random", "keep": 2}, defaults={"seed": 7, "validation_text": "chat"}).seed == 7  # type: ignore[attr-defined]
    assert selector_of({"method": "random", "keep": 2, "seed": 1}, defaults={"seed": 7}).seed == 1  # type: ignore[attr-defined]
    greats = selector_of({"method": "greats", "keep": 2, "validation": "v.jsonl"}, defaults={"validation_text": "chat"})
    assert greats.validation_text == "chat"  # type: ignore[attr-defined]
    assert selector_of({"method": "regular"}).keep == "all"
    with pytest.raises(UserError, match="random needs keep, the rows to train on"):
        selector_of({"method": "random"})


def test_files_that_a_selector_will_read_are_checked_before_training() -> None:
    rho = selector_of({"method": "rho-loss", "keep": 2, "reference": "missing.parquet"})
    with pytest.raises(UserError, match=r"reference='missing\.parquet' does not exist; make it with siftune score-ref"):
        rho.check_files()
    greats = selector_of({"method": "greats", "keep": 2, "validation": "missing.jsonl"})
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        greats.check_files()
    assert selector_of({"method": "uds", "keep": 2}).check_files() is None
