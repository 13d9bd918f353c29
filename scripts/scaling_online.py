"""The worked plan of docs/scaling.md for UDS on many GPUs: messages packed and measured, memory and passes computed.

Measured here: the bytes of the messages that ranks exchange, packed as training packs them, and the processor time per
candidate of comparing and of packing and unpacking. Computed: what follows for a 70B model on 64 GPUs. Nothing about a GPU
or a network is measured by this script.

    python scripts/scaling_online.py                  prints the plan
    python scripts/scaling_online.py --write          puts it between its marks in docs/scaling.md
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scaling_page import put

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from siftune.hook.exchange import pack  # noqa: E402
from siftune.hook.selection_step import Measurement, decode_measurements, encode_measurements  # noqa: E402
from siftune.online.base import Measured  # noqa: E402
from siftune.online.uds import UDS  # noqa: E402

MARKS = ("<!-- online plan: scripts/scaling_online.py -->", "<!-- end of online plan -->")

# Llama-3.1-70B's published configuration: width, vocabulary, weights.
WIDTH, VOCABULARY, WEIGHTS = 8192, 128_256, 70.6e9
RANKS, CANDIDATES, KEPT, TOKENS = 64, 64, 8, 512
SKETCH, MEMORY = 1024, 1024
NETWORK = (25e9, 50e9, 400e9)
"""Bytes a second that one GPU receives, to be replaced by the reader's own."""


def measurement(rows: int) -> Measurement:
    """One rank's measurement of `rows` candidates, with values that do not compress."""
    columns = {
        "intra": torch.rand(rows, dtype=torch.float64),
        "sketch": torch.rand(rows, SKETCH, dtype=torch.float64),
        "tokens": torch.randint(1, TOKENS, (rows,)),
    }
    return Measurement(Measured(rows, columns), columns["tokens"], torch.zeros(rows, dtype=torch.bool))


def seconds(task: Callable[[], object], *, rounds: int = 5) -> float:
    """Processor time of a call, the fastest of some rounds."""
    best = math.inf
    for _ in range(rounds):
        began = time.process_time()
        task()
        best = min(best, time.process_time() - began)
    return best


def uneven_share() -> tuple[float, float]:
    """Mean and largest number of rows a rank gives away, where the best of all ranks' candidates lie anywhere: 2,000
    seeded draws."""
    generator = torch.Generator().manual_seed(0)
    given, largest = [], []
    for _ in range(2000):
        kept = torch.randperm(RANKS * CANDIDATES, generator=generator)[: RANKS * KEPT] // CANDIDATES
        surplus = (torch.bincount(kept, minlength=RANKS) - KEPT).clamp_min(0).double()
        given.append(float(surplus.mean()))
        largest.append(float(surplus.max()))
    return sum(given) / len(given), sum(largest) / len(largest)


