"""THE HOOK: `attach(trainer, selector)` makes a live Hugging Face trainer train on the rows the selector keeps.

The trainer is unchanged otherwise: its `get_batch_samples` is wrapped on the instance, so candidates are fetched as
ever, scored, cut, and counted by the same method again over the kept rows alone; the loss is divided by the right number
of tokens. `train` is wrapped to learn which checkpoint a run resumes from, `log` to add the selection's numbers, and one
callback writes state and ledger. Cost: the selector's scoring; nothing else runs per row but a hash.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import UserError
from ..models.layout import LaidOut, with_layout
from ..online import nuclear
from ..online.base import OnlineMethod
from ..online.token_id import token_ids
from ..output import say
from . import checkpoint as state
from .batching import Padding
from .checks import allows_dummies, check, check_batch, check_budget, together
from .exchange import Ranks
from .ledger import Ledger
from .metrics import Meter
from .packing import describe_packed, packs
from .row_index import RowIndex, index_rows
from .selection_step import Selection, select_step, window_count
from .validation import read_validation

_MARK = "siftune_attachment"
_WRAPPED = ("get_batch_samples", "train", "log")


def attach(
    trainer: Any,
    selector: OnlineMethod,
    *,
    allow_fresh_selector: bool = False,
    ledger: bool = True,
    quiet: bool = False,
) -> Attachment:
    """Sift every training batch of `trainer` with `selector`, from the next `trainer.train()` on.

    `trainer` is a `transformers.Trainer` or any subclass (`trl.SFTTrainer`, ...). `per_device_train_batch_size` becomes
    the number of candidates; 64 with `keep=8` is a good shape. Evaluation is never sifted. With `ledger` every candidate
    leaves a line in `OUTPUT_DIR/siftune/selection.parquet`. `allow_fresh_selector` lets a run resume from a checkpoint
    that holds no selection state. One line on stderr says what the budget means, unless `quiet`.

    With several processes, all their candidates are chosen from together, unless the selector has `scope="local"`.

    Raises `UserError` where selection cannot work: a selector attached already, less than one row kept, DataParallel,
    context or tensor parallelism, images, packing without boundaries, preference trainers, and methods that need other ranks' gradients or sharded weights whole.

    >>> siftune.attach(trainer, siftune.UDS(keep="1/8"))
    >>> trainer.train()
    """
    if (earlier := getattr(trainer, _MARK, None)) is not None:
        raise UserError(f"the selector {earlier.selector.name} is attached already; call siftune.detach(trainer) first")
    check(trainer, selector)
    read_validation(trainer, selector, quiet=quiet)
    attachment = Attachment(trainer, selector, allow_fresh=allow_fresh_selector, ledger=ledger, quiet=quiet)
    if not quiet and trainer.is_world_process_zero():
        say(attachment.describe(), error=True)
    return attachment


def detach(trainer: Any) -> None:
    """Give the trainer back as it was. Raises `UserError` where nothing is attached.

    >>> siftune.detach(trainer)
    """
    attachment: Attachment | None = getattr(trainer, _MARK, None)
    if attachment is None:
        raise UserError("no selector is attached to this trainer; nothing to detach")
    attachment.detach()


class Attachment:
    """What `attach` bound to a trainer: the selector, the ledger, the live numbers, and the way back (`detach`)."""

    def __init__(self, trainer: Any, selector: OnlineMethod, *, allow_fresh: bool, ledger: bool, quiet: bool) -> None:
        self.trainer = trainer
        self.selector = selector
        self.meter = Meter()
        args = trainer.args
        self.ledger = (
            Ledger(Path(args.output_dir) / "siftune", rank=args.process_index, world=args.world_size)
            if ledger
            else None
        )
        self._together = together(trainer, selector)
        self._allow_fresh = allow_fresh
        self._quiet = quiet or not trainer.is_world_process_zero()
        self._padding = Padding.of(trainer)
        self._dummies = allows_dummies(trainer)
        self._rows: tuple[Any, RowIndex | None] = (None, None)
        self._resume: Path | None = None
        self._pristine: Mapping[str, Any] = {}
        self._checked = False
        self._packed = packs(trainer)
        self._facts: dict[str, str] = {}
        self._ranks: Ranks | None = None
        self._previous = {name: getattr(trainer, name) for name in _WRAPPED}
        self._own = {name for name in _WRAPPED if name in vars(trainer)}
        self._callback = _Callback(self)
        for name in _WRAPPED:
            setattr(trainer, name, getattr(self, f"_{name}"))
        trainer.add_callback(self._callback)
        setattr(trainer, _MARK, self)

    def detach(self) -> None:
        """Give the trainer back as it was."""
        for name in _WRAPPED:
            if name in self._own:
                setattr(self.trainer, name, self._previous[name])
            else:
                delattr(self.trainer, name)
        self.trainer.remove_callback(self._callback)
        delattr(self.trainer, _MARK)

    def describe(self) -> str:
        """Candidates and trained rows of a full step, and what that means for the schedule, in one line."""
        args, name = self.trainer.args, self.selector.name
        if self._packed:  # how many rows a batch holds is known once the first one came
            return (
                f"siftune: {name} scores the rows of every packed batch and trains on keep={self.selector.keep!r} of them, the "
                "new effective batch; optimiser steps and schedule stay as they are"
            )
        size, micro, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        chosen_from = ranks if self._together else 1
        if self.selector.window == "step":
            kept = window_count(self.selector, [size] * micro * chosen_from)
        else:
            kept = window_count(self.selector, [size] * chosen_from) * micro
        kept *= ranks // chosen_from
        processes = f" of {ranks} processes{'' if self._together else ', each by itself,'}" if ranks > 1 else ""
        return (
            f"siftune: {name} scores {size * micro * ranks} candidates{processes} per step and trains on {kept} of them, "
            f"the new effective batch; optimiser steps and schedule stay as they are, so an epoch trains on "
            f"{kept / (size * micro * ranks):.1%} of the rows it reads"
        )

    def train_through(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Train with `train`, the trainer's method below every override, for a selector attached while one of them runs.

        The overrides are not run again; the arguments are those of `Trainer.train`.
        """
        outermost, self._previous["train"] = self._previous["train"], train
        try:
            return self._train(*args, **kwargs)
        finally:
            self._previous["train"] = outermost

    # --- what replaces the trainer's own methods --------------------------------------------------------------------

    def _get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        previous = self._previous["get_batch_samples"]
        candidates, _ = previous(epoch_iterator, num_batches, device)
        trained = self._select(list(candidates), device) if candidates or self._together else candidates
        # The same method again over the kept rows: it counts their tokens by the trainer's own rule. It gathers across
        # ranks, so it is called on every rank each time, also at the end of an iterable that gave nothing.
        return previous(iter(trained), len(trained), device)

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        said = state.checkpoint_to_resume(
            resume_from_checkpoint, self.trainer.args.output_dir, allow_fresh=self._allow_fresh
        )
        self._resume = Path(said) if isinstance(said, str) else None
        self._pristine = copy.deepcopy(self.selector.state_dict())
        try:
            if args:
                return self._previous["train"](said, *args, **kwargs)
            return self._previous["train"](resume_from_checkpoint=said, **kwargs)
        except BaseException:
            if self.ledger is not None:  # a run that dies leaves what it knew; resuming drops it beyond its checkpoint
                self.ledger.flush(self.trainer.state.global_step + 1)
            raise

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a training line; evaluation's are named eval_loss, the summary's train_loss
            logs.update(self.meter.report())
        self._previous["log"](logs, *args, **kwargs)

    # --- a step, and the events around it ---------------------------------------------------------------------------

    def _select(self, candidates: list[Any], device: torch.device) -> list[Any]:
        """The micro-batches to train on; the step's selection goes into the metrics and the ledger."""
        step = self.trainer.state.global_step
        laid_out = self._laid_out(candidates, device)
        early = step < self.selector.start_step
        with nullcontext() if early else self.meter.scoring(device):
            selection = select_step(
                self.selector,
                self._model(),
                laid_out,
                padding=self._padding,
                ranks=self._joined_ranks(device),
                allow_dummies=self._dummies,
                learning_rate=self._learning_rate(),
                unscored=f"no selection before start_step={self.selector.start_step}" if early else None,
            )
        if not early:
            self._record(device)
        self.meter.add(selection)
        if self.ledger is not None:
            self._write(step + 1, laid_out, selection.local_only())
        return selection.batches

    def _laid_out(self, candidates: list[Any], device: torch.device) -> list[LaidOut]:
        """The candidates on the device, with where each is stored; the first ones are checked.

        Once a packed batch was seen, a line without boundaries is one segment.
        """
        if not self._checked:
            for batch in candidates:
                check_batch(batch, self.trainer)
        laid_out = [with_layout(_on(device, batch), packed=self._packed) for batch in candidates]
        if not self._packed and any(batch.layout.packed for batch in laid_out):
            self._packed = True
            laid_out = [with_layout(batch.original, packed=True) for batch in laid_out]
        if not self._checked and laid_out:
            self._check_first(laid_out)
            self._checked = True
        return laid_out

    def _check_first(self, laid_out: list[LaidOut]) -> None:
        """What only the first batches show: segments or rows, and a budget below one of them."""
        if not self._packed:
            return
        segments = [len(batch.layout) for batch in laid_out]
        if self.selector.window != "step" and not self._together:
            self.selector.check_keep(max(segments))
        if not self._quiet:
            say(describe_packed(self.selector, laid_out, self._model()), error=True)

    def _joined_ranks(self, device: torch.device) -> Ranks:
        """The ranks whose candidates are chosen from together: all of them, or this one alone."""
        if self._ranks is None:
            self._ranks = Ranks.current(device) if self._together else Ranks.alone()
            if self._together and self._ranks.world != self.trainer.args.world_size:
                raise UserError(
                    f"{self.trainer.args.world_size} processes train and torch.distributed joins {self._ranks.world} of them, "
                    'so they cannot choose together; pass scope="local" to the selector'
                )
        return self._ranks

    def _record(self, device: torch.device) -> None:
        """What the selector decided at run time goes into the ledger's metadata, and once, on an accelerator, to stderr."""
        facts = self.selector.provenance()
        if facts != self._facts and nuclear.is_accelerator(device) and not self._quiet:
            for name, value in facts.items():
                say(f"siftune: {name.replace('_', ' ')}: {value}", error=True)
        self._facts = facts
        if self.ledger is not None:
            self.ledger.facts = facts

    def _model(self) -> torch.nn.Module:
        """The model as the trainer runs it, autocast and adapters included. Of DDP (and of DeepSpeed up to ZeRO-2) its
        module, which has those too: DDP's own forward would exchange buffers, and ranks score in different numbers of
        chunks."""
        model: Any = self.trainer.model_wrapped
        if isinstance(model, torch.nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module
        whole: torch.nn.Module = model
        return whole

    def _learning_rate(self) -> float | None:
        """The one that the coming optimiser step will be taken with; of several groups the first, as the log has it."""
        groups = getattr(self.trainer.optimizer, "param_groups", None)
        return float(groups[0]["lr"]) if groups else None

    def _write(self, step: int, candidates: list[LaidOut], selection: Selection) -> None:
        assert self.ledger is not None
        digests = [digest for batch in candidates for digest in token_ids(batch)]
        segments = [index for batch in candidates for index in range(len(batch.layout))] if self._packed else None
        index = self._rows[1]
        self.ledger.add(
            step,
            selection.micro,
            token_ids=digests,
            rows=[index.row(digest) if index is not None else None for digest in digests],
            total=selection.total.tolist(),
            parts={name: values.tolist() for name, values in selection.parts.items()},
            kept=selection.kept.tolist(),
            segments=segments,
            reasons=selection.reasons,
        )

    def begin(self, dataloader: Any) -> None:
        """A run starts (or starts again with a smaller batch): the selector's state is that of its checkpoint."""
        now = self.trainer.state
        if now.is_hyper_param_search:
            raise UserError("hyperparameter_search trains many models, and a selector follows one; detach first")
        check_budget(self.trainer, self.selector, now.train_batch_size or self.trainer.args.per_device_train_batch_size)
        saved = state.Saved(copy.deepcopy(self._pristine), {})
        if self._resume is not None and state.is_complete(self._resume):
            args = self.trainer.args
            rank = 0 if self._together else args.process_index
            saved = state.read(self._resume, self.selector, rank=rank, world=args.world_size, together=self._together)
        self.selector.load_state_dict(saved.selector)
        self.meter.restart(saved.totals)
        self._checked, self._ranks, self._packed = False, None, packs(self.trainer)
        if self.ledger is not None:
            self.ledger.forget_after(now.global_step)
            dataset = getattr(dataloader, "dataset", None)
            if dataset is not None and self._rows[0] is not dataset:
                self._rows = (dataset, index_rows(dataset, dataloader.collate_fn))

    def save(self) -> None:
        """A checkpoint was written: put the selection's state into it, `COMPLETE` last."""
        args, step = self.trainer.args, self.trainer.state.global_step
        checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
        if self.ledger is not None:
            self.ledger.flush(step)
        if args.process_index == 0 or not self._together:  # choosing together, all ranks remember the same
            totals = self.meter.totals()
            state.write(checkpoint, self.selector, totals, step=step, rank=args.process_index, world=args.world_size)
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.is_world_process_zero():
            state.finish(checkpoint, step=step)

    def end(self) -> None:
        """Training is over: write the rest of the ledger and merge it."""
        if self.ledger is not None:
            self.ledger.flush(self.trainer.state.global_step)
            self.trainer.accelerator.wait_for_everyone()
            if self.trainer.is_world_process_zero():
                self.ledger.merge()


class _Callback(TrainerCallback):
    """The trainer's events, handed on."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attachment.begin(kwargs.get("train_dataloader"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attachment.save()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attachment.end()


def _on(device: torch.device, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if all(value.device.type == device.type for value in tensors):
        return batch
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
