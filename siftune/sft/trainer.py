"""A recipe becomes a live `trl.SFTTrainer`, its selector attached: checked first, weights last.

    prepare      checks all that the user configures: keys, files, model folder, template, budget; no weight is read
    Prepared     the result; `.trainer(output_dir)` loads the weights and builds the trainer
    build_trainer  both at once

The trainer gets rows that are tokens already (`siftune.sft.dataset`), so which tokens have labels is decided in one place
for every version of trl. Cost: importing trl once, the rows' tokens once per content, the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget import parse_keep
from ..data.load import load_pool
from ..errors import UserError
from ..hook.row_index import preserved_random_state
from ..hook.selector import selector_of
from ..models.load import WEIGHT_FILES, find_folder, loading, quiet, read_causal, read_config, read_tokenizer
from ..models.tokenize_rows import check_text
from ..online.base import OnlineMethod
from ..records import Pool
from ..redaction import shortened
from .adapters import ADAPTER, is_adapter
from .configs import lora_config, quantization_config, sft_config
from .dataset import TrainingRows, tokenizer_key, training_rows
from .packing import packed_lines, report_reading_across
from .recipe import Recipe
from .row_weights import check_weights, honour_weights
from .token_counts import TokenCounts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]


def build_trainer(recipe: Recipe, output_dir: str | Path) -> SFTTrainer:
    """The recipe's `trl.SFTTrainer`, with its selector attached where it has one; nothing is trained yet.

    Raises `UserError` for anything in the recipe, the files or the model folder that cannot work, before weights are read.

    >>> trainer = build_trainer(Recipe.read("recipe.yaml"), "out")
    >>> trainer.train()
    """
    return prepare(recipe).trainer(output_dir)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A recipe that has been checked against its libraries, its files and its model's folder."""

    recipe: Recipe
    folder: Path
    """The model's."""
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    pool: Pool
    held_out: Mapping[str, Pool]
    cache: str | Path | None = None

    @property
    def length(self) -> int:
        """Tokens of a row at most: `sft.max_length`, or the model's own number of positions."""
        positions = getattr(self.config, "max_position_embeddings", None)
        return (
            min(self.recipe.max_length, positions)
            if isinstance(positions, int) and positions > 1
            else self.recipe.max_length
        )

    @cached_property
    def rows(self) -> TrainingRows:
        """The training rows as tokens, tokenised on first use."""
        return self._tokens(self.pool, self.recipe.max_rows)

    def _tokens(self, pool: Pool, max_rows: int | None = None) -> TrainingRows:
        return training_rows(
            pool,
            self.tokenizer,
            key=tokenizer_key(self.folder),
            text=self.recipe.text,
            max_length=self.length,
            max_rows=max_rows,
            cache=self.cache,
        )

    def trainer(
        self,
        output_dir: str | Path,
        *,
        token_counts: TokenCounts | None = None,
        network: PreTrainedModel | None = None,
        quiet: bool = True,
    ) -> SFTTrainer:
        """The trainer. `token_counts` counts on it; `network` is used instead of loading the recipe's weights; without
        `quiet` the line of `siftune.attach` is printed."""
        recipe, weighted = self.recipe, self.rows.has_weights
        dataset = self.rows.weighted if weighted else self.rows.dataset
        arguments = sft_config(recipe, output_dir)
        selector = checked_selector(recipe, arguments)
        if weighted:
            check_weights(arguments, online=selector is not None)
        lines = packed_lines(dataset, arguments, self.length) if arguments.packing else dataset
        counting: tuple[Any, ...] = () if token_counts is None else token_counts.callbacks()
        with preserved_random_state():  # trl and transformers seed the global generators
            trainer = self._build(arguments, lines, counting[:1], network)
        if weighted:
            honour_weights(trainer)
        if token_counts is not None:
            token_counts.below(trainer)
        if selector is not None:
            from ..hook.attach import attach

            attach(trainer, selector, quiet=quiet).number_rows_as(dataset)
        elif arguments.packing or arguments.padding_free:
            report_reading_across(trainer, quiet=quiet)
        if token_counts is not None:
            token_counts.above(trainer, selector)
            trainer.add_callback(counting[-1])
        return trainer

    def _build(self, arguments: SFTConfig, dataset: Any, callbacks: Any, network: PreTrainedModel | None) -> SFTTrainer:
        from transformers import PrinterCallback, ProgressCallback, set_seed
        from trl import SFTTrainer  # type: ignore[attr-defined]

        set_seed(self.recipe.seed)  # new adapter weights come from it, on every version of trl
        adapter = None if network is not None else lora_config(self.recipe)
        held_out = {name: self._tokens(pool).dataset for name, pool in self.held_out.items()}
        with quiet():
            try:
                trainer = SFTTrainer(
                    model=load_model(self.recipe, self.folder) if network is None else network,
                    args=arguments,
                    train_dataset=dataset,
                    eval_dataset=(held_out or None)
                    if str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no"
                    else None,
                    processing_class=self.tokenizer,
                    peft_config=adapter,
                    callbacks=list(callbacks),
                )
            except (ValueError, TypeError) as error:
                raise UserError(f"trl refuses the recipe: {shortened(error, 300)}") from error
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer


