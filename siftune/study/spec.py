"""What a study is asked: its YAML as one checked, frozen record. Everything a reader can get wrong is found here.

`variables:` declares names that stand in braces in any text of the file (`{data}/code.jsonl`); `--set data=DIR` gives
them values, and `--set KEY=VALUE` with a dotted key of the study replaces that key. No torch here, no file is read but
the YAML (and the recipe's, where it is a path).
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
from ..runs.options import unknown
from ..sft.recipe import merged, read_preset, read_recipe_file
from ..yaml_io import read_yaml
from .entries import NONE, Entry, check_name, fill, read_entries, texts

DEMO = "demo"
"""As `model`, `pool` or `held_out`: the embedded model and corpus."""
OWN_KEYS = ("model", "train", "eval", "seed", "online", "stop_at", "max_rows", "format", "columns", "on_bad_row")
"""Keys of a recipe that the study fills in itself."""
LEAST = "write model:, pool:, recipe: and held_out: at least"
"""The way out for a file that holds none of it."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as said, checked. `read_study` makes it."""

    name: str
    """What its folder and its page are called."""
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
    """What every cell but the one without any selection trains the same number of."""
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
    """Keep every cell's tuned model; off, a cell's weights go once they are measured."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Names that stand in braces elsewhere in the file, and their values."""

    @property
    def asks(self) -> set[str]:
        """The `{places}` that some method asks for."""
        return {place for entry in (*self.offline, *self.online) for place in entry.places}

    @property
    def max_length(self) -> int:
        """Tokens of a row at most; SFTConfig's own default where the recipe is silent."""
        return int(self.recipe.get("sft", {}).get("max_length") or 1024)

    @property
    def text(self) -> str:
        """How a row becomes tokens."""
        return str(self.recipe.get("text", "auto"))


def read_study(path: str, changes: Mapping[str, Any] | None = None) -> Study:
    """Read a study's YAML, with `--set` changes by variable or dotted key. Raises `UserError`, one sentence.

    >>> read_study("study.yaml", {"data": "./pools", "seeds": [0, 1]}).seeds
    (0, 1)
    """
    said = {name.replace("-", "_"): value for name, value in read_yaml(path, what="the study", write=LEAST).items()}
    known = [item.name for item in dataclasses.fields(Study)]
    for key in said:
        if key not in known:
            raise unknown(key, known, what="key", where=path)
    variables = _mapping(said.get("variables"), "variables", path)
    for key, value in (changes or {}).items():
        if key in variables:
            variables[key] = value
        else:
            _change(said, key, value, known, list(variables), path)
    said.pop("variables", None)
    if isinstance(said.get("recipe"), str):
        said["recipe"] = read_recipe_file(fill(said["recipe"], _said(variables)))
    _no_empty_variable(said, variables, path)
    return _checked(fill(said, _said(variables)) | {"variables": variables}, path)


def _said(variables: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items() if value is not None}


def _mapping(value: Any, key: str, path: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {key} is {value!r}; write `name: value` lines under it")
    return {str(name): inner for name, inner in value.items()}


def _change(
    said: dict[str, Any], key: str, value: Any, known: Sequence[str], variables: Sequence[str], path: str
) -> None:
    """Replace the key that a dotted name says."""
    first, *rest = key.split(".")
    if first not in known:
        raise unknown(first, [*known, *variables], what="variable or key", where=path)
    place: Any = said
    for name, deeper in zip([first, *rest], rest, strict=False):
        inside = place.get(name)
        if inside is None:
            inside = place[name] = {}
        if not isinstance(inside, dict):
            raise UserError(f"{path}: --set {key}: {name} is no mapping, so it has no {deeper}")
        place = inside
    place[[first, *rest][-1]] = value


def _no_empty_variable(said: Mapping[str, Any], variables: Mapping[str, Any], path: str) -> None:
    for name, value in variables.items():
        if value is None and any("{" + name + "}" in text for text in texts(said)):
            raise UserError(f"{path}: the variable {name} has no value; give --set {name}=VALUE")


# --- checks -----------------------------------------------------------------------------------------------------------


def _checked(said: dict[str, Any], path: str) -> Study:
    for key in ("model", "recipe", "pool"):
        if not said.get(key):
            raise UserError(f"{path} lacks {key}; give it in the file, or with --set {key}=VALUE")
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-")[:60]
    made: dict[str, Any] = {**said, "name": str(said.get("name") or stem or "study")}
    check_name(made["name"], where=f"{path}: name:")
    made["model"] = str(said["model"])
    made["pool"] = _sources(said["pool"], "pool", path)
    made["held_out"] = _sources(said.get("held_out") or {}, "held_out", path)
    made["recipe"] = _recipe(said["recipe"], path)
    made["evaluate"] = {
        name.replace("-", "_"): one for name, one in _mapping(said.get("evaluate"), "evaluate", path).items()
    }
    if made["evaluate"] and not said.get("suite"):
        raise UserError(
            f"{path}: evaluate holds options of a suite, and there is none; give suite: daar, uds or a file"
        )
    made["offline"] = read_entries(said.get("offline"), "offline", where=path)
    made["online"] = read_entries(said.get("online"), "online", where=path)
    made["budgets"] = _budgets(said.get("budgets", ["20%"]), path)
    made["seeds"] = _seeds(said.get("seeds", [0, 1, 2]), path)
    for key, least in (("rows", 1), ("held_out_rows", 1), ("tokens", 1), ("seed_rows", 1), ("validation_rows", 0),
                       ("reference_rows", 1), ("jobs", 1), ("threads", 1), ("draw_seed", 0)):  # fmt: skip
        value = said.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"{path}: {key}={value!r} must be a whole number of at least {least}")
    for key, choices in (("equal", ("rows", "tokens")), ("on_bad_row", ("error", "skip"))):
        if key in said and said[key] not in choices:
            raise UserError(f"{path}: {key}={said[key]!r} is not known; give {' or '.join(choices)}")
    if not made["held_out"] and not said.get("suite"):
        raise UserError(f"{path} measures nothing; give held_out: {{name: file}} or suite: daar, uds or a file")
    made["cells"] = _cells(said.get("cells", "product"), made, path)
    for key in ("jobs", "threads", "draw_seed", "seed_rows", "validation_rows", "reference_rows"):
        if made.get(key, 0) is None:
            del made[key]
    study = Study(**made)
    _check_tokens(study, path)
    return study


