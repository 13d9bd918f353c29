"""`load_pool`: files, folders, hub ids and datasets become a `Pool`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..records import Pool


def load_pool(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    duplicates: Literal["keep", "drop"] = "keep",
    format: str | None = None,
    cache: str | Path | None = None,
) -> Pool:
    """Read a pool of rows."""
    raise NotImplementedError
