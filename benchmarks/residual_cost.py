"""What UDS of the residual costs beside MaxLoss's own pass through the head, from the same hidden states.

Random weights in the shape of Qwen2.5-0.5B (width 896, vocabulary 151,936) or 7B (width 3584), one decoder layer: the
forward is replayed, so that only what follows it is timed. Rows of equal length, a third of each masked as a prompt. Both
are timed in turn, round after round, and the ratio is that of their medians.

Run: python benchmarks/residual_cost.py [--device cuda] [--shape 0.5b|7b|small] [--rows 4] [--tokens 192] [--rounds 3]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from machine import describe
from uds_cost import SHAPES, Replayed, build, in_turn

from siftune.models.hidden_states import predicting_tokens
from siftune.online.base import OnlineMethod
from siftune.online.maxloss import MaxLoss
from siftune.online.uds import UDS

BAR = 1.3
SELECTORS: dict[str, OnlineMethod] = {
    "maxloss": MaxLoss(keep=1),
    "residual, nuclear norm": UDS(keep=1, matrix="residual"),
    "residual, Frobenius norm": UDS(keep=1, matrix="residual", norm="frobenius"),
    "residual, head-gradient": UDS(keep=1, matrix="residual", norm="head-gradient"),
}


class ReplayedAnswers(Replayed):
    """The states of the label tokens alone."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor]) -> None:
        super().__init__(model, batch)
        masks = predicting_tokens(batch)
        for chunk in self.chunks:
            chunk.states[:] = [
                states[masks[row].to(states.device)] for row, states in zip(chunk.rows, chunk.states, strict=True)
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="0.5b", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    model = build(shape, args.device, layers=1, tied=args.shape == "0.5b")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape["vocab_size"], (args.rows, args.tokens), generator=generator).to(args.device)
    labels = ids.clone()
    labels[:, : args.tokens // 3] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    replay = ReplayedAnswers(model, batch)

    def scored(selector: OnlineMethod) -> Any:
        def run() -> None:
            with replay:
                selector.score(model, batch)

        return run

    times = in_turn({name: scored(selector) for name, selector in SELECTORS.items()}, args.device, args.rounds)
    answers = int(predicting_tokens(batch)[0].sum())
    print(f"{describe()}\n\n{args.shape}, {args.rows} rows x {answers} label tokens, {args.device}\n")
    print(f"| score | seconds | times maxloss (bar <= {BAR}) |\n|---|---:|---:|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.3f} | {seconds / times['maxloss']:.2f} |")


if __name__ == "__main__":
    main()
