"""One optimiser step, in parts: the model shapes, the adapters and the timing that train_step.py and gpu.py share.

A step "on all" trains C candidates in micro-batches of K rows; a step "sifted" scores the same C candidates and trains
the K best. Rows/s counts candidates read, so the ratio of the two is the speed-up at the same number of rows read.

Axes: `C` candidates of a step, `K` rows kept, `T` columns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

import siftune
from siftune.models.head import factorise, read_head
from siftune.models.hidden_states import iter_hidden_states, real_tokens, unwrap_model

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 8_192, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3_584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen2.5's own shapes beside a small one; weights are random."""


class Adapter(nn.Module):
    """LoRA on one linear layer (r = 8, as in the UDS paper), without needing peft."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, rank, bias=False, **place)
        self.up = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base(inputs) + 2.0 * self.up(self.down(inputs))


def build(shape: str, *, device: str, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """A Qwen2 of that shape with random weights, made on the device."""
    settings = {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**settings), dtype=dtype)
    return model.train()


def make_trainable(model: PreTrainedModel, what: str) -> None:
    """`lora`: adapters on every linear layer of the decoder. `full`: everything. `frozen head`: all but the head."""
    model.requires_grad_(what != "lora")
    if what == "frozen head":
        model.get_output_embeddings().requires_grad_(False)
        model.get_input_embeddings().requires_grad_(False)
    if what == "lora":
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Adapter(child))


def checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Recompute each layer in the backward pass, or not."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def candidates(model: PreTrainedModel, rows: int, columns: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """`rows` rows of random ids, all of them `columns` long: no speed is won from padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (rows, columns), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def some(batch: Mapping[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """Rows `start .. stop - 1`."""
    return {name: value[start:stop] for name, value in batch.items()}


class Step:
    """The timed parts of one optimiser step on one model."""

    def __init__(self, model: PreTrainedModel, *, rows: int, keep: int, columns: int) -> None:
        self.model, self.rows, self.keep, self.columns = model, rows, keep, columns
        self.batch = candidates(model, rows, columns)
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        self.selector = siftune.UDS(keep=keep, score_tokens=keep * columns)

    def train(self, batch: Mapping[str, torch.Tensor], parts: int) -> None:
        """Forward and backward in `parts` micro-batches."""
        size = len(batch["input_ids"]) // parts
        for part in range(parts):
            loss = self.model(**some(batch, part * size, (part + 1) * size), use_cache=False).loss / parts
            loss.backward()

    def update(self) -> None:
        """The optimiser's step (plain SGD: the same for both, and small)."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_all(self) -> None:
        """Train on every candidate."""
        self.train(self.batch, self.rows // self.keep)
        self.update()

    def sifted(self) -> None:
        """Score every candidate, train on the kept ones."""
        kept = self.selector.select(self.model, self.batch)
        self.train(kept.batch, 1)
        self.update()

    # --- the parts that bound it ------------------------------------------------------------------------------------

    def forward(self) -> None:
        """The candidates' forward pass alone, as scoring needs it."""
        for _ in iter_hidden_states(
            unwrap_model(self.model), self.batch, real_tokens(self.batch), score_tokens=self.keep * self.columns
        ):
            pass

    def train_kept(self) -> None:
        """Forward, backward and update of K rows."""
        self.train(some(self.batch, 0, self.keep), 1)
        self.update()

    def refresh(self) -> None:
        """What a trained head costs once per step: its Gram factor and its sketch."""
        head = read_head(unwrap_model(self.model))
        assert head is not None
        with torch.no_grad():
            factorise(head)
            head.project(self.selector.sketch.columns)

    @property
    def trains_head(self) -> bool:
        """Whether training moves the head."""
        return self.model.get_output_embeddings().weight.requires_grad


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall time of one call, with the device drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(works: Mapping[str, Callable[[], Any]], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each, round by round, taken in turns in one run, after one warm-up each."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            taken = seconds(work, device)
            if repeat:
                spent[name].append(taken)
    return spent


def paired(works: Mapping[str, Callable[[], Any]], *, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each, from `in_turns`."""
    return {name: statistics.median(values) for name, values in in_turns(works, repeats=repeats, device=device).items()}


def measure(step: Step, *, repeats: int, device: str) -> dict[str, float]:
    """The step on all, the sifted step, their parts, the ratio and its limit."""
    step.sifted()  # the sketch draws its columns at first use
    works: dict[str, Callable[[], Any]] = {"on_all": step.on_all, "sifted": step.sifted}
    works |= {"candidates_forward": step.forward, "kept_step": step.train_kept}
    if step.trains_head:
        works["head_refresh"] = step.refresh
    spent = paired(works, repeats=repeats, device=device)
    spent.setdefault("head_refresh", 0.0)
    least = spent["candidates_forward"] + spent["kept_step"] + spent["head_refresh"]
    ratio, limit = spent["on_all"] / spent["sifted"], spent["on_all"] / least
    return {**spent, "ratio": ratio, "limit": limit, "of_limit": ratio / limit}


def naive_scores(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], signs: torch.Tensor
) -> list[tuple[float, torch.Tensor]]:
    """Each row's nuclear norm from its logits, and its FFT sketch, as the method's text has it: no shortcut."""
    scores = []
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
        for row in logits.float():
            spectrum = torch.fft.fft(row * signs, dim=1).real[:, :128]
            sketch = torch.fft.fft(spectrum, dim=0).real[:8]
            scores.append((float(torch.linalg.svdvals(row).sum()), sketch))
    return scores


def peak_beyond(first: Callable[[], Any], second: Callable[[], Any]) -> float:
    """MB by which the CUDA allocator's peak during `second` exceeds that during `first`."""
    peaks = []
    for work in (first, second):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        peaks.append(torch.cuda.max_memory_allocated() / 2**20)
    return peaks[1] - peaks[0]
