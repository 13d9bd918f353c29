"""`attach(trainer, selector)` makes a live Hugging Face trainer train on the rows that the selector keeps.

The trainer is unchanged otherwise: its `get_batch_samples` is wrapped on the instance, so candidates are fetched as
before, scored, cut, and counted by the same method again over the kept rows alone; the loss is divided by the right
number of tokens. `train` is wrapped to learn which checkpoint a run resumes from, `log` to add the selection's numbers,
`compute_loss` to read each row's loss from the training forward for the ledger (`siftune.hook.training_loss`), and one
callback writes state and ledger. Cost: the selector's scoring; nothing else runs per row but a hash and that reading.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..errors import UserError
from ..models.layout import BatchWithLayout, with_layout
from ..online import nuclear
from ..online.base import OnlineMethod
from ..online.token_id import token_ids
from ..output import say
from . import checkpoint as checkpoints
from .batching import Padding
from .checks import allows_dummies, check, check_batch, check_budget, selects_across_ranks
from .columns import use_training_column
from .exchange import Ranks
from .ledger import Ledger
from .metrics import SelectionMetrics
from .packing import (
    attends_to_complete_lines,
    describe_lines,
    describe_packed,
    describe_reading_across,
    packed_lines,
    packs,
    separates,
)
from .row_index import RowIndex, index_rows
from .selection_step import Selection, select_step, window_count
from .training_loss import TrainingLosses
from .validation import read_validation

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

_ATTACHMENT = "siftune_attachment"
_WRAPPED = ("get_batch_samples", "train", "log", "compute_loss")


def attach(
    trainer: Trainer,
    selector: OnlineMethod,
    *,
    allow_fresh_selector: bool = False,
    ledger: bool = True,
    quiet: bool = False,
) -> Attachment:
    """Sift every training batch of `trainer` with `selector`, from the next `trainer.train()` on.

    `trainer` is a `transformers.Trainer` or any subclass (`trl.SFTTrainer`, ...). `per_device_train_batch_size` becomes
    the number of candidates; 64 with `keep=8` is a good shape. Evaluation is never sifted. With `ledger` every
    candidate leaves a line in `OUTPUT_DIR/siftune/selection.parquet`. `allow_fresh_selector` lets a run resume from a
    checkpoint that holds no selection state. One line on stderr says what the budget means, unless `quiet`.

    With several processes, all their candidates form one set of candidates, unless the selector has `scope="local"`.

    Raises `UserError` where selection cannot work: a selector attached already, less than one row kept, DataParallel,
    context or tensor parallelism, images, packing without boundaries, preference trainers, and methods
    that need other ranks' gradients or complete weights of a sharded model.

    >>> siftune.attach(trainer, siftune.UDS(keep="1/8"))
    >>> trainer.train()
    """
    if (existing := getattr(trainer, _ATTACHMENT, None)) is not None:
        raise UserError(
            f"the selector {existing.selector.name} is attached already; call siftune.detach(trainer) first"
        )
    check(trainer, selector)
    read_validation(trainer, selector, quiet=quiet)
    attachment = Attachment(trainer, selector, allow_fresh=allow_fresh_selector, ledger=ledger, quiet=quiet)
    if not quiet and trainer.is_world_process_zero():
        say(attachment.describe(), error=True)
    return attachment


def detach(trainer: Trainer) -> None:
    """Restore the trainer. Raises `UserError` where nothing is attached.

    >>> siftune.detach(trainer)
    """
    attachment: Attachment | None = getattr(trainer, _ATTACHMENT, None)
    if attachment is None:
        raise UserError("no selector is attached to this trainer; nothing to detach")
    attachment.detach()


class Attachment:
    """What `attach` added to a trainer: the selector, the ledger, the metrics, and `detach`, which removes them."""

    def __init__(
        self, trainer: Trainer, selector: OnlineMethod, *, allow_fresh: bool, ledger: bool, quiet: bool
    ) -> None:
        self.trainer = trainer
        self.selector = selector
        self.metrics = SelectionMetrics()
        args = trainer.args
        self.ledger = (
            Ledger(Path(str(args.output_dir)) / "siftune", rank=args.process_index, world=args.world_size)
            if ledger
            else None
        )
        self._losses = TrainingLosses(self.ledger)
        self._across_ranks = selects_across_ranks(trainer, selector)
        self._allow_fresh_selector = allow_fresh
        self._quiet = quiet or not trainer.is_world_process_zero()
        self._padding = Padding.of(trainer)
        self._allow_dummies = allows_dummies(trainer)
        self._row_index: tuple[Any, RowIndex | None] = (None, None)
        self._resume_from: Path | None = None
        self._initial_state: Mapping[str, Any] = {}
        self._batches_checked = False
        self._packed = packs(trainer)
        self._separated: bool | None = None
        self._index_source: tuple[Any, Any] | None = None
        self._numbered: Any = None
        self._provenance: dict[str, str] = {}
        self._ranks: Ranks | None = None
        use_training_column(selector, trainer.train_dataset, self._index)
        self._original = {name: getattr(trainer, name) for name in _WRAPPED}
        self._own_attributes = {name for name in _WRAPPED if name in vars(trainer)}
        self._callback = _Callback(self)
        for name, method in self._original.items():
            # With the original's module and signature, which checks.py and trainers look at.
            setattr(trainer, name, functools.wraps(method)(functools.partial(getattr(self, f"_{name}"))))
        trainer.add_callback(self._callback)
        setattr(trainer, _ATTACHMENT, self)

    def detach(self) -> None:
        """Restore the trainer's own methods and remove the callback."""
        for name in _WRAPPED:
            if name in self._own_attributes:
                setattr(self.trainer, name, self._original[name])
            else:
                delattr(self.trainer, name)
        self.trainer.remove_callback(self._callback)
        self.selector.use_columns(None)
        delattr(self.trainer, _ATTACHMENT)

    def number_rows_as(self, dataset: Any) -> None:
        """Let the ledger's `row` be a row of `dataset`, of which the training set's lines were packed."""
        self._numbered = dataset
        use_training_column(self.selector, dataset, self._index)

    def describe(self) -> str:
        """Candidates and trained rows of a full step, and what that means for the schedule, in one line."""
        args, name = self.trainer.args, self.selector.name
        if (lines := packed_lines(self.trainer)) is not None:  # how many rows they hold is known at the first step
            return describe_lines(self.selector, self.trainer, lines)
        size, micro_batches, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        ranks_per_choice = ranks if self._across_ranks else 1
        if self.selector.window == "step":
            kept = window_count(self.selector, [size] * micro_batches * ranks_per_choice)
        else:
            kept = window_count(self.selector, [size] * ranks_per_choice) * micro_batches
        kept *= ranks // ranks_per_choice
        processes = f" of {ranks} processes{'' if self._across_ranks else ', each separately,'}" if ranks > 1 else ""
        return (
            f"siftune: {name} scores {size * micro_batches * ranks} candidates{processes} per step and trains on {kept} of them, "
            f"the new effective batch; optimiser steps and schedule stay as they are, so an epoch trains on "
            f"{kept / (size * micro_batches * ranks):.1%} of the rows it reads"
        )

    def train_through(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Train with `train`, the trainer's method below every override, for a selector attached while one of them
        runs.

        The overrides are not run again; the arguments are those of `Trainer.train`.
        """
        outermost, self._original["train"] = self._original["train"], train
        try:
            return self._train(*args, **kwargs)
        finally:
            self._original["train"] = outermost

    # --- what replaces the trainer's own methods --------------------------------------------------------------------

    def _get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        previous = self._original["get_batch_samples"]
        candidates, _ = previous(epoch_iterator, num_batches, device)
        trained = self._select(list(candidates), device) if candidates or self._across_ranks else candidates
        # The same method again over the kept rows: it counts their tokens by the trainer's own rule. It gathers across
        # ranks, so it is called on every rank each time, also where the iterable is exhausted and this rank has no candidate.
        return previous(iter(trained), len(trained), device)

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = checkpoints.checkpoint_to_resume(
            resume_from_checkpoint, str(self.trainer.args.output_dir), allow_fresh=self._allow_fresh_selector
        )
        self._resume_from = Path(checkpoint) if isinstance(checkpoint, str) else None
        self._initial_state = copy.deepcopy(self.selector.state_dict())
        try:
            if args:
                return self._original["train"](checkpoint, *args, **kwargs)
            return self._original["train"](resume_from_checkpoint=checkpoint, **kwargs)
        except BaseException:
            if (
                self.ledger is not None
            ):  # a run that fails leaves its records; resuming drops those beyond its checkpoint
                self.ledger.flush(self.trainer.state.global_step + 1)
            raise

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a training step's log; evaluation logs eval_loss and the summary train_loss
            logs.update(self.metrics.report())
        self._original["log"](logs, *args, **kwargs)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._losses.reading(model, inputs):
            return self._original["compute_loss"](model, inputs, *args, **kwargs)

    # --- a step, and the events around it ---------------------------------------------------------------------------

    def _select(self, candidates: list[Any], device: torch.device) -> list[Any]:
        """The micro-batches to train on; the step's selection goes into the metrics and the ledger."""
        step = self.trainer.state.global_step
        batches = self._with_layouts(candidates, device)
        before_start = step < self.selector.start_step
        with nullcontext() if before_start else self.metrics.scoring(device):
            selection = select_step(
                self.selector,
                self._model(),
                batches,
                padding=self._padding,
                ranks=self._selecting_ranks(device),
                allow_dummies=self._allow_dummies,
                learning_rate=self._learning_rate(),
                unscored=f"no selection before start_step={self.selector.start_step}" if before_start else None,
                score_segments_alone=self._separated is True and attends_to_complete_lines(self._model()),
            )
        if not before_start:
            self._record(device)
        self.metrics.add(selection)
        if self.ledger is not None:
            self._write_ledger(step + 1, batches, selection.local_only())
        return selection.batches

    def _with_layouts(self, candidates: list[Any], device: torch.device) -> list[BatchWithLayout]:
        """The candidates on the device, each with its layout; the first ones are checked.

        After a first packed batch, a line without boundaries is one segment.
        """
        if not self._batches_checked:
            for batch in candidates:
                check_batch(batch, self.trainer, is_row=self.is_row)
        batches = [with_layout(_to_device(device, batch), packed=self._packed) for batch in candidates]
        if not self._packed and any(batch.layout.packed for batch in batches):
            self._packed = True
            batches = [with_layout(batch.original, packed=True) for batch in batches]
        if self._packed and batches:
            if not self._batches_checked:
                self._check_first_packed(batches)
            self._check_separation(batches)
        self._batches_checked = self._batches_checked or bool(batches)
        return batches

    def _check_first_packed(self, batches: list[BatchWithLayout]) -> None:
        """What only the first packed batches show: a budget below one segment, and what a step holds."""
        if self.selector.window != "step" and not self._across_ranks:
            self.selector.check_keep(max(len(batch.layout) for batch in batches))
        if not self._quiet:
            processes = self.trainer.args.world_size if self._across_ranks else 1
            say(describe_packed(self.selector, batches, processes=processes), error=True)

    def _check_separation(self, batches: list[BatchWithLayout]) -> None:
        """Whether the model separates packed rows, measured on the first batch that shows it; reported once."""
        if self._separated is not None or not self.selector.needs_forward:
            return
        self._separated = separates(self._model(), batches)
        if self._separated is False and not self._quiet:
            say(describe_reading_across(self._model()), error=True)

    def is_row(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch's only line is one row of the training set, and not several that a collator joined."""
        index = self._index()
        return index is not None and index.row(token_ids(batch)[0]) is not None

    def _index(self) -> RowIndex | None:
        """The rows of the training set by their token ids, made once; None for iterable data."""
        _, index = self._row_index
        if index is None:
            if self._index_source is None:  # before training
                dataloader = self.trainer.get_train_dataloader()
                self._index_source = (dataloader.dataset, dataloader.collate_fn)
            index = index_rows(*self._index_source)
            self._row_index = (self._index_source[0], index)
        return index

    def _selecting_ranks(self, device: torch.device) -> Ranks:
        """The ranks that share one selection: all of them, or this one alone."""
        if self._ranks is None:
            self._ranks = Ranks.current(device) if self._across_ranks else Ranks.alone()
            if self._across_ranks and self._ranks.world != self.trainer.args.world_size:
                raise UserError(
                    f"{self.trainer.args.world_size} processes train and torch.distributed joins {self._ranks.world} of them, "
                    'so they cannot share one selection; pass scope="local" to the selector'
                )
        return self._ranks

    def _record(self, device: torch.device) -> None:
        """Put what the selector decided at run time into the ledger's metadata and, once, on an accelerator, to
        stderr."""
        facts = self.selector.provenance()
        if facts != self._provenance and nuclear.is_accelerator(device) and not self._quiet:
            for name, value in facts.items():
                say(f"siftune: {name.replace('_', ' ')}: {value}", error=True)
        self._provenance = facts
        if self.ledger is not None:
            self.ledger.facts = facts

    def _model(self) -> torch.nn.Module:
        """The model as the trainer runs it, autocast and adapters included. Of DDP (and of DeepSpeed up to ZeRO-2) the
        wrapped module, which has both: DDP's own forward would synchronise buffers, and ranks score in different
        numbers of chunks."""
        model: Any = self.trainer.model_wrapped
        if isinstance(model, torch.nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module
        module: torch.nn.Module = model
        return module

    def _learning_rate(self) -> float | None:
        """The learning rate of the coming optimiser step; of several parameter groups the first one's, as the log has
        it."""
        groups = getattr(self.trainer.optimizer, "param_groups", None)
        return float(groups[0]["lr"]) if groups else None

    def _write_ledger(self, step: int, candidates: list[BatchWithLayout], selection: Selection) -> None:
        assert self.ledger is not None
        digests = [digest for batch in candidates for digest in token_ids(batch)]
        segments = [index for batch in candidates for index in range(len(batch.layout))] if self._packed else None
        row_index = self._row_index[1]
        first_line = self.ledger.add(
            step,
            selection.micro,
            token_ids=digests,
            rows=[row_index.row(digest) if row_index is not None else None for digest in digests],
            total=selection.total.tolist(),
            parts={name: values.tolist() for name, values in selection.parts.items()},
            kept=selection.kept.tolist(),
            segments=segments,
            reasons=selection.reasons,
        )
        lines = [[None if row is None else first_line + row for row in rows] for rows in selection.trained]
        self._losses.expect(selection.batches, lines, packed=self._packed)

    def begin(self, dataloader: Any) -> None:
        """A run starts (or restarts with a smaller batch): the selector takes the state of its checkpoint."""
        trainer_state = self.trainer.state
        if trainer_state.is_hyper_param_search:
            raise UserError(
                "hyperparameter_search trains several models, and a selector keeps the state of one; detach first"
            )
        check_budget(
            self.trainer, self.selector, trainer_state.train_batch_size or self.trainer.args.per_device_train_batch_size
        )
        saved = checkpoints.SavedState(copy.deepcopy(self._initial_state), {})
        if self._resume_from is not None and checkpoints.is_complete(self._resume_from):
            args = self.trainer.args
            rank = 0 if self._across_ranks else args.process_index
            saved = checkpoints.read(
                self._resume_from, self.selector, rank=rank, world=args.world_size, across_ranks=self._across_ranks
            )
        self.selector.load_state_dict(saved.selector)
        self.metrics.restart(saved.totals)
        self._batches_checked, self._ranks, self._packed = False, None, packs(self.trainer)
        self._separated = None
        dataset = getattr(dataloader, "dataset", None) if self._numbered is None else self._numbered
        self._index_source = None if dataset is None else (dataset, dataloader.collate_fn)
        if self.ledger is not None:
            self.ledger.drop_after(trainer_state.global_step)
            if self._index_source is not None and self._row_index[0] is not dataset:
                self._row_index = (dataset, index_rows(*self._index_source))

    def save(self) -> None:
        """A checkpoint was written: put the selection's state into it, `COMPLETE` last."""
        args, step = self.trainer.args, self.trainer.state.global_step
        folder = Path(str(args.output_dir)) / f"checkpoint-{step}"
        if self.ledger is not None:
            self.ledger.flush(step)
        if (
            args.process_index == 0 or not self._across_ranks
        ):  # with one selection over all ranks their states are equal
            totals = self.metrics.totals()
            checkpoints.write(folder, self.selector, totals, step=step, rank=args.process_index, world=args.world_size)
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.is_world_process_zero():
            checkpoints.finish(folder, step=step)

    def end(self) -> None:
        """Training is over: write the rest of the ledger and merge it."""
        if self.ledger is not None:
            self.ledger.flush(self.trainer.state.global_step)
            self.trainer.accelerator.wait_for_everyone()
            if self.trainer.is_world_process_zero():
                self.ledger.merge()


class _Callback(TrainerCallback):
    """Forwards the trainer's events to the attachment."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._attachment.begin(kwargs.get("train_dataloader"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._attachment.save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._attachment.end()


def _to_device(device: torch.device, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if all(value.device.type == device.type for value in tensors):
        return batch
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
