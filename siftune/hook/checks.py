"""Checks of a trainer when the selector is attached: what selection does not support is refused before training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..budget import parse_keep
from ..errors import UserError
from ..models.layout import BOUNDARIES, layout_of
from ..online.base import OnlineMethod
from .packing import packs
from .selection_step import window_count

if TYPE_CHECKING:
    from transformers import Trainer

_IMAGE_KEYS = ("pixel_values", "image", "images", "image_grid_thw")
_PREFERENCE_MARKS = (
    "DPO",
    "KTO",
    "ORPO",
    "CPO",
    "BCO",
    "XPO",
    "NashMD",
    "GRPO",
    "RLOO",
    "PPO",
    "Reward",
    "PRM",
    "Preference",
    "Pairwise",
    "Reranker",
    "Embedding",
    "SentenceTransformer",
    "CrossEncoder",
    "SparseEncoder",
)
"""Marks of trainers and collators whose batches hold pairs, prompts to answer or rewards, not rows to imitate."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of configurations that count the experts of a layer."""
_OTHER_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM")
"""Ends of the names of models whose labels are not the row's next tokens."""
_PACKING_KEYS = (
    "packing and padding_free (trl), packing and neat_packing (LLaMA-Factory), sample_packing (Axolotl), packing and "
    "padding_free (ms-swift), pack (Oumi)"
)


def check(trainer: Trainer, selector: object) -> None:
    """Raise `UserError` for the first thing about this trainer that selection does not work with."""
    if isinstance(selector, type) or not isinstance(selector, OnlineMethod):
        raise UserError(
            f"attach got {selector!r} as its selector, which is no online method; pass an instance, as in "
            "attach(trainer, siftune.UDS(keep='1/8'))"
        )
    if not callable(getattr(trainer, "get_batch_samples", None)):
        raise UserError(
            f"{type(trainer).__name__} has no get_batch_samples, so it is no transformers Trainer of 4.57 or later; "
            "in your own loop call selector.select(model, batch)"
        )
    _check_processes(trainer, selector)
    _check_data(trainer)
    check_budget(trainer, selector, trainer.args.per_device_train_batch_size)


def _check_processes(trainer: Trainer, selector: OnlineMethod) -> None:
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
    _check_sharding(trainer, selector)
    if selects_across_ranks(trainer, selector) and not selector.across_ranks:
        raise UserError(
            f"{selector.name} compares its candidates' gradients with each other, and those of {args.world_size} processes "
            'are in different memories; pass scope="local" to the selector to choose on each rank separately'
        )


def selects_across_ranks(trainer: Trainer, selector: OnlineMethod) -> bool:
    """Whether one selection covers the candidates of all processes."""
    return trainer.args.world_size > 1 and selector.scope != "local"


def _check_sharding(trainer: Trainer, selector: OnlineMethod) -> None:
    """Refuse methods that need complete weights where the model is sharded over processes."""
    deepspeed = getattr(trainer, "is_deepspeed_enabled", False)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None) if deepspeed else None
    sharding = "FSDP" if getattr(trainer, "is_fsdp_enabled", False) else ""
    sharding = "ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else sharding
    if sharding and selector.needs_complete_weights():
        raise UserError(
            f"{sharding} shards the weights, and {selector.name} takes gradients of single rows, which need the complete weights; use "
            "uds or maxloss, or plain DDP"
        )


def _check_data(trainer: Trainer) -> None:
    args, collator = trainer.args, trainer.data_collator
    config = getattr(trainer.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(trainer.model).__name__} is an encoder-decoder; selection works on causal language models"
        )
    _check_task(trainer)
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    features = getattr(trainer.train_dataset, "features", None) or {}
    image_columns = [name for name in _IMAGE_KEYS if name in columns and not _is_null(features.get(name))]
    if image_columns or "Vision" in type(collator).__name__:
        raise UserError(
            f"the training set holds images ({', '.join(image_columns) or type(collator).__name__}), which selection does not "
            "support; train on text-only rows or detach"
        )
    if getattr(args, "packing", False) is True and getattr(args, "packing_strategy", "") == "wrapped":
        raise UserError(
            "packing_strategy='wrapped' cuts rows at the end of a line, so rows cannot be chosen; set packing_strategy='bfd' "
            "or packing=False"
        )


def _check_task(trainer: Trainer) -> None:
    """Refuse trainers whose batches are not rows to imitate."""
    if reason := other_task(trainer):
        raise UserError(reason)


