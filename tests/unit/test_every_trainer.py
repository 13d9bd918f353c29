"""`install`: every trainer whose `train` is called is sifted, other kinds are left alone, and mistakes are one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import siftune
from siftune import UserError
from siftune.integrations.every_trainer import install
from siftune.integrations.request import Request
from siftune.online.maxloss import MaxLoss
from tests.trainers import kept_rows, ledger, losses, trainer

SECTION = {"method": "maxloss", "keep": "1/4"}


def classes() -> tuple[type[Trainer], type[Trainer]]:
    """A base class to install on, which the other tests' trainers do not share, and one derived from it."""

    class Base(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(*args, **kwargs)

    class Derived(Base):
        prepared = 0

        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.prepared += 1
            return super().train(*args, **kwargs)

    return Base, Derived


def test_a_trainer_is_sifted_as_one_that_was_attached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, derived = classes()
    install(Request(selector=SECTION), base)
    live = trainer(tmp_path / "installed", cls=derived, max_steps=3)
    live.train()
    attached = trainer(tmp_path / "attached", max_steps=3)
    siftune.attach(attached, MaxLoss(keep="1/4"))
    attached.train()
    assert losses(live) == losses(attached)
    assert ledger(tmp_path / "installed") == ledger(tmp_path / "attached")
    assert "maxloss is attached to Derived" in capsys.readouterr().err


def test_an_override_of_train_runs_once_each_time(tmp_path: Path) -> None:
    base, derived = classes()
    install(Request(selector=SECTION), base)
    live = trainer(tmp_path, cls=derived, max_steps=2)
    live.train()
    assert live.prepared == 1
    live.train()
    assert live.prepared == 2
    assert len(kept_rows(tmp_path, 2)) == 2


def test_a_resumed_run_keeps_the_rows_of_an_uninterrupted_one(tmp_path: Path) -> None:
    base, derived = classes()
    install(Request(selector={"method": "uds", "keep": "1/4"}), base)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, cls=derived, **saving).train()
    rows = kept_rows(tmp_path, 4)
    trainer(tmp_path, cls=derived, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert kept_rows(tmp_path, 4) == rows


def test_installing_again_replaces_the_request(tmp_path: Path) -> None:
    base, derived = classes()
    install(Request(selector=SECTION), base)
    install(Request(selector={"method": "maxloss", "keep": 1}), base)
    live = trainer(tmp_path, cls=derived, max_steps=1)
    live.train()
    assert live.prepared == 1
    assert len(kept_rows(tmp_path, 1)) == 1


@pytest.mark.parametrize("name", ["DPOTrainer", "RewardTrainer", "GRPOTrainer", "PairwiseTrainer", "RerankerTrainer"])
def test_trainers_of_other_tasks_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    base, derived = classes()
    install(Request(selector=SECTION), base)
    live = trainer(tmp_path, cls=type(name, (derived,), {}), max_steps=1)
    live.train()
    assert f"{name} is left alone: {name} trains on pairs, rewards or generated answers" in capsys.readouterr().err
    assert not hasattr(live, "siftune_attachment")
    assert live.state.global_step == 1


def test_a_classifier_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from siftune.hook.checks import other_task

    live = trainer(tmp_path)
    live.model.__class__ = type("LlamaForSequenceClassification", (type(live.model),), {})
    assert "is a classifier" in str(other_task(live))
    live.model.__class__ = type("BertForMaskedLM", (type(live.model),), {})
    assert "is a masked language model" in str(other_task(live))


def test_only_the_named_class_is_sifted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, derived = classes()
    install(Request(selector=SECTION, only_class="SFTTrainer"), base)
    trainer(tmp_path, cls=derived, max_steps=1).train()
    assert "Derived is left alone: only SFTTrainer is to be sifted" in capsys.readouterr().err
    live = trainer(tmp_path, cls=type("Mine", (type("SFTTrainer", (derived,), {}),), {}), max_steps=1)
    live.train()
    assert hasattr(live, "siftune_attachment")


def test_a_selector_of_the_script_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, derived = classes()
    install(Request(selector=SECTION), base)
    live = trainer(tmp_path, cls=derived, max_steps=1)
    siftune.attach(live, MaxLoss(keep=3))
    live.train()
    assert "it has the selector maxloss already" in capsys.readouterr().err
    assert len(kept_rows(tmp_path, 1)) == 3


def test_what_cannot_be_sifted_ends_the_process_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, derived = classes()
    reports = tmp_path / "reports"
    reports.mkdir()
    install(Request(selector={"method": "maxloss", "keep": "1/80"}, reports=str(reports)), base)
    with pytest.raises(SystemExit) as ended:
        trainer(tmp_path, cls=derived).train()
    assert ended.value.code == 2
    assert "keep='1/80' is less than one row" in capsys.readouterr().err
    (report,) = reports.glob("refused-*.json")
    assert "less than one row" in json.loads(report.read_text())["line"]


def test_a_dry_run_stops_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, derived = classes()
    install(Request(selector=SECTION, dry_run=True), base)
    live = trainer(tmp_path / "run", cls=derived)
    with pytest.raises(SystemExit) as ended:
        live.train()
    assert ended.value.code == 0
    assert live.state.global_step == 0
    assert not (tmp_path / "run" / "siftune").exists()
    printed = capsys.readouterr().err
    assert "scores 8 candidates per step and trains on 2 of them" in printed
    assert "dry run: maxloss (keep='1/4') accepts the first batch" in printed


def test_a_dry_run_refuses_what_the_first_batch_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, derived = classes()
    install(Request(selector=SECTION, dry_run=True), base)
    live = trainer(tmp_path, cls=derived)
    collate = live.data_collator
    live.data_collator = lambda rows: {**collate(rows), "pixel_values": [1]}
    with pytest.raises(SystemExit) as ended:
        live.train()
    assert ended.value.code == 2
    assert "images" in capsys.readouterr().err


# --- the request --------------------------------------------------------------------------------------------------------


def test_a_section_holds_the_method_and_how_to_attach() -> None:
    request = Request.of_section({"online": "uds", "keep": "1/8", "only-class": "SFTTrainer", "dry_run": True})
    assert request == Request(selector={"method": "uds", "keep": "1/8"}, only_class="SFTTrainer", dry_run=True)


@pytest.mark.parametrize(
    ("section", "match"),
    [("uds", "which is no mapping"), ({"keep": 1, "dry_run": "yes"}, "has to be true or false")],
)
def test_a_section_of_another_form_is_refused(section: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Request.of_section(section)


def test_the_environment_gives_back_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = Request(selector=SECTION, only_class="SFTTrainer", reports="reports")
    for name, value in request.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Request.from_environment() == request
    monkeypatch.delenv("SIFTUNE_RUN")
    (tmp_path / "sift.yaml").write_text("method: maxloss\nkeep: 1/4\n")
    monkeypatch.setenv("SIFTUNE_CONFIG", str(tmp_path / "sift.yaml"))
    assert Request.from_environment() == Request(selector=SECTION)
    monkeypatch.delenv("SIFTUNE_CONFIG")
    with pytest.raises(UserError, match="set SIFTUNE_CONFIG"):
        Request.from_environment()


def test_a_secret_does_not_travel_in_the_environment() -> None:
    selector = {"method": "rho-loss", "keep": 1, "reference": "https://me:secret@host/losses.parquet"}
    with pytest.raises(UserError, match="holds a password or key"):
        Request(selector=selector).as_environment()
