"""What siftune may overwrite: never an input, never a folder that holds files of the user.

    refuse_overlap   no output is an input, is inside one or contains one; links are followed
    claim            a folder for several files belongs to the command that created it, recorded in a mark file
    refuse_foreign   files saved into a folder replace those of siftune alone
    foreign_name     the first name in a folder that siftune did not write

A file set as `--out` replaces a regular file of that name, as every command line does; nothing else is replaced.
Cost: a few `stat` calls, one per file of an input folder where an output exists already.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import is_temporary, plain_errors, read_json, write_json

CLAIM = ".siftune-folder.json"
LOCKS = (".lock", ".locks")
ADAPTER = "adapter_config.json"
NO_PATHS = frozenset(
    [
        "command",
        "method",
        "keep",
        "order",
        "format",
        "on_bad_row",
        "duplicates",
        "text",
        "label_column",
        "band",
        "device",
        "dtype",
        "window",
        "scope",
    ]
)
"""Settings whose text is never a path, even where a folder has that name."""

Identity = tuple[int, int]


def refuse_overlap(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raise `UserError` where an output is an input (the same file by any link), is inside one, or contains one.

    Both map a name for the message to a path, or None. An input may also be a glob, a list, or a hub id (which is no
    path here); an adapter's folder brings its base along. A run folder's own config.yaml may be read into that run
    again.

    >>> refuse_overlap({"--out": "chosen.jsonl"}, {"the pool": ["pool.jsonl"], "--model": "./model"})
    """
    inputs_given = [(name, place) for name, value in inputs.items() for place in places(value)]
    for flag, value in outputs.items():
        if value is None:
            continue
        output = Path(value).expanduser()
        for name, place in inputs_given:
            _refuse(flag, output, name, place)


def _refuse(flag: str, output: Path, name: str, place: Path) -> None:
    here, there = _identity(output), _identity(place)
    shown = f"{name} ({place})"
    if here is not None and (here == there or here in _files_of(place)):
        raise UserError(f"{flag} {output} is the same as {shown}, and inputs are never replaced; choose another path")
    if there is not None and there in _above(output):
        raise UserError(f"{flag} {output} is inside {shown}, and nothing is written there; choose another path")
    if here is not None and here in _above(place) and not _own_config(output, place):
        raise UserError(f"{flag} {output} contains {shown}, and inputs are never replaced; choose another path")


def check_parents(folder: Path, named: str) -> None:
    """Raise `UserError` where `folder`, or a part of the path to it, is a file."""
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                what = "is" if part == folder else f"is below {part}, which is"
                raise UserError(f"{named} {folder} {what} a file, not a folder; choose another path")
            return


def refuse_nested(flag: str, output: Path, name: str, folder: Path) -> None:
    """Raise `UserError` where two output folders are the same, or one is inside the other, whether they exist or not."""
    here, there = output.expanduser().resolve(), folder.expanduser().resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"{flag} {output} and {name} ({folder}) are inside one another; choose another path")


def places(value: Any) -> Iterator[Path]:
    """The existing paths of an input: a path, a glob, or a list of them; nothing for hub ids and other values."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from places(item)
        return
    if not isinstance(value, (str, os.PathLike)):
        return
    text = os.fspath(value)
    for path in (Path(text), Path(os.path.expanduser(text))):
        if _identity(path) is not None:
            yield path
            yield from _base(path)
            return
    if glob.has_magic(text):
        yield from (Path(name) for name in glob.glob(os.path.expanduser(text), recursive=True))


def _base(folder: Path) -> Iterator[Path]:
    """The base that an adapter's folder names, where it is a path."""
    try:
        base = json.loads((folder / ADAPTER).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(base, str) and _identity(Path(base)) is not None:
        yield Path(base)


def _identity(path: Path) -> Identity | None:
    """Device and inode of the file or folder at a path, links followed; None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _above(path: Path) -> set[Identity | None]:
    """The folders above a path, by its own name and with its links resolved."""
    return {_identity(folder) for way in (Path(os.path.abspath(path)), path.resolve()) for folder in way.parents}


def _files_of(folder: Path) -> set[Identity | None]:
    """The files directly in an input folder, which may be links to others."""
    if not folder.is_dir():
        return set()
    try:
        return {_identity(path) for path in folder.iterdir() if not path.is_dir()}
    except OSError:
        return set()


def _own_config(run: Path, place: Path) -> bool:
    return place.resolve() == (run / "config.yaml").resolve() and (run / "manifest.json").is_file()


def setting_inputs(settings: Mapping[str, Any], form: str = "{}") -> dict[str, Any]:
    """Settings that may be paths, under `form` filled with their names, for `refuse_overlap`.

    >>> setting_inputs({"method": "daar", "pool": ["pool.jsonl"], "seeds": "seeds.jsonl"}, "the run's {}")
    {"the run's pool": ['pool.jsonl'], "the run's seeds": 'seeds.jsonl'}
    """
    texts = {name: value for name, value in settings.items() if isinstance(value, (str, Path, list, tuple))}
    return {form.format(name): value for name, value in texts.items() if name not in NO_PATHS}


# --- folders that siftune creates -----------------------------------------------------------------------------------


def foreign_name(folder: Path, known: tuple[str, ...] = ()) -> str | None:
    """The first name in a folder that is neither a lock, nor a temporary of siftune, nor `known`; None where all
    are."""
    with plain_errors(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return next((name for name in names if name not in (*LOCKS, *known) and not is_temporary(name)), None)


def claim(folder: Path, kind: str, *, flag: str = "--run") -> None:
    """Take a new or empty folder for `kind` (a loop, a demo), or one that the same kind took before. Raises
    `UserError`.

    >>> claim(Path("runs/loop"), "loop")
    """
    mark = folder / CLAIM
    if mark.is_file():
        content = read_json(mark)
        owner = content.get("kind") if isinstance(content, dict) else None
        if owner != kind:
            raise UserError(
                f"{flag} {folder} belongs to a {owner or 'folder'} of siftune, not to a {kind}; pass another folder"
            )
        return
    if (name := foreign_name(folder)) is not None:
        raise UserError(
            f"{flag} {folder} holds {name} and no {CLAIM}, so siftune did not create it; pass a new or empty folder"
        )
    write_json(mark, {"kind": kind})


RUN = {"manifest.json": ("config", "inputs", "stages")}
"""The mark of a run folder: this file, with these keys."""


def refuse_foreign(folder: Path, names: Sequence[str], marks: Mapping[str, Sequence[str]]) -> None:
    """Raise `UserError` where a folder holds one of the files to be written and none of the marks of siftune's own.

    `marks` are JSON files with the keys that they hold. For files that are saved into a folder of the caller's choice.

    >>> refuse_foreign(Path("fitted"), ["daar.json"], RUN)
    """
    existing = [name for name in names if (folder / name).exists()]
    if existing and not any(_has(folder / name, keys) for name, keys in marks.items()):
        raise UserError(
            f"{folder / existing[0]} was not written by siftune, so it is not replaced; choose another folder"
        )


def _has(path: Path, keys: Sequence[str]) -> bool:
    try:
        content = read_json(path)
    except UserError:
        return False
    return isinstance(content, dict) and all(key in content for key in keys)
