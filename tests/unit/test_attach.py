"""attach and detach on a live trainer: what is trained, logged, written and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainerControl

from siftune import UserError, attach, detach
from siftune.online.greats import Greats
from siftune.online.maxgrad import MaxGrad
from siftune.online.simple import Random, Regular
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import Drifting, kept_rows, ledger, losses, rows, trainer


def test_a_run_trains_on_the_kept_rows_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    attach(live, Random(keep="1/4"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "16 candidates per step and trains on 4" in said
    assert "25.0%" in said
    live.train()
    lines = ledger(tmp_path)
    assert len(lines) == 2 * 16
    assert [sum(line["kept"] for line in lines if line["step"] == step) for step in (1, 2)] == [4, 4]
    assert {line["micro"] for line in lines} == {0, 1}
    assert {line["rank"] for line in lines} == {0}
    assert len({line["row"] for line in lines}) == 32  # an epoch's rows, none twice
    data = rows()
    logs = [line for line in live.state.log_history if "loss" in line]
    trained = [sum(len(data[row]["input_ids"]) for row in kept_rows(tmp_path, step)) for step in (1, 2)]
    assert [line["sift/tokens_trained"] for line in logs] == [trained[0], sum(trained)]
    everything = sum(len(data[line["row"]]["input_ids"]) for line in lines)
    assert logs[-1]["sift/tokens_skipped"] == everything - sum(trained)
    for line in logs:
        assert line["sift/kept_fraction"] == 0.25
        assert line["sift/total_kept"] > line["sift/total_skipped"]
        assert line["sift/candidates_per_second"] > 0
        assert 0 < line["sift/scoring_share"] < 1


def test_logged_means_are_those_of_the_ledger(tmp_path: Path) -> None:
    live = trainer(tmp_path, max_steps=4, logging_steps=2)
    attach(live, Drifting(keep=3), quiet=True)
    live.train()
    log = [line for line in live.state.log_history if "loss" in line][-1]
    window = [line for line in ledger(tmp_path) if line["step"] in (3, 4)]
    for side, kept in (("kept", True), ("skipped", False)):
        for name in ("total", "mean"):
            values = [line[name] for line in window if line["kept"] is kept]
            assert log[f"sift/{name}_{side}"] == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_other_callbacks_see_the_numbers(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
            seen.append(dict(kwargs["logs"]))

    live = trainer(tmp_path, max_steps=1)
    live.add_callback(Watch())
    attach(live, Random(keep=2), quiet=True)
    live.train()
    assert "sift/kept_fraction" in seen[0]
    assert not any(key.startswith("sift/") for key in seen[-1])  # the summary is not a training line


def test_detach_gives_the_trainer_back(tmp_path: Path) -> None:
    live = trainer(tmp_path)
    before, callbacks = dict(vars(live)), list(live.callback_handler.callbacks)
    attach(live, Random(keep=2), quiet=True)
    with pytest.raises(UserError, match="random is attached already"):
        attach(live, Random(keep=2))
    detach(live)
    assert vars(live) == before
    assert live.callback_handler.callbacks == callbacks
    with pytest.raises(UserError, match="no selector is attached"):
        detach(live)


def test_an_earlier_patch_of_the_instance_is_used_and_restored(tmp_path: Path) -> None:
    live = trainer(tmp_path, max_steps=1)
    counted: list[int] = []

    def mine(iterator: Any, number: int, device: torch.device) -> Any:
        result = Trainer.get_batch_samples(live, iterator, number, device)
        counted.append(sum(len(batch["input_ids"]) for batch in result[0]))
        return result

    live.get_batch_samples = mine
    attach(live, Random(keep=3), quiet=True)
    live.train()
    assert counted == [8, 3]
    detach(live)
    assert live.get_batch_samples is mine


def test_short_last_batches_keep_at_least_one_row(tmp_path: Path) -> None:
    live = trainer(tmp_path, data=Dataset.from_list(rows(17)))
    attach(live, Random(keep="1/8"), quiet=True)
    live.train()
    lines = ledger(tmp_path)
    per_step = [[line["kept"] for line in lines if line["step"] == step] for step in (1, 2, 3)]
    assert [len(kept) for kept in per_step] == [8, 8, 1]
    assert [sum(kept) for kept in per_step] == [1, 1, 1]


@pytest.mark.parametrize("window", ["micro", "step"])
def test_short_accumulation_windows_stay_whole(tmp_path: Path, window: str) -> None:
    live = trainer(
        tmp_path, data=Dataset.from_list(rows(21)), per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    came: list[int] = []
    step = live.training_step
    live.training_step = lambda *a, **k: came.append(len(a[1]["input_ids"])) or step(*a, **k)  # type: ignore[func-returns-value]
    attach(live, Drifting(keep="1/2", window=window), quiet=True)
    live.train()
    assert came == [2, 2, 2, 2, 2, 1]
    assert live.state.global_step == 2
    assert sum(line["kept"] for line in ledger(tmp_path)) == 11


def test_iterable_data_with_max_steps(tmp_path: Path) -> None:
    data = IterableDataset.from_generator(lambda: iter(rows(20)))
    live = trainer(tmp_path, data=data, max_steps=5)
    attach(live, Random(keep=2), quiet=True)
    live.train()
    lines = ledger(tmp_path)
    assert {line["row"] for line in lines} == {None}
    assert all(len(line["token_id"]) == 32 for line in lines)
    assert live.state.global_step == 5
    # 20 rows make batches of 8, 8, 4, over and over
    assert [sum(line["step"] == step for line in lines) for step in (1, 2, 3, 4, 5)] == [8, 8, 4, 8, 8]


def test_rows_without_answers_are_taken_last_with_a_reason(tmp_path: Path) -> None:
    live = trainer(tmp_path, data=Dataset.from_list(rows(40, answers=False)))
    attach(live, Random(keep=4), quiet=True)
    live.train()
    lines = ledger(tmp_path)
    mute = [line for line in lines if line["row"] % 5 == 0]
    assert len(mute) == 8
    assert not any(line["kept"] for line in mute)
    assert {line["reason"] for line in mute} == {"no answer tokens: every label of the row is masked"}
    assert {line["total"] for line in mute} == {None}
    assert all(line["reason"] is None and line["total"] is not None for line in lines if line["row"] % 5)


def test_before_start_step_every_row_is_kept_and_nothing_is_scored(tmp_path: Path) -> None:
    selector = Drifting(keep=2, start_step=2)
    live = trainer(tmp_path, max_steps=3)
    attach(live, selector, quiet=True)
    live.train()
    lines = ledger(tmp_path)
    assert [sum(line["kept"] for line in lines if line["step"] == step) for step in (1, 2, 3)] == [8, 8, 2]
    assert all((line["total"] is None) == (line["step"] < 3) for line in lines)
    assert {line["reason"] for line in lines if line["step"] < 3} == {"no selection before start_step=2"}
    assert len(selector.batches) == 1


def test_evaluation_is_never_sifted(tmp_path: Path) -> None:
    data = Dataset.from_list(rows(16, seed=1))
    live = trainer(tmp_path, eval_data=data, eval_strategy="steps", eval_steps=1, max_steps=2, learning_rate=0.0)
    plain = live.evaluate()["eval_loss"]
    attach(live, Drifting(keep=1), quiet=True)
    live.train()
    evaluated = [line["eval_loss"] for line in live.state.log_history if "eval_loss" in line]
    assert evaluated[-2:] == [plain, plain]
    assert not any("sift/kept_fraction" in line for line in live.state.log_history if "eval_loss" in line)


def test_a_smaller_batch_after_running_out_of_memory_starts_over(tmp_path: Path) -> None:
    live = trainer(tmp_path, auto_find_batch_size=True)
    step, calls = live.training_step, []

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(args[1]["input_ids"]))
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory. (not really)")
        return step(*args, **kwargs)

    live.training_step = failing
    selector = Drifting(keep="1/2")
    attach(live, selector, quiet=True)
    live.train()
    lines = ledger(tmp_path)
    size = sum(line["step"] == 1 for line in lines)
    assert size < 8
    assert calls[:2] == [4, 4]
    assert sorted(line["row"] for line in lines) == list(range(48))
    assert lines[0]["alpha"] == 0.0  # the selector's memory is that of a fresh run


def test_without_a_ledger_nothing_is_written(tmp_path: Path) -> None:
    live = trainer(tmp_path, max_steps=1)
    attach(live, Random(keep=2), ledger=False, quiet=True)
    live.train()
    assert not (tmp_path / "siftune").exists()


def test_a_second_run_in_the_same_folder_does_not_mix_ledgers(tmp_path: Path) -> None:
    for steps in (3, 1):
        live = trainer(tmp_path, max_steps=steps)
        attach(live, Random(keep=2), quiet=True)
        live.train()
        assert {line["step"] for line in ledger(tmp_path)} == set(range(1, steps + 1))


def test_a_run_that_dies_leaves_its_ledger(tmp_path: Path) -> None:
    class Bomb(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    live = trainer(tmp_path)
    live.add_callback(Bomb())
    attach(live, Random(keep=2), quiet=True)
    with pytest.raises(KeyboardInterrupt):
        live.train()
    assert [path.name for path in (tmp_path / "siftune" / "selection").iterdir()] == ["part-2.parquet"]


def test_candidates_reach_the_selector_as_the_collator_made_them(tmp_path: Path) -> None:
    selector = Drifting(keep=1)
    live = trainer(tmp_path, max_steps=1, multiple=8, padding_side="left")
    trained: list[Any] = []
    step = live.training_step
    live.training_step = lambda *a, **k: trained.append(a[1]) or step(*a, **k)  # type: ignore[func-returns-value]
    attach(live, selector, quiet=True)
    live.train()
    candidates = selector.batches[0]
    assert candidates["input_ids"].shape[0] == 8
    assert candidates["input_ids"].shape[1] % 8 == 0
    row = trained[0]
    assert row["input_ids"].shape[1] % 8 == 0
    assert row["input_ids"].shape[1] - int(row["attention_mask"].sum()) < 8
    assert row["attention_mask"][0, -1] == 1


@pytest.mark.parametrize("with_ledger", [True, False])
def test_a_collator_that_drops_rows_may_leave_one(tmp_path: Path, with_ledger: bool) -> None:
    pad = DataCollatorForSeq2Seq(tiny_tokenizer())
    long = [row for row in rows(200, longest=60) if len(row["input_ids"]) > 20][:16]
    data = [{name: value[: 6 if at % 4 == 1 else 20] for name, value in row.items()} for at, row in enumerate(long)]
    live = trainer(tmp_path, data=Dataset.from_list(data), per_device_train_batch_size=4)
    live._get_train_sampler = lambda *some: torch.utils.data.SequentialSampler(data)
    live.data_collator = lambda several: pad([row for row in several if len(row["input_ids"]) <= 6])
    attach(live, Random(keep="1/2"), ledger=with_ledger, quiet=True)
    live.train()
    assert live.state.global_step == 4
    if with_ledger:
        assert [line["row"] for line in ledger(tmp_path)] == [1, 5, 9, 13]


def test_full_lines_with_an_end_in_their_middle_are_reported(tmp_path: Path) -> None:
    """LLaMA-Factory's `packing`: nothing says where rows begin, and the tokenizer has no token that does."""
    ids = [[7, 8, 1, 9, 10, 11, 1, 12]] * 16
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * 8, "labels": row} for row in ids])
    live = trainer(tmp_path, data=data, max_steps=1)
    live.processing_class.bos_token = None
    attach(live, Random(keep="1/2"), quiet=True)
    with pytest.warns(UserWarning, match="has the token that begins or ends a row in its middle"):
        live.train()