def _sources(said: Any, key: str, path: str) -> dict[str, str]:
    """Sources by domain; a list is named by its files."""
    if said == DEMO:
        return {DEMO: DEMO}
    if isinstance(said, Mapping):
        sources = {str(name): str(source) for name, source in said.items()}
    elif isinstance(said, (str, list)):
        files = [said] if isinstance(said, str) else [str(one) for one in said]
        names = [Path(file).name.split(".")[0] for file in files]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path}: two {key} files are named {name}; write `name: file` lines under {key}:")
        sources = dict(zip(names, files, strict=True))
    else:
        raise UserError(f"{path}: {key}={said!r} is no file, list of files or mapping of name: file")
    for name, source in sources.items():
        looks_local = Path(source).suffix != "" or source.startswith((".", "/", "~"))
        if looks_local and not any(mark in source for mark in "*?[") and not Path(source).expanduser().exists():
            raise UserError(f"{path}: {key} {name}: there is no file {source}; check the path, or give --set")
    return sources


def _recipe(said: Any, path: str) -> dict[str, Any]:
    recipe = _mapping(said, "recipe", path)
    for key in OWN_KEYS:
        if key in recipe:
            raise UserError(f"{path}: recipe holds {key}, which the study sets for every cell; leave it out")
    if (preset := recipe.pop("preset", None)) is not None:
        recipe = merged(read_preset(str(preset)), recipe)
        recipe.pop("online", None)  # the study's own `online:` says what selects
    recipe["sft"] = _mapping(recipe.get("sft"), "recipe.sft", path)
    return recipe


def _budgets(said: Any, path: str) -> tuple[Keep, ...]:
    budgets = tuple(said) if isinstance(said, list) else (said,)
    if not budgets:
        raise UserError(f"{path}: budgets is empty; give at least one, such as 20%")
    try:
        amounts = [parse_keep(budget) for budget in budgets]
    except UserError as error:
        raise UserError(f"{path}: budgets: {error}") from error
    for budget, amount in zip(budgets, amounts, strict=True):
        if amounts.count(amount) > 1:
            raise UserError(f"{path}: budgets has {budget} twice; leave one out")
    return budgets


def _seeds(said: Any, path: str) -> tuple[int, ...]:
    seeds = said if isinstance(said, list) else [said]
    if not seeds or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise UserError(f"{path}: seeds={said!r} must be a list of whole numbers, at least one, such as [0, 1, 2]")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise UserError(f"{path}: seeds has {seed} twice; leave one out")
    return tuple(seeds)


def _cells(said: Any, made: Mapping[str, Any], path: str) -> Any:
    if said == "product":
        return said
    if not isinstance(said, list) or not said:
        raise UserError(f"{path}: cells={said!r} must be `product` or a list of [offline, online, budget]")
    names = {side: [entry.name for entry in made[side]] for side in ("offline", "online")}
    cells = []
    for one in said:
        if not isinstance(one, list) or len(one) not in (2, 3):
            raise UserError(f"{path}: cells holds {one!r}; write [offline name, online name, budget]")
        for side, name in zip(("offline", "online"), one, strict=False):
            if name not in names[side]:
                raise UserError(f"{path}: cells names {name!r}, which is not one of {side}: {', '.join(names[side])}")
        selects = one[0] != next((entry.name for entry in made["offline"] if entry.method is None), NONE["offline"])
        if selects and len(one) == 2:
            raise UserError(f"{path}: cells holds {one!r} without a budget; write [{one[0]}, {one[1]}, 20%]")
        cells.append((str(one[0]), str(one[1]), _budgets(one[2], path)[0] if selects else None))
    for one in cells:
        if cells.count(one) > 1:
            raise UserError(f"{path}: cells has {list(one)} twice; leave one out")
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
