"""Where rows come from: a path, a folder, a glob, a hub id, a `datasets.Dataset`, a data frame, a list of rows, or a
list of these, as `Part`s.

A part is one file or one dataset. `resolve` looks at names only (and, for a hub id, lets `datasets` download). Files of
a folder or glob come sorted by name. A text with a glob's characters that is itself a file is that file.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from ..errors import UserError
from ..files import plain_errors, refuse_special
from ..redaction import shortened
from .parse import CHUNK_BYTES, Chunk, cut, is_json_array, json_lines, json_rows, object_rows
from .parse_csv import csv_rows
from .tables import read_arrow, read_dataset, read_parquet, tables

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"} | {
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKED = (".gz", ".zst", ".bz2", ".xz")
KNOWN = ".jsonl, .json, .csv or .tsv (also with .gz, .zst, .bz2 or .xz), .parquet or .arrow"
DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files in the folder of a data set that describe it and hold no rows."""

_MAGIC = {
    b"\x1f\x8b": (".gz", "gzip data"),
    b"\x28\xb5\x2f\xfd": (".zst", "Zstandard data"),
    b"BZh": (".bz2", "bzip2 data"),
    b"\xfd7zXZ\0": (".xz", "xz data"),
    b"PAR1": (".parquet", "a Parquet file"),
    b"ARROW1": (".arrow", "an Arrow file"),
    b"PK\x03\x04": ("", "a zip archive"),
}
"""First bytes of files that are not text, the suffix under which they are read (empty: none), and what they are."""

_SPLIT = re.compile(r"(train|validation|valid|val|dev|test|eval)(?=[-_.]|$)", re.IGNORECASE)
"""Names of files that hold one split of a data set."""

_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::(?P<split>[\w.\[\]:%+-]+))?")


@dataclass(frozen=True, eq=False)
class Part:
    """One file or one dataset of a pool."""

    name: str
    """As the user gave it: used in messages and in `rows.parquet`."""
    path: Path | None = None
    kind: str = "dataset"
    dataset: Any = None
    """A `datasets.Dataset`, an Arrow table, or an iterable of objects, by `kind`."""

    def chunks(self) -> Iterator[Chunk]:
        """The part's rows. Raises `UserError` when they cannot be read to the end."""
        if self.kind == "dataset":
            return read_dataset(self.dataset, self.name)
        if self.kind == "table":
            return tables(iter(self.dataset.to_batches()), self.name)
        if self.kind == "objects":
            return cut(object_rows(self.dataset))
        assert self.path is not None
        return read_file(self.path, self.kind, self.name)


def resolve(source: Any) -> list[Part]:
    """The parts of a source, in order. Raises `UserError` when there is none, or something is missing or unknown."""
    if isinstance(source, (list, tuple)):
        if not source:
            raise UserError("the list of sources is empty; pass at least one file or dataset")
        if isinstance(source[0], Mapping):
            return [Part(name="list", kind="objects", dataset=source)]
        return [part for item in source for part in resolve(item)]
    if isinstance(source, (str, os.PathLike)):
        return _named(os.fspath(source), is_path=isinstance(source, os.PathLike))
    return [_in_memory(source)]


def _in_memory(source: Any) -> Part:
    datasets = sys.modules.get("datasets")  # a caller with a Dataset has imported it
    if datasets is not None:
        if isinstance(source, datasets.Dataset):
            return Part(name=str(source.info.dataset_name or "dataset"), dataset=source)
        if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            raise UserError(f"this is a DatasetDict with the splits {', '.join(map(str, source))}; pass one of them")
        if isinstance(source, datasets.IterableDataset):
            return Part(name=str(source.info.dataset_name or "dataset"), kind="objects", dataset=source)
    if hasattr(source, "iloc") or hasattr(source, "__arrow_c_stream__"):  # pandas; Polars, pyarrow and others
        return Part(name=f"{type(source).__name__}", kind="table", dataset=_frame(source))
    raise UserError(
        f"a {type(source).__name__} is not a source of rows; pass a path, a hub id, a datasets.Dataset, a data frame or a "
        "list of objects"
    )


def _frame(source: Any) -> pa.Table:
    """A data frame as an Arrow table, without the index of a pandas frame."""
    try:
        if hasattr(source, "iloc"):
            return pa.Table.from_pandas(source, preserve_index=False).replace_schema_metadata(None)
        return pa.table(source)
    except (pa.ArrowException, ValueError, TypeError) as error:
        message = shortened(" ".join(str(error).split()), 200)
        raise UserError(
            f"the {type(source).__name__} has a column that Arrow cannot hold ({message}); pass its rows as a list of "
            "objects"
        ) from error


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
        files = [Path(name) for name in matches if not os.path.isdir(name)]
        parts = [_file(file) for file in files if file.name not in DESCRIPTIONS]
        if not parts:
            raise UserError(f"{text} matches no file; check the pattern, or quote it so that the shell leaves it alone")
        return parts
    match = _HUB_ID.fullmatch(text)
    if is_path or match is None or file_kind(path) is not None:
        raise UserError(f"{text} does not exist; check the path")
    return [_from_hub(match["name"], match["split"] or "train")]


