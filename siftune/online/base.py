"""The contract of an online method: `score(model, batch)` changes no state, `select(model, batch)` does.

A selection has five steps, so that the trainer hook can choose across several micro-batches and ranks:

    measure   the forward pass: values of each candidate alone (norms, a sketch, a loss); reads no memory
    compare   measurements + memory, each candidate alone (nothing, for most); the work is divided between ranks
    combine   measurements + memory -> RowScores
    choose    RowScores -> indices to keep
    commit    memory, counters and statistics are updated with the kept rows

Shapes: `B` candidates (rows of a padded batch, segments of a packed one), `T` columns of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from ..budget import Keep, parse_keep
from ..errors import UserError
from ..models.hidden_states import predicting_tokens
from ..models.layout import BatchWithLayout, candidates_of, layout_of, with_layout
from ..models.repack import cut_segments
from ..records import Kept, RowScores
from .strata import STRATUM, check_strata, length_band, quotas, strata_of

Batch = Mapping[str, Any]
IGNORED = -100
"""The label of a token that no loss counts."""
SEGMENT_TOKENS = "segment_tokens"
"""The column of a packed batch's candidates that `keep_tokens` counts: all tokens of a segment."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of `rows` candidates by the forward pass, before any memory is read.

    `columns` are CPU tensors whose first axis is the candidates; a candidate that cannot be scored has NaN and
    an entry in `reasons`.
    """

    rows: int
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)
    label_masks: Sequence[torch.Tensor] = ()
    """Of a method that masks tokens, for each candidate which of its label tokens are trained on, in order: bool
    `(N,)`. They stay in the process that measured."""

    @staticmethod
    def join(parts: Sequence[Measured]) -> Measured:
        """Several micro-batches' candidates as one, in order."""
        reasons: dict[int, str] = {}
        start = 0
        for part in parts:
            reasons |= {start + index: reason for index, reason in part.reasons.items()}
            start += part.rows
        names = parts[0].columns if parts else {}
        masks = [mask for part in parts for mask in part.label_masks]
        return Measured(
            start, {name: torch.cat([part.columns[name] for part in parts]) for name in names}, reasons, masks
        )


