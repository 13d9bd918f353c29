"""Checksums of a folder's files, so that a file that was truncated, damaged or replaced is detected when it is read
again.

CRC-32 detects every damaged stretch of up to 32 bits and misses one in 4 billion of all others; it does not protect
against forged files. Cost: about 0.4 s per GB.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import hash_json, plain_errors, read_json, write_json

PIECE_BYTES = 1 << 20
CHECK = "check"


def sum_of(path: str | Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = total = 0
    with plain_errors(path), open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            size, total = size + len(piece), zlib.crc32(piece, total)
    return [size, total]


def sums_of(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file in a folder, by name."""
    return {path.name: sum_of(path) for path in sorted(folder.iterdir())}


def write_checked_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object that holds a hash of itself.

    >>> write_checked_json(folder / "meta.json", {"rows": 3, "sums": sums_of(folder)})
    """
    write_json(path, {**value, CHECK: hash_json(value)})


def read_checked_json(path: Path) -> dict[str, Any] | None:
    """What `write_checked_json` wrote; None where the file is missing, damaged or of another origin."""
    try:
        value = read_json(path)
    except (OSError, ValueError):  # UserError, which names a file that cannot be read, is one
        return None
    if not isinstance(value, dict):
        return None
    check = value.pop(CHECK, None)
    return value if check == hash_json(value) else None


def are_intact(folder: Path, sums: Mapping[str, list[int]]) -> bool:
    """Whether every file is as it was when its sum was taken."""
    try:
        return all(
            (folder / name).stat().st_size == expected[0] and sum_of(folder / name) == expected
            for name, expected in sums.items()
        )
    except (OSError, ValueError):
        return False