def file_kind(path: Path) -> str | None:
    """A value of `KINDS` by the suffix, packed or not; None for any other."""
    name = path.name.lower()
    for suffix in PACKED:
        if name.endswith(suffix):
            kind = KINDS.get(Path(name.removesuffix(suffix)).suffix)
            return None if kind in ("parquet", "arrow") else kind
    return KINDS.get(Path(name).suffix)


def _file(path: Path) -> Part:
    refuse_special(path)
    if path.name in DESCRIPTIONS:
        raise UserError(f"{path} describes a data set and holds no rows; pass the folder or the files beside it")
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
        present = sorted(os.listdir(path))
        if "dataset_dict.json" in present:
            splits = [name for name in present if (path / name / "dataset_info.json").is_file()]
            raise UserError(
                f"the folder {path} is a DatasetDict with the splits {', '.join(splits) or 'none'}; pass the folder of one "
                f"of them{f', such as {path / splits[0]}' if splits else ''}"
            )
    names = [name for name in present if not name.startswith(".") and name not in DESCRIPTIONS]
    files = [path / name for name in names if file_kind(path / name) and not (path / name).is_dir()]
    _refuse_clone(path, present, files)
    if not files:
        raise UserError(f"the folder {path} holds no file that can be read; it needs {KNOWN}")
    return [_file(file) for file in files]


def _refuse_clone(path: Path, present: list[str], files: list[Path]) -> None:
    """Raise `UserError` for the clone of a hub's data set, which holds several splits, or has its rows in subfolders."""
    is_clone = ".gitattributes" in present or ".huggingface" in present or "README.md" in present
    below = [] if files else sorted(file for file in path.glob("*/*") if file_kind(file) and file.is_file())
    below = [file for file in below if not file.parent.name.startswith(".") and file.name not in DESCRIPTIONS]
    splits: dict[str, str] = {}
    for file in files or below:
        if match := _SPLIT.match(file.name) or _SPLIT.match(file.parent.name if below else ""):
            suffix = file.name[file.name.index(".") :]
            in_folder = _SPLIT.match(file.name) is None
            splits.setdefault(match[1], str(file.parent / ("*" if in_folder else f"{match[0]}*")) + suffix)
    if (below and splits) or (is_clone and len(splits) > 1):
        named = ", ".join(splits)
        first = next(iter(splits.values()))
        raise UserError(
            f"the folder {path} is a data set with the splits {named}; pass the files of one of them, such as {first!r}"
        )


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
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, UserError):
            raise
        message = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"{name} cannot be read to its end ({message}); it may be damaged or cut short") from error


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked by its last suffix (`PACKED`)."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), CHUNK_BYTES)
    return open(path, "rb", buffering=CHUNK_BYTES)


def read_file(path: Path, kind: str, name: str) -> Iterator[Chunk]:
    """The rows of one file; `kind` is a value of `KINDS`, `name` is used in messages.

    Raises `UserError` when the file cannot be read to its end.
    """
    with readable(name):
        if kind == "parquet":
            yield from read_parquet(path, name)
            return
        if kind == "arrow":
            yield from read_arrow(path, name)
            return
        with open_bytes(path) as stream:
            buffered = (
                stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(Any, stream), CHUNK_BYTES)
            )
            _refuse_other_kinds(buffered, kind, name)
            if kind in ("csv", "tsv"):
                yield from cut(csv_rows(buffered, name, delimiter="\t" if kind == "tsv" else ","))
            else:
                yield from cut(json_rows(buffered) if kind == "json" else json_lines(buffered))


def _refuse_other_kinds(stream: io.BufferedReader, kind: str, name: str) -> None:
    """Raise `UserError` for a file whose first bytes show that its suffix is wrong."""
    start = stream.peek(64)
    for magic, (suffix, what) in _MAGIC.items():
        if start.startswith(magic):
            inside = suffix in PACKED and suffix
            way_out = f"rename it to {Path(name).name}{suffix}" if inside else f"rename it to end in {suffix}"
            raise UserError(f"{name} holds {what}, not text; {way_out if suffix else 'unpack it'}")
    if kind == "jsonl" and is_json_array(stream):
        raise UserError(f"{name} holds one JSON array, not one object per line; rename it to end in .json")
