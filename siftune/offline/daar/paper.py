"""The two quirks of the authors' DaaR code that change features, for compat="paper" (arXiv 2502.04380).

Means run over `max_length` padded positions, padding included (not mentioned in the paper's text), and the probe set
is read with `Instruction:`, `Input:`, `Output:` labels that the scored pool does not get.
Cost: `max_length` positions per row, whatever its length; as in the authors' code.

Axes: `B` rows of a batch, `T` padded positions, `D` width.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from ...data.formats import BadRow
from ...files import hash_json
from ...models.backbone import Backbone
from ...models.features import NO_TOKENS, NOT_FINITE, extract
from ...models.tokenise import texts_of, tokenise
from ...records import Pool, Row, Shard, ShardResult


def labelled_text(row: Row) -> str:
    """A row's text with a label before each part; chat and plain rows have no parts and stay as they are.

    >>> labelled_text(Row(0, "", "Add.", "1 + 1", "2"))
    'Instruction: Add.\\nInput: 1 + 1\\nOutput: 2'
    """
    parts = (("Instruction", row.instruction), ("Input", row.input), ("Output", row.output))
    return "\n".join(f"{name}: {value}" for name, value in parts if value)


@dataclass(frozen=True)
class PaperFeatures:
    """Features of one shard the authors' way; columns as `FeatureTask`'s, `embedding` always among them."""

    backbone: Backbone
    _: KW_ONLY
    padded: bool
    labelled: bool
    token_budget: int | None = None

    @property
    def key(self) -> str:
        return hash_json(["daar-paper", 1, self.backbone.key, self.padded, self.labelled, self.token_budget])

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        rows = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        columns: dict[str, Any] = {
            name: np.full((len(shard), self.backbone.width), np.nan, dtype=np.float32)
            for name in ("embedding", "hidden")
        }
        columns |= {"tokens": np.full(len(shard), -1, np.int32), "truncated": np.zeros(len(shard), np.bool_)}
        reasons: dict[int, str] = {}
        size = max(1, (self.token_budget or 4096) // self.backbone.length) if self.padded else 256
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            read = pool.read(batch)
            texts = [
                labelled_text(row) if self._is_labelled(row) else text
                for row, text in zip(read, texts_of(read, self.backbone.tokenizer), strict=True)
            ]
            features = (
                self._padded(texts) if self.padded else extract(self.backbone, texts, token_budget=self.token_budget)
            )
            inside = np.array(batch) - shard.start
            for name in columns:
                columns[name][inside] = features[name] if isinstance(features, dict) else getattr(features, name)
            reasons_of_batch = features["reasons"] if isinstance(features, dict) else features.reasons
            reasons |= {batch[index]: reason for index, reason in reasons_of_batch.items()}
        return ShardResult(columns, reasons)

    def _is_labelled(self, row: Row) -> bool:
        return self.labelled and not row.messages and bool(row.instruction)

    @torch.no_grad()
    def _padded(self, texts: list[str | BadRow]) -> dict[str, Any]:
        """One forward over `B x max_length` positions, masked as a tokenizer masks padding, averaged over them all."""
        rows, tokenizer = tokenise(self.backbone, texts), self.backbone.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        device, length = self.backbone.torch_device, self.backbone.length
        ids_BT = torch.full((len(rows), length), pad, dtype=torch.long)
        mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            ids_BT[index, : len(row.ids)] = torch.from_numpy(row.ids.astype(np.int64))
            mask_BT[index, : len(row.ids)] = 1
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        network: Any = self.backbone.network
        embedding_BTD = network.get_input_embeddings()(ids_BT)
        hidden_BTD = network(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        means = [states.float().mean(dim=1).cpu().numpy() for states in (embedding_BTD, hidden_BTD)]
        tokens = np.array([len(row.ids) for row in rows], dtype=np.int32)
        finite = np.isfinite(means[0]).all(axis=1) & np.isfinite(means[1]).all(axis=1) & (tokens > 0)
        for values in means:
            values[~finite] = np.nan
        return {
            "embedding": means[0],
            "hidden": means[1],
            "tokens": tokens,
            "truncated": np.array([row.truncated for row in rows], dtype=np.bool_),
            "reasons": {
                int(i): NOT_FINITE if tokens[i] else rows[i].reason or NO_TOKENS for i in np.flatnonzero(~finite)
            },
        }
