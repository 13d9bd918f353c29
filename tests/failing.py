"""A task and a pool for engines in several processes: rows that raise, rows that kill their worker, once or always.

Everything here pickles by name, and what was run is written to a file, so that a test sees what other processes did.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siftune.errors import UserError
from siftune.records import Pool, Row, Shard, ShardResult


class PanicException(BaseException):
    """Stands for pyo3_runtime.PanicException, which is no Exception either."""


@dataclass(frozen=True)
class Rows:
    """Made-up rows; some of them hold a word that the task obeys."""

    count: int
    words: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int]) -> list[Row]:
        said = dict(self.words)
        return [Row(int(r), f"{r:032x}", said.get(int(r), f"{r * 7919 % 10007}"), "", "out") for r in rows]


def pool_of(count: int, words: dict[int, str] | None = None, reasons: dict[int, str] | None = None) -> Pool:
    return Pool(Rows(count, tuple((words or {}).items())), "alpaca", "no fingerprint", reasons or {})  # type: ignore[arg-type]


@dataclass
class Obey:
    """Score = a number made of the row and of who else is scored in the shard's batches of 16, so that cutting a shard
    in two would show."""

    folder: Path
    key: str = "obey1"

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        with open(self.folder / "ran.txt", "a") as log:
            log.write(f"{shard.index} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
        score = np.full(len(shard), np.nan, dtype=np.float32)
        rows = pool.read([row for row in range(shard.start, shard.stop) if row not in pool.reasons])
        for start in range(0, len(rows), 16):
            batch = rows[start : start + 16]
            for row in batch:
                self.obey(row)
            numbers = [len(row.instruction) + row.row % 101 for row in batch]
            for row, number in zip(batch, numbers, strict=True):
                score[row.row - shard.start] = number / sum(numbers)
        return ShardResult({"score": score}, {})

    def obey(self, row: Row) -> None:
        word, _, mark = row.instruction.partition(":")
        if mark:
            try:
                (self.folder / mark).touch(exist_ok=False)  # only the first who comes here
            except FileExistsError:
                return
        if word == "raise":
            raise ValueError(f"row {row.row} is\n poisoned")
        if word == "panic":
            raise PanicException(f"row {row.row} is too much")
        if word == "memory":
            raise MemoryError
        if word == "stop":
            raise KeyboardInterrupt
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "user":
            raise UserError("the model is not here; give another")
        if word == "full":
            raise OSError(28, "No space left on device")

    def ran(self) -> list[int]:
        """Shards in the order in which they were begun."""
        return [int(line.split()[0]) for line in self.lines()]

    def pids(self) -> set[str]:
        return {line.split()[1] for line in self.lines()}

    def lines(self) -> list[str]:
        path = self.folder / "ran.txt"
        return path.read_text().splitlines() if path.exists() else []


def same(one: tuple[Any, Any], two: tuple[Any, Any]) -> None:
    """The same columns, bit for bit, and the same reasons."""
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    for name, values in one[0].items():
        assert values.tobytes() == two[0][name].tobytes(), name
