"""RHO-Loss: the candidates that are hard for the model but not for one that has seen held-out data.

    total_i = CE_i(θ) − IL_i        CE: mean loss over the row's label tokens; IL: the same under the reference model

Higher = worth learning: rows that are easy already have a small CE, noisy rows a large IL. Masks and the shift by one
are those of the model's own loss, on both sides. Cost: one forward of the model, and one of the reference model unless
its losses were tabulated before (`siftune.reference_losses`). Source: Mindermann et al., arXiv 2206.07137, as the
baseline of UDS (arXiv 2510.16882).

Axes: `B` candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import UserError
from ..files import refuse_special
from ..models.load import find_folder, loading, read_causal
from ..records import RowScores
from .base import Batch, Measured, ModelScored
from .maxloss import MaxLoss
from .token_id import token_ids

RECREATE_TABLE = "make the table again with siftune.reference_losses(trainer, ref_model)"

Table = Mapping[bytes, float]
TABLE_SUFFIXES = (".parquet", ".safetensors")


@dataclass(kw_only=True, eq=False)
class RhoLoss(ModelScored):
    """Keeps the K candidates with the largest reducible loss.

    >>> RhoLoss(keep=2, reference=held_out_model).select(model, batch).scores.irreducible
    >>> RhoLoss(keep=2, reference="reference.parquet")          # written by siftune.reference_losses
    """

    name: ClassVar[str] = "rho-loss"

    reference: Any
    """Where IL comes from: a causal LM, the folder or hub id of one (loaded at first use, safetensors only), a table
    (`.parquet`, `.safetensors`), or a mapping from `token_id` (bytes or hex) to the loss."""

    def __post_init__(self) -> None:
        self._model_loss, self._reference_loss = MaxLoss(keep=self.keep), MaxLoss(keep=self.keep)
        self._reference_model: torch.nn.Module | None = None
        self._table: Table | None = None
        self._any_row_in_table = False
        """Whether any candidate was in the table so far."""

    def check(self) -> None:
        super().check()
        known = isinstance(self.reference, (torch.nn.Module, Mapping, str, Path))
        if not known or self.reference == "":
            raise UserError(
                f"reference={self.reference!r} is no causal LM, folder, hub id, table or mapping; make a table with "
                "siftune.reference_losses(trainer, ref_model)"
            )

    def check_files(self) -> None:
        if not isinstance(self.reference, (str, Path)):
            return
        if Path(self.reference).suffix not in TABLE_SUFFIXES:
            find_folder(str(self.reference), None)
        elif not Path(self.reference).is_file():
            raise UserError(f"reference={str(self.reference)!r} does not exist; make it with siftune score-reference")

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Columns `loss`, `irreducible` `(B,)` (float64) and `tokens` `(B,)` (int64, label tokens)."""
        self._model_loss.score_tokens = self._reference_loss.score_tokens = self.score_tokens
        measured = self._model_loss.measure(model, batch)
        loss, reasons = measured.columns["loss"].clone(), dict(measured.reasons)
        self._load_reference(next(model.parameters()).device)
        if self._reference_model is not None:
            reference = self._reference_loss.measure(self._reference_model, batch)
            irreducible, reference_reasons = reference.columns["loss"].clone(), dict(reference.reasons)
            reference_reasons = {
                row: f"under the reference model {reason}" for row, reason in reference_reasons.items()
            }
        else:
            irreducible, reference_reasons = self._from_table(batch)
        reasons = {**reference_reasons, **reasons}
        loss[list(reasons)] = torch.nan
        irreducible[list(reasons)] = torch.nan
        columns = {"loss": loss, "irreducible": irreducible, "tokens": measured.columns["tokens"]}
        return Measured(measured.rows, columns, dict(sorted(reasons.items())))

    def _from_table(self, batch: Batch) -> tuple[torch.Tensor, dict[int, str]]:
        assert self._table is not None
        losses = [self._table.get(digest) for digest in token_ids(batch)]
        self._any_row_in_table |= any(value is not None for value in losses)
        if not self._any_row_in_table:
            raise UserError(
                f"none of {len(losses)} candidates is among the {len(self._table)} rows of the reference table; make it "
                "with this trainer's own data, tokenizer and max_length (siftune.reference_losses)"
            )
        missing = {row: "the reference table has no row for it" for row, value in enumerate(losses) if value is None}
        values = torch.tensor([torch.nan if value is None else value for value in losses], dtype=torch.float64)
        empty = {row: "the reference table holds no loss for it" for row, value in enumerate(losses) if value != value}
        return values, {**missing, **empty}

    def _load_reference(self, device: torch.device) -> None:
        if self._reference_model is not None or self._table is not None:
            return
        if isinstance(self.reference, torch.nn.Module):
            self._reference_model = self.reference
        elif isinstance(self.reference, Mapping):
            self._table = {row_digest(name): float(loss) for name, loss in self.reference.items()}
        elif Path(self.reference).suffix in TABLE_SUFFIXES:
            self._table = read_table(Path(self.reference))
        else:
            self._reference_model = load_reference_model(self.reference, device)

    def combine(self, measured: Measured) -> RowScores:
        loss, irreducible = measured.columns["loss"], measured.columns["irreducible"]
        parts = {"loss": loss, "irreducible": irreducible}
        return RowScores(loss - irreducible, parts, dict(measured.reasons))


def load_reference_model(reference: str | Path, device: torch.device) -> torch.nn.Module:
    """The causal LM of a folder or hub id, frozen, on a device (safetensors only). Raises `UserError`."""
    loaded: Any = loading(
        f"reference={str(reference)!r} could not be loaded",
        lambda: read_causal(str(reference), dtype="auto", use_safetensors=True),
    )
    model: torch.nn.Module = loaded.to(device).eval().requires_grad_(False)
    return model


def read_table(path: Path) -> Table:
    """`token_id` -> loss (NaN where the reference model gave none) of a table that `reference_losses` wrote.

    Raises `UserError` where the file is missing or holds other columns.
    """
    if not path.exists():
        raise UserError(
            f"there is no reference table {path}; make one with siftune.reference_losses(trainer, ref_model)"
        )
    refuse_special(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = loading(f"the reference table {path} cannot be read", lambda: load_file(path))
        _check_columns(path, set(tensors))
        names = tensors["token_id"].contiguous().numpy().tobytes()
        return {names[16 * at : 16 * at + 16]: float(loss) for at, loss in enumerate(tensors["loss"].tolist())}
    from ..data.checked_parquet import read_checked

    table = read_checked(path, way_out=RECREATE_TABLE)
    _check_columns(path, set(table.column_names))
    columns = table.select(["token_id", "loss"]).to_pydict()
    pairs = zip(columns["token_id"], columns["loss"], strict=True)
    return {row_digest(name): float("nan") if loss is None else loss for name, loss in pairs}


def _check_columns(path: Path, names: set[str]) -> None:
    if not {"token_id", "loss"} <= names:
        raise UserError(f"{path} holds {', '.join(sorted(names))}, and a reference table has token_id and loss")


def row_digest(name: bytes | str) -> bytes:
    digest = bytes.fromhex(name) if isinstance(name, str) else name
    if len(digest) != 16:
        raise UserError(f"{name!r} is no token_id: 16 bytes, or 32 hexadecimal digits")
    return digest