@dataclass(kw_only=True, eq=False)
class OnlineMethod(ABC):
    """Base of every online method: subclasses are keyword-only dataclasses that inherit the options every method has
    and define `name`, `measure` and `combine`. Selectors use only their own generators, never the global random state.

    Raises `UserError` for options that cannot work, at the first selection (`check`).
    """

    name: ClassVar[str]
    """The registry's name."""
    side: ClassVar[Literal["offline", "online"]] = "online"
    """Which registry the method belongs to."""
    summary: ClassVar[str] = ""
    """What it ranks by, for `siftune methods`; empty is the first line of the class's docstring. This and the next two
    are also read from a method that another package registers by an entry point."""
    paper: ClassVar[str] = "-"
    """Its source."""
    needs: ClassVar[str] = "-"
    """What it needs to run: a model, labels, a server."""
    across_ranks: ClassVar[bool] = True
    """Whether candidates of several processes can be compared: not where that takes products of their gradients."""
    needs_forward: ClassVar[bool] = True
    """Whether scoring runs the model."""
    needs_gradients: ClassVar[bool] = False
    """Whether scoring takes gradients of single rows, which needs every trained weight complete in this process."""

    keep: Keep
    """Rows kept per micro-batch (int), or a fraction of the candidates: `8`, `1/8`, `20%`."""
    start_step: int = 0
    """Optimiser steps before the first selection; until then every row is kept."""
    window: Literal["micro", "step"] = "micro"
    """Choose within each micro-batch (`micro`, as the papers do) or across the accumulation window (`step`)."""
    scope: Literal["global", "local"] = "global"
    """With several processes: choose among all their candidates (`global`) or in each process alone (`local`)."""
    strata: str | None = None
    """Choose inside strata, each keeping rows in proportion to its candidates: a column's name (one value a row; with a
    trainer a column of its training set), or `length:N`, bands of N tokens. None ranks all candidates together."""
    score_tokens: int | None = field(default=None, init=False, repr=False)
    """An option of `ModelScored` alone; None elsewhere."""
    keep_tokens: int | None = field(default=None, init=False, repr=False)
    """An option of `ModelScored` alone; None elsewhere."""

    _column_values: Callable[[Batch], Sequence[Any]] | None = field(default=None, init=False, repr=False)
    """Gives the column of `strata` for a batch that does not hold it: set by the trainer hook."""
    _selections = 0
    """Selections made, saved with the state."""
    _steps = 0
    """Optimiser steps begun, saved with the state."""
    _steps_announced = False
    """Whether `new_step` is called from outside, so that `select` does not count steps itself."""
    _derived_stale = True
    """Whether the trained weights may have changed since values were derived from them."""
    _head_stale = True
    """Whether they may have changed since the head was last read."""

    def check(self) -> None:
        """Refuse options that cannot work, before any model is run. Raises `UserError`, which names the value and the
        fix.

        Called before every selection and by `check_keep`; subclasses add their own options.
        """
        parse_keep(self.keep)
        check_choice("window", self.window, ("micro", "step"))
        check_choice("scope", self.scope, ("global", "local"))
        check_minimum("start_step", self.start_step, 0)
        check_strata(self.strata, keep_tokens=self.keep_tokens)
        for name in ("score_tokens", "keep_tokens"):
            if getattr(self, name) is not None:
                check_minimum(name, getattr(self, name), 1)

    def check_files(self) -> None:  # noqa: B027
        """Refuse files and models that the options name and that do not exist, before training. Raises `UserError`.
        The default names none."""

    def needs_complete_weights(self) -> bool:
        """Whether scoring needs every trained weight complete in this process, so that none may be sharded:
        `needs_gradients`, for a method whose options do not change it."""
        return self.needs_gradients

    def new_step(self, *, learning_rate: float | None = None) -> None:
        """An optimiser step begins: it is counted, for `start_step`, and what was derived from trained weights is
        stale.

        The trainer hook calls it once per optimiser step, before scoring, with the step's learning rate. A loop that
        accumulates gradients calls it in the same place; in a loop that never calls it each `select` is a step.
        """
        self._steps += 1
        self._steps_announced = True
        self._mark_weights_changed()

    def _mark_weights_changed(self) -> None:
        self._derived_stale = self._head_stale = True

    def provenance(self) -> dict[str, str]:
        """How scores were computed where that was decided at run time, for the log and the ledger's metadata."""
        return {}

    # --- the five steps -------------------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Measure the candidates with the current weights of `model`. Changes no state; training flags, RNG and
        gradients are restored."""

    def compare(self, measured: Measured) -> Measured:
        """The same candidates with more columns: what depends on a candidate and on the memory, and on no other
        candidate. Changes no state. The default adds nothing; `combine` must not require the columns."""
        return measured

    @abstractmethod
    def combine(self, measured: Measured) -> RowScores:
        """Scores of the measured candidates, with the current memory. Changes no state."""

    def choose(self, scores: RowScores, measured: Measured, count: int) -> torch.Tensor:
        """Indices of the `count` best candidates, ascending; ties go to the lower index.

        Candidates without a score (NaN) are taken last, in order, only where `count` cannot be met without them.
        """
        total = torch.where(torch.isnan(scores.total), -torch.inf, scores.total)
        order = torch.argsort(-total, stable=True)
        return self.within_token_budget(order, measured)[:count].sort().values

    def choose_rows(self, scores: RowScores, measured: Measured, count: int) -> torch.Tensor:
        """`choose`, inside each stratum where `strata` is set and the candidates have been `stratified`."""
        if self.strata is None:
            return self.choose(scores, measured, count)
        _, group_B = torch.unique(measured.columns[STRATUM], return_inverse=True)
        members = [(group_B == group).nonzero().flatten() for group in range(int(group_B.max()) + 1)] if count else []
        members.sort(key=lambda rows: int(rows[0]))
        kept = [torch.zeros(0, dtype=torch.int64)]
        for rows, quota in zip(members, quotas([len(rows) for rows in members], count), strict=True):
            columns = {name: column[rows] for name, column in measured.columns.items()}
            parts = {name: part[rows] for name, part in scores.parts.items()}
            chosen = self.choose(RowScores(scores.total[rows], parts), Measured(len(rows), columns), quota)
            kept.append(rows[chosen])
        return torch.cat(kept).sort().values

    def stratified(self, measured: Measured, batch: Batch) -> Measured:
        """The candidates with the column of their strata, where `strata` is set. Raises `UserError` where it is a
        column that neither the batch nor the trainer's training set has."""
        if self.strata is None:
            return measured
        values = batch.get(self.strata)
        if values is None and self._column_values is not None and length_band(self.strata) is None:
            values = self._column_values(batch)
        stratum = strata_of(self.strata, batch, values)
        return replace(measured, columns={**measured.columns, STRATUM: stratum})

    def use_columns(self, column_values: Callable[[Batch], Sequence[Any]] | None) -> None:
        """Let `strata` read a column that batches do not hold; the trainer hook gives that of the training set."""
        self._column_values = column_values

    def _without_strata(self, batch: Batch) -> Batch:
        """The batch without the column of `strata`, which no model accepts."""
        if self.strata is None or self.strata not in batch:
            return batch
        return {name: value for name, value in batch.items() if name != self.strata}

    def within_token_budget(self, order: torch.Tensor, measured: Measured) -> torch.Tensor:
        """The head of `order` whose `tokens` column fits into `keep_tokens`, at least one row; all without a budget.

        Segments of a packed batch fill a line: each is taken, in order, if all of its tokens still fit.
        """
        if self.keep_tokens is None or len(order) == 0:
            return order
        if (sizes := measured.columns.get(SEGMENT_TOKENS)) is not None:
            return _filling(order, sizes, self.keep_tokens)
        total_tokens = measured.columns["tokens"][order].cumsum(0)
        return order[: max(1, int((total_tokens <= self.keep_tokens).sum()))]

    def commit(self, measured: Measured, scores: RowScores, kept: torch.Tensor) -> None:
        """Add the kept candidates to the memory and count the selection. The default has no memory."""
        self._selections += 1

    # --- the public two -------------------------------------------------------------------------------------------

    def score(self, model: torch.nn.Module, batch: Batch) -> RowScores:
        """Scores of the batch's B rows; no state changes.

        >>> scores = siftune.UDS(keep=2).score(model, batch)
        >>> scores.total, scores.intra, scores.inter
        """
        self.check()
        self._mark_weights_changed()
        return self.combine(self.measure(model, with_layout(self._without_strata(batch))))

    def select(self, model: torch.nn.Module, batch: Batch) -> Kept:
        """Score, keep the best, remember them. `kept.batch` is the batch cut to the kept rows, without the column of
        `strata`.

        >>> kept = siftune.UDS(keep=2).select(model, batch)
        >>> loss = model(**kept.batch).loss
        """
        self.check()
        self._mark_weights_changed()
        if not self._steps_announced:
            self._steps += 1
        if self._steps <= self.start_step:
            return self._keep_all(self._without_strata(batch))
        given, batch = batch, with_layout(self._without_strata(batch))
        layout = batch.layout
        measured = self.stratified(self.measure(model, batch), given)
        scores = self.combine(measured)
        choosable = (
            with_segment_tokens(measured, torch.tensor([span.tokens for span in layout.spans]))
            if layout.packed
            else measured
        )
        kept = self.choose_rows(scores, choosable, self.count(measured.rows))
        self.commit(measured, scores, kept)
        trained = mask_labels(batch, measured.label_masks) if measured.label_masks else batch
        return Kept(kept, scores, cut(trained, kept))

    def _keep_all(self, batch: Batch) -> Kept:
        """Before `start_step`: every row, unscored."""
        rows = rows_of(batch)
        unscored = torch.full((rows,), torch.nan, dtype=torch.float64)
        reason = f"no selection before start_step={self.start_step}"
        return Kept(torch.arange(rows), RowScores(unscored, {}, dict.fromkeys(range(rows), reason)), dict(batch))

    # --- how many -------------------------------------------------------------------------------------------------

    def count(self, candidates: int) -> int:
        """Rows to keep of `candidates`: the contract's K, and at least one on a short batch."""
        if candidates == 0:
            return 0
        return min(candidates, max(1, parse_keep(self.keep).rows(candidates)))

    def check_keep(self, candidates: int) -> None:
        """Refuse, before training, options that cannot work and a fraction of a full micro-batch below one row."""
        self.check()
        if parse_keep(self.keep).rows(candidates) < 1:
            raise UserError(
                f"keep={self.keep!r} is less than one row of a micro-batch of {candidates} candidates; "
                "raise keep or per_device_train_batch_size"
            )

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to keep the same rows: tensors and plain JSON values, nothing else."""
        return {"selections": self._selections, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`. Raises `UserError` when it belongs to another configuration."""
        expected = self.state_dict()
        if set(state) | {"steps"} != set(expected) | {"steps"}:
            raise UserError(
                f"{self.name} keeps {', '.join(expected) or 'no state'}, and this state holds {', '.join(state) or 'nothing'}; "
                "it belongs to another method"
            )
        self._load_counters(state)

    def _load_counters(self, state: Mapping[str, Any]) -> None:
        """States of version 0.1.0 have no `steps`: its plain loops counted every step as a selection."""
        self._selections = int(state.get("selections", 0))
        self._steps = int(state.get("steps", self._selections))