def other_task(trainer: Trainer) -> str | None:
    """Why a trainer's batches are not rows to imitate; None for one that fine-tunes a causal language model."""
    kinds = [cls.__name__ for cls in type(trainer).__mro__ if cls.__name__.endswith("Trainer")]
    kinds.append(type(trainer.data_collator).__name__)
    if preference := [kind for kind in kinds if any(mark in kind for mark in _PREFERENCE_MARKS)]:
        return (
            f"{preference[0]} trains on pairs, rewards or generated answers, and selection chooses single rows to imitate, so "
            "pairs would be separated; use it with SFTTrainer or Trainer"
        )
    model: Any = trainer.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(model).__name__
    if any(f"For{task}" in name for task in _OTHER_TASKS):
        kind = "a masked language model" if "MaskedLM" in name else "a classifier"
        return (
            f"{name} is {kind}, and selection works on causal language models, whose labels are tokens; load the model "
            "with AutoModelForCausalLM or train without siftune"
        )
    return None


def _is_null(feature: Any) -> bool:
    """Whether a `datasets` feature holds nothing but nulls, or lists of them."""
    inner = getattr(feature, "feature", None)
    if isinstance(feature, (list, tuple)) and feature:
        inner = feature[0]
    return _is_null(inner) if inner is not None else getattr(feature, "dtype", None) == "null"


def check_budget(trainer: Trainer, selector: OnlineMethod, size: int) -> None:
    """Refuse a budget of less than one row: of a full micro-batch of `size`, or of the step's window."""
    micro_batches = trainer.args.gradient_accumulation_steps
    ranks = trainer.args.world_size if selects_across_ranks(trainer, selector) else 1
    step_window = selector.window == "step"
    if packs(
        trainer
    ):  # a line holds an unknown number of rows: the first batch shows whether the budget is one of them
        selector.check()
        return
    selector.check()
    slots = ranks * micro_batches if step_window else ranks
    candidates = (
        f"the step's {micro_batches} x {size} candidates" if step_window else f"a micro-batch of {size} candidates"
    )
    candidates += f" of {ranks} processes each" if ranks > 1 else ""
    if parse_keep(selector.keep).rows(size * slots) < 1:
        raise UserError(
            f"keep={selector.keep!r} is less than one row of {candidates}; {_way_out(trainer, selector, size)}"
        )
    kept = window_count(selector, [size] * slots)
    if kept < slots and (obstacle := _dummies_obstacle(trainer)):
        raise UserError(
            f"keep={selector.keep!r} of {candidates} is {kept} rows for {slots} micro-batches, and {obstacle}; "
            f"{_way_out(trainer, selector, size)}"
        )


def _way_out(trainer: Trainer, selector: OnlineMethod, size: int) -> str:
    """What to change where a micro-batch would keep no row: the same candidates in one micro-batch, if that is enough."""
    micro_batches = trainer.args.gradient_accumulation_steps
    if micro_batches == 1 or parse_keep(selector.keep).rows(size * micro_batches) < 1:
        return "raise keep, per_device_train_batch_size or gradient_accumulation_steps"
    same = (
        f"read the same candidates in one micro-batch, per_device_train_batch_size={size * micro_batches} (micro_batch_size in "
        "Axolotl) and gradient_accumulation_steps=1: only the kept rows need the memory of training"
    )
    if selector.window == "micro" and _dummies_obstacle(trainer) is None:
        same += ', or choose over the step with window="step"'
    return f"{same}; or raise keep"


def allows_dummies(trainer: Trainer) -> bool:
    """Whether a fully masked micro-batch adds exactly nothing to this trainer's loss."""
    return _dummies_obstacle(trainer) is None


def _dummies_obstacle(trainer: Trainer) -> str | None:
    """Why a fully masked micro-batch may add something to this trainer's loss; None where it adds exactly nothing.

    It adds nothing where the loss is the library's own sum over label tokens, divided by the step's token count. A loss of
    the user's own, label smoothing or a model without that count may divide by the micro-batch's label tokens: 0 / 0; and so
    may a process that counts its own tokens alone. The balancing loss of a mixture of experts counts masked tokens too.
    """
    if _has_balancing_loss(trainer.model):
        return "the balancing loss of the model's experts would train on an empty one"
    library_loss = getattr(trainer.compute_loss, "__module__", "").split(".")[0] in ("transformers", "trl")
    label_smoothing = getattr(trainer.args, "label_smoothing_factor", 0.0)
    default_loss = getattr(trainer, "compute_loss_func", None) is None and not label_smoothing
    counts_local_tokens = trainer.args.world_size > 1 and not getattr(
        trainer.args, "average_tokens_across_devices", True
    )
    accepts_count = bool(getattr(trainer, "model_accepts_loss_kwargs", False))
    if library_loss and default_loss and not counts_local_tokens and accepts_count:
        return None
    return "this trainer's own loss may not support an empty one"