def plan() -> str:
    """The page's section."""
    torch.set_num_threads(1)
    message = encode_measurements([measurement(CANDIDATES)])
    row = torch.randint(0, VOCABULARY, (KEPT, TOKENS))
    moved = len(pack({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row})) / KEPT
    uds = UDS(keep=KEPT)
    uds._memory.push(torch.rand(MEMORY, SKETCH, dtype=torch.float64))
    measured = measurement(CANDIDATES).measured
    compare = seconds(lambda: uds.compare(measured)) / CANDIDATES
    packing = seconds(lambda: encode_measurements([measurement(CANDIDATES)])) / CANDIDATES
    reading = seconds(lambda: decode_measurements(message)) / CANDIDATES
    mean, largest = uneven_share()
    everything = RANKS * CANDIDATES
    received = [RANKS * len(message), 8 * everything, RANKS * largest * moved, 8 * 3 * RANKS]
    weights = 2 * WEIGHTS
    passes = math.ceil(CANDIDATES / KEPT)
    gram, copy = 8 * WIDTH**2 / 2, 2 * WIDTH * VOCABULARY
    lines = [
        f"`python scripts/scaling_online.py` ({platform.processor() or platform.machine()}, torch {torch.__version__}, "
        "2026-11-22; processor time on one core)",
        "",
        f"{RANKS} processes of {CANDIDATES} candidates of {TOKENS} tokens, {KEPT} of {CANDIDATES} kept, UDS with its "
        f"defaults; a model of {WEIGHTS / 1e9:.1f} billion weights, D = {WIDTH:,}, V = {VOCABULARY:,}.",
        "",
        "| each optimiser step, received by every rank | bytes | how |",
        "|---|---|---|",
        f"| measurements | {received[0] / 1e6:.1f} MB | measured: a message of {len(message):,} bytes, "
        f"{len(message) / CANDIDATES:,.0f} a candidate, nearly all of it the sketch |",
        f"| distances to the memory | {received[1] / 1e3:.0f} kB | 8 bytes a candidate |",
        f"| rows that move | {received[2] / 1e6:.1f} MB | {moved:,.0f} bytes a row, measured; a rank gives {mean:.1f} of its "
        f"rows away on average, and messages are as long as the longest, {largest:.1f} rows |",
        f"| lengths and digests | {received[3] / 1e3:.1f} kB | 8 bytes each |",
        f"| together | {sum(received) / 1e6:.0f} MB | "
        + ", ".join(f"{sum(received) / speed * 1e3:.1f} ms at {speed / 1e9:.0f} GB/s" for speed in NETWORK)
        + " |",
        "",
        f"| scoring's forward passes under FSDP or ZeRO-3 | weights received per step | at {NETWORK[1] / 1e9:.0f} GB/s |",
        "|---|---|---|",
        f"| `score_tokens` unset: as many tokens as one kept micro-batch, {passes} passes | {passes * weights / 1e9:,.0f} GB | "
        f"{passes * weights / NETWORK[1]:.1f} s |",
        f"| `score_tokens={CANDIDATES * TOKENS}`: all candidates at once, 1 pass | {weights / 1e9:,.0f} GB | "
        f"{weights / NETWORK[1]:.1f} s |",
        "",
        f"Network speeds are assumptions. For comparison, the model, its gradients and Adam's state in full tuning, 16 bytes a "
        f"weight over {RANKS} ranks, are {16 * WEIGHTS / RANKS / 1e9:.1f} GB a rank.",
        "",
        "| each rank holds for selection | bytes |",
        "|---|---|",
        f"| a copy of the head, V x D in bf16 (FSDP 1 gathers float32: twice that) | {copy / 1e9:.1f} GB |",
        f"| its Gram matrix while it is formed, packed, float64 | {gram / 1e6:.0f} MB |",
        f"| the factor of it that is kept, float32 | {gram / 2e6:.0f} MB |",
        f"| the head's sketch, {SKETCH // 8} x D, float64 | {8 * SKETCH // 8 * WIDTH / 1e6:.0f} MB |",
        f"| the memory, {MEMORY} sketches, on the host | {8 * MEMORY * SKETCH / 1e6:.0f} MB |",
        f"| all ranks' measurements, on the host | {RANKS * len(message) / 1e6:.0f} MB |",
        "",
        "| processor time on the host | per candidate | per step |",
        "|---|---|---|",
        f"| comparing with the memory, the rank's own {CANDIDATES} | {compare * 1e3:.2f} ms | {compare * CANDIDATES * 1e3:.0f} ms |",
        f"| packing the rank's own | {packing * 1e6:.0f} us | {packing * CANDIDATES * 1e3:.1f} ms |",
        f"| reading all {everything:,} | {reading * 1e6:.0f} us | {reading * everything * 1e3:.0f} ms |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the plan into docs/scaling.md")
    said = parser.parse_args()
    text = plan()
    put(text, MARKS, write=said.write)


if __name__ == "__main__":
    main()
