"""The losses of a trainer's rows under a reference model, computed once, for RHO-Loss (arXiv 2206.07137)
and, token by token, for token masks.

Rows go through the trainer's own data preparation and collator and are named by `token_id`, so the table fits whatever
order, batch or epoch they come in later. Losses are computed in parts of 512 rows, written under a temporary name and
renamed; an interrupted run resumes and gives the same file. Cost: one forward of the reference model per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from safetensors.torch import save_file

from ..data.checked_parquet import read_checked, write_checked
from ..data.exports import clear
from ..data.protect import foreign_name
from ..errors import UserError
from ..files import atomic_path, read_json, write_json
from ..hook.row_index import collate_rows, preserved_random_state
from ..models.hidden_states import predicting_tokens
from ..models.layout import BatchWithLayout
from ..online.logit_access import LogitAccess
from ..online.maxloss import MaxLoss, cross_entropy, values_of_labels
from ..online.rho_loss import TABLE_SUFFIXES
from ..online.token_id import token_ids
from ..online.token_masks import LOSSES
from ..progress import counted

if TYPE_CHECKING:
    from transformers import Trainer

PART = 512
"""Rows of a part: what an interruption costs at most."""
CHUNK = 32
"""Rows collated together."""
NOTE = "made-by.json"
"""Which model computed the parts; its presence marks their folder."""
PARTS = (NOTE, "part-*.parquet", ".*.siftune-tmp")

_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("token_id", pa.string()),
        ("loss", pa.float64()),
        ("tokens", pa.int32()),
        ("reason", pa.string()),
    ]
)


def reference_losses(
    trainer: Trainer,
    ref_model: torch.nn.Module,
    *,
    out: str | Path | None = None,
    score_tokens: int = 8192,
    per_token: bool = False,
) -> Path:
    """Write the mean loss of every row of the trainer's training set under `ref_model`; return the table's path.

    `out` (default `OUTPUT_DIR/siftune/reference.parquet`) ends in `.parquet` (columns `row`, `token_id` in hex, `loss`
    or null, `tokens`, `reason`) or `.safetensors` (`token_id` uint8 `(n, 16)`, `loss` float64 `(n,)`, NaN without one).
    `score_tokens` bounds the padded tokens of one forward pass. `per_token` adds a column `losses`, the loss of each
    label token as float32, for `token-rho` and `token-self` (.parquet only). A finished table is computed again; an interrupted one is
    resumed. Raises `UserError` for iterable data, for a collator that merges rows, and for another ending of `out`.

    >>> table = siftune.reference_losses(trainer, ref_model)
    >>> siftune.attach(trainer, siftune.RhoLoss(keep="1/8", reference=table))
    """
    path = Path(out) if out is not None else Path(str(trainer.args.output_dir)) / "siftune" / "reference.parquet"
    if path.suffix not in TABLE_SUFFIXES:
        raise UserError(f"out={str(path)!r} must end in .parquet or .safetensors")
    if per_token and path.suffix != ".parquet":
        raise UserError(f"out={str(path)!r} must end in .parquet: a table of token losses has no other form")
    with preserved_random_state():
        loader = trainer.get_train_dataloader()
    dataset, collate = loader.dataset, loader.collate_fn
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(
            "the training set is iterable and has no length, so no table can be written; pass ref_model itself"
        )
    folder = path.with_name(path.name + ".parts")
    _begin(folder, ref_model, len(dataset), per_token=per_token)
    measure = _Measure(ref_model, score_tokens, per_token)
    every = [list(range(start, min(start + PART, len(dataset)))) for start in range(0, len(dataset), PART)]
    for index, rows in enumerate(counted("loss under the reference model", every, len(dataset), size=len)):
        part = folder / f"part-{index:06d}.parquet"
        with preserved_random_state():
            batches, owners = _batches(dataset, collate, rows)
        names = [digest.hex() for batch in batches for digest in token_ids(batch)]
        if _holds(part, names):
            continue
        _write(part, measure.table(batches, owners, names))
    parts = sorted(folder.glob("part-*.parquet"))[: -(-len(dataset) // PART)]
    tables = [read_checked(part, way_out="run the same command again, which measures it again") for part in parts]
    _write(path, pa.concat_tables(tables) if tables else measure.schema.empty_table())
    clear(folder, PARTS)
    return path


def _begin(folder: Path, model: torch.nn.Module, rows: int, *, per_token: bool) -> None:
    """Keep the parts of an interrupted run only where this model computed them. Raises `UserError` for a folder that
    siftune did not write."""
    made_by = {"model": _fingerprint(model) + (" per token" if per_token else ""), "rows": rows}
    note = folder / NOTE
    if note.is_file():
        previous = read_json(note)
        if previous == made_by:
            return
        if not isinstance(previous, dict) or previous.keys() != made_by.keys():
            raise UserError(f"{note} was not written by siftune; move {folder} away, or choose another path")
        clear(folder, PARTS)
    elif (name := foreign_name(folder)) is not None:
        raise UserError(f"{folder} holds {name} and no {NOTE}; move it away, or choose another path")
    write_json(note, made_by)


def _holds(part: Path, names: list[str]) -> bool:
    """Whether a part exists, is undamaged, and holds these rows."""
    try:
        return part.is_file() and read_checked(part, way_out="")["token_id"].to_pylist() == names
    except UserError:
        return False


def _fingerprint(model: torch.nn.Module) -> str:
    """blake2b over names, shapes, dtypes and 64 values of each weight: training moves them all."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // 64)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _batches(
    dataset: Any, collate: Callable[[list[Any]], Any], rows: list[int]
) -> tuple[list[BatchWithLayout], list[int]]:
    """Batches of some rows, and the data set's row of each of their candidates."""
    batches: list[BatchWithLayout] = []
    owners: list[int] = []
    for start in range(0, len(rows), CHUNK):
        for batch, numbers in collate_rows(dataset, collate, rows[start : start + CHUNK]):
            batches.append(batch)
            owners.extend(numbers)
    return batches, owners