def _has_balancing_loss(model: Any) -> bool:
    """Whether the model adds a loss over its routers' choices: where transformers' models return their router logits, and
    perhaps where a mixture of experts is code of its own."""
    config = getattr(model, "config", None)
    if config is None:
        return False
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if any(getattr(one, "output_router_logits", False) for one in (config, text)):
        return True
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    own_code = not type(causal).__module__.startswith("transformers.models.")
    return own_code and any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS)


def check_batch(batch: Any, trainer: Trainer, *, is_row: Callable[[Mapping[str, Any]], bool]) -> None:
    """Checks that need a batch: token ids, no images, and boundaries where rows are joined.

    `is_row` answers whether the only line of a batch is one row of the training set.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch or getattr(batch["input_ids"], "ndim", 0) != 2:
        keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise UserError(f"a training batch holds {keys}, and selection needs input_ids of shape (rows, tokens); detach")
    if images := [name for name in _IMAGE_KEYS if batch.get(name) is not None]:
        raise UserError(
            f"a training batch holds images ({', '.join(images)}), which selection does not support; detach"
        )
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.shape != batch["input_ids"].shape:
        raise UserError(
            f"labels of {tuple(labels.shape)} are not one per token of input_ids {tuple(batch['input_ids'].shape)}, as a "
            "causal language model has them; train this task without siftune"
        )
    if not layout_of(batch).packed:
        _check_rows(batch, trainer, is_row)


def _check_rows(batch: Mapping[str, Any], trainer: Trainer, is_row: Callable[[Mapping[str, Any]], bool]) -> None:
    """Refuse a batch whose lines hold several rows, or parts of rows, without boundaries."""
    lines, width = batch["input_ids"].shape
    size = trainer.state.train_batch_size or trainer.args.per_device_train_batch_size
    dataset: Any = trainer.train_dataset
    rows = len(dataset) if hasattr(dataset, "__len__") else 0
    split = getattr(trainer.accelerator, "split_batches", False)
    if packs(trainer) and all(batch.get(name) is None for name in BOUNDARIES):
        raise UserError(
            f"this trainer joins rows, and nothing in its first batch ({', '.join(map(str, batch))}) says where they begin, so "
            "complete lines would be chosen; make the collator return position_ids (return_position_ids=True for "
            f"DataCollatorWithFlattening), or set to false what joins rows: {_PACKING_KEYS}"
        )
    alone = lines == 1 < size <= rows // max(1, trainer.args.world_size) and not split and not packs(trainer)
    if alone and not is_row(batch):  # a collator that drops rows may leave one
        raise UserError(
            f"the first batch has one line of {width} tokens where per_device_train_batch_size is {size}; the line is no row of "
            f"the training set, and nothing in it ({', '.join(map(str, batch))}) says where its rows begin; set to false what "
            f"joins them: {_PACKING_KEYS}"
        )
    if any(mark in type(dataset).__name__ for mark in ("Pack", "ConstantLength")):
        raise UserError(
            f"the training set is a {type(dataset).__name__}, whose lines hold several rows, and nothing in the first batch "
            f"({', '.join(map(str, batch))}) says where they begin, so complete lines would be chosen; set to false what joins "
            f"them: {_PACKING_KEYS}"
        )
    if _row_starts_inside_lines(batch, trainer):
        warnings.warn(
            f"each of the {lines} lines of the first batch is full ({width} tokens) and has the token that begins or ends a row "
            "in its middle; if they are packed rows, siftune chooses complete lines, because no key says where rows begin",
            stacklevel=2,
        )


def _row_starts_inside_lines(batch: Mapping[str, Any], trainer: Trainer) -> bool:
    """Whether every line is full and has a token in its middle that begins a row or, where the tokenizer has no such token,
    ends one.

    A collator that packs without boundaries (LLaMA-Factory `packing`) marks its padding as tokens, too.
    """
    tokenizer = getattr(trainer, "processing_class", None)
    begin, end = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    if len(ids) < 2 or (mask is not None and not bool((mask != 0).all())):
        return False
    if begin is not None and begin != end:
        return bool((ids[:, 1:] == begin).any(dim=1).all())
    return mask is not None and end is not None and bool((ids[:, :-1] == end).any(dim=1).all())
