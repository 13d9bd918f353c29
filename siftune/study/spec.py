"""The configuration of a study: its YAML as one checked, frozen record. Every mistake in the file is reported here.

`variables:` declares names that are used in braces in any string of the file (`{data}/code.jsonl`); `--set data=DIR` sets
their values, and `--set KEY=VALUE` with a dotted key of the study replaces that key. No torch here; the only file that is
read is the YAML (and the recipe's, where it is a path).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..budget import Keep, parse_keep
from ..errors import UserError
from ..models.tokenize_rows import Text
from ..runs.options import unknown
from ..sft.recipe import merged, read_preset, read_recipe_file
from ..yaml_io import read_yaml
from .entries import NONE, Entry, check_name, fill, read_entries, texts

DEMO = "demo"
"""As `model`, `pool` or `held_out`: the embedded model and corpus."""
OWN_KEYS = (
    "model",
    "train",
    "eval",
    "seed",
    "online",
    "stop_at",
    "max_rows",
    "format",
    "columns",
    "roles",
    "on_bad_row",
)
"""Keys of a recipe that the study fills in itself."""
LEAST = "write model:, pool:, recipe: and held_out: at least"
"""What to do with a file that has none of these keys."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as configured, checked. `read_study` creates it."""

    name: str
    """The name of its folder and its page."""
    model: str
    """Folder or hub id of the model that every cell starts from; `demo` is the embedded one."""
    pool: Mapping[str, str]
    """Source by domain: a file, folder or hub id each. The domain's name is a column of the drawn rows (`label`)."""
    recipe: Mapping[str, Any]
    """How a cell trains: a recipe of `siftune train` without the keys that the study fills in."""
    held_out: Mapping[str, str] = field(default_factory=dict)
    """Rows by domain on which loss and token accuracy are measured."""
    rows: int | None = None
    """Rows drawn from the pool, equally from every source; None is all."""
    held_out_rows: int | None = 200
    """Rows of each held-out source that are measured; the others serve as seeds and validation rows."""
    suite: str | None = None
    """An evaluation suite beside or instead of the held-out rows: `daar`, `uds` or a file."""
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    """Options of `siftune evaluate` for the suite: data, limit, skip, chat, batch_size, allow_code."""
    offline: tuple[Entry, ...] = ()
    """Methods that choose rows before training; `full` is all rows."""
    online: tuple[Entry, ...] = ()
    """Methods that choose rows of every batch; `regular` is all rows."""
    budgets: tuple[Keep, ...] = ("20%",)
    """What an offline method keeps."""
    cells: Literal["product"] | tuple[tuple[str, str, Keep | None], ...] = "product"
    """Every pair at every budget, or the list of (offline name, online name, budget)."""
    equal: Literal["rows", "tokens"] = "rows"
    """The unit of the equal budget of every cell but the one without any selection."""
    tokens: int | None = None
    """With `equal: tokens`, tokens to train; None is the mean tokens of a row times the baseline's rows."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every method per seed: of its draw, of the data's order, of new weights."""
    baseline: str = "random"
    """The method that every other one is compared with, paired by seed."""
    jobs: int = 1
    """Processes at once."""
    threads: int = 1
    """Threads of each."""
    columns: Mapping[str, str] | None = None
    """As in `siftune select`, for pool and held-out files."""
    roles: Mapping[str, str] | None = None
    """As in `siftune select`, for pool and held-out files."""
    format: str | None = None
    """As in `siftune select`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """As in `siftune select`."""
    label: str = "domain"
    """Column that holds a drawn row's domain, for `label_column:` of inter- and intra-diversity."""
    draw_seed: int = 0
    """Seed of the draws that all cells share."""
    seed_rows: int = 15
    """Rows per domain in `{seeds}`, drawn by each seed from held-out rows that are not measured."""
    validation_rows: int = 32
    """Rows in `{validation}`, from held-out rows that are neither measured nor seeds."""
    reference_rows: int = 2000
    """Rows in `{rest}`: of the pool's sources, not drawn into the study; `{reference}` is tuned on them."""
    keep_models: bool = False
    """Keep every cell's tuned model; by default a cell's weights are deleted once they are measured."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Names that are used in braces elsewhere in the file, and their values."""

    @property
    def places(self) -> set[str]:
        """The `{places}` that any method's settings use."""
        return {place for entry in (*self.offline, *self.online) for place in entry.places}

    @property
    def max_length(self) -> int:
        """Tokens of a row at most; SFTConfig's own default where the recipe does not set it."""
        return int(self.recipe.get("sft", {}).get("max_length") or 1024)

    @property
    def text(self) -> Text:
        """How a row becomes tokens."""
        text: Text = self.recipe.get("text", "auto")
        return text


