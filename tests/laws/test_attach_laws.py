"""Laws of the hook: keep = all is the plain trainer bit for bit; the loss is that of the kept rows and no others;
how the step is cut into micro-batches does not matter; the trainer's random state, flags and gradients are its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import Trainer

from siftune import attach, registry
from siftune.online.simple import Regular
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import Drifting, arguments, kept_rows, ledger, loss_by_hand, losses, rows, trainer, weights

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")


def lora(model: Any, *, dropout: float = 0.0) -> Any:
    """The model with small adapters on every linear layer, the same ones every time."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def dropping(rate: float = 0.1) -> Any:
    """A tiny GPT-2 with dropout on, so that a changed random state changes the weights."""
    return tiny_model("gpt2", layers=2, width=16, attn_pdrop=rate, resid_pdrop=rate, embd_pdrop=rate)


SETTINGS = {
    "llama": {},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
}


class TestKeepAll:
    @pytest.mark.parametrize(("setting", "window"), [*((name, "micro") for name in SETTINGS), ("accumulation", "step")])
    def test_a_trainer_is_untouched(self, tmp_path: Path, setting: str, window: str) -> None:
        self.same(tmp_path, lambda: None, Drifting(keep="all", window=window), **SETTINGS[setting])

    @pytest.mark.parametrize("model", ["gpt2 dropout", "lora dropout"])
    def test_dropout_sees_the_same_random_numbers(self, tmp_path: Path, model: str) -> None:
        def make() -> Any:
            return dropping() if model.startswith("gpt2") else lora(tiny_model(layers=2, width=16), dropout=0.3)

        self.same(tmp_path, make, Regular(), gradient_accumulation_steps=2)

    def same(self, folder: Path, make: Any, selector: Any, **more: Any) -> None:
        plain, sifted = (trainer(folder / name, model=make(), **more) for name in ("plain", "sifted"))
        torch.manual_seed(3)
        plain.train()
        torch.manual_seed(3)
        attach(sifted, selector, quiet=True)
        sifted.train()
        assert losses(sifted) == losses(plain)
        ours = weights(sifted)
        assert all(torch.equal(value, ours[name]) for name, value in weights(plain).items())

    def test_an_sft_trainer_is_untouched(self, tmp_path: Path) -> None:
        results = []
        for name in ("plain", "sifted"):
            live = sft(tmp_path / name, gradient_accumulation_steps=2)
            if name == "sifted":
                attach(live, Regular(), quiet=True)
            live.train()
            results.append((losses(live), weights(live)))
        assert results[0][0] == results[1][0]
        assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def prompt_completion(count: int = 32) -> Dataset:
    """Arithmetic questions, as prompt and completion."""
    return Dataset.from_list(
        [
            {"prompt": f"{index} and {index * 7 % 11}?" + "?" * (index % 9), "completion": f" {index}!"}
            for index in range(count)
        ]
    )


def chats(count: int = 32) -> Dataset:
    """Two-turn chats."""

    def talk(index: int) -> list[dict[str, str]]:
        said = [("user", "hi" * (index % 5 + 1)), ("assistant", f"yes {index}"), ("user", "so?"), ("assistant", "end")]
        return [{"role": role, "content": content} for role, content in said]

    return Dataset.from_list([{"messages": talk(index)} for index in range(count)])


def sft(folder: Path, *, data: Dataset | None = None, model: Any = None, **more: Any) -> Any:
    """A real `SFTTrainer` over text."""
    settings = arguments(folder, max_length=64, gradient_checkpointing=False, **more)
    return trl.SFTTrainer(
        model=tiny_model(layers=2, width=16) if model is None else model,
        args=trl.SFTConfig(**{"bf16": False, **settings}),
        train_dataset=prompt_completion() if data is None else data,
        processing_class=tiny_tokenizer(),
    )


