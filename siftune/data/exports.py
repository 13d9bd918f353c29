"""Folders that siftune replaces atomically: an exported model, a merged adapter, the parts of a table.

`.siftune-export.json` in such a folder lists its files with size and hash. A folder is replaced or removed only where
it holds those files and nothing else; one that has no list, another file, or a changed file belongs to the user and is
refused. The folder that is there is renamed aside, and removed once the new one has its name. Cost: one hash of every
file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import hash_file, plain_errors, read_json, sync, write_json
from .protect import check_parents

MARK = ".siftune-export.json"


def seal(folder: Path, *, hashed: bool = True) -> None:
    """List the files of a folder in its mark. Without `hashed`, only their sizes, for files of many gigabytes."""
    files = {
        name: [path.stat().st_size, hash_file(path) if hashed else None]
        for name, path in _entries(folder)
        if name != MARK and not path.is_dir()
    }
    write_json(folder / MARK, {"files": files})


def why_kept(folder: Path) -> str | None:
    """Why a folder must not be replaced, as the end of a sentence; None for an unchanged export."""
    listed = _listed(folder)
    for name, path in _entries(folder):
        if name == MARK and listed is not None:
            continue
        if path.is_dir() and not path.is_symlink():
            if listed is None or not any(file.startswith(f"{name}/") for file in listed):
                return f"holds {name}, which siftune did not write"
        elif listed is None or name not in listed or path.is_symlink():
            return f"holds {name}, which siftune did not write"
        elif not _same(path, listed[name]):
            return f"holds {name}, which was changed after siftune wrote it"
    return None


def check_replaceable(folder: Path, flag: str = "") -> None:
    """Raise `UserError` where `folder` is a file or holds anything but an export as siftune wrote it."""
    named = f"{flag} {folder}".strip()
    if folder.is_dir():
        if (why := why_kept(folder)) is not None:
            raise UserError(f"{named} {why}, so it is not replaced; move it away, or pass a new or empty folder")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"{named} is a file; pass a folder")


def check_export(flag: str, folder: Path) -> None:
    """Raise `UserError` where an export cannot be placed at `folder`: also for the working folder and those above
    it."""
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise UserError(f"{flag} {folder} is the working folder or contains it; pass a separate folder")
    check_parents(folder.parent, f"{flag} {folder}: its folder")
    check_replaceable(folder, flag)


def place(new: Path, folder: Path) -> None:
    """Give the finished folder `new`, which is beside `folder`, that name, sealed; an export that has it is replaced.

    Raises `UserError` where `folder` holds anything else; then, and where the name cannot be given, all is as it was.
    """
    folder = folder.resolve()
    seal(new)
    aside = folder.with_name(f".{folder.name}.siftune-old")
    with plain_errors(folder):
        if aside.exists() and not folder.exists():  # a process was killed between the two renames
            os.rename(aside, folder)
        check_replaceable(folder)
        if aside.exists() and not discard(aside):
            raise UserError(f"{aside} {why_kept(aside)}; move it away")
        if folder.exists():
            os.rename(folder, aside)
        try:
            os.rename(new, folder)
        except BaseException:
            if aside.exists():
                os.rename(aside, folder)
            raise
        sync(folder.parent)
    if aside.exists():
        discard(aside)


def discard(folder: Path) -> bool:
    """Remove an export as siftune wrote it; anything else stays as it is. Returns whether it is gone."""
    if not folder.is_dir():
        return not folder.exists()
    files = [name for name, path in _entries(folder) if not path.is_dir()]  # never what came after the check
    if why_kept(folder) is None:
        _remove(folder, files)
    return not folder.exists()


def refill(folder: Path, new: Path, *, last: str) -> None:
    """Put the files of `new` in place of those of a damaged cache folder, `last` at the end; other files there stay."""
    for path in sorted(new.iterdir(), key=lambda path: path.name == last):
        os.replace(path, folder / path.name)
    sync(folder)


def clear(folder: Path, names: Sequence[str]) -> None:
    """Remove a folder whose files all fit `names` (patterns). Raises `UserError` where one does not."""
    names_present = [name for name, path in _entries(folder) if path.is_symlink() or not path.is_dir()]
    for name in names_present:
        if not any(fnmatch(name, pattern) for pattern in names):
            raise UserError(f"{folder} holds {name}, which siftune did not write; move it away and run again")
    _remove(folder, names_present)


def _remove(folder: Path, files: Sequence[str]) -> None:
    """Unlink these files, then every folder that is empty: what is not named here is never touched."""
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for place_, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(place_)
        except OSError:
            continue


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a folder, by its path from there."""
    for path in sorted(folder.rglob("*")):
        yield path.relative_to(folder).as_posix(), path


def _listed(folder: Path) -> Mapping[str, Any] | None:
    """The files that the mark lists; None without a valid mark."""
    try:
        content = read_json(folder / MARK)
    except UserError:
        return None
    files = content.get("files") if isinstance(content, dict) else None
    return files if isinstance(files, dict) else None


def _same(path: Path, listed: Any) -> bool:
    match listed:
        case [int(size), None]:
            return path.stat().st_size == size
        case [int(size), str(digest)]:
            return path.stat().st_size == size and hash_file(path) == digest
    return False
