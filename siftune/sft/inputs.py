"""The files and folders that a recipe names, so that no output of a command is one of them."""

from __future__ import annotations

from typing import Any

from ..data.protect import setting_inputs
from .recipe import Recipe


def recipe_inputs(recipe: Recipe) -> dict[str, Any]:
    """The files and folders that a recipe reads, by the key that names them, for `refuse_overlap`.

    >>> recipe_inputs(Recipe.read("recipe.yaml"))
    {'model': './model', 'train': ('rows.jsonl',)}
    """
    inputs: dict[str, Any] = {"model": recipe.model, "train": recipe.train}
    inputs |= {f"eval.{name}": files for name, files in recipe.eval.items()}
    return inputs | setting_inputs(recipe.online or {}, "online.{}")
