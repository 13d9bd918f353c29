"""The naive definition of row gradients: each row alone, unpadded, float64, one `autograd.grad` over all trained weights.

Shares no code with the fast path: the loss is written out, the shift by one included.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def naive_gradients(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
    """Per row the gradient of its mean loss in all trained weights, float64 `(P,)`; None without label tokens."""
    exact = copy.deepcopy(model).double().eval()
    weights = [weight for weight in exact.parameters() if weight.requires_grad]
    found: list[torch.Tensor | None] = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        learnt = labels[1:] != -100
        if not learnt.any():
            found.append(None)
            continue
        logits = exact(input_ids=ids[None]).logits[0, :-1]
        chosen = torch.log_softmax(logits, dim=-1)[learnt, labels[1:][learnt]]
        gradients = torch.autograd.grad(-chosen.mean(), weights, allow_unused=True)
        pieces = [
            torch.zeros_like(weight).flatten() if gradient is None else gradient.flatten()
            for weight, gradient in zip(weights, gradients, strict=True)
        ]
        found.append(torch.cat(pieces))
    return found


def naive_norms(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    return [float("nan") if one is None else float(one.norm()) for one in naive_gradients(model, batch)]


def naive_greedy(
    gradients: list[torch.Tensor], validation: list[torch.Tensor], rate: float, count: int
) -> tuple[list[int], list[float]]:
    """GREATS as its paper's algorithm has it: (rows in the order taken, η ⟨g, mean validation gradient⟩ of all)."""
    scores = [rate * sum(float(one @ other) for other in validation) / len(validation) for one in gradients]
    first = list(scores)
    left, taken = list(range(len(gradients))), []
    for _ in range(count):
        best = max(left, key=lambda row: scores[row])
        left.remove(best)
        taken.append(best)
        for row in left:
            scores[row] -= rate**2 * float(gradients[best] @ gradients[row])
    return taken, first
