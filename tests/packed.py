"""Rows packed as the collators of the training frameworks pack them, written from the layouts' descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Row = dict[str, list[int]]
LAYOUTS = ["trl", "positions", "flattening", "unsloth", "neat", "axolotl", "swift", "block-mask"]
PAD = 0


def rows_of(lengths: Sequence[int], *, seed: int = 0, vocabulary: int = 250) -> list[Row]:
    """Rows of random ids, the first third masked as a prompt, and the first token in any case."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = generator.integers(5, vocabulary, size=length).tolist()
        prompt = max(1, length // 3)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def padded(rows: Sequence[Row]) -> dict[str, Any]:
    """The same rows in a padded batch."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": PAD, "labels": -100, "attention_mask": 0}
    full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [fill[name]] * (width - len(row[name])) for row in full])
        for name in ("input_ids", "attention_mask", "labels")
    }


def lines_of(rows: Sequence[Row], width: int | None) -> list[list[Row]]:
    """Rows in order, each in the current line while it fits; one line without a width."""
    lines: list[list[Row]] = [[]]
    for row in rows:
        if width is not None and sum(len(one["input_ids"]) for one in lines[-1]) + len(row["input_ids"]) > width:
            lines.append([])
        lines[-1].append(row)
    return lines


def pack(rows: Sequence[Row], kind: str, *, width: int | None = None) -> dict[str, Any]:
    """A batch of `kind`; `width` is the length of a line, else one line of all rows."""
    lines = lines_of(rows, width)
    longest = width or sum(len(row["input_ids"]) for row in rows)

    def column(values: Any, fill: int) -> torch.Tensor:
        flat = [[value for row in line for value in values(row)] for line in lines]
        return torch.tensor([one + [fill] * (longest - len(one)) for one in flat])

    ids, labels = column(lambda row: row["input_ids"], PAD), column(lambda row: row["labels"], -100)
    positions = column(lambda row: range(len(row["input_ids"])), 0)
    numbers = torch.zeros_like(ids)
    for line, some in enumerate(lines):
        start = 0
        for number, row in enumerate(some, 1):
            numbers[line, start : start + len(row["input_ids"])] = number
            start += len(row["input_ids"])
    lengths = [len(row["input_ids"]) for row in rows]
    cumulative = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if kind in ("neat", "axolotl"):  # the attention mask holds each token's row
        batch["attention_mask"] = numbers
        if kind == "axolotl":
            batch["position_ids"] = positions
    elif kind == "block-mask":
        same = (numbers[:, :, None] == numbers[:, None, :]) & (numbers[:, None, :] != 0)
        allowed = same & torch.ones(longest, longest, dtype=torch.bool).tril()
        batch["attention_mask"] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
        batch["position_ids"] = positions
    else:
        batch["position_ids"] = positions
    if kind == "unsloth":
        batch["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    if kind in ("flattening", "swift"):
        batch["cu_seq_lens_q"], batch["cu_seq_lens_k"] = cumulative, cumulative.clone()
        batch["max_length_q"] = batch["max_length_k"] = max(lengths)
    if kind == "flattening":
        batch["seq_idx"] = (numbers - 1).to(torch.int32)
    return batch
