"""One method of a study, as its YAML names it: `daar`, or `{name: entropy, method: daar, reward: entropy, ...}`.

`full` (offline) and `regular` (online) stand for no selection. Every field beside `name`, `method` and, online,
`candidates` is the method's own and is checked against its dataclass, so a mistake is found before anything runs.
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
"""What stands for no selection."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{,59}")  # two of them and a seed name one folder
PLACE = re.compile(r"\{(\w+)\}")
PLACES = ("model", "pool", "rest", "seeds", "validation", "reference")
"""What a method's settings may ask for in braces: files and folders that the study makes or knows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A named method with its settings."""

    side: Side
    name: str
    """What tables call it."""
    method: str | None
    """The registry's name; None is no selection."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's own fields, `{places}` not yet filled in."""
    candidates: int | None = None
    """Online: rows of a micro-batch that are scored, in place of the recipe's `per_device_train_batch_size`."""

    @property
    def places(self) -> set[str]:
        """What the settings ask for in braces."""
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
        made = {name: fill(value, values) for name, value in self.settings.items()}
        if "seed" in self.fields:
            made.setdefault("seed", seed)
        if "model" in self.fields:
            made.setdefault("model", values["model"])
        return made


def read_entries(said: Any, side: Side, *, where: str) -> tuple[Entry, ...]:
    """The entries of a study's `offline:` or `online:`. Raises `UserError` for unknown methods, keys, and names twice."""
    if said is None:
        said = [NONE[side]]
    if isinstance(said, (str, Mapping)):
        said = [said]
    if not isinstance(said, list) or not said:
        raise UserError(f"{where}: {side} must be a list of methods, not {said!r}")
    entries = tuple(_entry(one, side, where) for one in said)
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: {side} has two entries named {name}; give one of them a `name:` of its own")
    return entries


def _entry(said: Any, side: Side, where: str) -> Entry:
    if isinstance(said, str):
        said = {"method": said}
    if not isinstance(said, Mapping):
        raise UserError(f"{where}: {side} holds {said!r}; write a method's name, or name, method and its settings")
    settings = {str(key).replace("-", "_"): value for key, value in said.items()}
    name = settings.pop("name", None)
    method = settings.pop("method", None)
    if method is None and name is None:
        raise UserError(f"{where}: {side} has an entry without a method ({dict(said)!r}); write `method: NAME`")
    method = str(name if method is None else method)
    name = str(method if name is None else name)
    check_name(name, where=f"{where}: {side} name")
    candidates = settings.pop("candidates", None) if side == "online" else None
    if candidates is not None and (isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1):
        raise UserError(f"{where}: online {name} has candidates={candidates!r}; give a number of rows, 1 or more")
    if method == NONE[side]:
        if settings:
            raise UserError(f"{where}: {method} selects nothing and takes no {next(iter(settings))}; leave it out")
        return Entry(side=side, name=name, method=None, candidates=candidates)
    entry = Entry(side=side, name=name, method=_found(side, method, where), settings=settings, candidates=candidates)
    _check_settings(entry, where)
    return entry


def _found(side: Side, method: str, where: str) -> str:
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
            raise UserError(f"{where}: {entry.side} {entry.name} needs {setting}: give it beside `method:`")
    if wrong := sorted(entry.places - set(PLACES)):
        known = ", ".join("{" + place + "}" for place in PLACES)
        raise UserError(
            f"{where}: {entry.side} {entry.name} asks for {{{wrong[0]}}}, which is none of {known} and no variable"
        )


def _fields(side: Side, method: str) -> dict[str, dataclasses.Field[Any]]:
    return {item.name: item for item in dataclasses.fields(registry.find(side, method).load()) if item.init}


def texts(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts(inner)


def fill(value: Any, values: Mapping[str, str]) -> Any:
    """`value` with `{name}` replaced in every text inside it, names that `values` lacks left as they are.

    >>> fill({"seeds": "{data}/seeds.jsonl"}, {"data": "d"})
    {'seeds': 'd/seeds.jsonl'}
    """
    if isinstance(value, str):
        return PLACE.sub(lambda found: values.get(found[1], found[0]), value)
    if isinstance(value, Mapping):
        return {name: fill(inner, values) for name, inner in value.items()}
    return [fill(inner, values) for inner in value] if isinstance(value, (list, tuple)) else value


def check_name(name: str, *, where: str) -> None:
    """Raise `UserError` for a name that no folder can have."""
    if not NAME.fullmatch(name):
        raise UserError(f"{where} {name[:80]!r} names folders too; use at most 60 letters, digits, dots, dashes")
