"""Rows that are left out before a method scores the pool: text of benchmarks, near-copies.

Both are stages of `siftune select`; each row that is left out has a reason, and the reasons are kept in the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import hash_json
from ..offline.near_copies import near_copies
from ..records import Pool
from .options import Filtering

LEFT_OUT = "left-out.json"
"""The reasons, by row, of the rows that were left out before scoring."""


def check_filtering(options: Filtering, *, cache: str | None) -> dict[str, str]:
    """Check the options, and return the content hashes of the benchmark files. Raises `UserError`."""
    read_threshold(options.near_duplicates)
    if options.decontaminate is None:
        return {}
    from ..offline.benchmark_overlap import benchmark_hashes

    return benchmark_hashes(benchmark_files(options.decontaminate))


def read_threshold(value: Any) -> float | None:
    """`--near-duplicates` as a similarity. Raises `UserError` for anything but a number above 0 and at most 1."""
    if value is None:
        return None
    try:
        threshold = float(value)
    except (TypeError, ValueError):
        threshold = 0.0
    if isinstance(value, bool) or not 0 < threshold <= 1:
        raise UserError(f"--near-duplicates {value} must be a similarity above 0 and at most 1; 0.8 is common")
    return threshold


def benchmark_files(value: str) -> list[Path]:
    """The files of `--decontaminate`: paths, and SUITE:FOLDER for those of a suite's tasks in a data folder."""
    files: list[Path] = []
    for part in (text.strip() for text in value.split(",")):
        if not part:
            raise UserError(f"--decontaminate {value} has an empty part; write FILE,FILE or SUITE:FOLDER")
        path = Path(part).expanduser()
        suite, colon, folder = part.rpartition(":")
        if path.is_file():
            files.append(path)
        elif colon and Path(folder).expanduser().is_dir():
            files += _suite_files(suite, Path(folder).expanduser())
        else:
            raise UserError(
                f"--decontaminate {part} is neither a file nor SUITE:FOLDER, such as daar:eval with the data folder of "
                "siftune evaluate"
            )
    return list(dict.fromkeys(files))


def _suite_files(suite: str, folder: Path) -> list[Path]:
    """The files of the questions of a suite's tasks. Raises `UserError`."""
    from ..evaluation.suite import Suite
    from ..evaluation.tasks import find_file

    specs = [task.spec for task in Suite.read(suite).tasks if task.spec is not None and task.spec.file is not None]
    if not specs:
        raise UserError(f"--decontaminate {suite}: no task of that suite has a file of rows; name the files themselves")
    return [find_file(spec, folder, spec.file) for spec in specs]


def filtered(pool: Pool, options: Filtering) -> tuple[dict[int, str], dict[str, int]]:
    """A reason for each row that is left out, and their counts: benchmarks first, then near-copies of what remains."""
    reasons: dict[int, str] = {}
    counts: dict[str, int] = {}
    if options.decontaminate is not None:
        from ..offline.benchmark_overlap import benchmark_rows, read_benchmarks

        reasons |= benchmark_rows(pool, read_benchmarks(benchmark_files(options.decontaminate)))
        counts["in_a_benchmark"] = len(reasons)
    if (threshold := read_threshold(options.near_duplicates)) is not None:
        copies = near_copies(without(pool, reasons), threshold)
        reasons |= copies
        counts["near_duplicates"] = len(copies)
    return reasons, counts


def without(pool: Pool, reasons: Mapping[int, str]) -> Pool:
    """The pool with more rows left out."""
    if not reasons:
        return pool
    fingerprint = hash_json([pool.fingerprint, {str(row): reason for row, reason in reasons.items()}])
    together = {**reasons, **pool.reasons}
    return replace(pool, reasons=dict(sorted(together.items())), fingerprint=fingerprint)
