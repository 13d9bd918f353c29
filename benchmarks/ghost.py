"""Row gradients in factors against explicit ones: what exact gradient norms and GREATS cost beside a training step.

Random weights in Qwen2.5's shapes, LoRA (r = 8, all linear layers) or all weights trained. Timed in turn, round after
round, medians: the bare forward; forward and backward of all rows, as training would do; the norms in groups of
`--group` rows; the norms by one `autograd.grad` per row; the inner products of GREATS with `--validation` rows, in
factors and from explicit gradients that are all held (left out where they would need more than `--explicit-gb`).

Run: python benchmarks/ghost.py [--shape small|0.5b|7b] [--device cuda] [--rows 8] [--tokens 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from steps import SHAPES, build, candidates, make_trainable

from siftune.online.greats import Greats
from siftune.online.maxgrad import MaxGrad


def explicit(model: Any, batch: dict[str, torch.Tensor], *, hold: bool) -> torch.Tensor | list[torch.Tensor]:
    """Squared norms `(R,)`, or the gradients themselves, from one backward pass per row."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = []
    for row in range(len(batch["input_ids"])):
        loss = model(**{name: values[row : row + 1] for name, values in batch.items()}, use_cache=False).loss
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        pieces = [gradient.flatten() for gradient in gradients if gradient is not None]
        found.append(torch.cat(pieces) if hold else sum(piece.float().square().sum() for piece in pieces))
    return found if hold else torch.stack(found)  # type: ignore[arg-type]


def spent(action: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the accelerator's queue emptied before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def actions(model: Any, said: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    batch = candidates(model, said.rows, said.tokens)
    held_out = candidates(model, said.validation, said.tokens, seed=1)
    budget = said.group * said.tokens
    norms = MaxGrad(keep=1, score_tokens=budget)
    greats = Greats(keep=1, validation=held_out, learning_rate=1e-4, score_tokens=budget)

    def forward() -> None:
        with torch.no_grad():
            model(**{name: batch[name] for name in ("input_ids", "attention_mask")}, use_cache=False, logits_to_keep=1)

    def train() -> None:
        for start in range(0, said.rows, said.group):
            model(**{n: v[start : start + said.group] for n, v in batch.items()}, use_cache=False).loss.backward()
        model.zero_grad()

    def products() -> None:
        rows = explicit(model, batch, hold=True) + explicit(model, held_out, hold=True)
        torch.stack(rows) @ torch.stack(rows).T

    found = {"forward": forward, "training": train, "norms, factors": lambda: norms.score(model, batch)}
    found["norms, explicit"] = lambda: explicit(model, batch, hold=False)
    found["greats, factors"] = lambda: greats.score(model, batch)
    trained = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    if 2 * trained * (said.rows + said.validation) <= said.explicit_gb * 2**30:
        found["greats, explicit"] = products
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=None, help="fewer decoder layers than the shape has")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--validation", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--explicit-gb", type=float, default=8.0)
    parser.add_argument("--trained", nargs="+", default=["lora", "full"], choices=["lora", "frozen head", "full"])
    parser.add_argument("--json", type=Path, default=None)
    said = parser.parse_args()
    dtype = getattr(torch, said.dtype or ("bfloat16" if said.device == "cuda" else "float32"))
    print(describe())
    print(f"\n{said.shape} shape, {said.rows} candidates and {said.validation} validation rows of {said.tokens} tokens, "
          f"groups of {said.group}, {dtype}; median seconds of {said.rounds}\n")  # fmt: skip
    columns = ["forward", "training", "norms, factors", "norms, explicit", "greats, factors", "greats, explicit"]
    print("| trained | " + " | ".join(columns) + " | norms: explicit ÷ factors |\n" + "|---" * (len(columns) + 2) + "|")
    results = []
    for trained in said.trained:
        torch.manual_seed(0)
        model = build(said.shape, device=said.device, dtype=dtype, layers=said.layers)
        make_trainable(model, trained)
        model.eval()
        timed = actions(model, said)
        times: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(said.rounds + 1):  # one round more to warm up
            for name, action in timed.items():
                times[name].append(spent(action, said.device))
        found = {name: statistics.median(some[1:]) for name, some in times.items()}
        results.append({"trained": trained, **found})
        cells = [f"{found[name]:.3f}" if name in found else "–" for name in columns]
        ratio = found["norms, explicit"] / found["norms, factors"]
        print(f"| {trained} | " + " | ".join(cells) + f" | {ratio:.2f}× |", flush=True)
    if said.json:
        said.json.write_text(json.dumps({"machine": describe(), **vars(said), "results": results}, default=str) + "\n")


if __name__ == "__main__":
    main()
