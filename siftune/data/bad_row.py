"""Rows that take no part: the exception that carries the reason, and how names and types of the data are shown in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError, is_failure, one_line

_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"} | {
    bytes: "bytes"
}


class BadRow(Exception):
    """A row that is excluded; its text is the reason, `kind: detail`."""


@contextmanager
def row_failures(what: str) -> Iterator[None]:
    """Turn any failure inside into a `BadRow` whose reason starts with `what`.

    `BadRow` and `UserError` pass as they are, and so does an interruption.

    >>> with row_failures("tokenizer fails"):
    ...     tokenizer(text)
    """
    try:
        yield
    except (BadRow, UserError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise BadRow(f"{what}: {one_line(error)}") from error


def kind_of(value: Any) -> str:
    """The type of a value in words."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def shown(name: Any) -> str:
    """A name from the data, short and printable whatever it holds."""
    text = name if isinstance(name, str) else repr(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."
