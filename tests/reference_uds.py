"""The naive definition of UDS (arXiv 2510.16882): float64 logits, SVD, FFT. Shares no code with the fast path.

Also what its tests share: tiny batches with either padding, and a head given by its weights.

Axes: `B` rows, `T` columns, `N` real tokens of a row, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


def naive_logits(hidden: torch.Tensor, weight: torch.Tensor, **head: Any) -> np.ndarray:
    """`(N, V)` float64 from hidden states `(N, D)` and `W` `(V, D)`, with bias, multiplier and soft cap."""
    logits = hidden.double().numpy() @ weight.detach().double().numpy().T
    if head.get("bias") is not None:
        logits = logits + head["bias"].detach().double().numpy()
    logits = logits * head.get("multiplier", 1.0)
    if head.get("cap"):
        logits = head["cap"] * np.tanh(logits / head["cap"])
    return logits


def naive_nuclear(logits: np.ndarray) -> float:
    return float(np.linalg.svd(logits, compute_uv=False).sum())


def naive_frobenius(logits: np.ndarray) -> float:
    return float(np.sqrt((logits**2).sum()))


def naive_sketch(logits: np.ndarray, sketch: Any, *, paper: bool = False) -> np.ndarray:
    """`vec(Γ₂ L Γ₁ᵀ)` by literal FFTs: signs, transform over the vocabulary, signs, transform over time.

    Rows of more than 512 tokens are cut into periods of 512, each with its own signs, whose transforms add up.
    """
    vocabulary = logits.shape[1]
    first, second = len(sketch.indices.vocabulary), len(sketch.indices.time)
    spectrum = np.fft.fft(logits * sketch.signs.vocabulary.numpy(), axis=1).real
    columns = spectrum[:, sketch.indices.vocabulary.numpy()]
    columns = columns * (np.sqrt(vocabulary / first) if paper else np.sqrt(2 / first))
    total = np.zeros((second, first))
    for start in range(0, len(columns), 512):
        piece = columns[start : start + 512] * sketch.time_signs(len(columns)).numpy()[start : start + 512, None]
        padded = np.zeros((512, first))
        padded[: len(piece)] = piece
        total += np.fft.fft(padded, axis=0).real[sketch.indices.time.numpy()]
    return (total * (np.sqrt(512 / second) if paper else np.sqrt(2 / second))).reshape(-1)


@dataclass
class NaiveUDS:
    """Scores and a first-in-first-out memory, as the paper writes them."""

    alpha: float
    capacity: int = 1024
    paper: bool = False
    memory: list[np.ndarray] = field(default_factory=list)

    def score(self, rows: list[np.ndarray], sketch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
        """(total, intra, inter, sketches) of logits `(N, V)` row by row."""
        intra = np.array([naive_nuclear(logits) for logits in rows])
        sketches = [naive_sketch(logits, sketch, paper=self.paper) for logits in rows]
        inter = np.array(
            [np.mean([np.linalg.norm(z - old) for old in self.memory]) if self.memory else 0.0 for z in sketches]
        )
        return intra + self.alpha * inter, intra, inter, sketches

    def push(self, sketches: list[np.ndarray]) -> None:
        self.memory = (self.memory + sketches)[-self.capacity :]


# --- what the tests share -------------------------------------------------------------------------------------------


def tiny_batch(
    lengths: list[int], *, side: str = "right", vocabulary: int = 261, seed: int = 0, extra: int = 0
) -> dict[str, torch.Tensor]:
    """Random rows of these lengths, padded on one side (`extra` more columns than needed), prompt masked by a third."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths) + extra
    ids = torch.zeros(len(lengths), columns, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        tokens = torch.randint(5, vocabulary, (length,), generator=generator)
        place = slice(0, length) if side == "right" else slice(columns - length, columns)
        ids[row, place] = tokens
        mask[row, place] = 1
        labels[row, place] = torch.where(torch.arange(length) < length // 3, -100, tokens)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def true_hidden(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The model's own last hidden states of the real tokens, row by row, from one whole forward with all outputs."""
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    states = output.hidden_states[-1]
    states = states[:, -batch["input_ids"].shape[1] :]
    return [state[mask.bool()].float() for state, mask in zip(states, batch["attention_mask"], strict=True)]
