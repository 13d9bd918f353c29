"""Files that are complete or absent: atomic writes, content hashes, folder locks, the cache folder.

A file is written under a temporary name beside its place, flushed to the disk and renamed, so that a process killed at
any moment leaves the old file or the new one. Temporary names carry host and process, so that a later run can tell
those of dead processes and remove them. Errors that the user can fix (full disk, no permission) become one sentence.
Cost: one pass over the bytes.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from .errors import UserError
from .redaction import redact

_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32] or "host"
_PROCESS = secrets.token_hex(4)
_TEMPORARY = re.compile(
    r"\.(?P<host>[A-Za-z0-9-]+)~(?P<pid>\d+)~(?P<process>[0-9a-f]{8})~[0-9a-f]{8}\.siftune-tmp", re.ASCII
)
_FOREIGN_SECONDS = 7 * 24 * 3600
"""Age after which a temporary of another machine (a shared file system) counts as stale."""

_swept: set[str] = set()
"""Folders in which this process has removed stale temporaries."""

_WAYS_OUT = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; change its permissions or choose another path",
    errno.EPERM: "the operation is not permitted; change its permissions or choose another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "it is a folder; pass the path of a file",
    errno.EEXIST: "it exists and is not a folder; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOENT: "it does not exist; check the path",
    errno.EFBIG: "the file would be larger than the file system or a limit allows; choose another folder",
    errno.EBUSY: "it is in use, such as a mount point; choose a folder inside it",
    errno.ELOOP: "its symbolic links form a loop; choose another path",
}


@contextmanager
def plain_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's errors that a user can fix into a `UserError` that names the path."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError) or error.errno not in _WAYS_OUT:
            raise
        named = error.filename if isinstance(error.filename, str) else ""
        place = named if named and not any(map(is_temporary, Path(named).parts)) else path
        raise UserError(f"{place}: {_WAYS_OUT[error.errno]}") from error


_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def refuse_special(path: str | Path) -> None:
    """Raise `UserError` for a pipe, a socket or a device, links followed: opening one may wait, reading it never end.

    Every reader of a user's file calls this before it opens the file; a path that does not exist passes.
    """
    try:
        kind = _SPECIAL.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # reported by the caller that opens it
        return
    if kind is not None:
        raise UserError(f"{path} is {kind}, not a file; write its content to a file and pass that file")


# --- temporary names, atomic files ----------------------------------------------------------------------------------


def temporary_beside(path: Path) -> Path:
    """A fresh temporary name in the folder of `path`, which `sweep_temporaries` recognises.

    At a process's first call for a folder, temporaries of dead processes are removed from it, so that a killed command
    that runs again leaves nothing behind.
    """
    if (folder := os.path.abspath(path.parent)) not in _swept:
        _swept.add(folder)
        sweep_temporaries(folder)
    return path.parent / f".{_HOST}~{os.getpid()}~{_PROCESS}~{secrets.token_hex(4)}.siftune-tmp"


def is_temporary(path: str | Path) -> bool:
    """Whether this is one of siftune's temporary names."""
    return _TEMPORARY.fullmatch(os.path.basename(path)) is not None


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; on success it is flushed to the disk and renamed onto `path`, mode 0644.

    On an error nothing is left. A missing parent folder is created. Raises `UserError` for a full disk, a read-only
    folder or a missing permission.

    >>> with atomic_path("out/scores.bin") as temporary:
    ...     temporary.write_bytes(data)
    """
    path = Path(path)
    temporary = temporary_beside(path)
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "", str(path))
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file, so it is not replaced; choose another path")
        try:
            yield temporary
            os.chmod(temporary, 0o644)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot flush a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sweep_temporaries(folder: str | Path) -> int:
    """Remove what dead processes left in `folder` (not below it); returns how many. A missing folder holds none."""
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    swept = 0
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and _stale(Path(folder, name), match):
            remove(Path(folder, name))
            swept += 1
    return swept


def remove(path: Path) -> None:
    """Remove a file or a complete folder, if it exists; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


