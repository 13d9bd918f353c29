"""Padded against packed batches, plain against sifted, on rows with the lengths of real pools.

A padded micro-batch holds R rows as wide as its longest; a packed one holds the same rows in one line, whose position_ids
restart. Both are trained on all rows, and sifted by UDS with keep = 1/8, in turns in one run. Candidates per second count rows
read, label tokens per second tokens that the loss is taken from. The last table holds scoring alone against one forward pass over
the same packed line.

Bar: scoring a packed batch costs at most 1.05 x the forward pass over the same real tokens.
Run: python benchmarks/packing.py [--pools FOLDER]      (JSONL pools; without them the demo's corpus)
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import describe
from steps import build, make_trainable, paired

import siftune
from siftune.models.hidden_states import iter_hidden_states, real_tokens, unwrap_model
from siftune.models.layout import layout_of, with_layout

LONGEST = 512
"""Tokens of a row at most."""


def lengths_of_pool(path: Path, *, rows: int, seed: int) -> list[int]:
    """Tokens of drawn rows, four bytes to a token, as byte-level BPE has them on English text."""
    generator = torch.Generator().manual_seed(seed)
    reader: Any = gzip.open if path.suffix == ".gz" else open
    with reader(path, "rt", encoding="utf-8") as handle:
        records = [json.loads(line) for line in handle]
    chosen = torch.randperm(len(records), generator=generator)[:rows].tolist()
    texts = [
        " ".join(str(records[index].get(key, "")) for key in ("instruction", "input", "output")) for index in chosen
    ]
    return [max(8, min(LONGEST, len(text.encode()) // 4)) for text in texts]


def lengths_of_demo(*, rows: int, seed: int) -> list[int]:
    """The same of the demo's corpus."""
    from siftune.demo import corpus

    texts = [" ".join(row.values()) for row in corpus.rows(rows, seed)]
    return [max(8, min(LONGEST, len(text.encode()) // 4)) for text in texts]


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def train(model: Any, batch: Any) -> None:
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad()


def sifted(selector: Any, model: Any, batch: Any) -> int:
    kept = selector.select(model, batch)
    train(model, dict(kept.batch))
    return int((kept.batch["labels"] != -100).sum())


def measure(name: str, lengths: list[int], size: int, repeats: int) -> tuple[list[str], str]:
    """The lines of both tables for one distribution of lengths."""
    torch.manual_seed(0)
    model = build("small", device="cpu", dtype=torch.float32)
    make_trainable(model, "lora")
    rows = [torch.randint(5, model.config.vocab_size, (length,)) for length in lengths[:size]]
    batches = {"padded": padded(rows), "packed": packed(rows)}
    selectors = {kind: siftune.UDS(keep="1/8") for kind in batches}
    labels: dict[str, int] = {}
    works: dict[str, Callable[[], Any]] = {}
    for kind, batch in batches.items():
        works[f"{kind}, all"] = lambda batch=batch: train(model, batch)
        works[f"{kind}, sifted"] = lambda kind=kind, batch=batch: labels.update(
            {kind: sifted(selectors[kind], model, batch)}
        )
    line = with_layout(batches["packed"])
    works["scoring"] = lambda: selectors["packed"].score(model, batches["packed"])
    works["forward"] = lambda: [None for _ in iter_hidden_states(unwrap_model(model), line, real_tokens(line))]
    spent = paired(works, repeats=repeats, device="cpu")
    assert len(layout_of(batches["packed"])) == size
    share = sum(lengths[:size]) / (size * max(lengths[:size]))
    table = []
    for kind, batch in batches.items():
        for step, tokens in (("all", int((batch["labels"] != -100).sum())), ("sifted", labels[kind])):
            took = spent[f"{kind}, {step}"]
            table.append(f"| {name} | {share:.0%} | {kind} | {step} | {size / took:.1f} | {tokens / took:,.0f} |")
    return table, f"| {name} | {sum(lengths[:size])} | {spent['scoring'] / spent['forward']:.2f} x |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", type=Path, help="folder of JSONL pools (.jsonl or .jsonl.gz)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.pools is None:
        pools = {"demo corpus": lengths_of_demo(rows=options.rows, seed=0)}
    else:
        paths = [path for path in sorted(options.pools.glob("*.jsonl*")) if "heldout" not in path.name]
        pools = {path.name.split(".")[0]: lengths_of_pool(path, rows=options.rows, seed=0) for path in paths}
    print(describe())
    print(
        f"\n{options.rows} rows a micro-batch, keep 1/8 by UDS, 6.8 M model shape, LoRA, float32; medians of {options.repeats}.\n"
    )
    print("| lengths of | real tokens of the padded batch | batch | trained on | candidates/s | label tokens/s |")
    print("|---|---:|---|---|---:|---:|")
    results = [measure(name, lengths, options.rows, options.repeats) for name, lengths in pools.items()]
    for table, _ in results:
        print("\n".join(table))
    print("\n| lengths of | tokens of the line | scoring against the forward pass over the same line |")
    print("|---|---:|---:|")
    for _, scoring in results:
        print(scoring)


if __name__ == "__main__":
    main()