@dataclass(frozen=True)
class _Measure:
    """The losses of batches as rows of a table."""

    model: torch.nn.Module
    score_tokens: int
    per_token: bool
    access: LogitAccess = field(default_factory=LogitAccess)

    @property
    def schema(self) -> pa.Schema:
        return _SCHEMA.append(pa.field(LOSSES, pa.list_(pa.field("element", pa.float32())))) if self.per_token else _SCHEMA

    def table(self, batches: list[BatchWithLayout], rows: list[int], names: list[str]) -> pa.Table:
        method = MaxLoss(keep=1, score_tokens=self.score_tokens)
        columns: dict[str, list[Any]] = {"row": list(rows), "token_id": names, "loss": [], "tokens": [], "reason": []}
        for batch in batches:
            measured = method.measure(self.model, batch)
            for index, loss in enumerate(measured.columns["loss"].tolist()):
                columns["loss"].append(None if index in measured.reasons else loss)
                columns["reason"].append(measured.reasons.get(index))
            columns["tokens"].extend(measured.columns["tokens"].tolist())
            if self.per_token:
                columns.setdefault(LOSSES, []).extend(self._token_losses(batch, measured.reasons))
        return pa.table(columns, schema=self.schema)

    def _token_losses(self, batch: BatchWithLayout, reasons: Mapping[int, str]) -> list[list[float] | None]:
        positions = predicting_tokens(batch)
        losses = values_of_labels(
            self.access, self.model, batch, positions, cross_entropy, score_tokens=self.score_tokens
        )
        return [None if row in reasons else losses[row].tolist() for row in range(len(positions))]


def _write(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary:
        _write_table(temporary, path.suffix, table)


def _write_table(path: Path, suffix: str, table: pa.Table) -> None:
    if suffix == ".safetensors":
        names = bytearray(b"".join(bytes.fromhex(name) for name in table["token_id"].to_pylist()))
        ids = torch.frombuffer(names, dtype=torch.uint8) if names else torch.zeros(0, dtype=torch.uint8)
        losses = [float("nan") if loss is None else loss for loss in table["loss"].to_pylist()]
        save_file({"token_id": ids.reshape(-1, 16).clone(), "loss": torch.tensor(losses, dtype=torch.float64)}, path)
    else:
        write_checked(table, path)
