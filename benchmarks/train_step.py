"""One optimiser step keeping 1/8 of its candidates (64 -> 8) against training on all of them: rows/s ratio and its limit.

LoRA, full training with a frozen and with a trained head, each with and without gradient checkpointing; paired, in one
run, medians. The limit is computed from the parts measured beside it: candidates' forward, kept rows' forward, backward
and update, head refresh. The bar: 90 % of the limit.

Run: python benchmarks/train_step.py --shape small
     python benchmarks/train_step.py --shape 0.5b --columns 128 --candidates 16 --keep 2 --repeats 3
     python benchmarks/train_step.py --device cuda --shape 7b --settings lora
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from machine import describe
from steps import SHAPES, Step, build, checkpointing, make_trainable, measure

COLUMNS = ("on_all", "candidates_forward", "kept_step", "head_refresh", "sifted", "ratio", "limit", "of_limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=None, help="fewer decoder layers than the shape has")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=["lora", "frozen head", "full"])
    parser.add_argument("--checkpointing", nargs="+", default=["no", "yes"])
    parser.add_argument("--json", type=Path, default=None)
    said = parser.parse_args()
    dtype = getattr(torch, said.dtype or ("bfloat16" if said.device == "cuda" else "float32"))

    print(describe())
    shape = f"{said.shape} shape, {said.candidates} -> {said.keep} rows of {said.columns} tokens, {dtype}"
    print(f"\n{shape}; seconds per optimiser step, medians of {said.repeats}\n")
    print("| trained | checkpointing | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |")
    print("|" + "---|" * (len(COLUMNS) + 2))
    results = []
    for what in said.settings:
        for recompute in said.checkpointing:
            torch.manual_seed(0)
            model = build(said.shape, device=said.device, dtype=dtype, layers=said.layers)
            make_trainable(model, what)
            checkpointing(model, recompute == "yes")
            step = Step(model, rows=said.candidates, keep=said.keep, columns=said.columns)
            found = measure(step, repeats=said.repeats, device=said.device)
            results.append({"trained": what, "checkpointing": recompute, **found})
            cells = [f"{found[name]:.3f}" for name in COLUMNS[:5]]
            cells += [f"{found['ratio']:.2f}×", f"{found['limit']:.2f}×", f"{found['of_limit']:.0%}"]
            print(f"| {what} | {recompute} | " + " | ".join(cells) + " |", flush=True)
            if said.json:
                said.json.write_text(
                    json.dumps({"machine": describe(), "shape": shape, "results": results}, indent=1) + "\n"
                )
            del model, step


if __name__ == "__main__":
    main()
