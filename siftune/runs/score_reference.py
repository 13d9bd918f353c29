"""RHO-Loss's table: the loss of every row of a recipe's training set under a reference model, computed once.

Rows are tokens as `siftune train` would train on them, so the table's `token_id`s are those of its candidates. The recipe's own
model is not loaded: only its tokenizer is needed. Cost: one forward of the reference model per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.protect import refuse_overlap
from ..errors import UserError
from ..files import FolderLock, cache_folder, hash_file, hash_json, read_json, remove, temporary_beside, write_json
from ..sft.inputs import recipe_inputs
from ..sft.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..sft.trainer import Prepared

ENDINGS = (".parquet", ".safetensors")


@dataclass(frozen=True)
class Scored:
    """A table of reference losses, and whether it was computed or reused."""

    table: Path
    rows: int
    reused: bool
    """True when a table of the same rows and the same model existed."""


def score_reference(
    recipe: Recipe,
    reference: str,
    *,
    out: str | Path = "reference.parquet",
    score_tokens: int = 8192,
    per_token: bool = False,
    cache: str | Path | None = None,
    on_event: Callable[[str], None] = lambda line: None,
) -> Scored:
    """Write the table `out` (.parquet or .safetensors) of the recipe's rows under the model, or adapter, `reference`.

    A finished table of the same rows and model is reused, an interrupted one resumes, another table of siftune's (marked
    by the note beside it) is replaced. `score_tokens` bounds the padded tokens of one forward pass; `per_token` adds every
    label token's loss (.parquet only). Raises `UserError` as
    `siftune train` does, and for an `out` that is an input or a file that siftune did not write, before a weight is loaded.

    >>> score_reference(Recipe.read("recipe.yaml"), "./held-out-model", out="reference.parquet").rows
    """
    path = Path(out)
    if path.suffix not in ENDINGS:
        raise UserError(f"--out {out} must end in {' or '.join(ENDINGS)}")
    if per_token and path.suffix != ".parquet":
        raise UserError(f"--out {out} must end in .parquet with --per-token: a table of token losses has no other form")
    if score_tokens < 1:
        raise UserError(f"--score-tokens must be >= 1, got {score_tokens}")
    inputs = {"--reference": reference, **recipe_inputs(recipe)}
    refuse_overlap({"--out": path, "the note beside --out": _note(path)}, inputs)
    _check_ours(path)
    from ..models.load import find_folder
    from ..sft.adapters import load_tuned, model_key
    from ..sft.trainer import prepare

    folder = find_folder(reference, None)
    prepared = prepare(dataclasses.replace(recipe, online=None, eval={}, stop_at=None), cache=cache)
    key = hash_json([prepared.rows.meta["key"], model_key(folder), score_tokens, *(["per token"] if per_token else [])])
    with FolderLock(cache_folder(cache) / "locks" / hash_json(str(path.absolute()))):
        if _finished(path, key):
            return Scored(path, prepared.rows.meta["rows"], True)
        on_event(f"loss of {prepared.rows.meta['rows']:,} rows under {reference}")
        _compute(path, key, prepared, load_tuned(folder), score_tokens, per_token=per_token)
    return Scored(path, prepared.rows.meta["rows"], False)


def _finished(path: Path, key: str) -> bool:
    note = _note(path)
    return path.is_file() and note.is_file() and read_json(note) == {"key": key, "table": hash_file(path)}


def _check_ours(path: Path) -> None:
    """Refuse a table, or a note beside it, that siftune did not write."""
    note = _note(path)
    content = read_json(note) if note.is_file() else None
    if note.exists() and not (isinstance(content, dict) and content.keys() == {"key", "table"}):
        raise UserError(f"{note} was not written by siftune; move it away, or choose another --out")
    if path.exists() and content is None:
        raise UserError(
            f"--out {path} exists and has no {note.name} beside it, so siftune did not write it; choose another path"
        )


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".made-by.json")


def _compute(
    path: Path, key: str, prepared: Prepared, network: PreTrainedModel, score_tokens: int, *, per_token: bool
) -> None:
    import torch

    from ..sft.reference_losses import reference_losses

    write_json(_note(path), {"key": key, "table": None})  # first, so that an interrupted table is marked as siftune's
    scratch = temporary_beside(path.absolute())
    placed: Any = network
    placed = placed.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        trainer = prepared.trainer(scratch, network=placed)
        reference_losses(trainer, placed.eval(), out=path, score_tokens=score_tokens, per_token=per_token)
    finally:
        remove(scratch)
    write_json(_note(path), {"key": key, "table": hash_file(path)})
