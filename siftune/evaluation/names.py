"""What suites and tasks share: a YAML file as a mapping, names that are known, the nearest one for those that are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..data.files import parse_yaml
from ..errors import UserError, did_you_mean


def read_mapping(path: Path, *, what: str) -> dict[str, Any]:
    """A YAML file's keys and values. Raises `UserError` where it is missing, no YAML, or holds something else."""
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"), f"{what} {path}")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{what} {path} holds a {type(loaded).__name__}; write one `key: value` a line")
    return {str(name): value for name, value in loaded.items()}


def check_keys(said: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
    """Raise `UserError` for a key that is not known, naming the nearest that is."""
    known = list(known)
    for name in said:
        if name not in known:
            raise UserError(f"{where} has no key {name}; {nearest(name, known)}")


def nearest(said: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or the known names.

    >>> nearest("gsm8", ["gsm8k", "mmlu"])
    'did you mean gsm8k?'
    """
    known = list(known)
    return did_you_mean(said, known, otherwise=f"known are {', '.join(known)}")
