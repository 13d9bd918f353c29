"""The configuration of a fine-tuning: one YAML file whose `sft`, `peft`, `quantization` and `online` keys are those of trl, peft,
transformers and the online methods, checked by their own classes. Reading a recipe loads no library and no file of rows.

    preset     a shipped YAML file that this one overrides, key by key
    overrides  dotted keys from a command line or a study: `sft.learning_rate`, `online.keep`

Numbers are read as in YAML 1.2: `5e-5` is one. Paths are relative to the working directory of the command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..models.tokenize_rows import FORMS, Text
from ..yaml_io import parse_yaml, read_yaml
from .config_values import nearest

STOPS = ("trained_tokens", "trained_label_tokens")
READING = ("format", "columns", "roles", "on_bad_row", "duplicates")
"""Keys that mean what they mean for `siftune select`."""
PASSED_OVER = ("command",)
"""Keys that a run folder's config.yaml holds beside the recipe's."""

_SECTIONS = ("sft", "peft", "quantization", "online", "model_kwargs", "stop_at", "columns", "roles")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One fine-tuning as configured; nothing is checked against a model or a library yet (`build_trainer` does that).

    >>> recipe = Recipe.read("recipe.yaml", {"sft.learning_rate": 1e-4, "online.keep": "1/4"})
    >>> trainer = build_trainer(recipe, "out")
    """

    model: str
    """Model folder or hub id."""
    train: tuple[str, ...]
    """Files, folders, globs or hub ids, as `siftune.load_pool` reads them."""
    eval: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Held-out files by name, measured at the end and at the steps that `sft.eval_strategy` sets."""
    format: str | None = None
    """Form of the rows; detected when left out."""
    columns: Mapping[str, str] | None = None
    """The user's column for each column of siftune."""
    roles: Mapping[str, str] | None = None
    """The role of each further role name that the chats use."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` or `skip`, with its reason in rows.parquet."""
    duplicates: Literal["keep", "drop"] = "keep"
    """`keep` or `drop`, with a reason."""
    max_rows: int | None = None
    """The first n rows that can be trained on; None is all."""
    text: Text = "auto"
    """How a row becomes tokens (`siftune.models.tokenize_rows`): auto, chat or prompt."""
    sft: Mapping[str, Any] = field(default_factory=dict)
    """`trl.SFTConfig`'s own keys."""
    peft: Mapping[str, Any] | None = None
    """`peft.LoraConfig`'s own keys; None trains every weight."""
    quantization: Mapping[str, Any] | None = None
    """`transformers.BitsAndBytesConfig`'s own keys; with `peft` this is QLoRA."""
    online: Mapping[str, Any] | None = None
    """`method` and that online method's own fields; None trains on every row."""
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to `from_pretrained`. `dtype` is float32 by default, and with `peft` that of the checkpoint (`auto`)."""
    stop_at: Mapping[str, int] | None = None
    """`trained_tokens` or `trained_label_tokens`: training ends at the first optimiser step that reaches it."""
    seed: int = 0
    """Of the rows' order, of new adapter weights and of the selector (unless `online.seed` is set)."""
    preset: str | None = None
    """The preset that the recipe overrides, kept for the record."""

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe from a YAML file or a mapping. `overrides` use dotted keys and win.

        Raises `UserError` for a file that is no YAML mapping, an unknown key (naming the nearest), a value of another
        type, and a missing `model` or `train`.
        """
        where = str(source) if isinstance(source, (str, Path)) else "the recipe"
        values = read_recipe_file(source) if isinstance(source, (str, Path)) else dict(source)
        values = {str(key): value for key, value in values.items() if key not in PASSED_OVER}
        for key, value in (overrides or {}).items():
            values = _overridden(values, key.split("."), value, key)
        preset = values.pop("preset", None)
        if preset is not None:
            values = merged(read_preset(str(preset)), values)
        return cls(**_checked(values, where), preset=None if preset is None else str(preset))

    @property
    def plain(self) -> dict[str, Any]:
        """The recipe as `read` accepts it again: only the keys that are set, with the preset's filled in."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "preset"}
        return {name: _plain(value) for name, value in values.items() if value not in (None, {}, ())}

    @property
    def max_length(self) -> int:
        """Tokens of a row at most: `sft.max_length`, else trl's own default."""
        length = self.sft.get("max_length", 1024)
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise UserError(f"sft.max_length={length!r} leaves no label token; set a whole number of at least 2")
        return length


# --- reading --------------------------------------------------------------------------------------------------------


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """The keys of a recipe's file. Raises `UserError`."""
    return read_yaml(path, what="the recipe", write="write model: and train: at least, one `key: value` a line")


