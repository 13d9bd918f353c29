"""UDS on one CUDA GPU at a 7B shape (random weights, bfloat16, LoRA): plain training, the naive way, and ours.

Plain training is one optimiser step on all candidates; the naive way forms each row's logits, takes their singular
values and an FFT sketch (measured on a few rows, the rest is extrapolated, and the table says so); ours is
`siftune.UDS.select` and a step on the kept rows. Results are printed as they come, as Markdown and as JSON lines, so a
run that is cut short has told what it knows. It needs torch, transformers and siftune, nothing else.

Run: PYTHONPATH=. python benchmarks/gpu_uds.py                          (under 6 minutes on one H100)
     PYTHONPATH=. python benchmarks/gpu_uds.py --shape small --device cpu --candidates 16 --keep 2 --columns 64
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from machine import describe
from steps import SHAPES, Step, build, checkpointing, make_trainable, measure, paired, seconds, some


def naive_scores(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], signs: torch.Tensor
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


def say(name: str, found: dict[str, float | str], started: float) -> None:
    """One line of results, now."""
    print(json.dumps({"what": name, **found, "elapsed": round(time.perf_counter() - started, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--naive-rows", type=int, default=1)
    said = parser.parse_args()
    started = time.perf_counter()
    dtype = torch.bfloat16 if said.device == "cuda" else torch.float32

    print(describe(), flush=True)
    torch.manual_seed(0)
    model = build(said.shape, device=said.device, dtype=dtype, layers=said.layers)
    make_trainable(model, "lora")
    step = Step(model, rows=said.candidates, keep=said.keep, columns=said.columns)
    say("set up", {"shape": said.shape, "weights": float(sum(p.numel() for p in model.parameters()))}, started)

    scoring = paired(
        {"forward": step.forward, "score": lambda: step.selector.score(model, step.batch)},
        repeats=said.repeats, device=said.device,
    )  # fmt: skip
    scoring["beyond_forward"] = scoring["score"] / scoring["forward"] - 1
    say("scoring", scoring, started)
    if said.device == "cuda":
        say("memory", memory(step), started)

    steps = {}
    for recompute in (False, True):
        checkpointing(model, recompute)
        steps[recompute] = measure(step, repeats=said.repeats, device=said.device)
        say("step", {"checkpointing": str(recompute), **steps[recompute]}, started)

    checkpointing(model, False)
    rows = some(step.batch, 0, said.naive_rows)
    signs = (torch.randint(0, 2, (model.config.vocab_size,), device=model.device) * 2 - 1).float()
    per_row = seconds(lambda: naive_scores(model, rows, signs), said.device) / said.naive_rows
    naive = per_row * said.candidates
    say("naive scoring", {"per_row": per_row, "extrapolated": naive, "times_ours": naive / scoring["score"]}, started)

    print(
        "\n| checkpointing | plain step | naive step (extrapolated) | ours | ratio | limit | of limit |\n|" + "---|" * 7
    )
    for recompute, found in steps.items():
        print(
            f"| {'yes' if recompute else 'no'} | {found['on_all']:.3f} s | {naive + found['kept_step']:.1f} s "
            f"| {found['sifted']:.3f} s | {found['ratio']:.2f}× | {found['limit']:.2f}× | {found['of_limit']:.0%} |",
        )


def memory(step: Step) -> dict[str, float | str]:
    """Peak memory of scoring beyond that of the same forward pass, in MB."""
    peaks = []
    for work in (step.forward, lambda: step.selector.score(step.model, step.batch)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        peaks.append(torch.cuda.max_memory_allocated() / 2**20)
    return {"forward_mb": peaks[0], "score_mb": peaks[1], "beyond_mb": peaks[1] - peaks[0]}


if __name__ == "__main__":
    main()
