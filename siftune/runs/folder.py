"""One run folder: the configuration (config.yaml), the record of the run (manifest.json), the results (other files).

A stage is finished when the manifest, replaced atomically, holds its record: the content hash of its inputs and of
its files. Running again skips a stage whose record is still valid, so a killed command resumes, and a
folder never mixes two runs: another configuration or a changed input is refused.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from .. import __version__
from ..data.protect import check_parents, foreign_name
from ..errors import UserError
from ..files import FolderLock, atomic_path, hash_file, hash_json, read_json, sweep_temporaries, write_json
from ..progress import doing
from ..redaction import redact
from .options import write_yaml

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "numpy",
    "scikit-learn",
    "safetensors",
    "accelerate",
    "trl",
    "peft",
)


@dataclass
class Stage:
    """One stage of a run, as the manifest shows it."""

    name: str
    key: str
    """Content hash of everything that determines the stage's result."""
    reused: bool
    """True when an earlier run of the same folder finished it and its files are unchanged."""
    counts: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    """Files inside the run folder that the stage wrote."""
    seconds: float = 0.0
    """Spent in this run; set it where the work was done before the stage was entered."""


class RunFolder:
    """A run folder, locked while it is open.

    `config` and `inputs` are the run's identity: JSON values. Entering raises `UserError` when the folder is in use,
    holds another run, or holds files that are not siftune's.

    >>> with RunFolder(Path("runs/a"), config={"keep": "20%"}, inputs={"pool": "9c1e"}) as run:
    ...     with run.stage("score", key) as stage:
    ...         if not stage.reused: ...
    """

    def __init__(self, folder: Path, *, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = redact(json.loads(json.dumps(config)))
        self.inputs = {"siftune": __version__, **json.loads(json.dumps(inputs))}
        self.manifest: dict[str, Any] = {}
        self._lock = FolderLock(folder)
        self._records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        make_folder(self.folder)
        self._lock.__enter__()
        try:
            sweep_temporaries(self.folder)
            self._resume()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._lock.__exit__(*exception)

    def _resume(self) -> None:
        previous = read_manifest(self.folder) if (self.folder / MANIFEST).exists() else {}
        if previous:
            self._agree(previous)
        else:
            check_run_folder(self.folder)
        self._records = {record["name"]: record for record in previous.get("stages", [])}
        self.manifest = {
            "siftune": __version__,
            "status": "running",
            "running": None,
            "versions": versions(),
            "config": self.config,
            "inputs": self.inputs,
            "stages": [],
            **{name: previous[name] for name in ("rows", "info") if name in previous},
        }
        self._save()  # first: the manifest marks the folder as siftune's
        with atomic_path(self.folder / CONFIG) as temporary:
            temporary.write_text(write_yaml(self.config), encoding="utf-8")

    def _agree(self, previous: Mapping[str, Any]) -> None:
        """Refuse a folder whose run has another configuration or input, naming the first difference."""
        for part, now in (("config", self.config), ("inputs", self.inputs)):
            before = previous.get(part, {})
            for name in [*now, *(name for name in before if name not in now)]:
                if now.get(name) != before.get(name):
                    what = "option" if part == "config" else "input"
                    raise UserError(
                        f"run folder {self.folder} holds another run: its {what} {name} was {before.get(name)} and is "
                        f"now {now.get(name)}; pass another --run"
                    )

    # --- stages ---------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str, key: str, *, again: bool = False) -> Iterator[Stage]:
        """Enter a stage; it is finished when the body ends without an exception. The body checks `stage.reused`, which is
        False with `again`: the stage is computed, finished before or not."""
        record = self._records.get(name)
        reused = self.finished(name, key) and not again
        stage = Stage(name, key, reused)
        if reused and record is not None:
            stage.counts, stage.files = dict(record["counts"]), list(record["files"])
        self.manifest["running"] = name
        self._save()
        started = time.perf_counter()
        with doing(name):
            yield stage
        spent = stage.seconds + time.perf_counter() - started
        first = record["computed_seconds"] if reused and record is not None else round(spent, 3)
        self._records[name] = {
            "name": name,
            "status": "reused" if reused else "computed",
            "seconds": round(spent, 3),
            "computed_seconds": first,
            "key": key,
            "counts": stage.counts,
            "files": {file: hash_file(self.folder / file) for file in stage.files},
        }
        self.manifest["running"] = None
        self._save()

    def finished(self, name: str, key: str) -> bool:
        """Whether an earlier run finished this stage with the same inputs, and its files are unchanged."""
        record = self._records.get(name)
        if record is None or record["key"] != key:
            return False
        files = record["files"].items()
        return all((self.folder / name).is_file() and hash_file(self.folder / name) == digest for name, digest in files)

    @contextmanager
    def watch(self) -> Iterator[list[str]]:
        """Names of the files that the body writes into the folder; filled when the body ends."""
        before, written = self._stamps(), list[str]()
        yield written
        written += [name for name, stamp in self._stamps().items() if before.get(name) != stamp]

    def _stamps(self) -> dict[str, tuple[int, int]]:
        files = sorted(path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("."))
        stamps = {path.name: path.stat() for path in files if path.name not in (MANIFEST, CONFIG)}
        return {name: (stamp.st_ino, stamp.st_mtime_ns) for name, stamp in stamps.items()}

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Record the run's facts and mark it finished; returns the manifest."""
        self.manifest |= facts
        self.manifest["status"] = "finished"
        self._save()
        return self.manifest

    def note(self, **facts: Any) -> None:
        """Record facts that a later run of the folder may need."""
        self.manifest |= facts
        self._save()

    def _save(self) -> None:
        self.manifest["stages"] = list(self._records.values())
        self.manifest["peak_memory_mb"] = peak_memory_mb()
        write_json(self.folder / MANIFEST, self.manifest)


def check_run_folder(folder: Path) -> None:
    """Raise `UserError` where a run cannot be kept at `folder`: a file, below a file, or a folder of the user's."""
    check_parents(folder, "run folder")
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"run folder {folder} is a symbolic link to nothing; pass a new or empty folder as --run")
    if (folder / MANIFEST).exists():
        return
    if (name := foreign_name(folder)) is not None:
        raise UserError(
            f"run folder {folder} holds {name} and no {MANIFEST}, so it is not a run of siftune; "
            "pass a new or empty folder as --run"
        )


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises `UserError` where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be created: {error.strerror}; choose another one") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises `UserError` where there is none."""
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no {MANIFEST}; pass the folder that siftune select printed"
        )
    try:
        manifest = read_json(folder / MANIFEST)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error}); pass another --run") from error
    if not _is_manifest(manifest):
        raise UserError(f"run folder {folder} has a {MANIFEST} that siftune did not write; pass another --run")
    checked: dict[str, Any] = manifest
    return checked


def _is_manifest(manifest: Any) -> bool:
    """Whether it has the parts that are read again; files may be damaged or edited."""
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(name), dict) for name in ("config", "inputs")):
        return False
    types: dict[str, Any] = {"name": str, "key": str, "counts": dict, "files": dict, "computed_seconds": (int, float)}
    stages = manifest.get("stages")
    return isinstance(stages, list) and all(
        isinstance(stage, dict) and all(isinstance(stage.get(name), kind) for name, kind in types.items())
        for stage in stages
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results. Imports none of them."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in RECORDED_PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def peak_memory_mb() -> int:
    """Peak memory of this process so far, in MB (10**6 bytes).

    On Linux from /proc: `ru_maxrss` would include the parent's memory at the time it started this process.
    """
    import resource

    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)


def identity(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """The short hash in a default run folder's name, of everything that decides the run's result; secrets are left out."""
    return hash_json({"config": redact(config), "inputs": inputs, "siftune": __version__})[:12]
