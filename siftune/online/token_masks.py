"""Token masks: every row is kept, and the loss sees the top share of the micro-batch's label tokens.

    excess_t = ℓ_t(θ_ref) − ℓ_t(θ)         ℓ_t: cross-entropy of label token t; θ_ref: the reference model

The label tokens of a micro-batch are ranked by their excess, and the labels of all but the first `share` are -100 in the
batch that is trained: the trainer's own loss and its count of tokens see no others. A segment of a packed batch is a
row like any other. `token-rho` has a reference model or a table of its losses, `token-self` the base model: with LoRA
the trained model without its adapter, no second copy. Cost: a forward of the model, and one of the reference unless
there is a table. Sources: Rho-1, arXiv 2404.07965; ssToken, arXiv 2510.18250, without its attention term.

Shapes: `B` rows, `T` columns, `N` label tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..budget import Keep, parse_keep
from ..errors import UserError
from ..models.hidden_states import predicting_tokens
from ..models.load import find_folder
from ..records import RowScores
from .base import Batch, Measured, ModelScored, check_choice
from .logit_access import LogitAccess
from .maxloss import cross_entropy, values_of_labels
from .rho_loss import TABLE_SUFFIXES, load_reference_model, row_digest
from .token_id import token_ids

LOSSES = "losses"
"""Column of a reference table: the loss of each label token of a row, in order, as float32."""
RECREATE_TABLE = "make the table again with siftune.reference_losses(trainer, ref_model, per_token=True)"


@dataclass(kw_only=True, eq=False)
class TokenRho(ModelScored):
    """Keeps every row, and of the micro-batch's label tokens those whose loss differs most from a reference model's.

    >>> siftune.TokenRho(share="60%", reference=held_out_model).select(model, batch).batch["labels"]
    """

    name: ClassVar[str] = "token-rho"

    keep: Keep = "all"
    """All rows: tokens are chosen, not rows. Another value is refused; the budget is `share`."""
    share: Keep = "60%"
    """Label tokens trained on, of each micro-batch: `"60%"`, `0.6`, `"3/5"`; at least one. Rho-1 uses 60 to 70 %."""
    reference: Any
    """Where the reference losses come from: a causal LM, the folder or hub id of one, a table (`.parquet`) of
    `siftune.reference_losses(per_token=True)`, or a mapping from `token_id` (bytes or hex) to the row's losses."""
    order: Literal["reference-now", "now-reference"] = "reference-now"
    """What ranks highest: tokens that the reference finds harder than the model does now (`reference-now`, as ssToken
    has it), or tokens that the model finds harder now (`now-reference`, the excess loss of Rho-1)."""

    def __post_init__(self) -> None:
        self._logits_now, self._logits_reference = LogitAccess(), LogitAccess()
        self._reference_model: torch.nn.Module | None = None
        self._table: Mapping[bytes, Sequence[float]] | None = None
        self._any_row_in_table = False

    def check(self) -> None:
        super().check()
        if parse_keep(self.keep).fraction != 1.0:
            raise UserError(
                f"keep={self.keep!r} is not all rows, and {self.name} chooses tokens of all of them; set share instead"
            )
        if parse_keep(self.share).fraction is None:
            raise UserError(f"share={self.share!r} is a number of rows; set a share of the label tokens, such as 60%")
        if self.keep_tokens is not None:
            raise UserError(f"keep_tokens={self.keep_tokens} cuts rows, and {self.name} keeps all; set share instead")
        check_choice("order", self.order, ("reference-now", "now-reference"))
        self._check_reference()

    def _check_reference(self) -> None:
        known = isinstance(self.reference, (torch.nn.Module, Mapping, str, Path)) and self.reference != ""
        if not known:
            raise UserError(
                f"reference={self.reference!r} is no causal LM, folder, hub id, table or mapping; make a table with "
                "siftune.reference_losses(trainer, ref_model, per_token=True)"
            )

    def check_files(self) -> None:
        if not isinstance(self.reference, (str, Path)):
            return
        if Path(self.reference).suffix not in TABLE_SUFFIXES:
            find_folder(str(self.reference), None)
        elif not Path(self.reference).is_file():
            raise UserError(f"reference={str(self.reference)!r} does not exist; {RECREATE_TABLE}")

    def count(self, candidates: int) -> int:
        return candidates

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Columns `excess` `(B,)` (the mean over a row's label tokens), `share` `(B,)` (of its label tokens that are
        trained on), both float64, and `tokens` `(B,)` (int64, label tokens); the masks as `label_masks`."""
        positions_BT = predicting_tokens(batch)
        counts_B = positions_BT.sum(dim=1)
        now = self._losses(self._logits_now, model, batch, positions_BT)
        reference, reasons = self._reference_losses(model, batch, positions_BT)
        self._check_any_in_table(reasons, counts_B)
        sign = 1.0 if self.order == "reference-now" else -1.0
        excess: list[torch.Tensor] = []
        for row, count in enumerate(counts_B.tolist()):
            known = count > 0 and row not in reasons
            values = sign * (reference[row] - now[row]) if known else torch.zeros(count, dtype=torch.float64)
            if count == 0:
                reasons[row] = "no label tokens to score"
            elif not bool(torch.isfinite(values).all()):
                reasons[row] = "its loss is not finite"
                values = torch.full_like(values, torch.nan)
            excess.append(values)
        without_reference = {row for row, reason in reasons.items() if "reference table" in reason}
        masks = self._masks(excess, without_reference)
        shares = [float(mask.double().mean()) if len(mask) else torch.nan for mask in masks]
        means = [float(values.mean()) if len(values) else torch.nan for values in excess]
        columns = {
            "excess": torch.tensor(means, dtype=torch.float64),
            "share": torch.tensor(shares, dtype=torch.float64),
            "tokens": counts_B,
        }
        for name in ("excess", "share"):
            columns[name][list(reasons)] = torch.nan
        return Measured(len(positions_BT), columns, dict(sorted(reasons.items())), masks)

    def _masks(self, excess: Sequence[torch.Tensor], without_reference: AbstractSet[int]) -> list[torch.Tensor]:
        """Which label tokens of each row are trained on: of the micro-batch's ranked tokens the top `share`, ties to the
        earlier one; all tokens of rows without a reference; none of rows whose loss is not finite, unless nothing else
        is left to train on."""
        lengths = [len(values) for values in excess]
        unranked = torch.cat([torch.full((n,), row in without_reference) for row, n in enumerate(lengths)])
        joined = torch.cat(list(excess))
        ranked = (~torch.isnan(joined) & ~unranked).nonzero().flatten()
        mask = unranked.clone()
        if len(ranked):
            count = max(1, parse_keep(self.share).rows(len(ranked)))
            mask[ranked[torch.argsort(-joined[ranked], stable=True)[:count]]] = True
        if not bool(mask.any()):
            mask[:] = True
        return list(mask.split(lengths))

    def _check_any_in_table(self, reasons: Mapping[int, str], counts_B: torch.Tensor) -> None:
        """Raise `UserError` where no candidate so far was in the table: it belongs to other rows."""
        if self._table is None or self._any_row_in_table or not len(counts_B):
            return
        self._any_row_in_table = len(reasons) < len(counts_B)
        if not self._any_row_in_table:
            raise UserError(
                f"none of {len(counts_B)} candidates is among the {len(self._table)} rows of the reference table with as many "
                f"label tokens; {RECREATE_TABLE} with this trainer's own data, tokenizer and max_length"
            )

    def combine(self, measured: Measured) -> RowScores:
        parts = {"share": measured.columns["share"]}
        return RowScores(measured.columns["excess"], parts, dict(measured.reasons))

    # --- losses -------------------------------------------------------------------------------------------------------

    def _losses(
        self, access: LogitAccess, model: torch.nn.Module, batch: Batch, positions_BT: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        return values_of_labels(access, model, batch, positions_BT, cross_entropy, score_tokens=self.score_tokens)

    def _reference_losses(
        self, model: torch.nn.Module, batch: Batch, positions_BT: torch.Tensor
    ) -> tuple[Mapping[int, torch.Tensor], dict[int, str]]:
        """The reference's loss of each label token, by row, and reasons for rows without."""
        self._load(next(model.parameters()).device)
        if self._table is None:
            assert self._reference_model is not None
            return self._losses(self._logits_reference, self._reference_model, batch, positions_BT), {}
        result: dict[int, torch.Tensor] = {}
        reasons: dict[int, str] = {}
        for row, (digest, count) in enumerate(zip(token_ids(batch), positions_BT.sum(dim=1).tolist(), strict=True)):
            losses = self._table.get(digest)
            if losses is None:
                reasons[row] = "the reference table has no row for it"
            elif len(losses) != count:
                reasons[row] = f"the reference table has {len(losses)} losses for its {count} label tokens"
            else:
                result[row] = torch.tensor(np.array(losses, dtype=np.float64))
        return result, reasons

    def _load(self, device: torch.device) -> None:
        if self._reference_model is not None or self._table is not None:
            return
        if isinstance(self.reference, torch.nn.Module):
            self._reference_model = self.reference
        elif isinstance(self.reference, Mapping):
            self._table = {row_digest(name): losses for name, losses in self.reference.items()}
        elif Path(self.reference).suffix in TABLE_SUFFIXES:
            self._table = read_token_table(Path(self.reference))
        else:
            self._reference_model = load_reference_model(self.reference, device)


