"""What UDS scores cost beyond the backbone's forward, and against the naive way (logits, SVD, FFT).

Random weights in the shape of Qwen2.5-0.5B (24 layers, width 896, vocabulary 151,936) or 7B (28 layers, width 3584; on
a CPU one layer is run and counted 28 times, which is said). Forward, scores and refresh are timed in turn, round after
round, and their medians taken. The naive way runs on one row and is multiplied by the rows. Memory is the peak above
what stood before: of CUDA as its allocator counts it, of a CPU as resident pages in a process of its own.

Run: python benchmarks/uds_cost.py [--device cuda] [--shape 0.5b|7b|small] [--rows 4] [--tokens 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from transformers import AutoModelForCausalLM, Qwen2Config

from siftune.models.head import Head, factorise, read_head
from siftune.models.hidden_states import iter_hidden_states, unwrap_model
from siftune.online import logit_access
from siftune.online.nuclear import lanczos_norms, norms
from siftune.online.sketch import Sketch
from siftune.online.uds import UDS

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "heads": 4, "vocab_size": 32_000},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "heads": 14, "vocab_size": 151_936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "heads": 28, "vocab_size": 152_064},
}  # fmt: skip


def build(shape: dict[str, int], device: str, *, layers: int, tied: bool) -> Any:
    config = Qwen2Config(
        **{name: value for name, value in shape.items() if name not in ("heads", "num_hidden_layers")},
        num_hidden_layers=layers, num_attention_heads=shape["heads"], num_key_value_heads=2,
        tie_word_embeddings=tied, max_position_embeddings=8192,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def spent(action: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the accelerator's queue emptied before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(actions: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each action over rounds in which every action runs once; one round more to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            times[name].append(spent(action, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


class Replayed:
    """Stands in for the forward: hands out hidden states made before, so that only what comes after is timed."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor]) -> None:
        self.chunks = list(iter_hidden_states(unwrap_model(model), batch, batch["attention_mask"].bool().cpu()))

    def __enter__(self) -> None:
        self.original = logit_access.iter_hidden_states
        logit_access.iter_hidden_states = lambda *_, **__: iter(self.chunks)  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        logit_access.iter_hidden_states = self.original


def cap_head(model: Any, cap: float = 30.0) -> None:
    model.config.final_logit_softcapping = cap
    model.lm_head.register_forward_hook(lambda _m, _i, logits: cap * torch.tanh(logits / cap))


