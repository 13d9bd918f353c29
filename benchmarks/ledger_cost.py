"""A loss log of every row: one optimiser step with `siftune.attach(trainer, siftune.Regular())` against a plain step.

The same trainer, model and rows; plain and logged runs alternate, and each figure is a median over all steps but the
first of each run. `inside` is the time that the attachment itself takes in a step (token ids, the reading of the losses,
the ledger), measured in the same runs. On a CPU all figures are processor seconds, so that what else the machine does
does not enter. The bar: 2 % of the step.

Run: python benchmarks/ledger_cost.py
     python benchmarks/ledger_cost.py --shape 0.5b --rows 4 --columns 128 --steps 4 --rounds 2
     python benchmarks/ledger_cost.py --device cuda --shape 0.5b --rows 16 --columns 512
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from machine import describe
from steps import SHAPES, build, make_trainable
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import siftune


def clock(device: str) -> float:
    """Processor seconds of this process on a CPU, else seconds."""
    return time.process_time() if device == "cpu" else time.perf_counter()


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(clock(self.device))

    @property
    def seconds(self) -> list[float]:
        return [stop - start for start, stop in zip(self.ends, self.ends[1:], strict=False)]


class Inside:
    """Time spent in the attachment's own code."""

    def __init__(self, attachment: Any, device: str) -> None:
        self.seconds = 0.0
        self.device = device
        self._wrap(attachment, "_select")
        reading = attachment._losses.reading

        @contextlib.contextmanager
        def timed_reading(model: torch.nn.Module, inputs: Any) -> Iterator[None]:
            hooks = set(model._forward_hooks)
            started = clock(self.device)
            context = reading(model, inputs)
            context.__enter__()
            self.seconds += clock(self.device) - started
            for name in set(model._forward_hooks) - hooks:
                model._forward_hooks[name] = self._timed(model._forward_hooks[name])
            try:
                yield
            finally:
                context.__exit__(None, None, None)

        attachment._losses.reading = timed_reading

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.device == "cuda":
                torch.cuda.synchronize()
            started = clock(self.device)
            try:
                return function(*args, **kwargs)
            finally:
                if self.device == "cuda":
                    torch.cuda.synchronize()
                self.seconds += clock(self.device) - started

        return timed

    def _wrap(self, owner: Any, name: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name)))


def train(model: Any, data: Dataset, options: argparse.Namespace, *, logged: bool) -> tuple[list[float], float]:
    """Seconds of each step but the first, and the seconds per step inside the attachment."""
    times = StepTimes(options.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, per_device_train_batch_size=options.rows, max_steps=options.steps + 1, learning_rate=1e-5,
            save_strategy="no", report_to="none", use_cpu=options.device == "cpu", disable_tqdm=True,
            logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, args, data_collator=default_data_collator, train_dataset=data, callbacks=[times])
        inside = None
        if logged:
            inside = Inside(siftune.attach(trainer, siftune.Regular(), quiet=True), options.device)
        trainer.train()
        if logged:
            table = siftune.open_ledger(Path(folder)).trained()
            assert table["loss"].null_count == 0
            assert len(table) == options.rows * (options.steps + 1)
    return times.seconds, (inside.seconds if inside else 0.0) / (options.steps + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=["lora", "full"])
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    print(describe())
    print(f"\n{options.shape} shape, {options.rows} rows of {options.columns} tokens, half of them labels, {dtype}; medians of "
          f"{options.rounds} x {options.steps} steps\n")  # fmt: skip
    print("| trained | plain step | with the log | difference | inside the attachment | of the step |")
    print("|---|---|---|---|---|---|")
    for setting in options.settings:
        torch.manual_seed(0)
        model = build(options.shape, device=options.device, dtype=dtype, layers=None)
        make_trainable(model, setting)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(5, vocabulary, (options.rows * (options.steps + 1), options.columns))
        labels = ids.clone()
        labels[:, : options.columns // 2] = -100
        data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
        plain: list[float] = []
        logged: list[float] = []
        inside: list[float] = []
        for _ in range(options.rounds):
            plain += train(model, data, options, logged=False)[0]
            seconds, own = train(model, data, options, logged=True)
            logged += seconds
            inside.append(own)
        step, with_log, own = statistics.median(plain), statistics.median(logged), statistics.median(inside)
        print(f"| {setting} | {step:.3f} s | {with_log:.3f} s | {with_log / step - 1:+.1%} | {own * 1000:.1f} ms | {own / step:.1%} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
