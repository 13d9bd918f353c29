"""`token_id`: the name of a row by what the model sees of it, blake2b-128 of its real input ids and its label mask.

A row of a packed batch has the name that it has alone. Padding is removed, so it does not depend on the batch, the
epoch or the worker that a row came from. An id column is no alternative: trainers drop it before the collator. Cost:
one hash a row.

Shapes: `B` rows of a batch, `T` columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..models.layout import layout_of

Batch = Mapping[str, Any]


def token_ids(batch: Batch) -> list[bytes]:
    """`token_id` of each row, 16 bytes each.

    >>> token_ids(collator([row]))[0].hex()
    '5b7b4f1f...'
    """
    ids_BT, labels_BT, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if not isinstance(labels_BT, torch.Tensor) or labels_BT.shape != ids_BT.shape:
        labels_BT = torch.zeros_like(ids_BT)
    real_BT = mask != 0 if isinstance(mask, torch.Tensor) and mask.ndim == 2 else torch.ones_like(ids_BT)
    columns_3BT = torch.stack([ids_BT.long(), (labels_BT != -100).long(), real_BT.long()]).cpu().numpy()
    layout = layout_of(batch)
    if layout.packed:
        return [_digest(*_segment(columns_3BT[:2, line, start:stop])) for line, start, stop in layout.spans]
    return [
        _digest(row_ids[kept != 0], label_mask[kept != 0])
        for row_ids, label_mask, kept in zip(*columns_3BT, strict=True)
    ]


def _segment(columns_2T: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and label mask of a segment, whose first token is a label in no row's own loss."""
    ids, label_mask = columns_2T[0], columns_2T[1].copy()
    label_mask[0] = 0
    return ids, label_mask


def _digest(ids: NDArray[np.int64], label_mask: NDArray[np.int64]) -> bytes:
    digest = blake2b(ids.astype("<i8").tobytes(), digest_size=16)
    digest.update(label_mask.astype(np.uint8).tobytes())
    return digest.digest()
