"""The table of methods: known names resolve, unknown ones say what is near."""

from __future__ import annotations

import pytest

from siftune import registry
from siftune.errors import UserError


def test_every_entry_of_a_side_is_listed_in_order() -> None:
    names = [entry.name for entry in registry.methods("offline")]
    assert names[:2] == ["random", "daar"]
    assert {entry.side for entry in registry.methods()} == {"offline", "online"}


def test_offline_entries_load_to_their_class() -> None:
    assert registry.find("offline", "random").load().name == "random"


def test_an_unknown_name_gets_the_nearest_and_the_list() -> None:
    with pytest.raises(UserError, match=r"no offline method 'dar'; known: random, daar.*did you mean daar\?"):
        registry.find("offline", "dar")


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register("offline", "mine", "builtins:dict", summary="a test")
    assert registry.find("offline", "mine").load() is dict
    with pytest.raises(UserError, match="'mine' is registered already"):
        registry.register("offline", "mine", "builtins:list", summary="again")
    registry.register("online", "mine", "builtins:list", summary="the other side has names of its own")
