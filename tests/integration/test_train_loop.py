"""The closed loop with `siftune train` inside: every round tunes the last round's model, adapters merged, nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from siftune.cli.main import main
from siftune.demo import corpus
from tests.tiny import save_tiny

pytest.importorskip("trl")

SFT = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 128, "save_strategy": "no", "learning_rate": 0.1}


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    corpus.write(tmp_path, count=200, per_domain=3, held=10)
    save_tiny(tmp_path / "model", layers=3, width=16)
    monkeypatch.chdir(tmp_path)
    write({"peft": {"r": 2, "target_modules": "all-linear"}})
    return tmp_path


def write(more: dict[str, object]) -> None:
    sft = {**SFT, "gradient_checkpointing": False}
    Path("recipe.yaml").write_text(json.dumps({"online": {"method": "uds", "keep": 2}, "sft": sft, **more}))


def words(*more: str) -> list[str]:
    said = ["loop", "daar", "pool.jsonl", "--model", "./model", "--seeds", "seeds.jsonl", "--keep", "40"]
    return [*said, "--probe-rows", "60", "--run", "run", "--recipe", "recipe.yaml", *more]


@pytest.mark.slow
def test_rounds_tune_in_process_and_merge_adapters(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("--json")) == 0
    rounds = json.loads(capsys.readouterr().out)["rounds"]
    assert [item["model"] for item in rounds] == ["./model", "run/tune-1/merged"]
    assert [item["tuned"] for item in rounds] == ["run/tune-1/merged", "run/tune-2/merged"]
    manifests = [json.loads(Path(f"run/tune-{number}/manifest.json").read_text()) for number in (1, 2)]
    assert [item["config"]["model"] for item in manifests] == ["./model", "run/tune-1/merged"]
    assert [item["config"]["train"] for item in manifests] == [[f"run/round-{n}/selected.jsonl"] for n in (1, 2)]
    assert all(item["tokens"]["trained_rows"] == 4 for item in manifests)
    probed = [json.loads(Path(f"run/round-{n}/manifest.json").read_text())["inputs"]["model"] for n in (1, 2)]
    assert probed[0] != probed[1], "the tuned model was not probed"
    assert json.loads(Path("run/tune-2/model/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        prepared / "run/tune-1/merged"
    )
    assert main(words("--json")) == 0
    again = json.loads(capsys.readouterr().out)["rounds"]
    assert [item["tune_seconds"] for item in again] == [0.0, 0.0]
    assert "| kept | 40 of 200 rows of pool.jsonl |" in Path("run/tune-1/model/README.md").read_text()


def test_mistakes_are_told_before_rows_are_chosen(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("--tune", "true {train_file} {out_model}")) == 2
    assert "--recipe and --tune are two ways to tune" in capsys.readouterr().err
    for more, why in (
        ({"sft": {"max_step": 2}}, "sft.max_step is no key of trl.SFTConfig; did you mean max_steps?"),
        ({"sft": SFT, "online": {"method": "uds", "keep": 9}}, "online.keep=9 exceeds the 4 candidates"),
        ({"trian": "x"}, "has the key trian, which no recipe has"),
    ):
        write(more)
        assert main(words()) == 2
        assert why in capsys.readouterr().err
    assert not Path("run").exists()