def read_study(path: str, changes: Mapping[str, Any] | None = None) -> Study:
    """Read a study's YAML, with `--set` changes by variable or dotted key. Raises `UserError`, one sentence.

    >>> read_study("study.yaml", {"data": "./pools", "seeds": [0, 1]}).seeds
    (0, 1)
    """
    content = {name.replace("-", "_"): value for name, value in read_yaml(path, what="the study", write=LEAST).items()}
    known_keys = [item.name for item in dataclasses.fields(Study)]
    for key in content:
        if key not in known_keys:
            raise unknown(key, known_keys, what="key", where=path)
    variables = _mapping(content.get("variables"), "variables", path)
    for key, value in (changes or {}).items():
        if key in variables:
            variables[key] = value
        else:
            _change(content, key, value, known_keys, list(variables), path)
    content.pop("variables", None)
    if isinstance(content.get("recipe"), str):
        content["recipe"] = read_recipe_file(fill(content["recipe"], _as_text(variables)))
    _no_empty_variable(content, variables, path)
    return _checked(fill(content, _as_text(variables)) | {"variables": variables}, path)


def _as_text(variables: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items() if value is not None}


def _mapping(value: Any, key: str, path: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {key} is {value!r}; write `name: value` lines under it")
    return {str(name): inner for name, inner in value.items()}


def _change(
    content: dict[str, Any], key: str, value: Any, known_keys: Sequence[str], variables: Sequence[str], path: str
) -> None:
    """Replace the value at a dotted key."""
    first, *rest = key.split(".")
    if first not in known_keys:
        raise unknown(first, [*known_keys, *variables], what="variable or key", where=path)
    place: Any = content
    for name, deeper in zip([first, *rest], rest, strict=False):
        inside = place.get(name)
        if inside is None:
            inside = place[name] = {}
        if not isinstance(inside, dict):
            raise UserError(f"{path}: --set {key}: {name} is no mapping, so it has no {deeper}")
        place = inside
    place[[first, *rest][-1]] = value


def _no_empty_variable(content: Mapping[str, Any], variables: Mapping[str, Any], path: str) -> None:
    for name, value in variables.items():
        if value is None and any("{" + name + "}" in text for text in texts(content)):
            raise UserError(f"{path}: the variable {name} has no value; pass --set {name}=VALUE")


# --- checks -----------------------------------------------------------------------------------------------------------


def _checked(content: dict[str, Any], path: str) -> Study:
    for key in ("model", "recipe", "pool"):
        if not content.get(key):
            raise UserError(f"{path} lacks {key}; set it in the file, or with --set {key}=VALUE")
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-")[:60]
    values: dict[str, Any] = {**content, "name": str(content.get("name") or stem or "study")}
    check_name(values["name"], where=f"{path}: name:")
    values["model"] = str(content["model"])
    values["pool"] = _sources(content["pool"], "pool", path)
    values["held_out"] = _sources(content.get("held_out") or {}, "held_out", path)
    values["recipe"] = _recipe(content["recipe"], path)
    values["evaluate"] = {
        name.replace("-", "_"): option for name, option in _mapping(content.get("evaluate"), "evaluate", path).items()
    }
    if values["evaluate"] and not content.get("suite"):
        raise UserError(f"{path}: evaluate holds options of a suite, and there is none; set suite: daar, uds or a file")
    values["offline"] = read_entries(content.get("offline"), "offline", where=path)
    values["online"] = read_entries(content.get("online"), "online", where=path)
    values["budgets"] = _budgets(content.get("budgets", ["20%"]), path)
    values["seeds"] = _seeds(content.get("seeds", [0, 1, 2]), path)
    for key, least in (("rows", 1), ("held_out_rows", 1), ("tokens", 1), ("seed_rows", 1), ("validation_rows", 0),
                       ("reference_rows", 1), ("jobs", 1), ("threads", 1), ("draw_seed", 0)):  # fmt: skip
        value = content.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"{path}: {key}={value!r} must be a whole number of at least {least}")
    for key, choices in (("equal", ("rows", "tokens")), ("on_bad_row", ("error", "skip"))):
        if key in content and content[key] not in choices:
            raise UserError(f"{path}: {key}={content[key]!r} is not known; use {' or '.join(choices)}")
    if not values["held_out"] and not content.get("suite"):
        raise UserError(f"{path} measures nothing; set held_out: {{name: file}} or suite: daar, uds or a file")
    values["cells"] = _cells(content.get("cells", "product"), values, path)
    for key in ("jobs", "threads", "draw_seed", "seed_rows", "validation_rows", "reference_rows"):
        if values.get(key, 0) is None:
            del values[key]
    study = Study(**values)
    _check_tokens(study, path)
    return study