@dataclass(kw_only=True, eq=False)
class TokenSelf(TokenRho):
    """Keeps every row, and of the micro-batch's label tokens those whose loss fell most since the base model.

    >>> siftune.attach(lora_trainer, siftune.TokenSelf(share="60%"))
    """

    name: ClassVar[str] = "token-self"

    reference: Any = None
    """The base model where no adapter is trained: a causal LM, the folder or hub id of one, or a table as for
    `token-rho`. None: the trained model with its adapter switched off."""

    def _check_reference(self) -> None:
        if self.reference is not None:
            super()._check_reference()

    def _reference_losses(
        self, model: torch.nn.Module, batch: Batch, positions_BT: torch.Tensor
    ) -> tuple[Mapping[int, torch.Tensor], dict[int, str]]:
        if self.reference is not None:
            return super()._reference_losses(model, batch, positions_BT)
        with without_adapter(model):
            return self._losses(self._logits_reference, model, batch, positions_BT), {}


def without_adapter(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """A context in which a peft model computes as its base does. Raises `UserError` for a model without an adapter.

    >>> with without_adapter(peft_model): base_logits = peft_model(**batch).logits
    """
    for module in model.modules():
        disable = getattr(module, "disable_adapter", None)
        if callable(disable) and hasattr(module, "peft_config"):
            context: AbstractContextManager[Any] = disable()
            return context
    raise UserError(
        "token-self compares with the base model, and the model has no adapter of peft to switch off; set reference to "
        "the base model, or train with LoRA"
    )


def read_token_table(path: Path) -> dict[bytes, Sequence[float]]:
    """`token_id` -> losses of a row's label tokens, of a table of `reference_losses(per_token=True)`. Raises
    `UserError`."""
    from ..data.checked_parquet import read_checked

    if path.suffix != ".parquet":
        raise UserError(f"reference={str(path)!r} holds one loss per row; {RECREATE_TABLE}, as .parquet")
    if not path.exists():
        raise UserError(f"there is no reference table {path}; {RECREATE_TABLE}")
    table = read_checked(path, way_out=RECREATE_TABLE)
    if not {"token_id", LOSSES} <= set(table.column_names):
        raise UserError(
            f"{path} holds {', '.join(table.column_names)}, and a table of token losses has token_id and {LOSSES}; {RECREATE_TABLE}"
        )
    rows = zip(table["token_id"].to_pylist(), table[LOSSES].combine_chunks(), strict=True)
    return {row_digest(name): losses.values.to_numpy() for name, losses in rows if losses.is_valid}
