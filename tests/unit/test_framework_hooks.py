"""The hooks of ms-swift, Oumi and LLaMA-Factory against stubs of their interfaces (`make frameworks` runs the real ones)."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from siftune import UserError
from siftune.hook.packing import packs
from siftune.integrations import every_trainer, llamafactory, oumi, swift
from siftune.integrations.request import Request

ROOT = Path(__file__).resolve().parents[2]
REQUEST = Request(selector={"method": "uds", "keep": "1/8"})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the hooks install, without touching `transformers.Trainer`."""
    requests: list[Request] = []
    for module in (swift, oumi, llamafactory, every_trainer):
        monkeypatch.setattr(module, "install", requests.append)
    return requests


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "sift.yaml"
    path.write_text("method: uds\nkeep: 1/8\n")
    monkeypatch.setenv("SIFTUNE_CONFIG", str(path))
    monkeypatch.delenv("SIFTUNE_RUN", raising=False)
    return path


def load(path: Path) -> ModuleType:
    """Import a file by its path, as the frameworks do."""
    spec = importlib.util.spec_from_file_location(f"_external_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- ms-swift -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """ms-swift's table of callbacks, and its base class, which takes the arguments and the trainer."""

    class TrainerCallback:
        def __init__(self, args: Any, trainer: Any) -> None:
            self.args, self.trainer = args, trainer

    table: dict[str, Any] = {}
    package, module = ModuleType("swift"), ModuleType("swift.callbacks")
    module.callbacks_map = table  # type: ignore[attr-defined]
    module.TrainerCallback = TrainerCallback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", package)
    monkeypatch.setitem(sys.modules, "swift.callbacks", module)
    return table


def test_the_plugin_file_registers_a_callback_that_sifts(
    callbacks: dict[str, Any], installed: list[Request], config: Path
) -> None:
    load(swift.PLUGIN)
    callback = callbacks["siftune"]("the arguments", "the trainer")
    assert installed == []
    callback.on_init_end("the arguments", None, None)
    assert installed == [REQUEST]


def test_the_plugin_file_names_a_configuration_that_is_missing(
    callbacks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIFTUNE_CONFIG", raising=False)
    monkeypatch.delenv("SIFTUNE_RUN", raising=False)
    with pytest.raises(UserError, match="set SIFTUNE_CONFIG"):
        load(swift.PLUGIN)


# --- Oumi -----------------------------------------------------------------------------------------------------------------


def test_the_registry_file_sifts_every_trainer(installed: list[Request], config: Path) -> None:
    load(oumi.REGISTERED)
    assert installed == [REQUEST]


def test_files_that_frameworks_load_hide_no_module_of_theirs() -> None:
    """ms-swift and Oumi put the folder of such a file on the path."""
    names = {path.stem for path in oumi.REGISTERED.parent.glob("*.py")}
    assert names == {"siftune_swift", "siftune_oumi"}


@pytest.mark.parametrize("module", ["swift", "oumi"])
def test_the_module_prints_the_path_of_its_file(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"siftune.integrations.{module}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    path = Path(done.stdout.strip())
    assert path.name == f"siftune_{module}.py"
    assert path.is_file()


# --- LLaMA-Factory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What LLaMA-Factory's `run_exp` is called with."""
    calls: list[dict[str, Any]] = []
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["llamafactory.train.tuner"].run_exp = lambda args: calls.append(args)  # type: ignore[attr-defined]
    return calls


def test_the_section_is_taken_out_and_the_rest_is_trained(
    experiments: list[dict[str, Any]], installed: list[Request], tmp_path: Path
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("stage: sft\ntrust_remote_code: true\nlearning_rate: 1e-4\nsiftune:\n  method: uds\n  keep: 1/8\n")
    assert llamafactory.main([str(path), "max_steps=20", "output_dir=out"]) == 0
    assert installed == [REQUEST]
    assert experiments == [
        {"stage": "sft", "trust_remote_code": True, "learning_rate": 1e-4, "max_steps": 20, "output_dir": "out"}
    ]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("stage: sft\n", [], "has no section siftune"),
        ("siftune: {method: usd, keep: 1}\n", [], "did you mean uds"),
        ("siftune: {method: uds, kep: 1}\n", [], "did you mean keep"),
        ("siftune: {method: uds}\n", [], "uds needs keep"),
        ("siftune: uds\n", [], "no mapping"),
        ("siftune: {method: uds, keep: 1}\n", ["max_steps"], "'max_steps' is no override"),
    ],
)
def test_mistakes_in_the_file_are_refused_before_it_trains(
    experiments: list[dict[str, Any]],
    installed: list[Request],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    more: list[str],
    message: str,
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    assert llamafactory.main([str(path), *more]) == 2
    assert message in capsys.readouterr().err
    assert experiments == []
    assert installed == []


def test_without_llamafactory_it_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("siftune: {method: uds, keep: 1}\n")
    assert llamafactory.main([str(path)]) == 2
    assert "LLaMA-Factory cannot be imported" in capsys.readouterr().err
    assert llamafactory.main([]) == 2
    assert "as its first word, got 'nothing'" in capsys.readouterr().err


def test_neat_packing_is_seen_before_the_first_batch() -> None:
    """One line a micro-batch is then no single candidate; LLaMA-Factory's collator alone holds the setting."""
    collator = SimpleNamespace(neat_packing=True)
    assert packs(SimpleNamespace(args=SimpleNamespace(), data_collator=collator))
    collator.neat_packing = False
    assert not packs(SimpleNamespace(args=SimpleNamespace(), data_collator=collator))


# --- Axolotl --------------------------------------------------------------------------------------------------------------


def test_the_plugin_is_in_axolotls_group() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["axolotl.plugins"]["siftune"].partition(":")
    assert hasattr(importlib.import_module(module), name)