def test_block_masks_of_different_widths_are_not_joined(tmp_path: Path) -> None:
    pad = DataCollatorForSeq2Seq(tiny_tokenizer())

    def collate(several: list[Any]) -> Any:
        batch = dict(pad(several))
        width = batch["input_ids"].shape[1]
        real = batch["attention_mask"].bool()
        batch["attention_mask"] = (torch.ones(width, width, dtype=torch.bool).tril() & real[:, None, :])[:, None]
        return batch

    live = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=4, per_device_train_batch_size=4)
    live.data_collator = collate
    attach(live, Random(keep="1/2", window="step", seed=1), quiet=True)
    with pytest.raises(UserError, match="columns with 4-D attention masks cannot be joined; pass window='micro'"):
        live.train()


class TestRefusals:
    """Each refused at attach, in one sentence that holds the value and the way out."""

    def refused(self, live: Any, selector: Any, match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            attach(live, selector)
        assert "\n" not in str(caught.value)
        assert not hasattr(live, "siftune_attachment")

    def test_selectors(self, tmp_path: Path) -> None:
        live = trainer(tmp_path)
        self.refused(live, Random, "pass an instance")
        self.refused(live, "uds", "pass an instance")
        self.refused(object(), Random(keep=1), "no get_batch_samples")

    def test_budgets(self, tmp_path: Path) -> None:
        live = trainer(tmp_path, gradient_accumulation_steps=4)
        self.refused(live, Random(keep="1%"), "less than one row of a micro-batch of 8 candidates")
        self.refused(live, Random(keep="1%", window="step"), "less than one row of the step's 4 x 8 candidates")
        live.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
        self.refused(live, Random(keep="1/16", window="step"), "2 rows for 4 micro-batches")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"n_gpu": 2}, "2 GPUs through DataParallel"),
            ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' cuts rows"),
        ],
    )
    def test_arguments(self, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
        live = trainer(tmp_path)
        seen = SimpleNamespace(**{name: getattr(live.args, name) for name in ("n_gpu", "world_size")})
        seen.per_device_train_batch_size, seen.gradient_accumulation_steps = 8, 1
        vars(seen).update(changes)
        live.args = seen
        self.refused(live, Random(keep=1), match)

    @pytest.mark.parametrize(("kind", "word"), [("cp", "context"), ("sp", "sequence"), ("tp", "tensor")])
    def test_parallelism(self, tmp_path: Path, kind: str, word: str) -> None:
        live = trainer(tmp_path)
        config = SimpleNamespace(**{f"{kind}_enabled": True, f"{kind}_size": 2})
        live.accelerator = SimpleNamespace(parallelism_config=config)
        self.refused(live, Random(keep=1), f"{word} parallelism .{kind}_size=2")

    def test_several_processes(self, tmp_path: Path) -> None:
        live = trainer(tmp_path)
        live.args = copy.copy(live.args)
        live.args.__dict__.update(per_device_train_batch_size=4, gradient_accumulation_steps=1)
        with mock.patch.object(type(live.args), "world_size", 8):
            self.refused(live, Greats(keep=1, validation=[]), 'are in different memories; pass scope="local"')
            self.refused(live, Random(keep="1%"), "less than one row of a micro-batch of 4 candidates of 8 processes")
            live.args.average_tokens_across_devices = False
            self.refused(live, Random(keep="1/8"), "is 4 rows for 8 micro-batches")

    def test_processes_that_no_group_joins(self, tmp_path: Path) -> None:
        live = trainer(tmp_path)
        with mock.patch.object(type(live.args), "world_size", 2):
            attach(live, Random(keep=2), quiet=True)
            with pytest.raises(UserError, match=r"2 processes train and torch.distributed joins 1 of them"):
                live.train()

    def test_sharded_models(self, tmp_path: Path) -> None:
        live = trainer(tmp_path)
        live.is_fsdp_enabled = True
        self.refused(live, MaxGrad(keep=1), "FSDP shards the weights, and maxgrad takes gradients of single rows")
        live.is_deepspeed_enabled = True
        plugin = SimpleNamespace(zero_stage=3)
        live.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        self.refused(live, Greats(keep=1, validation=[]), "ZeRO-3 shards the weights, and greats takes gradients")

    def test_images(self, tmp_path: Path) -> None:
        live = trainer(tmp_path, data=Dataset.from_list([{"input_ids": [1], "labels": [1], "images": [0]}]))
        self.refused(live, Random(keep=1), "images")

    def test_columns_that_hold_nothing_are_no_images(self, tmp_path: Path) -> None:
        """Every data set of LLaMA-Factory has the three columns, null where it has none."""
        for empty in (None, []):
            data = Dataset.from_list([{**row, "images": empty, "videos": None, "audios": None} for row in rows(8)])
            live = trainer(tmp_path, data=data)
            attach(live, Random(keep=1), quiet=True)
            detach(live)

    @pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer", "ORPOTrainer", "RewardTrainer", "GRPOTrainer"])
    def test_trainers_of_preferences(self, tmp_path: Path, name: str) -> None:
        live = trainer(tmp_path, cls=type(name, (Trainer,), {}))
        self.refused(live, Random(keep=1), f"{name} trains on pairs, rewards or generated answers")

    def test_collators_of_preferences(self, tmp_path: Path) -> None:
        live = trainer(tmp_path)
        live.data_collator = type("DataCollatorForPreference", (), {})()
        self.refused(live, Random(keep=1), "DataCollatorForPreference trains on pairs")

    def test_classifiers(self, tmp_path: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        from tests.tiny import tiny_config

        model = AutoModelForSequenceClassification.from_config(tiny_config("llama", layers=1, width=16))
        self.refused(trainer(tmp_path, model=model), Random(keep=1), "is a classifier")

    def test_encoder_decoders(self, tmp_path: Path) -> None:
        live = trainer(tmp_path)
        live.model.config.is_encoder_decoder = True
        self.refused(live, Random(keep=1), "encoder-decoder")

    def test_a_resume_without_state(self, tmp_path: Path) -> None:
        trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
        live = trainer(tmp_path, max_steps=3)
        attach(live, Random(keep=2), quiet=True)
        for said in (True, str(tmp_path / "checkpoint-2")):
            with pytest.raises(UserError, match="allow_fresh_selector=True"):
                live.train(resume_from_checkpoint=said)
        detach(live)
        attach(live, Random(keep=2), quiet=True, allow_fresh_selector=True)
        live.train(resume_from_checkpoint=True)
        assert {line["step"] for line in ledger(tmp_path)} == {3}

    def test_batches_that_are_no_rows_of_tokens(self, tmp_path: Path) -> None:
        live = trainer(tmp_path)
        attach(live, Regular(), quiet=True)
        collate = live.data_collator
        live.data_collator = lambda several: {**collate(several), "cu_seq_lens_q": torch.tensor([0, 3])}
        with pytest.raises(UserError, match=r"cu_seq_lens_q covers 3 of the batch.s 8 x"):
            live.train()


def test_a_trainer_on_another_model_family_runs(tmp_path: Path) -> None:
    live = trainer(tmp_path, model=tiny_model("gpt2", layers=1, width=16), padding_side="left", max_steps=2)
    attach(live, Random(keep=2), quiet=True)
    live.train()
    assert len(losses(live)) == 2
