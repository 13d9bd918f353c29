"""ZeRO-2 and ZeRO-3 over two processes keep the rows and give the losses of one process. Skips without DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.laws.ranks_runs import run
from tests.laws.test_ranks import by_step, launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def test_two_processes_with_zero_equal_one_without(tmp_path: Path) -> None:
    launch(tmp_path, 2, "laws/ranks_deepspeed.py")
    one = run(tmp_path / "1", "uds", 1)["losses"]
    for stage, lost in json.loads((tmp_path / "deepspeed.json").read_text()).items():
        assert lost == pytest.approx(one, rel=1e-4)
        assert by_step(tmp_path / f"zero-{stage}") == by_step(tmp_path / "1" / "uds")
