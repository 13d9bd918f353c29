"""A model sharded by FSDP 1 or 2 over two processes keeps the rows, scores and losses of a whole one in one process."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.laws.ranks_sharded import SCENARIOS, run
from tests.laws.test_ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    launch(folder, 2, "laws/ranks_sharded.py")
    told: dict[str, Any] = json.loads((folder / "sharded.json").read_text())
    return told


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.filterwarnings("ignore:scores are taken from the model's own logits")
def test_sharded_equals_whole(found: dict[str, Any], name: str) -> None:
    from siftune.hook.exchange import Ranks

    many, one = found[name], run(Ranks(rank=0, world=1, device=torch.device("cpu")), **SCENARIOS[name])
    assert many["kept"] == one["kept"]
    assert any(len(set(step) & {0, 1, 2, 3, 8, 9, 10, 11}) not in (0, len(step)) for step in many["kept"])
    for ours, theirs in zip(many["totals"], one["totals"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, nan_ok=True)
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert len(set(one["losses"])) == len(one["losses"])
