"""A `siftune` command in a process of its own that can be killed: what the fork server runs in each child."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def run(words: Sequence[str], folder: str, log: str) -> None:
    """The command line as it is, its output in `log`, its exit code the process's."""
    os.chdir(folder)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from siftune.cli.main import main

    code = main(list(words))
    sys.stdout.flush()
    os._exit(code)


def preload() -> list[str]:
    """Modules the fork server imports once, so that a child starts in milliseconds."""
    assert Path(__file__).exists()
    return ["tests.laws.killable", "siftune.cli.main", "siftune.runs.select", "siftune.offline.daar.selector", "siftune.engines.local",
            "datasets", "transformers.models.llama.modeling_llama", "pyarrow.parquet"]  # fmt: skip
