"""One method of a study, as its YAML names it: `daar`, or `{name: entropy, method: daar, reward: entropy, ...}`.

`full` (offline) and `regular` (online) mean no selection. Every field beside `name`, `method` and, online, `candidates` is
the method's own and is checked against its dataclass, so a mistake is reported before anything runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .. import registry
from ..errors import UserError
from ..runs.options import PARTS, unknown

Side = Literal["offline", "online"]
NONE: Mapping[Side, str] = {"offline": "full", "online": "regular"}
"""The name that means no selection."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{,59}")  # two of them and a seed name one folder
PLACE = re.compile(r"\{(\w+)\}")
PLACES = ("model", "pool", "rest", "seeds", "validation", "reference")
"""The names in braces that a method's settings may contain: files and folders that the study writes or reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A named method with its settings."""

    side: Side
    name: str
    """The name in tables."""
    method: str | None
    """The registry's name; None is no selection."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's own fields, `{places}` not yet filled in."""
    candidates: int | None = None
    """Online: rows of a micro-batch that are scored, in place of the recipe's `per_device_train_batch_size`."""

    @property
    def places(self) -> set[str]:
        """The names in braces in the settings."""
        return {name for text in texts(self.settings) for name in PLACE.findall(text)}

    @property
    def fields(self) -> dict[str, dataclasses.Field[Any]]:
        """The fields of the method's dataclass."""
        return {} if self.method is None else _fields(self.side, self.method)

    @property
    def scores_with_model(self) -> bool:
        """Online: whether the method runs the model over its candidates."""
        return self.method is not None and bool(registry.find(self.side, self.method).load().needs_forward)

    def takes_seed(self) -> bool:
        """Whether another seed of the study gives another selection."""
        return "seed" in self.fields or "seeds" in self.places

    def filled(self, values: Mapping[str, str], *, seed: int) -> dict[str, Any]:
        """The settings with their places filled in, `model` and `seed` too where the method has such fields."""
        settings = {name: fill(value, values) for name, value in self.settings.items()}
        if "seed" in self.fields:
            settings.setdefault("seed", seed)
        if "model" in self.fields:
            settings.setdefault("model", values["model"])
        return settings


def read_entries(value: Any, side: Side, *, where: str) -> tuple[Entry, ...]:
    """The entries of a study's `offline:` or `online:`. Raises `UserError` for unknown methods, keys, and names twice."""
    if value is None:
        value = [NONE[side]]
    if isinstance(value, (str, Mapping)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {side} must be a list of methods, not {value!r}")
    entries = tuple(_entry(item, side, where) for item in value)
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: {side} has two entries named {name}; set another `name:` for one of them")
    return entries


def _entry(item: Any, side: Side, where: str) -> Entry:
    if isinstance(item, str):
        item = {"method": item}
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: {side} holds {item!r}; write a method's name, or name, method and its settings")
    settings = {str(key).replace("-", "_"): value for key, value in item.items()}
    name = settings.pop("name", None)
    method = settings.pop("method", None)
    if method is None and name is None:
        raise UserError(f"{where}: {side} has an entry without a method ({dict(item)!r}); write `method: NAME`")
    method = str(name if method is None else method)
    name = str(method if name is None else name)
    check_name(name, where=f"{where}: {side} name")
    candidates = settings.pop("candidates", None) if side == "online" else None
    if candidates is not None and (isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1):
        raise UserError(f"{where}: online {name} has candidates={candidates!r}; set a number of rows, 1 or more")
    if method == NONE[side]:
        if settings:
            raise UserError(f"{where}: {method} selects nothing and has no setting {next(iter(settings))}; remove it")
        return Entry(side=side, name=name, method=None, candidates=candidates)
    entry = Entry(
        side=side, name=name, method=_registered_name(side, method, where), settings=settings, candidates=candidates
    )
    _check_settings(entry, where)
    return entry


def _registered_name(side: Side, method: str, where: str) -> str:
    try:
        return registry.find(side, method).name
    except UserError as error:
        raise UserError(f"{where}: {error}, or {NONE[side]} for no selection") from error


def _check_settings(entry: Entry, where: str) -> None:
    fields = entry.fields
    for setting in entry.settings:
        if setting not in fields or setting in PARTS:
            raise unknown(setting, list(fields), what="setting", where=f"{where}: {entry.side} {entry.name}")
    for setting, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and setting != "model" and setting not in entry.settings:
            raise UserError(f"{where}: {entry.side} {entry.name} needs {setting}: set it beside `method:`")
    if wrong := sorted(entry.places - set(PLACES)):
        known = ", ".join("{" + place + "}" for place in PLACES)
        raise UserError(
            f"{where}: {entry.side} {entry.name} contains {{{wrong[0]}}}, which is neither one of {known} nor a variable"
        )


def _fields(side: Side, method: str) -> dict[str, dataclasses.Field[Any]]:
    return {item.name: item for item in dataclasses.fields(registry.find(side, method).load()) if item.init}


def texts(value: Any) -> Iterator[str]:
    """Every string inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts(inner)


def fill(value: Any, values: Mapping[str, str]) -> Any:
    """`value` with `{name}` replaced in every string inside it; names that `values` lacks are unchanged.

    >>> fill({"seeds": "{data}/seeds.jsonl"}, {"data": "d"})
    {'seeds': 'd/seeds.jsonl'}
    """
    if isinstance(value, str):
        return PLACE.sub(lambda match: values.get(match[1], match[0]), value)
    if isinstance(value, Mapping):
        return {name: fill(inner, values) for name, inner in value.items()}
    return [fill(inner, values) for inner in value] if isinstance(value, (list, tuple)) else value


def check_name(name: str, *, where: str) -> None:
    """Raise `UserError` for a name that is not a valid folder name."""
    if not NAME.fullmatch(name):
        raise UserError(f"{where} {name[:80]!r} names folders too; use at most 60 letters, digits, dots, dashes")
