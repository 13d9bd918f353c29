"""Errors that the user can fix.

`UserError` is one clear sentence: the place, the value, the way out. The command line prints it alone and exits with 2;
anything else is an internal error, exits with 1 and shows where it occurred.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .redaction import redact, shortened


class UserError(ValueError):
    """Bad input or usage: one sentence that names the value and the way out. Secrets in it are masked.

    >>> raise UserError("keep=16 exceeds the 8 rows of the pool; lower keep")
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(part) for part in args))


class MissingExtra(UserError, ImportError):
    """An optional dependency is not installed: the sentence holds the pip command.

    >>> raise MissingExtra("trl", extra="train", needed_for="siftune train")
    """

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs {package}, which is not installed; run: pip install 'siftune[{extra}]'")


def is_failure(error: BaseException) -> bool:
    """Whether `error` reports that something failed: any `Exception`, and the panic of a library written in Rust, which
    pyo3 derives from `BaseException`. KeyboardInterrupt, SystemExit and the like are not failures and must pass.

    >>> is_failure(ZeroDivisionError()), is_failure(KeyboardInterrupt())
    (True, False)
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(error: BaseException, limit: int = 120) -> str:
    """Type and message of an error on one line of at most `limit` characters, secrets masked.

    >>> one_line(ValueError("no\\n  number"))
    'ValueError: no number'
    """
    return shortened(f"{type(error).__name__}: {error}", limit).rstrip(": ")


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """Advice for an unknown name: the nearest known one, else `otherwise`, else all known ones.

    >>> did_you_mean("gsm8", ["gsm8k", "mmlu"])
    'did you mean gsm8k?'
    """
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)  # so that `rank` finds rank_pattern
    nearest = nearest or difflib.get_close_matches(name.lower(), known, n=1)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"known: {', '.join(known)}" if otherwise is None else otherwise


def check_keys(keys: Iterable[object], known: Iterable[str], where: str) -> None:
    """Raise `UserError` for a key that is not known, naming the nearest known one.

    >>> check_keys({"shots": 5}, ["shots", "limit"], "suite daar")
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise UserError(f"{where} has an unknown key {key!r}; {did_you_mean(str(key), known)}")
