"""target-loss against its definition: each row alone, in float64, with and without the adapter; and its warm-up run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from tests.pools import make_pool
from tests.tiny import save_tiny

pytest.importorskip("trl")
pytest.importorskip("peft")

from siftune.warmup.target_loss import TargetLoss
from siftune.warmup.tuning import WarmUp

ROWS: list[dict[str, Any]] = [
    {
        "instruction": f"Question {number} " + "about numbers " * (number % 4),
        "input": "",
        "output": f"answer {number * 7}",
    }
    for number in range(12)
]
TARGET = [{"instruction": f"Name a colour {number}", "input": "", "output": f"blue {number}"} for number in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", width=16)


@pytest.fixture(scope="module")
def fitted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TargetLoss:
    method = TargetLoss(model=str(model), target=TARGET, device="cpu", steps=6, batch=2, learning_rate=1e-2)
    method.cache = tmp_path_factory.mktemp("cache")
    return method.fit(make_pool(ROWS))


def naive(model: Path, adapter: Path | None, rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Mean cross-entropy of each row's answer tokens, one row at a time, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    network = (network if adapter is None else PeftModel.from_pretrained(network, str(adapter)).double()).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    losses = []
    for row in rows:
        turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        tokens = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor([tokens["input_ids"]]), np.array(tokens["assistant_masks"], dtype=bool)
        with torch.no_grad():
            logits = network(ids).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").numpy()
        losses.append(each[mask[1:]].mean())
    return np.array(losses)


def test_the_score_is_that_of_the_definition(model: Path, fitted: TargetLoss) -> None:
    pool = make_pool(ROWS)
    assert fitted.fitted_adapter is not None
    before, after = naive(model, None, ROWS), naive(model, fitted.fitted_adapter, ROWS)
    assert (abs(before - after) > 1e-4).all(), "the warm-up changes every loss"
    np.testing.assert_allclose(fitted.score(pool).values, (before - after) / before, rtol=1e-4, atol=1e-6)


def test_the_adapter_of_the_lowest_held_out_loss_is_taken(fitted: TargetLoss) -> None:
    facts = fitted.warmup
    steps = [step for step, _ in facts["held_out_losses"]]
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert (facts["train_rows"], facts["held_out_rows"]) == (5, 1)
    assert facts["best_step"] in steps


def test_a_second_fit_takes_the_run_from_the_cache(fitted: TargetLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        name: getattr(fitted, name) for name in ("model", "target", "device", "steps", "batch", "learning_rate")
    }
    again = TargetLoss(**settings)
    again.cache = fitted.cache
    monkeypatch.setattr("siftune.warmup.tuning._run", lambda *_: pytest.fail("the run is in the cache"))
    again.fit(make_pool(ROWS))
    assert again.fitted_adapter == fitted.fitted_adapter


def test_a_damaged_run_in_the_cache_is_replaced_without_the_users_files(model: Path, tmp_path: Path) -> None:
    def fit() -> Path:
        method = TargetLoss(model=str(model), target=TARGET, device="cpu", steps=1, batch=2, learning_rate=1e-2)
        method.cache = tmp_path
        folder = method.fit(make_pool(ROWS)).fitted_adapter
        assert folder is not None
        return folder

    folder = fit()
    (folder / "notes.txt").write_text("the user's own")
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    assert fit() == folder
    assert (folder / "adapter_model.safetensors").stat().st_size > 100
    assert (folder / "notes.txt").read_text() == "the user's own"
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_a_saved_adapter_serves_another_pool_without_a_warm_up(
    fitted: TargetLoss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted.save(tmp_path)
    monkeypatch.setattr("siftune.warmup.target_loss.warm_up", lambda *_, **__: pytest.fail("no run is needed"))
    other = make_pool(ROWS[3:])
    settings: dict[str, Any] = {"model": fitted.model, "target": TARGET, "device": "cpu"}
    by_option = TargetLoss(adapter=str(tmp_path / "adapter"), **settings).fit(other).score(other)
    by_load = TargetLoss.load(tmp_path, **settings).score(other)
    np.testing.assert_array_equal(by_option.values, by_load.values)
    np.testing.assert_allclose(by_option.values, fitted.score(make_pool(ROWS)).values[3:], rtol=1e-4)


def test_a_changed_adapter_is_refused(fitted: TargetLoss, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="has changed since its run wrote it"):
        TargetLoss.load(tmp_path, model=fitted.model, target=TARGET)


def test_a_run_that_lowers_no_loss_is_warned_of(fitted: TargetLoss) -> None:
    method = TargetLoss(model=fitted.model, target=TARGET)
    method.warmup = {"held_out_losses": [[0, 2.0], [1, 2.5]]}
    with pytest.warns(UserWarning, match=r"did not lower the loss of the held-out target rows \(2.0000 before"):
        method._warn_of_collapse()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": TARGET[:1]}, "it has one row, and target-loss trains on some and watches others"),
        ({"held_out": 1.0}, "held_out=1.0 must be a share between 0 and 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"text": "letter"}, "text='letter' is not known"),
        ({"adapter": "no-such-folder"}, "adapter='no-such-folder' holds no adapter_config.json"),
    ],
)
@pytest.mark.filterwarnings("ignore:the target has one row")
def test_settings_that_cannot_be_used_are_refused(model: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TargetLoss(**{"model": str(model), "target": TARGET, "device": "cpu", **settings}).check()


def test_the_recipe_is_checked_like_any_other(model: Path) -> None:
    from siftune.models.backbone import Backbone
    from siftune.sft.trainer import check_sections

    settings = WarmUp(
        model=str(model),
        max_length=64,
        learning_rate=1e-3,
        rank=4,
        batch=2,
        steps=20,
        seed=0,
        device="cpu",
        dtype="auto",
    )
    for watched in (False, True):
        check_sections(settings.recipe(Backbone(str(model), layer=1, device="cpu"), watched=watched))
