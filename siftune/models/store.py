"""A content-addressed cache of arrays on disk.

A key is a hash of all that determines the value, so an entry never goes stale; it is only ever missing. One entry is
one safetensors file (arrays, JSON metadata, checksum), written under a temporary name and renamed: readers and other
writers, in this process or another, see all of it or nothing. A truncated or corrupted entry counts as missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..files import atomic_path

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Store:
    """A folder of entries. Holds nothing but the path, so it is picklable and shared by any number of processes.

    >>> store = Store("cache/features")
    >>> store.put("ab12", {"hidden": np.zeros((2, 4), np.float32)}, {"rows": 2})
    >>> arrays, meta = store.get("ab12")
    """

    folder: str | Path

    def path(self, key: str) -> Path:
        """The file of `key`, in a sub-folder by the key's first two characters."""
        assert key.isalnum(), f"a key is a hexadecimal hash, not {key!r}"
        return Path(self.folder) / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """Arrays and metadata of `key`, or None where there is no valid entry; an invalid one is removed."""
        path = self.path(key)
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, TypeError):
            metadata, arrays = {}, {}
        if metadata.get("checksum") != _checksum(key, arrays, metadata.get("meta", "")):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return None
        return arrays, json.loads(metadata["meta"])

    def put(self, key: str, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        """Keep arrays (any numeric or bool type that safetensors supports) and JSON-able metadata under `key`."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        text = json.dumps(dict(meta), sort_keys=True)
        content = save(packed, metadata={"meta": text, "checksum": _checksum(key, packed, text)})
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def digest(self, key: str, compute: Callable[[], str]) -> str:
        """A hash of large files that is computed once: `key` names the files by their stamps."""
        if stored := self.get(key):
            return str(stored[1]["digest"])
        digest = compute()
        self.put(key, {}, {"digest": digest})
        return digest

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()


def _checksum(key: str, arrays: Arrays, meta: str) -> str:
    """Of the names, types, shapes and bytes of the arrays, the metadata, and the key the entry was written for."""
    digest = blake2b(f"{key}|{meta}".encode(), digest_size=16)
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"|{name}|{values.dtype.str}|{values.shape}|".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