def _stale(path: Path, match: re.Match[str]) -> bool:
    pid = int(match["pid"])
    if match["host"] != _HOST:
        try:
            return time.time() - path.stat().st_mtime > _FOREIGN_SECONDS
        except OSError:
            return False
    if pid == os.getpid():  # containers hand out the same number again
        return match["process"] != _PROCESS
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


# --- JSON -----------------------------------------------------------------------------------------------------------


def json_value(value: Any) -> Any:
    """The JSON form of a value that JSON lacks, in row ids and in JSONL made from tables.

    Dates and times: ISO 8601; durations: seconds; decimals, UUIDs and paths: text; bytes: base64; numpy: numbers and
    lists; sets: sorted lists. Raises `TypeError` for anything else.
    """
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, (decimal.Decimal, Path, uuid.UUID)):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def without_nan(value: Any) -> Any:
    """The same value with NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return without_nan(json_value(value)) if hasattr(value, "tolist") else value


_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=json_value
)


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no escapes beyond JSON's own; `json_value` for what JSON lacks.

    Raises `ValueError` for NaN and infinities.
    """
    return _CANONICAL.encode(value)


def read_json(path: str | Path) -> Any:
    """The JSON value of a file. Raises `UserError` when it is missing or is not JSON."""
    refuse_special(path)
    with plain_errors(path):
        data = Path(path).read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file ({error}); fix or remove it") from error


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as readable JSON, atomically; NaN and infinities become null, secrets are masked.

    >>> write_json("run/manifest.json", {"rows": 100})
    """
    options: dict[str, Any] = {"indent": 2, "ensure_ascii": False, "default": json_value, "allow_nan": False}
    obj = redact(obj)
    try:
        text = json.dumps(obj, **options)
    except ValueError:
        text = json.dumps(without_nan(obj), **options)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


# --- hashes ---------------------------------------------------------------------------------------------------------


def hash_bytes(data: bytes) -> str:
    """blake2b-128 as 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def hash_json(obj: Any) -> str:
    """blake2b-128 of the canonical JSON of `obj`: equal values, equal hash, whatever the order of the keys.

    >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    True
    """
    return hash_bytes(canonical_json(obj).encode("utf-8", "surrogatepass"))


def hash_file(path: str | Path) -> str:
    """blake2b-128 of a file's bytes, read in pieces."""
    refuse_special(path)
    with plain_errors(path), open(path, "rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# --- folders --------------------------------------------------------------------------------------------------------


def cache_folder(explicit: str | Path | None = None) -> Path:
    """The folder of reusable results: the argument, else `SIFTUNE_CACHE`, else `~/.cache/siftune`. Not created here."""
    chosen = explicit or os.environ.get("SIFTUNE_CACHE") or Path("~/.cache/siftune")
    return Path(chosen).expanduser().absolute()


def lock_file(path: str | Path, *, wait: bool = False) -> FileLock | None:
    """The lock of a file that exists for nothing else, acquired; None when it is held elsewhere and `wait` is false.

    The system frees it at any death. Raises `UserError` where the file cannot be opened, or on a file system without locks
    (filelock's substitute there would outlive a killed process).
    """
    lock = FileLock(path, thread_local=False)  # whichever thread releases it
    try:
        with plain_errors(path):
            lock.acquire(blocking=wait, poll_interval=0.1)
        native = isinstance(lock, FileLock)
    except Timeout:
        return None
    except NotImplementedError:  # filelock before it had a substitute
        native = False
    if not native:
        lock.release()
        raise UserError(f"{path}: this file system has no file locks; choose a folder on another one")
    return lock


class FolderLock:
    """One process at a time in a folder: an exclusive lock on `<folder>/.lock`, freed by the system at any death.

    Entering creates the folder and raises `UserError` when another process (or another lock of this one) holds it.

    >>> with FolderLock("runs/first"):
    ...     ...
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: FileLock | None = None

    def __enter__(self) -> Self:
        assert self._lock is None, "this lock is already held"
        with plain_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(self.folder / ".lock")
        if self._lock is None:
            raise UserError(f"{self.folder} is in use by another siftune process; wait for it or choose another folder")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        self._lock.release()
        self._lock = None
