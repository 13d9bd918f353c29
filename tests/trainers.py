"""Small live trainers for the tests of the hook: random rows, a tiny model, nothing from the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from siftune.budget import Keep
from siftune.online.base import Batch, Measured, OnlineMethod
from siftune.records import RowScores
from tests.tiny import tiny_model, tiny_tokenizer


@dataclass(kw_only=True, eq=False)
class Drifting(OnlineMethod):
    """A selector whose choice depends on everything it kept before, so that a lost state shows at once.

    Score: the row's mean token id, turned by a phase that every kept row moves.
    """

    name: ClassVar[str] = "drifting"
    keep: Keep
    start_step: int = 0
    window: str = "micro"
    scope: str = "local"
    phase: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    batches: list[Any] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        self.batches.append(batch)
        ids = batch["input_ids"].double()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        mean = (ids * mask).sum(1) / mask.sum(1)
        return Measured(len(ids), {"mean": mean.cpu()})

    def combine(self, measured: Measured) -> RowScores:
        mean = measured.columns["mean"]
        turned = torch.sin(mean * 12.9898 + self.phase)
        return RowScores(turned, {"mean": mean, "alpha": self.phase.expand(len(mean)).clone()})

    def commit(self, measured: Measured, scores: RowScores, kept: torch.Tensor) -> None:
        self.phase = self.phase + measured.columns["mean"][kept].sum() * 0.01

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self.phase.clone(), "note": "any plain value"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["note"] == "any plain value"
        self.phase = state["phase"].clone()


def rows(count: int = 48, *, seed: int = 0, answers: bool = True, longest: int = 30) -> list[dict[str, Any]]:
    """Token rows of mixed length, the first third of each masked as its prompt; with `answers` off every fifth row has
    nothing to learn from."""
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        ids = generator.integers(5, 250, size=int(generator.integers(6, longest))).tolist()
        prompt = len(ids) // 3
        labels = [-100] * prompt + ids[prompt:]
        if not answers and index % 5 == 0:
            labels = [-100] * len(ids)
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return made


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """Training arguments for a silent run on the CPU."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4 leaves an earlier trainer's bf16 behind
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }


def trainer(
    folder: Path,
    *,
    data: Any = None,
    model: Any = None,
    family: str = "llama",
    padding_side: str = "right",
    multiple: int | None = None,
    cls: type[Trainer] = Trainer,
    eval_data: Any = None,
    **more: Any,
) -> Trainer:
    """A plain `Trainer` over `rows()` on a fresh tiny model (the same weights every time)."""
    tokenizer = tiny_tokenizer(padding_side=padding_side)
    model = tiny_model(family, layers=2, width=16) if model is None else model
    return cls(
        model=model,
        args=TrainingArguments(**arguments(folder, **more)),
        train_dataset=Dataset.from_list(rows()) if data is None else data,
        eval_dataset=eval_data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple),
        processing_class=tokenizer,
    )


def losses(live: Trainer) -> list[float]:
    """The logged training losses, in order."""
    return [line["loss"] for line in live.state.log_history if "loss" in line]


def weights(live: Trainer) -> dict[str, torch.Tensor]:
    """The trained weights, copied."""
    return {name: value.detach().clone() for name, value in live.model.state_dict().items()}


def ledger(folder: Path) -> list[dict[str, Any]]:
    """The merged ledger as rows."""
    lines: list[dict[str, Any]] = pq.read_table(folder / "siftune" / "selection.parquet").to_pylist()
    return lines


def kept_rows(folder: Path, step: int) -> list[int]:
    """Rows of the training set trained on at `step`, in order."""
    return [line["row"] for line in ledger(folder) if line["step"] == step and line["kept"]]


def loss_by_hand(model: Any, chosen: list[dict[str, Any]]) -> float:
    """Cross-entropy over all label tokens of the rows, each row alone and unpadded, in float64: the naive definition."""
    total, count = 0.0, 0
    model = model.double().eval()
    for row in chosen:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        learnt = labels[1:] != -100
        picked = torch.log_softmax(logits[:-1], dim=-1)[learnt, labels[1:][learnt]]
        total, count = total - float(picked.sum()), count + int(learnt.sum())
    return total / count
