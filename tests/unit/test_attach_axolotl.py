"""The Axolotl plugin against a stub of Axolotl's plugin interface (Axolotl itself is not installed here)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from siftune import UserError
from siftune.hook.attach import Attachment
from tests.trainers import ledger, trainer


class StubBase:
    """As Axolotl's base class: every hook exists and does nothing."""

    def __init__(self) -> None:
        self.made = True

    def register(self, cfg: Any) -> None: ...

    def get_input_args(self) -> str | None: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


@pytest.fixture
def plugin_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = StubBase  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "siftune.integrations.axolotl", raising=False)
    yield importlib.import_module("siftune.integrations.axolotl")
    sys.modules.pop("siftune.integrations.axolotl", None)


def test_the_section_becomes_an_attached_selector(plugin_module: Any, tmp_path: Path) -> None:
    plugin = plugin_module.SiftunePlugin()
    assert isinstance(plugin, StubBase)
    assert plugin.made
    live = trainer(tmp_path, max_steps=1)
    plugin.register({})
    plugin.post_trainer_create({"siftune": {"method": "uds", "keep": "1/4", "alpha": 0.5, "sketch": [16, 4]}}, live)
    attachment = live.siftune_attachment
    assert isinstance(attachment, Attachment)
    assert attachment.selector.keep == "1/4"
    live.train()
    lines = ledger(tmp_path)
    assert sum(line["kept"] for line in lines) == 2
    assert {line["alpha"] for line in lines} == {0.5}


def test_without_a_section_nothing_happens(plugin_module: Any, tmp_path: Path) -> None:
    live = trainer(tmp_path)
    plugin_module.SiftunePlugin().post_trainer_create({"siftune": None, "base_model": "x"}, live)
    assert not hasattr(live, "siftune_attachment")


def test_the_schema_lets_the_section_through(plugin_module: Any) -> None:
    pytest.importorskip("pydantic")
    module, _, name = plugin_module.SiftunePlugin().get_input_args().rpartition(".")
    schema = getattr(importlib.import_module(module), name)
    assert schema(siftune={"method": "random", "keep": 2}).siftune == {"method": "random", "keep": 2}
    assert schema().siftune is None


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"method": "usd", "keep": 1}, "did you mean uds"),
        ({"kep": 1}, "did you mean keep"),
        ({"method": "random"}, "needs keep"),
    ],
)
def test_mistakes_are_one_sentence(plugin_module: Any, section: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        plugin_module.selector_of(section)


def test_it_imports_without_axolotl() -> None:
    sys.modules.pop("siftune.integrations.axolotl", None)
    module = importlib.import_module("siftune.integrations.axolotl")
    assert module.SiftunePlugin.__mro__[1] is object