def heads(args: argparse.Namespace, shape: dict[str, int]) -> dict[str, Any]:
    """Forward, scores and refresh for a frozen, a trained and a soft-capped head."""
    layers = 1 if args.shape == "7b" and args.device == "cpu" else shape["num_hidden_layers"]
    model = build(shape, args.device, layers=layers, tied=args.shape == "0.5b")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape["vocab_size"], (args.rows, args.tokens), generator=generator).to(args.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = batch["attention_mask"].bool().cpu()
    uds = UDS(keep=1)
    first = spent(lambda: uds.select(model, batch), args.device)

    def forward() -> None:
        list(iter_hidden_states(unwrap_model(model), batch, wanted))

    def scored(selector: UDS) -> Callable[[], Any]:
        def run() -> None:
            with replay:
                selector.score(model, batch)

        return run

    replay = Replayed(model, batch)
    frozen = in_turn({"forward": forward, "scores": scored(uds)}, args.device, args.rounds)
    forward_s = frozen["forward"] * shape["num_hidden_layers"] / layers
    model.lm_head.weight.requires_grad_(True)
    trained = in_turn({"scores": scored(UDS(keep=1))}, args.device, args.rounds)["scores"]
    model.lm_head.weight.requires_grad_(False)
    head = read_head(unwrap_model(model))
    assert head is not None
    exact, naive = naive_row(head, replay.chunks[0].states[0], args.device)
    cap_head(model)
    capped = read_head(unwrap_model(model))
    assert capped is not None

    def logits() -> None:
        for states in replay.chunks[0].states:
            for start, stop in capped.blocks():
                capped.logits(capped.inputs(states), start, stop)

    last = in_turn({"logits": logits, "scores": scored(UDS(keep=1))}, args.device, max(1, args.rounds // 2))
    return {
        "forward_s": forward_s,
        "layers_run": layers,
        "first_batch_with_factor_s": first,
        "frozen_scores_s": frozen["scores"],
        "frozen_share": frozen["scores"] / forward_s,
        "trained_scores_s": trained,
        "trained_share": trained / forward_s,
        "capped_scores_s": last["scores"],
        "capped_logits_s": last["logits"],
        "capped_ratio": last["scores"] / last["logits"],
        "naive_s": naive * args.rows,
        "naive_ratio": naive * args.rows / frozen["scores"],
        "naive_difference": exact,
    }


def naive_row(head: Head, states: torch.Tensor, device: str) -> tuple[float, float]:
    """(relative difference of the nuclear norms, seconds) of logits + SVD + FFT on one row, in float32."""
    result: list[float] = []

    def run() -> None:
        logits = states.float() @ head.weight.float().T
        result.append(float(torch.linalg.svdvals(logits).sum()))
        signs = torch.ones(head.vocabulary, device=logits.device)
        columns = torch.fft.fft(logits * signs, dim=1).real[:, :128]
        torch.fft.fft(columns, n=512, dim=0).real[:8]

    seconds = spent(run, device)
    factor, _ = factorise(head)
    mine = norms(head.inputs(states)[None], [len(states)], factor)[0].nuclear
    return abs(result[0] / mine - 1), seconds


def random_head(width: int, vocabulary: int, device: str) -> Head:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if width > 2000 else torch.float32
    weight = torch.empty(vocabulary, width, dtype=dtype, device=device).normal_(generator=generator)
    return Head(weight, None, None, None, 1.0, None, (), (), False, False)


def scale(args: argparse.Namespace, shape: dict[str, int]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """One row's norm as N grows (exact, fast, Lanczos), and the once-per-head work as V grows."""
    width = shape["hidden_size"]
    factor, _ = factorise(random_head(width, 4 * width, args.device))
    by_tokens = []
    for tokens in (128, 256, 512, 1024, 2048, 4096):
        states = torch.randn(1, tokens, width, device=args.device)
        actions: dict[str, Callable[[], Any]] = {
            "exact_s": lambda s=states: norms(s, [s.shape[1]], factor),
            "lanczos_s": lambda s=states: lanczos_norms(s[0], factor),
        }
        if tokens <= 1024 or args.device == "cuda":
            actions["fast_s"] = lambda s=states: norms(s, [s.shape[1]], factor, route="fast")
        by_tokens.append({"tokens": tokens, **in_turn(actions, args.device, 3 if tokens < 2048 else 1)})
    by_vocabulary = []
    for vocabulary in (8_192, 32_768, 131_072, 262_144):
        if vocabulary * width * 4 > 2e9 and args.device == "cpu":
            continue
        head, sketch = random_head(width, vocabulary, args.device), Sketch((128, 8))
        sketch.bind(vocabulary)
        once = {
            "factor_s": spent(lambda h=head: factorise(h), args.device),
            "sketch_s": spent(lambda h=head, s=sketch: h.project(s.columns), args.device),
        }
        by_vocabulary.append({"vocabulary": vocabulary, **once})
    return by_tokens, by_vocabulary


def peak_above(action: Callable[[], Any], device: str) -> float:
    """MB in use at the peak of `action` above what was in use before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def resident(name: str) -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def memory(width: int, vocabulary: int, device: str) -> dict[str, float]:
    """MB above the head while it is factorised once, and while a row of 512 tokens is scored ever after."""
    head, sketch = random_head(width, vocabulary, device), Sketch((128, 8))
    torch.linalg.eigvalsh(torch.eye(600, dtype=torch.float64, device=device))  # libraries load now, not below
    (torch.ones(600, 600, device=device) @ torch.ones(600, 600, device=device)).sum()
    kept: list[Any] = []

    def once() -> None:
        sketch.bind(vocabulary)
        kept.extend([factorise(head)[0], head.project(sketch.columns)[0], torch.ones(1024, 1024, dtype=torch.float64)])

    states = torch.randn(1, 512, width, device=device)
    building = peak_above(once, device)
    held = sum(t.numel() * t.element_size() for t in [*kept[0].blocks, *kept[1:]]) / 1e6

    def row() -> None:
        norms(states, [512], kept[0])
        sketch.apply(states, kept[1])

    return {"width": width, "once_mb": building, "held_mb": held, "scoring_mb": held + peak_above(row, device)}


def memory_apart(width: int, vocabulary: int, device: str) -> dict[str, float]:
    """`memory` in a process whose allocator returns every larger block at once, so that pages show what is held."""
    if device == "cuda":
        return memory(width, vocabulary, device)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--memory", str(width), str(vocabulary)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    result: dict[str, float] = json.loads(said.splitlines()[-1])
    return result


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{row[name]:.4g}" if name in row else "–" for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="0.5b", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["heads", "scale", "memory"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(*args.memory, "cpu")))
        return
    shape = SHAPES[args.shape]
    figures: dict[str, Any] = {"machine": describe(), "shape": args.shape, "rows": args.rows, "tokens": args.tokens}
    print(f"{figures['machine']}\n\n{args.shape}, {args.rows} rows x {args.tokens} tokens, {args.device}\n", flush=True)
    if args.only in (None, "heads"):
        figures["heads"] = heads(args, shape)
        bars = {"frozen_share": "<= 0.02", "trained_share": "<= 0.20", "capped_ratio": "<= 1.1"}
        print("| figure | value | bar |\n|---|---|---|")
        for name, value in figures["heads"].items():
            print(f"| {name} | {value:.4g} | {bars.get(name, '')} |", flush=True)
    if args.only in (None, "scale"):
        figures["tokens_scale"], figures["vocabulary_scale"] = scale(args, shape)
        print(f"\n{table(figures['tokens_scale'])}\n\n{table(figures['vocabulary_scale'])}\n", flush=True)
    if args.only in (None, "memory"):
        figures["memory"] = [memory_apart(w, v, args.device) for w, v in ((896, 151_936), (3584, 152_064))]
        print(f"\n{table(figures['memory'])}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
