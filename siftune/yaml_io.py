"""YAML, read safely in one way everywhere: recipes, studies, suites, configurations, domain sentences."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from .errors import UserError
from .file_keys import check_file_keys
from .files import refuse_special

MAX_VALUES, MAX_DEPTH = 200_000, 100
"""Of a YAML file with its aliases expanded."""
_EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader; YAML 1.1 would read `5e-5`, the way in which learning rates are written, as text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def refuse_function(loader: Any, node: Any) -> None:
        raise UserError("the tag !function names code to run, which no file may; leave it out")

    Loader.add_constructor("!function", refuse_function)  # lm-evaluation-harness's
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return Loader


def parse_yaml(text: str, where: str) -> Any:
    """One YAML value, safely, with `5e-5` read as a number. Raises `UserError` that starts with `where`.

    >>> parse_yaml("keep: 20%\\nlearning_rate: 5e-5", "config.yaml")
    {'keep': '20%', 'learning_rate': 5e-05}
    """
    import yaml

    try:
        value = yaml.load(text, _loader())
        _check_size(value, where)
        return value
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # nested too deeply, huge numbers
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _check_size(value: Any, where: str) -> None:
    """Raise `UserError` where aliases make a short file very large or endless: iterating over the value would not end."""
    count, stack = 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise UserError(
                f"{where} expands to more than {MAX_VALUES:,} values or {MAX_DEPTH} levels; write it without nested aliases"
            )
        if isinstance(item, dict):
            stack.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, (list, tuple, set)):
            stack.extend((inner, depth + 1) for inner in item)


def read_yaml(
    path: str | Path, *, what: str, write: str = "write one `key: value` a line", names: bool = False
) -> dict[str, Any]:
    """The mapping that a YAML file holds; `{}` for an empty one. Raises `UserError` where it is missing or holds
    something else, and for a key that names code or holds a secret (`file_keys`).

    `what` names the kind of file, as in "the recipe"; `write` is the advice for a file that holds no keys; `names` is
    for a file whose keys the author chooses.
    """
    refuse_special(path)
    try:
        loaded = parse_yaml(Path(path).read_text(encoding="utf-8"), f"{what} {path}")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text; save it as UTF-8") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise UserError(f"{what} {path} holds a {type(loaded).__name__}; {write}")
    for name in loaded or {}:
        if not isinstance(name, str):  # `no:` is False to YAML, `1:` a number
            raise UserError(f"{what} {path} has the key {name!r}, which YAML does not read as text; put it in quotes")
    if not names:
        check_file_keys(loaded or {}, f"{what} {path}")
    return loaded or {}


def set_value(key: str, text: str) -> Any:
    """The value of `--set KEY=TEXT`, held to the same rules as a file. Raises `UserError`.

    >>> set_value("sft.learning_rate", "5e-5")
    5e-05
    """
    value = parse_yaml(text, f"--set {key}")
    check_file_keys({key: value}, "--set")
    return value
