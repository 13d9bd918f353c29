"""Where rows come from: a path, a folder, a glob, a hub id, a `datasets.Dataset`, or a list of these, as `Part`s.

A part is one file or one dataset. `resolve` looks at names only (and, for a hub id, lets `datasets` download). Files of
a folder or glob come sorted by name. A text with a glob's characters that is itself a file is that file.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from ..errors import UserError
from ..files import plain_errors, refuse_special
from ..redaction import shortened
from .parse import CHUNK_BYTES, Chunk, cut, json_lines, json_rows
from .parse_csv import csv_rows
from .tables import read_dataset, read_parquet

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
KNOWN = ".jsonl, .json or .csv (also with .gz or .zst), or .parquet"

_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::(?P<split>[\w.\[\]:%+-]+))?")


@dataclass(frozen=True, eq=False)
class Part:
    """One file or one dataset of a pool."""

    name: str
    """As the user gave it: used in messages and in `rows.parquet`."""
    path: Path | None = None
    kind: str = "dataset"
    dataset: Any = None

    def chunks(self) -> Iterator[Chunk]:
        """The part's rows. Raises `UserError` when they cannot be read to the end."""
        if self.path is None:
            return read_dataset(self.dataset)
        return read_file(self.path, self.kind, self.name)


def resolve(source: Any) -> list[Part]:
    """The parts of a source, in order. Raises `UserError` when there is none, or something is missing or unknown."""
    if isinstance(source, (list, tuple)):
        if not source:
            raise UserError("the list of sources is empty; pass at least one file or dataset")
        return [part for item in source for part in resolve(item)]
    if isinstance(source, (str, os.PathLike)):
        return _named(os.fspath(source), is_path=isinstance(source, os.PathLike))
    return [_dataset(source)]


def _dataset(source: Any) -> Part:
    datasets = sys.modules.get("datasets")  # a caller with a Dataset has imported it
    if datasets is not None:
        if isinstance(source, datasets.Dataset):
            return Part(name=str(source.info.dataset_name or "dataset"), dataset=source)
        if isinstance(source, datasets.DatasetDict):
            raise UserError(f"this is a DatasetDict with the splits {', '.join(map(str, source))}; pass one of them")
        if isinstance(source, datasets.IterableDataset):
            raise UserError("an IterableDataset has no row positions; pass a datasets.Dataset or files")
    raise UserError(f"a {type(source).__name__} is not a source of rows; pass a path, a hub id or a datasets.Dataset")


# --- names ----------------------------------------------------------------------------------------------------------


def _named(text: str, *, is_path: bool) -> list[Part]:
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # ~name: an unknown user, so a name that begins with a tilde
        path = Path(text)
    with plain_errors(text):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            mode = 0
        except ValueError as error:
            raise UserError(f"{text!r} is not a path; pass a file, a folder, a glob or a hub id") from error
        if stat.S_ISDIR(mode):
            return _folder(path)
    if mode:
        return [_file(path)]
    if glob.has_magic(text):
        matches = sorted(glob.glob(str(path), recursive=True))
        parts = [_file(Path(name)) for name in matches if not os.path.isdir(name)]
        if not parts:
            raise UserError(f"{text} matches no file; check the pattern, or quote it so that the shell leaves it alone")
        return parts
    match = _HUB_ID.fullmatch(text)
    if is_path or match is None or file_kind(path) is not None:
        raise UserError(f"{text} does not exist; check the path")
    return [_from_hub(match["name"], match["split"] or "train")]


def file_kind(path: Path) -> str | None:
    """`jsonl`, `json`, `csv` or `parquet` by the suffix, packed or not; None for any other."""
    name = path.name.lower()
    for suffix in PACKED:
        if name.endswith(suffix):
            kind = KINDS.get(Path(name.removesuffix(suffix)).suffix)
            return kind if kind != "parquet" else None
    return KINDS.get(Path(name).suffix)


def _file(path: Path) -> Part:
    refuse_special(path)
    kind = file_kind(path)
    if kind is None:
        raise UserError(f"the file type of {path} is not known; use {KNOWN}")
    return Part(name=_printable(path), path=path, kind=kind)


def _printable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _folder(path: Path) -> list[Part]:
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        import datasets

        return [Part(name=_printable(path), dataset=datasets.load_from_disk(str(path)))]
    with plain_errors(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    files = [path / name for name in names if file_kind(path / name) and not (path / name).is_dir()]
    if not files:
        raise UserError(f"the folder {path} holds no file that can be read; it needs {KNOWN}")
    return [_file(file) for file in files]


def _from_hub(name: str, split: str) -> Part:
    """`datasets.load_dataset(name, split=split)`, every failure reported in one sentence."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, hub, builder and split errors share no base class
        message = shortened((str(error).strip() or type(error).__name__).splitlines()[0], 200).rstrip(".")
        raise UserError(
            f"{name} is neither a file nor a folder here, and its split {split} could not be loaded from the hub "
            f"({message}); check the name, as owner/name:split, and the connection"
        ) from error
    return Part(name=name if split == "train" else f"{name}:{split}", dataset=dataset)


# --- reading one file -----------------------------------------------------------------------------------------------


@contextmanager
def readable(name: str | Path) -> Iterator[None]:
    """Turn any error that stops the reading of a file into one sentence."""
    try:
        with plain_errors(name):
            yield
    except MemoryError as error:
        raise UserError(f"{name} cannot be read: memory ran out; split the file or its largest rows") from error
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, UserError):
            raise
        message = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"{name} cannot be read to its end ({message}); it may be damaged or cut short") from error


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked by its last suffix (.gz, .zst)."""
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), CHUNK_BYTES)
    return open(path, "rb", buffering=CHUNK_BYTES)


def read_file(path: Path, kind: str, name: str) -> Iterator[Chunk]:
    """The rows of one file; `kind` is `jsonl`, `json`, `csv` or `parquet`, `name` is used in messages.

    Raises `UserError` when the file cannot be read to its end.
    """
    with readable(name):
        if kind == "parquet":
            yield from read_parquet(path)
            return
        with open_bytes(path) as stream:
            if kind == "csv":
                yield from cut(csv_rows(stream, name))
            else:
                yield from cut(json_rows(stream) if kind == "json" else json_lines(stream))