@dataclass(kw_only=True, eq=False)
class ModelScored(OnlineMethod):
    """Base of the methods whose scores come from the model: it adds the options that bound tokens.

    `measure` gives a column `tokens` `(B,)` (int64), the tokens of each candidate that count.
    """

    score_tokens: int | None = None
    """Padded tokens of one scoring pass at most, which bounds its activations; None is the whole batch at once (the
    trainer hook sets its own)."""
    keep_tokens: int | None = None
    """Token budget of one choice, beside `keep`: best rows first while their label tokens fit, at least one row. In a
    packed batch all tokens of a segment count, and segments that no longer fit are passed over for smaller ones."""


def with_segment_tokens(measured: Measured, tokens: torch.Tensor) -> Measured:
    """The candidates of a packed batch with the tokens `(B,)` (int64) that each takes up in a line, for
    `keep_tokens`."""
    return replace(measured, columns={**measured.columns, SEGMENT_TOKENS: tokens})


def _filling(order: torch.Tensor, sizes: torch.Tensor, room: int) -> torch.Tensor:
    """Candidates in `order` that fill `room` tokens, those left out that no longer fit; the first where none does."""
    taken: list[int] = []
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= room:
            taken.append(index)
            room -= size
    return torch.tensor(taken or order[:1].tolist(), dtype=torch.int64)