def prepare(
    recipe: Recipe,
    *,
    cache: str | Path | None = None,
    pool: Pool | None = None,
    held_out: Mapping[str, Pool] | None = None,
) -> Prepared:
    """Check everything that can be checked without weights. Raises `UserError`, one sentence.

    The pool's rows are read (and kept in the cache), the tokenizer and the configuration are, the weights are not. `pool`
    and `held_out` are rows that are read already, instead of the recipe's files.
    """
    check_sections(recipe)
    folder = model_folder(recipe.model)
    trusted = bool(recipe.model_kwargs.get("trust_remote_code", False))
    config = read_config(folder, model=recipe.model, layer=1, trust_remote_code=trusted)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"model={recipe.model!r} holds no safetensors; convert it with save_pretrained")
    tokenizer = read_tokenizer(folder, model=recipe.model, trust_remote_code=trusted)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"model={recipe.model!r} has a tokenizer with neither pad_token nor eos_token; save it with one"
        )

    def read(files: tuple[str, ...]) -> Pool:
        pool = load_pool(
            files[0] if len(files) == 1 else list(files),
            columns=recipe.columns,
            roles=recipe.roles,
            on_bad_row=recipe.on_bad_row,
            duplicates=recipe.duplicates,
            format=recipe.format,
            cache=cache,
        )
        check_text(recipe.text, tokenizer, model=recipe.model, format=pool.format)
        return pool

    if pool is None:
        pool = read(recipe.train)
    else:
        check_text(recipe.text, tokenizer, model=recipe.model, format=pool.format)
    if held_out is None:
        held_out = {name: read(files) for name, files in recipe.eval.items()}
    return Prepared(recipe, folder, config, tokenizer, pool, held_out, cache)


def check_sections(recipe: Recipe) -> None:
    """Every section against the library it belongs to, and the budget against the batch. Raises `UserError`."""
    arguments = sft_config(recipe, "unused")
    lora_config(recipe)
    quantization_config(recipe)
    checked_selector(recipe, arguments)


def model_folder(model: str) -> Path:
    """The model's folder. Raises `UserError`, also for one that holds an adapter alone."""
    folder = find_folder(model, None)
    if is_adapter(folder):
        from ..files import read_json

        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise UserError(
            f"model={model!r} is an adapter for {base}; pass that model, or merge the adapter into it first "
            "(siftune.sft.adapters)"
        )
    return folder


def load_model(recipe: Recipe, folder: Path) -> PreTrainedModel:
    """The recipe's model with its head, on the CPU unless quantised. Raises `UserError` where it cannot be loaded."""
    local_path = Path(recipe.model).expanduser()
    name = (
        str(local_path.absolute()) if local_path.is_dir() else recipe.model
    )  # the base's name in the adapter's configuration
    options: dict[str, Any] = {"dtype": "float32" if recipe.peft is None else "auto", **recipe.model_kwargs}
    if (quantized := quantization_config(recipe)) is not None:
        options["quantization_config"] = quantized
    network: PreTrainedModel = loading(
        f"model={recipe.model!r} could not be loaded",
        lambda: read_causal(name, use_safetensors=True, **options),
    )
    return network


def checked_selector(recipe: Recipe, arguments: SFTConfig) -> OnlineMethod | None:
    """The recipe's selector, its budget checked against the batch, or None. Raises `UserError`."""
    if recipe.online is None:
        return None
    online = dict(recipe.online)
    # A file of validation rows takes the form of the training rows.
    selector = selector_of(online, defaults={"seed": recipe.seed, "validation_text": recipe.text}, section="online")
    try:
        selector.check_files()
    except UserError as error:
        raise UserError(f"online: {error}") from error
    if arguments.packing:  # how many rows a line holds is known once they are packed
        selector.check()
        return selector
    size = int(arguments.per_device_train_batch_size)
    kept = parse_keep(selector.keep).count
    if kept is not None and kept > size:
        raise UserError(
            f"online.keep={kept} exceeds the {size} candidates of a micro-batch; lower keep or raise "
            "sft.per_device_train_batch_size"
        )
    if selector.window == "step":
        selector.check()
    else:
        selector.check_keep(size)
    return selector