def presets() -> list[str]:
    """The names of the shipped presets."""
    files = resources.files(__package__).joinpath("presets").iterdir()
    return sorted(path.name.removesuffix(".yaml") for path in files if path.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A shipped preset. Raises `UserError` for an unknown name."""
    if name not in presets():
        raise UserError(f"preset: {name} is not known; choose one of {', '.join(presets())}")
    preset: dict[str, Any] = parse_yaml(
        resources.files(__package__).joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8"), name
    )
    return preset


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key inside sections; null above removes what is below.

    >>> merged({"sft": {"bf16": True, "seed": 1}}, {"sft": {"seed": 2}})
    {'sft': {'bf16': True, 'seed': 2}}
    """
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        if key == "online":  # the keys of one method mean nothing to another
            value = {"method": value} if isinstance(value, str) else value
            if isinstance(value, Mapping) and isinstance(under, Mapping):
                method_changed = value.get("method", under.get("method")) != under.get("method")
                under = {name: under[name] for name in ("keep",) if name in under} if method_changed else under
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        result[key] = {**under, **value} if both else value  # type: ignore[dict-item]
    return result


def _overridden(values: dict[str, Any], path: Sequence[str], value: Any, dotted_key: str) -> dict[str, Any]:
    """A copy of `values` with the value at a dotted path."""
    key = path[0]
    if len(path) == 1:
        if key == "online":
            return merged(values, {key: value}) if isinstance(value, str) else {**values, key: value}
        return {**values, key: value}
    inner = values.get(key)
    if key == "online" and isinstance(inner, str):
        inner = {"method": inner}
    if inner is not None and not isinstance(inner, Mapping):
        raise UserError(f"{dotted_key} cannot be set: {key} is {inner!r}, which has no keys of its own")
    if key not in _SECTIONS and key != "eval":
        raise UserError(f"{dotted_key} cannot be set: {key} has no keys of its own{nearest(key, _SECTIONS)}")
    return {**values, key: _overridden(dict(inner or {}), path[1:], value, dotted_key)}


# --- checking -------------------------------------------------------------------------------------------------------


def _checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Every key known, every value of its kind. Raises `UserError`."""
    known_keys = [item.name for item in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known_keys:
            raise UserError(f"{where} has the key {key}, which no recipe has{nearest(key, known_keys)}")
    for key in ("model", "train"):
        if not values.get(key):
            raise UserError(
                f"{where} lacks {key}; write {key}: {'./model-or-hub-id' if key == 'model' else 'rows.jsonl'}"
            )
    checked = {key: value for key, value in values.items() if value is not None}
    if isinstance(checked.get("online"), str):
        checked["online"] = {"method": checked["online"]}
    for key in _SECTIONS:
        if key in checked and not isinstance(checked[key], Mapping):
            raise UserError(f"{where}: {key} is {checked[key]!r}; write its keys below it, one `key: value` a line")
    if checked.get("online") is not None and not checked["online"].get("method"):
        raise UserError(f"{where}: online names no method; write method: uds, or pass --online METHOD")
    checked["model"] = _text(checked["model"], "model", where)
    checked["train"] = _files(checked["train"], "train", where)
    if "eval" in checked:
        held_out = checked["eval"]
        files_by_name = held_out if isinstance(held_out, Mapping) else {"held-out": held_out}
        checked["eval"] = {str(name): _files(files, f"eval.{name}", where) for name, files in files_by_name.items()}
    for key, choices in (("text", FORMS), ("on_bad_row", ("error", "skip")), ("duplicates", ("keep", "drop"))):
        if key in checked and checked[key] not in choices:
            raise UserError(f"{where}: {key}: {checked[key]} is not one of {', '.join(choices)}")
    for key, least in (("max_rows", 1), ("seed", 0)):
        if key in checked:
            _check_int(checked[key], key, least, where)
    _check_stop(checked.get("stop_at"), where)
    return checked


def _check_stop(stop_at: Mapping[str, Any] | None, where: str) -> None:
    if stop_at is None:
        return
    if len(stop_at) != 1 or next(iter(stop_at)) not in STOPS:
        raise UserError(
            f"{where}: stop_at holds {', '.join(map(str, stop_at)) or 'nothing'}; set one of {', '.join(STOPS)}"
        )
    for key, value in stop_at.items():
        _check_int(value, f"stop_at.{key}", 1, where)


def _check_int(value: Any, key: str, least: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where}: {key}: {value!r} is not a whole number of at least {least}")


def _text(value: Any, key: str, where: str) -> str:
    if isinstance(value, (str, Path)) and str(value).strip():
        return str(value)
    raise UserError(f"{where}: {key}: {value!r} is not a path or a hub id")


def _files(value: Any, key: str, where: str) -> tuple[str, ...]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise UserError(f"{where}: {key} is an empty list; list at least one file")
    return tuple(_text(item, key, where) for item in items)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
