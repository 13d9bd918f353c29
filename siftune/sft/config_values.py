"""A mapping of the user's against the dataclass that will take it: unknown keys and values of another type, in one sentence.

trl, peft and transformers check their options by making an object; what they do not check (an unknown key is a
`TypeError` over two hundred names, a text where a number belongs fails at step 400) is checked here against the class's
own fields, so that no list of theirs is copied.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, did_you_mean


def nearest(said: str, known: Sequence[str]) -> str:
    """The way out for a name nobody knows, to be put behind the sentence."""
    listed = f"known: {', '.join(known)}" if len(known) < 30 else "its documentation lists them all"
    return f"; {did_you_mean(said, known, otherwise=listed)}"


def fitting(cls: type[Any], given: Mapping[str, Any], *, section: str) -> dict[str, Any]:
    """`given` as keyword arguments of the dataclass `cls`, numbers that YAML left as text made numbers.

    Raises `UserError` for a key that is no field, and for a value that cannot be of a plain field's type.

    >>> fitting(trl.SFTConfig, {"learning_rate": "5e-5"}, section="sft")
    {'learning_rate': 5e-05}
    """
    names = [item.name for item in dataclasses.fields(cls) if item.init]
    hints = typing.get_type_hints(cls)
    found = {}
    for key, value in given.items():
        if key not in names:
            raise UserError(
                f"{section}.{key} is no key of {cls.__module__.split('.')[0]}.{cls.__name__}{nearest(key, names)}"
            )
        found[key] = _fitted(value, hints.get(key), f"{section}.{key}")
    return found


def _fitted(value: Any, hint: Any, name: str) -> Any:
    kinds = (
        {*typing.get_args(hint)}
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else {hint}
    )
    if not kinds <= {int, float, bool, type(None)} or (value is None and type(None) in kinds):
        return value  # richer types are the class's own business
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
    wanted = " or ".join(words[kind] for kind in (float, int, bool, type(None)) if kind in kinds)
    raise UserError(f"{name}: {value!r} is not {wanted}")