class TestLossIsThatOfTheKeptRows:
    """The first logged loss (transformers 4 rounds it to 4 decimals) against a hand-made batch of the rows that the
    ledger says were kept."""

    @pytest.mark.parametrize("window", ["micro", "step"])
    @pytest.mark.parametrize(
        ("more", "tolerance"),
        [
            ({}, 2e-5),
            ({"gradient_accumulation_steps": 3}, 2e-5),
            ({"padding_side": "left", "multiple": 8, "gradient_accumulation_steps": 2}, 2e-5),
            ({"family": "gpt2", "padding_side": "left", "gradient_accumulation_steps": 2}, None),
            ({"bf16": True, "gradient_accumulation_steps": 2}, 2e-2),
            ({"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, 2e-5),
        ],
        ids=["plain", "accumulation", "left", "gpt2-left", "bf16", "checkpointing"],
    )
    def test_trainer(self, tmp_path: Path, more: dict[str, Any], tolerance: float | None, window: str) -> None:
        if more.get("family") == "gpt2":
            more = {**more, "model": dropping(0.0)}
        live = trainer(tmp_path, max_steps=1, **more)
        before = copy.deepcopy(live.model)
        attach(live, Drifting(keep="1/4", window=window), quiet=True)
        live.train()
        kept = [rows()[row] for row in kept_rows(tmp_path, 1)]
        assert len(kept) == 2 * more.get("gradient_accumulation_steps", 1)
        if tolerance is None:  # absolute positions of left-padded rows are the padded ones: compare with such a batch
            assert losses(live)[0] == pytest.approx(self.padded_loss(live, before, kept), rel=1e-4)
        else:
            assert losses(live)[0] == pytest.approx(loss_by_hand(before, kept), rel=tolerance)

    @staticmethod
    def padded_loss(live: Trainer, model: Any, kept: list[dict[str, Any]]) -> float:
        """The kept rows one by one, padded to the width their own micro-batch had: no positions may have moved."""
        total, count = 0.0, 0
        candidates = [rows()[line["row"]] for line in ledger(Path(live.args.output_dir))]
        per_micro = [candidates[:8], candidates[8:16]]
        for row in kept:
            width = max(len(one["input_ids"]) for one in next(part for part in per_micro if row in part))
            pad = width - len(row["input_ids"])
            ids = torch.tensor([[0] * pad + row["input_ids"]])
            mask = torch.tensor([[0] * pad + row["attention_mask"]])
            labels = torch.tensor([[-100] * pad + row["labels"]])
            with torch.no_grad():
                loss = model.eval()(input_ids=ids, attention_mask=mask, labels=labels).loss
            learnt = int((labels[:, 1:] != -100).sum())
            total, count = total + float(loss) * learnt, count + learnt
        return total / count

    @pytest.mark.parametrize("window", ["micro", "step"])
    @pytest.mark.parametrize("kind", ["completion", "assistant", "everything", "lora"])
    def test_sft_trainer(self, tmp_path: Path, kind: str, window: str) -> None:
        def make() -> Any:
            model = tiny_model(layers=2, width=16)
            return lora(model) if kind == "lora" else model

        more: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 1}
        if kind == "assistant":
            more |= {"assistant_only_loss": True, "data": chats()}
        if kind == "everything":
            more |= {"completion_only_loss": False}
        live = sft(tmp_path, model=make(), **more)
        before, data, collate = make(), live.train_dataset, live.data_collator
        attach(live, Drifting(keep="1/4", window=window), quiet=True)
        live.train()
        kept = kept_rows(tmp_path, 1)
        assert len(kept) == 4
        chosen = [{name: column[0].tolist() for name, column in collate([data[row]]).items()} for row in kept]
        if kind != "everything":
            assert all(-100 in row["labels"] for row in chosen)
        expected = loss_by_hand(before, chosen)
        if (
            kind == "everything" and transformers.__version__ < "5"
        ):  # it also counts first tokens, which no one predicts
            learnt = sum(len(row["labels"]) for row in chosen)
            expected *= (learnt - len(chosen)) / learnt
        assert losses(live)[0] == pytest.approx(expected, rel=2e-5)


class TestHowTheStepIsCut:
    @pytest.mark.parametrize(("keep", "shape"), [("1/2", (1, 8)), ("1/4", (2, 4)), ("all", (1, 8)), ("1/8", (4, 2))])
    def test_accumulation_makes_no_difference_over_the_step(
        self, tmp_path: Path, keep: Any, shape: tuple[int, int]
    ) -> None:
        """8 candidates a step, as 1 x 8 and as 8 x 1, 4 x 2 or 2 x 4: the same rows, the same weights to rounding."""
        results = []
        for index, (size, accumulation) in enumerate([(8, 1), shape]):
            live = trainer(
                tmp_path / str(index),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=0.1,
            )
            attach(live, Drifting(keep=keep, window="step"), quiet=True)
            live.train()
            results.append(
                ([kept_rows(tmp_path / str(index), step) for step in range(1, 7)], losses(live), weights(live))
            )
        (chosen, lost, trained), (chosen2, lost2, trained2) = results
        assert chosen == chosen2
        assert lost2 == pytest.approx(lost, rel=1e-4)
        for name, value in trained.items():
            torch.testing.assert_close(trained2[name], value, rtol=1e-4, atol=1e-5)


class TestNothingElseMoves:
    def test_training_flags_gradients_and_random_state(self, tmp_path: Path) -> None:
        live = trainer(tmp_path, model=dropping(), max_steps=2)
        seen: list[tuple[bool, ...]] = []
        attachment = attach(live, registry.find("online", "uds").load()(keep=2), quiet=True)
        sift = attachment._select

        def watched(*args: Any) -> Any:
            live.model.train()
            live.model.transformer.h[0].eval()  # a part the user keeps in eval mode
            flags = [module.training for module in live.model.modules()]
            state = torch.get_rng_state()
            trained = sift(*args)
            same_flags = flags == [module.training for module in live.model.modules()]
            no_gradients = all(p.grad is None or not p.grad.any() for p in live.model.parameters())
            seen.append((same_flags, torch.equal(state, torch.get_rng_state()), no_gradients))
            return trained

        attachment._select = watched  # type: ignore[method-assign]
        live.train()
        assert seen == [(True, True, True)] * 2
