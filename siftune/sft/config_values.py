"""A user's mapping checked against the dataclass that it configures: unknown keys and wrong types, one sentence each.

trl, peft and transformers check their options when the object is created; what they do not check (an unknown key is a
`TypeError` over two hundred names, a string instead of a number fails at step 400) is checked here against the fields of
the class, so that no list of options is copied.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, did_you_mean


def nearest(name: str, known_names: Sequence[str]) -> str:
    """What to do about an unknown name: the nearest known one, or the list. Appended to an error message."""
    listed = f"known: {', '.join(known_names)}" if len(known_names) < 30 else "its documentation lists them all"
    return f"; {did_you_mean(name, known_names, otherwise=listed)}"


def fitting(cls: type[Any], settings: Mapping[str, Any], *, section: str) -> dict[str, Any]:
    """`settings` as keyword arguments of the dataclass `cls`, numbers that YAML read as strings converted.

    Raises `UserError` for a key that is no field, and for a value that cannot be of a plain field's type.

    >>> fitting(trl.SFTConfig, {"learning_rate": "5e-5"}, section="sft")
    {'learning_rate': 5e-05}
    """
    names = [item.name for item in dataclasses.fields(cls) if item.init]
    hints = typing.get_type_hints(cls)
    keywords = {}
    for key, value in settings.items():
        if key not in names:
            raise UserError(
                f"{section}.{key} is no key of {cls.__module__.split('.')[0]}.{cls.__name__}{nearest(key, names)}"
            )
        keywords[key] = _fitted(value, hints.get(key), f"{section}.{key}")
    return keywords


def _fitted(value: Any, hint: Any, name: str) -> Any:
    kinds = (
        {*typing.get_args(hint)}
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else {hint}
    )
    if not kinds <= {int, float, bool, type(None)} or (value is None and type(None) in kinds):
        return value  # richer types are checked by the class itself
    if isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, int) and kinds & {int, float}:
        return value
    elif isinstance(value, float) and (float in kinds or (int in kinds and value.is_integer())):
        return value if float in kinds else int(value)
    elif isinstance(value, str) and float in kinds:
        try:
            return float(value)
        except ValueError:
            pass
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    expected = " or ".join(words[kind] for kind in (float, int, bool, type(None)) if kind in kinds)
    raise UserError(f"{name}: {value!r} is not {expected}")
