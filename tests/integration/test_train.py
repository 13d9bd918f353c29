"""`siftune train`: what is trained on is what was said, it is counted right, and mistakes are told before weights are read."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.cli.main import main
from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.models.tokenize_rows import Encoder, answer_tokens
from siftune.runs.train import Tuned, TuneOptions, tune
from siftune.sft import dataset as token_rows
from siftune.sft import trainer as building
from siftune.sft.adapters import load_tuned, merge
from siftune.sft.dataset import tokenizer_key, training_rows
from siftune.sft.recipe import Recipe
from siftune.sft.trainer import build_trainer, prepare
from tests.tiny import save_tiny, tiny_tokenizer
from tests.trainers import loss_by_hand
from tests.training_rows import alpaca, write_alpaca

pytest.importorskip("trl")

SFT = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "max_length": 64,
    "save_strategy": "no",
    "logging_steps": 1,
    "gradient_checkpointing": False,
}
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), layers=2, width=16)


@pytest.fixture
def said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A recipe on 40 rows in the test's own folder, sections given over it."""
    monkeypatch.chdir(tmp_path)
    write_alpaca(tmp_path / "pool.jsonl", 40)

    def recipe(**more: Any) -> Recipe:
        sft = {**SFT, **more.pop("sft", {})}
        return Recipe.read({"model": str(model), "train": "pool.jsonl", "sft": sft, **more})

    return recipe


def run(recipe: Recipe, folder: str = "run", **options: Any) -> Tuned:
    return tune(recipe, TuneOptions(run=folder, quiet=True, **options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_tuned(folder, dtype="float32").state_dict())


# --- what is trained on ---------------------------------------------------------------------------------------------


def test_the_trainer_gets_the_tokens_that_held_out_loss_counts(said: Callable[..., Recipe], model: Path) -> None:
    recipe = said(sft={"max_length": 24})
    trainer = build_trainer(recipe, "out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    pool = load_pool("pool.jsonl")
    prepared = prepare(recipe)
    kept = prepared.rows.positions.tolist()
    assert 0 < len(kept) < 40, "some rows have no answer within 24 tokens"
    for row, given in zip(pool.read(kept), trainer.train_dataset, strict=True):
        assert (given["input_ids"], given["labels"]) == answer_tokens(row, tokenizer, text="auto", max_length=24)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 1)])
    for index in (0, 1):
        labels = trainer.train_dataset[index]["labels"]
        assert batch["labels"][index][: len(labels)].tolist() == labels
        assert (batch["labels"][index][len(labels) :] == -100).all()
    assert sorted([*kept, *prepared.rows.reasons]) == list(range(40))
    assert all("no answer tokens after truncation" in reason for reason in prepared.rows.reasons.values())


def test_the_first_steps_loss_is_the_naive_one_over_the_answers(said: Callable[..., Recipe], model: Path) -> None:
    recipe = said(sft={"max_steps": 1, "per_device_train_batch_size": 40, "bf16": False})
    done = run(recipe)
    dataset = prepare(recipe).rows.dataset
    fresh = AutoModelForCausalLM.from_pretrained(model)
    assert done.manifest["train_loss"] == pytest.approx(loss_by_hand(fresh, list(dataset)), rel=1e-5)


def test_keeping_every_row_is_training_without_a_selector(said: Callable[..., Recipe]) -> None:
    plain, all_kept = run(said()), run(said(online={"method": "regular"}), "regular")
    theirs = weights(plain.model)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(all_kept.model).items())
    tokens = all_kept.manifest["tokens"]
    assert tokens == plain.manifest["tokens"]
    assert tokens["forward_tokens"] == tokens["trained_tokens"]
    other = run(said(seed=1), "other")
    assert any(not torch.equal(value, theirs[name]) for name, value in weights(other.model).items())


