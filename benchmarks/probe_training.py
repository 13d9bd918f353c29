"""How long both DaaR probes take to fit on stored features of 5,000 rows, by width. Prints a Markdown table and JSON.

    python benchmarks/probe_training.py [--rows 5000] [--widths 256 896 3584] [--threads 1] [--device cpu] [--repeats 1]

The features are made up (four overlapping clouds), so only the times mean anything; they include the folds of psi_dom
for the reward targets, calibration and every check on the held-out rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from machine import describe

from siftune.offline.daar.fitting import ProbeTraining, fit_probes

DOMAINS = 4


def clouds(rows: int, width: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features `(rows, width)` of four overlapping domains, and the domains."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, DOMAINS, (rows,), generator=generator)
    middles = torch.randn(DOMAINS, 16, generator=generator)
    inner = middles[labels] + torch.randn(rows, 16, generator=generator)
    return torch.tanh(inner @ torch.randn(16, width, generator=generator) / 4), labels.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 896, 3584])
    parser.add_argument("--threads", type=int, default=ProbeTraining().threads)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    asked = parser.parse_args()
    print(describe())
    print(f"\nBoth probes on {asked.rows:,} rows, {asked.device}, {asked.threads} CPU threads\n")
    print("| width | seconds | epochs psi_dom | epochs psi_div | folds | validation accuracy |")
    print("|---:|---:|---:|---:|---:|---:|")
    results = []
    for width in asked.widths:
        hidden, labels = clouds(asked.rows, width)
        seconds = []
        for _ in range(asked.repeats):
            start = time.perf_counter()
            training = ProbeTraining(threads=asked.threads)
            present = np.ones(DOMAINS, bool)
            info = fit_probes(hidden, labels, present, training, seed=0, device=asked.device).info
            seconds.append(time.perf_counter() - start)
        middle = statistics.median(seconds)
        print(
            f"| {width:,} | {middle:.1f} | {info['epochs']} | {info['reward_epochs']} | {info['folds']} "
            f"| {info['validation_accuracy']:.3f} |",
            flush=True,
        )
        results.append({"width": width, "seconds": middle, **info})
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