def _sources(value: Any, key: str, path: str) -> dict[str, str]:
    """Sources by domain; a list is named by its files."""
    if value == DEMO:
        return {DEMO: DEMO}
    if isinstance(value, Mapping):
        sources = {str(name): str(source) for name, source in value.items()}
    elif isinstance(value, (str, list)):
        files = [value] if isinstance(value, str) else [str(item) for item in value]
        names = [Path(file).name.split(".")[0] for file in files]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path}: two {key} files are named {name}; write `name: file` lines under {key}:")
        sources = dict(zip(names, files, strict=True))
    else:
        raise UserError(f"{path}: {key}={value!r} is no file, list of files or mapping of name: file")
    for name, source in sources.items():
        looks_local = Path(source).suffix != "" or source.startswith((".", "/", "~"))
        if looks_local and not any(mark in source for mark in "*?[") and not Path(source).expanduser().exists():
            raise UserError(f"{path}: {key} {name}: there is no file {source}; check the path, or pass --set")
    return sources


def _recipe(value: Any, path: str) -> dict[str, Any]:
    recipe = _mapping(value, "recipe", path)
    for key in OWN_KEYS:
        if key in recipe:
            raise UserError(f"{path}: recipe holds {key}, which the study sets for every cell; remove it")
    if (preset := recipe.pop("preset", None)) is not None:
        recipe = merged(read_preset(str(preset)), recipe)
        recipe.pop("online", None)  # the study's own `online:` selects
    recipe["sft"] = _mapping(recipe.get("sft"), "recipe.sft", path)
    return recipe


def _budgets(value: Any, path: str) -> tuple[Keep, ...]:
    budgets = tuple(value) if isinstance(value, list) else (value,)
    if not budgets:
        raise UserError(f"{path}: budgets is empty; list at least one, such as 20%")
    try:
        amounts = [parse_keep(budget) for budget in budgets]
    except UserError as error:
        raise UserError(f"{path}: budgets: {error}") from error
    for budget, amount in zip(budgets, amounts, strict=True):
        if amounts.count(amount) > 1:
            raise UserError(f"{path}: budgets has {budget} twice; remove one")
    return budgets


def _seeds(value: Any, path: str) -> tuple[int, ...]:
    seeds = value if isinstance(value, list) else [value]
    if not seeds or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise UserError(f"{path}: seeds={value!r} must be a list of whole numbers, at least one, such as [0, 1, 2]")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise UserError(f"{path}: seeds has {seed} twice; remove one")
    return tuple(seeds)


def _cells(value: Any, checked: Mapping[str, Any], path: str) -> Any:
    if value == "product":
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: cells={value!r} must be `product` or a list of [offline, online, budget]")
    names = {side: [entry.name for entry in checked[side]] for side in ("offline", "online")}
    cells = []
    for triple in value:
        if not isinstance(triple, list) or len(triple) not in (2, 3):
            raise UserError(f"{path}: cells holds {triple!r}; write [offline name, online name, budget]")
        for side, name in zip(("offline", "online"), triple, strict=False):
            if name not in names[side]:
                raise UserError(f"{path}: cells names {name!r}, which is not one of {side}: {', '.join(names[side])}")
        selects = triple[0] != next(
            (entry.name for entry in checked["offline"] if entry.method is None), NONE["offline"]
        )
        if selects and len(triple) == 2:
            raise UserError(f"{path}: cells holds {triple!r} without a budget; write [{triple[0]}, {triple[1]}, 20%]")
        cells.append((str(triple[0]), str(triple[1]), _budgets(triple[2], path)[0] if selects else None))
    for triple in cells:
        if cells.count(triple) > 1:
            raise UserError(f"{path}: cells has {list(triple)} twice; remove one")
    return tuple(cells)


def _check_tokens(study: Study, path: str) -> None:
    if study.equal == "rows":
        if study.tokens is not None:
            raise UserError(f"{path}: tokens={study.tokens} goes with equal: tokens; this study has equal: rows")
        return
    schedule = str(study.recipe.get("sft", {}).get("lr_scheduler_type", "linear"))
    if schedule not in ("constant", "constant_with_warmup"):
        raise UserError(
            f"{path}: equal: tokens ends each run at another step, so lr_scheduler_type={schedule} would end at another "
            "rate; set recipe.sft.lr_scheduler_type to constant or constant_with_warmup"
        )