def test_what_was_trained_is_counted_as_the_ledger_has_it(said: Callable[..., Recipe]) -> None:
    for online, folder in (({"method": "uds", "keep": 2}, "uds"), ({"method": "random", "keep": "1/2"}, "random")):
        recipe = said(online=online, sft={"gradient_accumulation_steps": 2})
        done = run(recipe, folder)
        ledger = pq.read_table(done.folder / "siftune" / "selection.parquet").to_pylist()
        dataset = prepare(recipe).rows.dataset
        kept = [dataset[line["row"]] for line in ledger if line["kept"]]
        tokens = done.manifest["tokens"]
        assert (tokens["candidates"], tokens["trained_rows"]) == (24, 12)
        assert tokens["trained_tokens"] == sum(len(row["input_ids"]) for row in kept)
        assert tokens["trained_label_tokens"] == sum(label != -100 for row in kept for label in row["labels"])
        scored = sum(len(dataset[line["row"]]["input_ids"]) for line in ledger) if folder == "uds" else 0
        assert tokens["forward_tokens"] == tokens["trained_tokens"] + scored
        log = [json.loads(line) for line in (done.folder / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in log if "loss" in line]
        assert done.manifest["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert done.manifest["steps"] == len(losses) == 3


def test_steps_before_the_first_selection_score_nothing(said: Callable[..., Recipe]) -> None:
    recipe = said(online={"method": "uds", "keep": 2, "start_step": 2})
    done = run(recipe)
    ledger = pq.read_table(done.folder / "siftune" / "selection.parquet").to_pylist()
    dataset = prepare(recipe).rows.dataset
    scored = sum(len(dataset[line["row"]]["input_ids"]) for line in ledger if line["total"] is not None)
    tokens = done.manifest["tokens"]
    assert tokens["trained_rows"] == 4 + 4 + 2
    assert tokens["forward_tokens"] == tokens["trained_tokens"] + scored


@pytest.mark.parametrize("unit", ["trained_tokens", "trained_label_tokens"])
def test_training_stops_at_the_first_step_that_reaches_the_tokens(said: Callable[..., Recipe], unit: str) -> None:
    long = {"max_steps": 30, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    online = {"method": "random", "keep": 2}
    first = run(said(sft={**long, "max_steps": 5}, online=online), "five")
    wanted = first.manifest["tokens"][unit]
    exact = run(said(sft=long, online=online, stop_at={unit: wanted}), "exact")
    assert (exact.manifest["steps"], exact.manifest["tokens"]) == (5, first.manifest["tokens"])
    beyond = run(said(sft=long, online=online, stop_at={unit: wanted + 1}), "beyond")
    assert beyond.manifest["steps"] == 6
    ours, theirs = weights(exact.model), weights(first.model)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    steps = sorted(path.name for path in (exact.folder / "checkpoints").glob("checkpoint-*"))
    assert steps == [f"checkpoint-{step}" for step in range(1, 5)], (
        "a checkpoint of the last step would train one too many"
    )


def test_the_global_random_state_is_left_alone(said: Callable[..., Recipe]) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    run(said(peft={**LORA, "lora_dropout": 0.2}))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_two_runs_in_one_process_do_not_touch_each_other(said: Callable[..., Recipe]) -> None:
    recipe = said(peft={**LORA, "lora_dropout": 0.3})
    alone = weights(run(recipe, "first").model)
    run(said(sft={"bf16": True}, online={"method": "uds", "keep": 2}), "between")
    torch.manual_seed(99)
    again = weights(run(recipe, "second").model)
    assert all(torch.equal(value, alone[name]) for name, value in again.items())


# --- the run folder -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(said: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(said(online={"method": "uds", "keep": 2}))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(building, "load_model", never)
    again = run(said(online={"method": "uds", "keep": 2}))
    for name in ("tokens", "train_loss", "steps", "rows", "seconds"):
        assert again.manifest[name] == first.manifest[name]
    assert {stage["status"] for stage in again.manifest["stages"]} == {"reused"}
    with pytest.raises(UserError, match="run folder run holds another run: its option seed was 0 and is now 4"):
        run(said(online={"method": "uds", "keep": 2}, seed=4))
    write_alpaca(Path("pool.jsonl"), 41)
    with pytest.raises(UserError, match="its input train was"):
        run(said(online={"method": "uds", "keep": 2}))


def test_config_yaml_is_a_recipe(said: Callable[..., Recipe]) -> None:
    recipe = said(peft=LORA, preset="uds-paper")
    done = run(recipe)
    assert Recipe.read(done.folder / "config.yaml").plain == recipe.plain
    assert run(Recipe.read(done.folder / "config.yaml")).manifest["stages"][-1]["status"] == "reused"


def test_an_unfinished_checkpoint_is_not_resumed_from(said: Callable[..., Recipe]) -> None:
    recipe = said(sft={"max_steps": 6, "save_strategy": "steps", "save_steps": 2})
    whole = run(recipe)
    folder = Path("run/checkpoints")
    (folder / "checkpoint-4" / "siftune" / "COMPLETE").unlink()
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"cut")
    (Path("run") / "model" / "model.safetensors").unlink()
    heard: list[str] = []
    again = tune(recipe, TuneOptions(run="run"), on_event=heard.append)
    assert "resuming from run/checkpoints/checkpoint-2" in heard
    assert sum(line.startswith("step ") for line in heard) == 4
    assert again.manifest["tokens"] == whole.manifest["tokens"]
    assert again.manifest["train_loss"] == whole.manifest["train_loss"]


def test_every_row_has_its_place_or_its_reason(said: Callable[..., Recipe]) -> None:
    lines = Path("pool.jsonl").read_text().splitlines()
    lines[3], lines[5] = "{broken", json.dumps({"instruction": "w " * 60, "output": "x"})
    Path("pool.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    done = run(said(on_bad_row="skip", duplicates="drop", max_rows=30))
    table = pq.read_table(done.folder / "rows.parquet").to_pylist()
    assert [line["row"] for line in table] == list(range(41))
    reasons = {line["row"]: line["reason"] for line in table if line["reason"]}
    assert "unparsable" in reasons[3] or "JSON" in reasons[3]
    assert reasons[5].startswith("no answer tokens after truncation")
    assert reasons[40] == "duplicate of row 0"
    assert [row for row, reason in reasons.items() if reason == "beyond max_rows"] == list(range(32, 40))
    placed = [line for line in table if line["reason"] is None]
    assert [line["position"] for line in placed] == list(range(30))
    facts = done.manifest["rows"]
    assert (facts["read"], facts["used"], facts["beyond"]) == (41, 30, 8)
    assert facts["tokens"] == sum(line["tokens"] for line in placed)
    assert facts["label_tokens"] == sum(line["label_tokens"] for line in placed)
    assert facts["reasons"]["no answer tokens after truncation"] == 1
    assert facts["cut"] == sum(line["cut"] for line in placed)


def test_the_card_says_what_was_chosen_and_how(said: Callable[..., Recipe]) -> None:
    assert main(["select", "length", "pool.jsonl", "--keep", "25%", "--run", "chosen", "--quiet"]) == 0
    more = {"peft": LORA, "preset": "daar-paper", "sft": {"gradient_accumulation_steps": 1}}
    recipe = said(train="chosen/selected.jsonl", online={"method": "uds", "keep": 2}, **more)
    done = run(recipe)
    card = (done.model / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: peft" in front
    assert "base_model" not in front, "a folder of this machine is no hub id"
    for wanted in (
        "Chosen before training, in the run that wrote `chosen/selected.jsonl`",
        "| method | length |",
        "| kept | 10 of 40 rows of pool.jsonl |",
        "| method | uds (keep 2) |",
        "| candidates | 10 |",  # 4, 4, and the 2 that are left
        "| trained on | 6 |",
        "| preset | daar-paper |",
        f"| mean training loss | {done.manifest['train_loss']:.4f} |",
        f"{done.manifest['tokens']['forward_tokens']:,}",
        "warmup_steps: 0.05",
    ):
        assert wanted in card, wanted
    assert not (done.model / "training_args.bin").exists()


def test_tokens_are_made_once_per_content(said: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = Encoder.__call__

    def counted(self: Encoder, row: Any) -> Any:
        calls.append(row.row)
        return encode(self, row)

    monkeypatch.setattr(Encoder, "__call__", counted)
    monkeypatch.setattr(token_rows, "ROWS_AT_ONCE", 7)
    first = prepare(said()).rows
    assert calls == list(range(40))
    again = prepare(said(peft=LORA, seed=3)).rows
    assert len(calls) == 40, "tokenised again"
    assert again.meta == first.meta
    other = prepare(said(sft={"max_length": 63})).rows
    assert len(calls) == 80
    assert other.folder != first.folder
    few = prepare(said(max_rows=10)).rows
    assert (few.meta["rows"], few.meta["beyond"], len(few.dataset)) == (10, 30, 10)
    tokens, label_tokens, cut = first.lengths()
    assert [len(row["input_ids"]) for row in first.dataset] == tokens.tolist()
    assert [sum(label != -100 for label in row["labels"]) for row in first.dataset] == label_tokens.tolist()
    whole = Encoder(tiny_tokenizer(), "auto", 10_000)
    assert cut.tolist() == [len(whole(row).input_ids) > 64 for row in load_pool("pool.jsonl").read(range(40))]
    assert 0 < sum(cut.tolist()) < 40


def test_rows_with_nothing_to_learn_are_told(said: Callable[..., Recipe], model: Path) -> None:
    with pytest.raises(
        UserError, match=r"no row of pool.jsonl can be trained on \(40 no answer tokens after truncation\)"
    ):
        _ = prepare(said(sft={"max_length": 4})).rows
    pool = load_pool("pool.jsonl")
    key = tokenizer_key(model)
    assert training_rows(pool, tiny_tokenizer(), key=key, text="prompt", max_length=64).meta["rows"] == 40


# --- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_names_its_base_and_merges_into_it(said: Callable[..., Recipe], model: Path) -> None:
    done = run(said(peft=LORA))
    assert done.is_adapter
    config = json.loads((done.model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert config["r"] == 4
    merged = done.merged()
    assert merged == done.folder / "merged"
    assert AutoTokenizer.from_pretrained(merged).chat_template
    ids = torch.arange(20, 40)[None]
    base, ours = AutoModelForCausalLM.from_pretrained(model), AutoModelForCausalLM.from_pretrained(merged)
    from peft import PeftModel

    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(done.model))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, live(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours(ids).logits, base(ids).logits, atol=1e-3)
    full = run(said(), "full")
    assert full.merged() == full.model
    with pytest.raises(UserError, match="holds no adapter"):
        merge(full.model, Path("x"))
    with pytest.raises(UserError, match=r"is an adapter for .*; pass that model, or merge"):
        prepare(Recipe.read({**said().plain, "model": str(done.model)}))


def test_quantization_is_checked(said: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    for more, why in (
        ({"quantization": {"load_in_4bit": True}}, "cannot be trained themselves; set peft: as well"),
        (
            {"quantization": {"load_in_4bits": True}, "peft": LORA},
            "load_in_4bits is no key .* did you mean load_in_4bit",
        ),
        ({"quantization": {"load_in_4bit": False}, "peft": LORA}, "neither load_in_4bit nor load_in_8bit is true"),
    ):
        with pytest.raises(UserError, match=why):
            prepare(said(**more))
    from siftune.sft import configs

    monkeypatch.setattr(configs, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(UserError, match="bitsandbytes, which is not installed; run: pip install bitsandbytes"):
        prepare(said(quantization={"load_in_4bit": True}, peft=LORA))


def test_a_base_of_four_bits_is_scored_and_its_adapter_trained(said: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = save_tiny(tmp_path / "wide", layers=2, width=64)  # its kernels want multiples of 32
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    more = {
        "model": str(wide),
        "quantization": four,
        "peft": LORA,
        "eval": {"own": "pool.jsonl"},
        "online": {"method": "uds", "keep": 2},
    }
    held = build_trainer(said(**more), "out").model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert type(held).__name__ == "Linear4bit"
    done = run(said(**more))
    assert {name: done.manifest["tokens"][name] for name in ("candidates", "trained_rows")} == {
        "candidates": 12,
        "trained_rows": 6,
    }
    assert (done.model / "adapter_config.json").is_file()
    assert 0 < done.manifest["info"]["held_out"]["own"]["loss"] < 20
    assert run(said(**more), "again").manifest["train_loss"] == done.manifest["train_loss"]


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"sft": {"learning_rat": 1}}, "sft.learning_rat is no key of trl.SFTConfig; did you mean learning_rate?"),
        ({"sft": {"max_steps": "many"}}, "sft.max_steps: 'many' is not a whole number"),
        ({"sft": {"lr_scheduler_type": "cosin"}}, "sft: .*cosin.* is not a valid SchedulerType"),
        ({"sft": {"output_dir": "x"}}, "sft.output_dir is not allowed in a recipe: the run folder holds it"),
        ({"sft": {"save_only_model": True}}, "sft.save_only_model is not allowed in a recipe: a run resumes from its"),
        ({"sft": {"assistant_only_loss": True}}, "sft.assistant_only_loss is not allowed"),
        (
            {"sft": {"packing": True, "packing_strategy": "wrapped"}},
            "sft.packing_strategy: wrapped cuts rows at the end",
        ),
        (
            {"sft": {"packing": True, "eval_packing": True}},
            "sft.eval_packing is not allowed in a recipe: held-out rows are",
        ),
        (
            {"sft": {"padding_free": True}, "online": {"method": "uds", "keep": 5}},
            "online.keep=5 exceeds the 4 candidates of a micro-batch",
        ),
        ({"peft": {"rank": 8}}, "peft.rank is no key of peft.LoraConfig; did you mean rank_pattern?"),
        ({"peft": {"r": 0}}, "peft.r must be >= 1, got 0"),
        ({"peft": {"r": "eight"}}, "peft.r: 'eight' is not a whole number"),
        (
            {"online": {"method": "uds", "keep": 5}},
            "online.keep=5 exceeds the 4 candidates of a micro-batch; lower keep",
        ),
        ({"online": {"method": "uds", "keep": "1/16"}}, "keep='1/16' is less than one row of a micro-batch of 4"),
        ({"online": {"method": "uds"}}, "online: uds needs keep"),
        ({"online": {"method": "udss", "keep": 1}}, "there is no online method 'udss'.*did you mean uds"),
        ({"online": {"method": "uds", "keep": 1, "alfa": 1}}, "online: alfa is no option of uds.*did you mean alpha"),
        ({"online": {"method": "uds", "keep": 1, "norm": "l1"}}, "norm='l1' is not one of"),
        ({"online": {"method": "rho-loss", "keep": 1}}, "online: rho-loss needs reference"),
        ({"train": "none.jsonl"}, "none.jsonl does not exist; check the path"),
        ({"eval": "none.jsonl"}, "none.jsonl does not exist"),
        ({"model": "./none"}, "model='./none' is not a folder here"),
        ({"columns": {"instruction": "q"}}, "q"),
        ({"text": "chat", "model": "bare"}, "text='chat' needs a chat template, and model='bare' has none"),
        ({"train": "chat.jsonl", "model": "bare"}, "the rows are messages and model='bare' has no chat template"),
        ({"model": "weightless"}, "model='weightless' holds no safetensors"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(
    said: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], why: str
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(building, "load_model", never)
    if more.get("model") in ("bare", "weightless"):
        save_tiny(Path("bare"), layers=1, width=16, template=False)
        save_tiny(Path("weightless"), layers=1, width=16)
        Path("weightless/model.safetensors").unlink()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(UserError, match=why):
        run(said(**more))
    assert not Path("run").exists()


def test_several_processes_and_a_missing_trl_are_told(
    said: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from siftune.sft import configs

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process, and WORLD_SIZE=2"):
        run(said())
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(configs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs trl, which is not installed; run: pip install 'siftune\[train\]'"):
        run(said())


def test_a_share_of_steps_as_warm_up_has_the_versions_own_name() -> None:
    from siftune.sft.configs import _warm_up

    class Four:
        def __init__(self, warmup_ratio: float = 0.0, warmup_steps: int = 0) -> None: ...

    class Five:
        def __init__(self, warmup_steps: float = 0) -> None: ...

    assert _warm_up(Four, {"warmup_steps": 0.05}) == {"warmup_ratio": 0.05}
    assert _warm_up(Four, {"warmup_steps": 5}) == {"warmup_steps": 5}
    assert _warm_up(Five, {"warmup_ratio": 0.05}) == {"warmup_steps": 0.05}
    assert _warm_up(Five, {"warmup_steps": 0.05}) == {"warmup_steps": 0.05}


# --- held-out rows, and the command line ------------------------------------------------------------------------------


def test_held_out_files_are_measured_and_watched(said: Callable[..., Recipe]) -> None:
    write_alpaca(Path("held.jsonl"), 12, seed=9)
    done = run(said(eval={"short": "held.jsonl"}, sft={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}))
    facts = done.manifest["held_out"]["short"]
    rows = [answer_tokens(row, AutoTokenizer.from_pretrained(done.model), text="auto", max_length=64)
            for row in load_pool("held.jsonl").read(range(12))]  # fmt: skip
    naive = loss_by_hand(load_tuned(done.model), [{"input_ids": ids, "labels": labels} for ids, labels in rows])
    assert facts["loss"] == pytest.approx(naive, rel=1e-5)
    assert facts["tokens"] == sum(label != -100 for _, labels in rows for label in labels)
    log = [json.loads(line) for line in (done.folder / "log.jsonl").read_text().splitlines()]
    assert any("eval_short_loss" in line for line in log)
    assert run(said(eval={"short": "held.jsonl"}, sft={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2})
               ).manifest["held_out"] == done.manifest["held_out"]  # fmt: skip


@pytest.fixture
def written(said: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]) -> Path:
    path = Path("recipe.yaml")
    path.write_text(json.dumps(said().plain))
    Path("file.txt").write_text("")
    capsys.readouterr()
    return path


def test_the_command_trains_and_says_so(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(written), "--online", "uds", "--keep", "1/2", "--set", "sft.max_steps=2", "--seed", "5"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing was trained" in said
    assert "max_steps: 2" in said
    assert not Path("siftune-runs").exists()
    assert main([*words, "--run", "a", "--out", "tuned"]) == 0
    said = capsys.readouterr().out
    assert "tuned model -> tuned" in said
    assert "step 2/2  loss" in said
    assert "trained   4 rows in 2 steps" in said
    assert Path("tuned/model.safetensors").read_bytes() == Path("a/model/model.safetensors").read_bytes()
    assert main([*words, "--run", "a", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["seed"] == 5
    assert facts["config"]["online"] == {"method": "uds", "keep": "1/2"}
    assert main([*words, "--quiet"]) == 0
    assert Path(capsys.readouterr().out.strip(), "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "siftune train needs a recipe: siftune train recipe.yaml"),
        (["none.yaml"], "the recipe none.yaml cannot be read"),
        (["recipe.yaml", "--set", "sft.max_steps"], "--set sft.max_steps is not KEY=VALUE"),
        (["recipe.yaml", "--set"], "--set (nothing) is not KEY=VALUE"),
        (
            ["recipe.yaml", "--set", "sft.max_step=3"],
            "sft.max_step is no key of trl.SFTConfig; did you mean max_steps?",
        ),
        (["recipe.yaml", "--keep", "2"], "online names no method; write method: uds, or pass --online METHOD"),
        (["recipe.yaml", "--online", "none", "--keep", "2"], "--keep chooses rows and --online none does not"),
        (["recipe.yaml", "--out", "recipe.yaml"], "--out recipe.yaml is the same as the recipe (recipe.yaml)"),
        (["recipe.yaml", "--out", "file.txt"], "--out file.txt is a file; pass a folder"),
    ],
)
def test_the_command_tells_mistakes(
    written: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert main(["train", *words, "--run", "no"]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
    assert not os.path.exists("no")


def test_settings_are_yaml_and_many(said: Callable[..., Recipe]) -> None:
    from siftune.cli.train import overrides

    texts = {"sft.learning_rate": "1e-4", "train": "[x.jsonl, y=1.jsonl]"}
    assert overrides({"seed": None, "set": texts}) == {"sft.learning_rate": 1e-4, "train": ["x.jsonl", "y=1.jsonl"]}
    values = {"online": "rho-loss", "keep": "1/2", "seed": None, "set": {"online.reference": "t.parquet"}}
    recipe = Recipe.read(said(online={"method": "uds", "keep": 1, "alpha": 2.0}).plain, overrides(values))
    assert recipe.online == {"method": "rho-loss", "keep": "1/2", "reference": "t.parquet"}


def test_alpaca_rows_are_all_different() -> None:
    assert len({json.dumps(row) for row in alpaca(40)}) == 40
