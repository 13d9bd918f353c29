"""A selector's state inside the trainer's checkpoints, so that a resumed run keeps the rows it would have kept.

`checkpoint-N/siftune/` holds `selector.safetensors` (tensors), `selector.json` (everything else) and, written last,
`COMPLETE` with the checksums of these files, so that a damaged one is noticed. Ranks that share one selection have
equal states, so rank 0's files serve any number of processes; ranks that choose alone (`scope="local"`) add files of
their own. A checkpoint without `COMPLETE` was not finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.sums import are_intact, read_checked_json, sums_of, write_checked_json
from ..errors import UserError
from ..files import atomic_path
from ..online.base import OnlineMethod

FORMAT = 1


@dataclass(frozen=True)
class SavedState:
    """The selection state in a checkpoint: the selector's state and the running totals of the log."""

    selector: Mapping[str, Any]
    totals: Mapping[str, Any]


def folder_of(checkpoint: Path) -> Path:
    """Where a checkpoint keeps the selection's state."""
    return checkpoint / "siftune"


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint holds a finished selection state."""
    return (folder_of(checkpoint) / "COMPLETE").is_file()


def write(
    checkpoint: Path, selector: OnlineMethod, totals: Mapping[str, Any], *, step: int, rank: int = 0, world: int = 1
) -> None:
    """Write this rank's files; they are valid once `finish` has written `COMPLETE`."""
    folder = folder_of(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    state = selector.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items() if _is_tensor(value)}
    values = {name: value for name, value in state.items() if not _is_tensor(value)}
    record = {"format": FORMAT, "selector": selector.name, "step": step, "values": values, "totals": dict(totals)}
    record |= {"processes": world, "scope": selector.scope}
    stem = _file_stem(rank)
    with atomic_path(folder / f"{stem}.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic_path(folder / f"{stem}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=True) + "\n")


def finish(checkpoint: Path, *, step: int) -> None:
    """Mark the state as complete, once every rank has written. Files that this machine cannot read have no checksum in
    it."""
    folder = folder_of(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    sums = {name: total for name, total in sums_of(folder).items() if name != "COMPLETE"}
    write_checked_json(folder / "COMPLETE", {"step": step, "sums": sums})


def check(checkpoint: Path, *names: str) -> None:
    """Raise `UserError` where one of these files of a finished state is not as it was written."""
    folder = folder_of(checkpoint)
    if not is_complete(checkpoint) or (folder / "COMPLETE").read_bytes().strip().isdigit():  # as earlier versions wrote
        return
    record = read_checked_json(folder / "COMPLETE")
    if record is None:
        raise damaged(folder / "COMPLETE")
    for name in names:
        if name in record["sums"] and not are_intact(folder, {name: record["sums"][name]}):
            raise damaged(folder / name)


def damaged(path: Path) -> UserError:
    """The error for a file of a checkpoint that cannot be used; no other file holds its content."""
    checkpoint = path.parent.parent
    return UserError(
        f"{path} is damaged; delete {checkpoint} and run again, which resumes from the checkpoint before it or starts anew"
    )


def read(
    checkpoint: Path, selector: OnlineMethod, *, rank: int = 0, world: int = 1, across_ranks: bool = False
) -> SavedState:
    """The state of `rank`: of rank 0 where one selection is made `across_ranks`, for any number of processes.

    Raises `UserError` where it belongs to another method, was written by fewer ranks, or by ranks that chose alone and
    are not the same number now.
    """
    folder, stem = folder_of(checkpoint), _file_stem(rank)
    if not (folder / f"{stem}.json").is_file():
        raise UserError(
            f"{folder} holds no selection state of rank {rank}; resume with as many processes as the run was saved with"
        )
    check(checkpoint, f"{stem}.json", f"{stem}.safetensors")
    try:
        record = json.loads((folder / f"{stem}.json").read_text())
        tensors = load_file(folder / f"{stem}.safetensors")
        values, totals = dict(record["values"]), dict(record["totals"])
        saved_by = str(record["selector"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise damaged(folder / f"{stem}.json") from error
    if saved_by != selector.name:
        raise UserError(
            f"{checkpoint} was saved with the selector {saved_by}, and {selector.name} is attached; "
            f"attach {saved_by} or start anew without resume_from_checkpoint"
        )
    processes = record.get("processes", world)
    if record.get("scope") == "local" and processes > 1 and (across_ranks or processes != world):
        raise UserError(
            f'{checkpoint} was saved by {processes} processes with scope="local", which remember different rows; resume '
            f'with {processes} processes and scope="local"'
        )
    return SavedState({**values, **tensors}, totals)


def checkpoint_to_resume(requested: str | bool | None, output_dir: str, *, allow_fresh: bool) -> str | bool | None:
    """The checkpoint `train(resume_from_checkpoint=...)` should take: `True` becomes the newest complete one.

    Raises `UserError` where the checkpoint holds no complete selection state, unless `allow_fresh`.
    """
    if requested is None or requested is False:
        return requested
    if requested is True:
        candidates = _numbered_checkpoints(Path(output_dir))
        complete = [path for path in candidates if is_complete(path)]
        if complete:
            return str(complete[-1])
        if not candidates:
            return True  # the trainer raises its own error
        checkpoint = candidates[-1]
    else:
        checkpoint = Path(requested)
        if not checkpoint.is_dir() or is_complete(checkpoint):
            return requested
    if allow_fresh:
        return requested
    raise UserError(
        f"{checkpoint} holds no complete selection state (siftune/COMPLETE), so the resumed run would keep other rows; "
        "resume from a checkpoint saved with the selector attached, or pass allow_fresh_selector=True to attach"
    )


def _numbered_checkpoints(output_dir: Path) -> list[Path]:
    numbered = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered)]


def _file_stem(rank: int) -> str:
    return "selector" if rank == 0 else f"selector-rank{rank}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
