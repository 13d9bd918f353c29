"""Choosing for a target, and near-copies: what the methods cost beside what they cannot do without.

    rds           representations from token ids, against the bare forward over the same ids in the same batches
    less          Adam-preconditioned, projected gradients of all rows of a batch, against the forward and backward pass of
                  a plain LoRA training step over the same batches, and against one row at a time by `autograd.grad`
    near-copies   `--near-duplicates 0.8` of short rows with planted copies (one word changed, a sentence moved)

The bars (CPU): rds <= 1.3 x; less <= 1.6 x the training step and >= 4 x the rows per second of one at a time; a million rows in
10 minutes and 3 GB, >= 99 % of the copies, <= 0.1 % of the clean rows. Runs are interleaved, figures are medians.

Run: python benchmarks/targets.py rds less
     python benchmarks/targets.py near-copies --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from daar_scoring import floor
from machine import describe

from siftune.data.load import load_pool
from siftune.models.backbone import Backbone
from siftune.models.features import TOKEN_BUDGET, batches
from siftune.models.representations import represent
from siftune.models.tokenise import Tokenised
from siftune.models.tokenize_rows import Tokens
from siftune.offline.near_copies import near_copies
from siftune.warmup.row_features import Moments, Projection, RowFeatures, adam_direction, collate

VOCABULARY = 8192


def lengths_of(rows: int) -> np.ndarray[Any, Any]:
    """Tokens of rows, spread as instruction data spreads them."""
    return np.clip(np.exp(np.random.default_rng(0).normal(4.8, 0.6, size=rows)), 16, 512).astype(int)


def network(width: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=3 * width, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def interleaved(rounds: int, **acts: Callable[[], Any]) -> dict[str, float]:
    """Median wall seconds of each act."""
    spent: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():
        act()  # warm
    for _ in range(rounds):
        for name, act in acts.items():
            start = time.perf_counter()
            act()
            spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def rds(args: argparse.Namespace) -> None:
    drawn = np.random.default_rng(1)
    rows = [Tokenised(drawn.integers(3, VOCABULARY, n).astype(np.int32), False) for n in lengths_of(args.rows)]
    with tempfile.TemporaryDirectory() as folder:
        network(args.width, args.layers).save_pretrained(folder)
        backbone = Backbone(folder, layer=args.layers, device="cpu")
        found = interleaved(
            args.rounds,
            floor=lambda: floor(backbone, rows, TOKEN_BUDGET["cpu"]),
            rds=lambda: represent(backbone, rows),
        )
    print(
        f"rds: {len(rows)} rows, {sum(len(row.ids) for row in rows):,} tokens, width {args.width}, {args.layers} layers\n"
    )
    print("| | s | x bare forward |\n|---|---:|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {seconds / found['floor']:.2f} |")
    print()


def less(args: argparse.Namespace) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(network(args.width, args.layers), LoraConfig(r=8, target_modules="all-linear")).eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in weights.values():
        torch.nn.init.normal_(weight, std=0.02)
    moments = {name: Moments(torch.zeros_like(w), torch.full_like(w, 1e-6), 10.0) for name, w in weights.items()}
    drawn = random.Random(1)
    rows = []
    for length in lengths_of(args.rows).tolist():
        ids = [drawn.randrange(3, VOCABULARY) for _ in range(length)]
        rows.append(Tokens(ids, [token if at >= length // 3 else -100 for at, token in enumerate(ids)], False))
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int32)
    features = RowFeatures(model, Projection(8192, 0))
    few = rows[: max(2, len(rows) // 8)]

    def step() -> None:
        for members in batches(lengths, TOKEN_BUDGET["cpu"] // 2):
            model.zero_grad()
            model(**collate([rows[index] for index in members])).loss.backward()

    def alone() -> None:
        for row in few:
            gradients = torch.autograd.grad(model(**collate([row])).loss, list(weights.values()))
            total = torch.zeros(1, 8192)
            for name, gradient in zip(weights, gradients, strict=True):
                features.projection.add(total, name, adam_direction(gradient, moments[name]).reshape(1, -1))

    found = interleaved(args.rounds, step=step, less=lambda: features.of(rows, moments=moments), alone=alone)
    found["alone"] *= len(rows) / len(few)
    print(f"less: {len(rows)} rows, {int(lengths.sum()):,} tokens, LoRA of rank 8, 8,192 numbers a row\n")
    print("| | rows/s | x training step's time |\n|---|---:|---:|")
    for name, title in (("step", "training step"), ("less", "less"), ("alone", "one row at a time")):
        print(f"| {title} | {len(rows) / found[name]:.1f} | {found[name] / found['step']:.2f} |")
    print(f"\nless computes {found['alone'] / found['less']:.1f} x the rows per second of one at a time.\n")


def copies(args: argparse.Namespace) -> None:
    drawn = np.random.default_rng(2)
    words = np.array([f"w{number}" for number in range(50_000)])
    planted = min(2000, args.rows // 10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.jsonl"
        with path.open("w") as file:
            texts: list[list[str]] = []
            for number in range(args.rows):
                text = words[(50_000 * drawn.random(drawn.integers(16, 41)) ** 2).astype(int)].tolist()
                if number < planted:
                    texts.append(list(text))
                file.write(json.dumps({"text": " ".join(text)}) + "\n")
            for number, text in enumerate(texts):
                half = len(text) // 2
                if number % 2:
                    text = text[half:] + text[:half]
                else:
                    text[half] = "changed"
                file.write(json.dumps({"text": " ".join(text)}) + "\n")
        pool = load_pool(str(path), cache=folder)
        start = time.perf_counter()
        found = near_copies(pool, 0.8)
        seconds = time.perf_counter() - start
    clean = sum(row < args.rows for row in found)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print("| rows | minutes | peak memory, GB | copies found | clean rows left out |\n|---:|---:|---:|---:|---:|")
    share = (len(found) - clean) / max(1, planted)
    print(f"| {len(pool):,} | {seconds / 60:.2f} | {memory:.2f} | {share:.2%} | {clean / args.rows:.3%} |\n")


SECTIONS = {"rds": rds, "less": less, "near-copies": copies}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(describe(), "\n")
    for section in arguments.sections:
        SECTIONS[section](arguments)
