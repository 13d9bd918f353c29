"""Code from a model's or an adapter's folder never runs unless Python asks for it, whatever a file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from siftune.cli.main import main
from siftune.errors import UserError
from siftune.evaluation.suite import Suite
from siftune.models.backbone import Backbone
from siftune.models.load import find_folder
from siftune.sft.recipe import Recipe
from tests.tiny import save_tiny
from tests.training_rows import write_alpaca

CONFIGURATION = """\
open({mark!r}, "w").close()
from transformers import LlamaConfig
class Config(LlamaConfig):
    model_type = "own-model"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder whose configuration is code that leaves a mark, and a pool."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    save_tiny(tmp_path / "model", layers=2, width=16)
    write_alpaca(tmp_path / "pool.jsonl", 8)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    stored |= {"model_type": "own-model", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(stored))
    (tmp_path / "model" / "own.py").write_text(CONFIGURATION.format(mark=str(tmp_path / "mark")))
    return tmp_path


def recipe(folder: Path, **more: object) -> Path:
    content = {"model": str(folder / "model"), "train": str(folder / "pool.jsonl"), "sft": {"max_steps": 1}, **more}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_recipe_that_trusts_is_refused_before_anything_runs(
    folder: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(folder, model_kwargs={"trust_remote_code": True})
    assert main(["train", str(path), "--run", str(folder / "run"), *more]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "model_kwargs.trust_remote_code names code to run" in err
    assert not (folder / "mark").exists()
    assert not (folder / "run").exists()


def test_a_model_with_code_of_its_own_is_refused_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    model = str(folder / "model")
    for words in (
        ["train", str(recipe(folder)), "--dry-run"],
        ["select", "ifd", str(folder / "pool.jsonl"), "--model", model, "--dry-run"],
        ["evaluate", model, "--held-out", f"a={folder / 'pool.jsonl'}"],
    ):
        assert main(words) == 2, words
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "it needs its own Python code; read that code, then pass trust_remote_code=True" in err
    assert not (folder / "mark").exists()


def test_the_same_model_runs_its_code_when_python_asks(folder: Path) -> None:
    assert Recipe.read({"model": "m", "train": "t", "model_kwargs": {"trust_remote_code": True}}).model_kwargs
    assert Backbone(str(folder / "model"), layer=1, trust_remote_code=True).config.model_type == "own-model"
    assert (folder / "mark").exists(), "the tests above prove nothing otherwise"


@pytest.mark.parametrize(
    "content",
    [
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
        {"experts_implementation": "someone/kernel"},
        {"text_config": {"attn_implementation": {"": "someone/kernel"}}},
    ],
)
def test_a_configuration_that_names_a_kernel_of_the_hub_is_refused(tmp_path: Path, content: dict[str, object]) -> None:
    folder = save_tiny(tmp_path / "model", layers=2, width=16)
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"_attn_implementation": "eager"}))
    assert Backbone(str(folder), layer=1).config is not None
    path.write_text(json.dumps(stored | content))
    with pytest.raises(UserError, match="that names code to run"):
        _ = Backbone(str(folder), layer=1).config


def test_an_adapter_that_names_a_module_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    stored = {"peft_type": "LORA", "megatron_core": "evil", "megatron_config": {"hidden_size": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"names a Python module to import \(megatron_core: 'evil'\)"):
        find_folder(str(folder), None)
    (folder / "adapter_config.json").write_text(json.dumps(stored | {"megatron_config": None}))
    assert find_folder(str(folder), None) == folder


@pytest.mark.parametrize("grade", ["completes_function", "passes_tests"])
def test_a_task_that_runs_programs_needs_allow_code_whatever_its_file_says(tmp_path: Path, grade: str) -> None:
    fields = {"prompt": "text", "test": "text", "entry_point": "text", "test_list": "texts"}
    task = {
        "kind": "write",
        "file": "rows",
        "fields": fields,
        "prompt": "{{ prompt }}",
        "grade": grade,
        "runs_code": False,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": {"mine": {"task": "mine.yaml"}}}))
    with pytest.raises(UserError, match="mine of suite suite run code that the model writes"):
        Suite.read(tmp_path / "suite.yaml").check_code(False)
