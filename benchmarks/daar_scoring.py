"""DaaR's features over a pool: ours, from text, against the bare forward and against one padded row at a time.

    floor    the truncated model's forward over the same token ids in the same batches, nothing else
    ours     `siftune.models.features.extract`: tokenisation, forward, means over real tokens
    padded   batch 1, padded to 1,024, mask given, mean over all positions, as DaaR's released code works; on a sample
             of rows, for its cost per row does not depend on the row

The bars: ours <= 1.3 x floor, and padded / ours >= 90 % of padded tokens / real tokens (CPU). The three are
interleaved, figures are medians over the rounds. Peak memory at 10,000 and 100,000 rows is scoring_memory.py's.

Run: python benchmarks/daar_scoring.py --pool pool.jsonl.gz ... --model DIR [--rows N] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

from siftune.models.backbone import Backbone
from siftune.models.features import TOKEN_BUDGET, batches, extract
from siftune.models.tokenise import Tokenised, tokenise

PADDED = 1024


def read_texts(paths: list[str], rows: int, seed: int) -> list[str]:
    """`rows` rows drawn from the files, their non-empty string fields but `source` on lines of their own."""
    texts = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as lines:
            for line in lines:
                fields = {name: value for name, value in json.loads(line).items() if name != "source"}
                texts.append("\n".join(value for value in fields.values() if isinstance(value, str) and value))
    drawn = np.random.default_rng(seed).permutation(len(texts))[:rows]
    return [texts[index] for index in drawn]


def made_texts(rows: int, seed: int) -> list[str]:
    """Rows of made-up words, with lengths spread as instruction data spreads them."""
    draw = np.random.default_rng(seed)
    words = ["".join(draw.choice(list("abcdefghijklmnopqrst"), size=draw.integers(2, 10))) for _ in range(5000)]
    lengths = np.clip(np.exp(draw.normal(4.5, 0.8, size=rows)), 5, 700).astype(int)
    return [" ".join(words[index] for index in draw.integers(0, len(words), size=length)) for length in lengths]


def floor(backbone: Backbone, rows: list[Tokenised], budget: int) -> None:
    """The forward alone."""
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int32)
    for batch in batches(lengths, budget):
        longest = int(lengths[batch].max())
        ids_BT = np.zeros((len(batch), longest), dtype=np.int64)
        for place, index in enumerate(batch):
            ids_BT[place, : lengths[index]] = rows[index].ids
        with torch.no_grad():
            backbone.network(input_ids=torch.from_numpy(ids_BT).to(backbone.torch_device), use_cache=False)


def padded(backbone: Backbone, texts: list[str]) -> None:
    """One row at a time, padded, the mean over every position."""
    tokenizer = backbone.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for text in texts:
        batch = tokenizer(text, return_tensors="pt", padding="max_length", truncation=True, max_length=PADDED)
        inputs = {name: batch[name].to(backbone.torch_device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            backbone.network(**inputs, use_cache=False).last_hidden_state.mean(dim=1).cpu()


def timed(backbone: Backbone, act: Callable[[], Any]) -> float:
    """Wall seconds, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if backbone.torch_device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    act()
    wait()
    return time.perf_counter() - start


def measure(backbone: Backbone, texts: list[str], *, rounds: int, sample: int) -> dict[str, Any]:
    """Medians over interleaved rounds, and what follows from them."""
    budget = TOKEN_BUDGET.get(backbone.torch_device.type, TOKEN_BUDGET["cuda"])
    rows = tokenise(backbone, texts)
    few = texts[:sample]
    floor(backbone, rows[:32], budget), extract(backbone, texts[:32]), padded(backbone, texts[:2])  # warm
    spent: dict[str, list[float]] = {"floor": [], "ours": [], "padded": [], "tokenise": []}
    for _ in range(rounds):
        spent["floor"].append(timed(backbone, lambda: floor(backbone, rows, budget)))
        spent["ours"].append(timed(backbone, lambda: extract(backbone, texts)))
        spent["padded"].append(timed(backbone, lambda: padded(backbone, few)) / len(few) * len(texts))
        spent["tokenise"].append(timed(backbone, lambda: tokenise(backbone, texts)))
    seconds = {name: statistics.median(values) for name, values in spent.items()}
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    batched = sum(len(batch) * int(lengths[batch].max()) for batch in batches(lengths.astype(np.int32), budget))
    real = int(lengths.sum())
    ratio = PADDED * len(rows) / real
    return {
        "rows": len(rows),
        "real_tokens": real,
        "tokens_per_second": real / seconds["ours"],
        "our_padding": batched / real - 1,
        "seconds": seconds,
        "ours_over_floor": statistics.median(np.divide(spent["ours"], spent["floor"])),
        "padded_over_ours": statistics.median(np.divide(spent["padded"], spent["ours"])),
        "padded_over_real_tokens": ratio,
        "share_of_that_ratio": statistics.median(np.divide(spent["padded"], spent["ours"])) / ratio,
        "rounds": rounds,
        "padded_sample": len(few),
    }


def show(figures: dict[str, Any], backbone: Backbone) -> None:
    """The table and the JSON."""
    seconds = figures["seconds"]
    told = f"{figures['rows']} rows, {figures['real_tokens']} real tokens, layers 1 to {backbone.layer}"
    print(f"{describe()}\n\n{told}, {backbone.torch_dtype}, {backbone.torch_device.type}\n")
    print("| | seconds | rows/s | against ours |\n|---|---|---|---|")
    for name in ("floor", "ours", "padded", "tokenise"):
        rate = figures["rows"] / seconds[name]
        print(f"| {name} | {seconds[name]:.2f} | {rate:.1f} | {seconds[name] / seconds['ours']:.2f} x |")
    print(f"\n- ours / floor: {figures['ours_over_floor']:.3f} (bar: <= 1.3)")
    print(f"- padded / ours: {figures['padded_over_ours']:.2f} x; tokens: {figures['padded_over_real_tokens']:.2f} x; ")
    print(f"  share: {figures['share_of_that_ratio']:.0%} (bar: >= 90 % on CPU, >= 50 x on a GPU)")
    print(f"- padding inside our batches: {figures['our_padding']:.2%}\n\n```json\n{json.dumps(figures)}\n```")


def memory() -> None:
    """Peak memory at two pool sizes, each in a fresh process."""
    script = Path(__file__).with_name("scoring_memory.py")
    print("\n| distinct rows | peak above the model |\n|---|---|")
    for rows in (10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            said = subprocess.run(
                [sys.executable, str(script), "--rows", str(rows), "--folder", folder],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        print(f"| {rows:,} | {json.loads(said)['above_model_mb']:.0f} MB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", nargs="*", default=[], help="JSONL files, .gz allowed; made-up rows without")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="also peak memory at 10,000 and 100,000 rows")
    said = parser.parse_args()
    backbone = Backbone(said.model, layer=said.layer, device=said.device, dtype=said.dtype, max_length=PADDED)
    texts = read_texts(said.pool, said.rows, said.seed) if said.pool else made_texts(said.rows, said.seed)
    show(measure(backbone, texts, rounds=said.rounds, sample=said.sample), backbone)
    if said.memory:
        memory()


if __name__ == "__main__":
    main()
