"""The online half of the demo: the embedded model fine-tuned for a few steps, with and without UDS.

Every run trains the same number of rows with the same schedule, so the held-out losses are compared at equal budget; they
are reported as measured. Shapes: `B` rows, `T` tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from ..models.load import quiet
from ..progress import current
from ..sft.progress_callback import ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINED = 4
"""Rows trained per step."""
CANDIDATES = 16
"""Rows that UDS chooses them from."""
RATE = 5e-4
HELD_OUT_ROWS = 200
FORM = "### Question\n{question}\n\n### Answer\n"
"""A prompt format that is new to the embedded model, so that there is something to learn."""
THREADS = 1
"""More threads slow so small a model down; one thread also gives the same losses under any load of the machine."""

TokenRows = list[dict[str, list[int]]]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(
    model: Path,
    rows: Sequence[Mapping[str, str]],
    held_out: Sequence[Mapping[str, str]],
    folder: Path,
    *,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Fine-tune twice from the same weights and measure both on the same held-out rows.

    Returns `steps`, `trained_rows`, `held_out_rows`, `loss_before` and, per run, `loss` (mean cross-entropy of an
    answer token, in nats), `candidates` and `seconds`. The global random state is left as it was.
    """
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(model)
    train, held = tokenised(tokenizer, rows), tokenised(tokenizer, held_out[:HELD_OUT_ROWS])
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        before, runs = _runs(model, tokenizer, train, held, folder, steps=steps, seed=seed)
    finally:
        torch.set_num_threads(threads)
    return {
        "steps": steps,
        "trained_rows": steps * TRAINED,
        "held_out_rows": len(held),
        "loss_before": round(before, 4),
        "runs": runs,
    }


def _runs(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    train: TokenRows,
    held: TokenRows,
    folder: Path,
    *,
    steps: int,
    seed: int,
) -> tuple[float, dict[str, Any]]:
    from ..online.uds import UDS

    collate = DataCollatorForSeq2Seq(tokenizer)
    before = held_out_loss(load(model), held, collate)
    runs = {}
    for name, selector in (("plain", None), ("uds", UDS(keep=TRAINED, seed=seed))):
        candidates = TRAINED if selector is None else CANDIDATES
        trained, seconds = fine_tune(
            load(model),
            train,
            collate,
            folder / name,
            selector,
            candidates=candidates,
            steps=steps,
            seed=seed,
        )
        loss = held_out_loss(trained, held, collate)
        runs[name] = {"loss": round(loss, 4), "candidates": candidates * steps, "seconds": round(seconds, 2)}
    return before, runs


def load(model: Path) -> Any:
    """The model in float32, without the loader's messages."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(model)


def fine_tune(
    model: PreTrainedModel,
    rows: TokenRows,
    collate: Any,
    folder: Path,
    selector: Any,
    *,
    candidates: int,
    steps: int,
    seed: int,
) -> tuple[Any, float]:
    """`steps` optimiser steps of full fine-tuning on the CPU, with `selector` where there is one; returns the model and the seconds."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=candidates,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    with torch.random.fork_rng(devices=[]):  # the trainer seeds the global generators
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressCallback(current(), lambda line: None))
        if selector is not None:
            from ..hook.attach import attach

            attach(trainer, selector, quiet=True)
        started = perf_counter()
        trainer.train()
        return model.eval(), perf_counter() - started


def tokenised(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]]) -> TokenRows:
    """Rows in the new prompt format, with labels only on the answer's tokens and the end token."""
    token_rows = []
    for row in rows:
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        prompt = tokenizer.encode(FORM.format(question=question), add_special_tokens=False)
        answer = [*tokenizer.encode(row["output"], add_special_tokens=False), tokenizer.eos_token_id]
        ids = prompt + answer
        labels = [-100] * len(prompt) + answer
        token_rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return token_rows


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: TokenRows, collate: Any) -> float:
    """Mean cross-entropy of an answer token, in nats."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(rows), CANDIDATES):
        batch_BT = collate(rows[start : start + CANDIDATES])
        logits = model(input_ids=batch_BT["input_ids"], attention_mask=batch_BT["attention_mask"]).logits[:, :-1]
        labels = batch_BT["labels"][:, 1:]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        tokens += int((labels != -100).sum())
    return total / tokens