def mask_labels(batch: Batch, masks: Sequence[torch.Tensor]) -> BatchWithLayout:
    """The batch with -100 at the label tokens that `masks` (one per candidate, as in `Measured`) leave out; nothing of
    the batch itself changes.

    >>> mask_labels({"input_ids": ids_1T, "labels": torch.tensor([[-100, 4, 5]])}, [torch.tensor([True, False])])
    """
    batch = with_layout(batch)
    positions_CT = predicting_tokens(batch)
    lines = [span.line for span in batch.layout.spans] if batch.layout.packed else range(len(positions_CT))
    labels_BT = batch["labels"].clone()
    if batch.layout.packed:  # nothing in its own row predicts a segment's first token
        labels_BT[lines, [span.start for span in batch.layout.spans]] = IGNORED
    for line, positions_T, mask_N in zip(lines, positions_CT, masks, strict=True):
        columns_N = positions_T.nonzero().flatten()[~mask_N] + 1
        labels_BT[line, columns_N.to(labels_BT.device)] = IGNORED
    return with_layout({**batch, "labels": labels_BT}, batch.layout)


def rows_of(batch: Batch) -> int:
    """Candidates of a batch. Raises `UserError` where it holds no `input_ids`."""
    return candidates_of(batch)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `UserError` unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_minimum(name: str, value: object, bound: float) -> None:
    """Raise `UserError` unless `value` is a number (a whole one for a whole bound) of at least `bound`."""
    kinds = (int,) if isinstance(bound, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= bound:
        raise UserError(f"{name}={value!r} must be a {'whole ' if kinds == (int,) else ''}number of at least {bound}")


def cut(batch: Batch, kept: torch.Tensor) -> dict[str, Any]:
    """The batch's kept rows: every tensor or list whose first axis is the batch is indexed, the rest is passed on; of a
    packed batch the kept segments, packed again (`siftune.models.repack`).

    Trimming of columns that are padding in every kept row belongs to the trainer hook, not here.
    """
    rows = candidates_of(batch)
    if len(kept) == rows:
        return dict(batch)
    if layout_of(batch).packed:
        return cut_segments(batch, kept)
    result: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows:
            result[name] = value[kept.to(value.device)]
        elif isinstance(value, (list, tuple)) and len(value) == rows:
            result[name] = type(value)(value[index] for index in kept.tolist())
        else:
            result[name] = value
    return result
