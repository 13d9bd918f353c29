"""What cannot be sifted is refused when the selector is attached, in one sentence with the way out, not at step 400."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..budget import parse_keep
from ..errors import UserError
from ..online.base import OnlineMethod
from .sift import window_count

_IMAGES = ("pixel_values", "image", "images", "image_grid_thw")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_lengths", "seq_idx")


def check(trainer: Any, selector: Any) -> None:
    """Raise `UserError` for the first thing about this trainer that selection does not work with."""
    if isinstance(selector, type) or not isinstance(selector, OnlineMethod):
        raise UserError(
            f"attach got {selector!r} as its selector, which is no online method; give an instance, as in "
            "attach(trainer, siftune.UDS(keep='1/8'))"
        )
    if not callable(getattr(trainer, "get_batch_samples", None)):
        raise UserError(
            f"{type(trainer).__name__} has no get_batch_samples, so it is no transformers Trainer of 4.57 or later; "
            "in a loop of your own call selector.select(model, batch)"
        )
    _processes(trainer, selector)
    _data(trainer)
    check_budget(trainer, selector, trainer.args.per_device_train_batch_size)


def _processes(trainer: Any, selector: OnlineMethod) -> None:
    args = trainer.args
    if args.n_gpu > 1:
        raise UserError(
            f"this process drives {args.n_gpu} GPUs through DataParallel, which selection cannot follow; "
            "start one process per GPU (torchrun) or set CUDA_VISIBLE_DEVICES to one"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for kind, name in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        if parallel is not None and getattr(parallel, f"{kind}_enabled", False):
            raise UserError(
                f"{name} parallelism ({kind}_size={getattr(parallel, f'{kind}_size', '?')}) splits a row over processes, "
                f"which selection cannot follow; set {kind}_size=1"
            )
    _sharded(trainer, selector)
    if together(trainer, selector) and not selector.across_ranks:
        raise UserError(
            f"{selector.name} compares its candidates' gradients with each other, and those of {args.world_size} processes "
            'lie on different ones; pass scope="local" to the selector to choose on each rank by itself'
        )


def together(trainer: Any, selector: Any) -> bool:
    """Whether the candidates of several processes are chosen from together."""
    return trainer.args.world_size > 1 and getattr(selector, "scope", "global") != "local"


def _sharded(trainer: Any, selector: OnlineMethod) -> None:
    """Models of which a process holds a part."""
    deepspeed = getattr(trainer, "is_deepspeed_enabled", False)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None) if deepspeed else None
    kind = "FSDP" if getattr(trainer, "is_fsdp_enabled", False) else ""
    kind = "ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else kind
    if kind and selector.whole_weights():
        raise UserError(
            f"{kind} shards the weights, and {selector.name} takes gradients of single rows, which need them whole; use "
            "uds or maxloss, or plain DDP"
        )


def _data(trainer: Any) -> None:
    args, collator = trainer.args, trainer.data_collator
    config = getattr(trainer.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(trainer.model).__name__} is an encoder-decoder; selection works on causal language models"
        )
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    seen = [name for name in _IMAGES if name in columns]
    if seen or "Vision" in type(collator).__name__:
        raise UserError(
            f"the training set holds images ({', '.join(seen) or type(collator).__name__}), which selection does not "
            "support; train on text-only rows or detach"
        )
    if getattr(args, "packing", False) or getattr(args, "sample_packing", False):
        strategy = getattr(args, "packing_strategy", "multipack")
        raise UserError(
            f"packing={strategy!r} puts several rows into one, so rows cannot be chosen; set packing=False "
            "(kept rows are trimmed to their own width)"
        )
    flattens = type(collator).__name__ == "DataCollatorWithFlattening" or getattr(collator, "padding_free", False)
    if getattr(args, "padding_free", False) or flattens:
        raise UserError(
            "padding_free=True joins a batch into one long row, so rows cannot be chosen; set padding_free=False "
            "(kept rows are trimmed to their own width)"
        )


def check_budget(trainer: Any, selector: OnlineMethod, size: int) -> None:
    """Refuse a budget of less than one row: of a full micro-batch of `size`, or of the step's window."""
    micro_batches = trainer.args.gradient_accumulation_steps
    ranks = trainer.args.world_size if together(trainer, selector) else 1
    step = getattr(selector, "window", "micro") == "step"
    if not step and ranks == 1:
        selector.check_keep(size)
        return
    selector.check()
    seats = ranks * micro_batches if step else ranks
    candidates = f"the step's {micro_batches} x {size} candidates" if step else f"a micro-batch of {size} candidates"
    candidates += f" of {ranks} processes each" if ranks > 1 else ""
    if parse_keep(selector.keep).rows(size * seats) < 1:
        raise UserError(
            f"keep={selector.keep!r} is less than one row of {candidates}; raise keep, per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )
    kept = window_count(selector, [size] * seats)
    if kept < seats and not allows_blanks(trainer):
        raise UserError(
            f"keep={selector.keep!r} of {candidates} is {kept} rows for {seats} micro-batches, and this trainer's own loss "
            "may not take an empty one; raise keep" + (", or lower gradient_accumulation_steps" if step else "")
        )


def allows_blanks(trainer: Any) -> bool:
    """Whether a micro-batch with every label masked adds exactly nothing to this trainer's loss.

    So it is where the loss is the library's own sum over label tokens, divided by the step's token count. A loss of the
    user's own, label smoothing or a model without that count may divide by the micro-batch's label tokens: 0 / 0; and so
    may a process that counts its own tokens alone.
    """
    ours = getattr(trainer.compute_loss, "__module__", "").split(".")[0] in ("transformers", "trl")
    smoothing = getattr(trainer.args, "label_smoothing_factor", 0.0)
    plain = getattr(trainer, "compute_loss_func", None) is None and not smoothing
    alone = trainer.args.world_size > 1 and not getattr(trainer.args, "average_tokens_across_devices", True)
    return ours and plain and not alone and bool(getattr(trainer, "model_accepts_loss_kwargs", False))


def check_batch(batch: Any) -> None:
    """What only the first batch can show: no token ids, images, or rows joined into one."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch or getattr(batch["input_ids"], "ndim", 0) != 2:
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise UserError(
            f"a training batch holds {found}, and selection needs input_ids of shape (rows, tokens); detach"
        )
    if images := [name for name in _IMAGES if batch.get(name) is not None]:
        raise UserError(
            f"a training batch holds images ({', '.join(images)}), which selection does not support; detach"
        )
    if packed := [name for name in _PACKED if name in batch]:
        raise UserError(
            f"a training batch is packed ({packed[0]}), so rows cannot be chosen; turn packing and padding_free off"
        )
