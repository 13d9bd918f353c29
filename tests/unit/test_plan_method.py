"""`siftune plan METHOD`: every offline method has a plan, from a sample or from its preview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from siftune.cli.main import main
from siftune.errors import UserError
from siftune.runs.options import PlanOptions
from siftune.runs.plan import plan
from tests.tiny import save_tiny

ROWS = [{"instruction": f"question {number}", "output": f"answer {number} " * (number % 3 + 1)} for number in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model"), "llama", width=16, layers=2))


@pytest.fixture
def pool(tmp_path: Path) -> str:
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "broken\n")
    (tmp_path / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    return str(path)


@pytest.mark.parametrize("method", ["random", "length", "bm25", "rds", "ifd", "kmeans"])
def test_a_method_is_planned_from_a_sample(method: str, pool: str, model: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {}
    if method in ("bm25", "rds"):
        settings["target"] = str(tmp_path / "target.jsonl")
    if method in ("rds", "ifd", "kmeans"):
        settings |= {"model": model, "device": "cpu"}
    facts = plan(PlanOptions(pool=[pool], sample=20, cache=str(tmp_path / "cache")), settings, method=method)
    assert facts["method"] == method
    assert (facts["rows"]["read"], facts["rows"]["usable"]) == (41, 40)
    assert facts["measured"]["sample_rows"] == 20
    assert facts["measured"]["fit_grows_with_the_pool"] == (method == "bm25")
    assert facts["measured"]["rows_per_second"] > 0
    assert all(value >= 0 for value in facts["estimate"].values())
    json.dumps(facts)


def test_the_command_names_the_method_first(pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "bm25", pool, "--target", str(tmp_path / "target.jsonl"), "--cache", str(tmp_path / "cache")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "plan of siftune select bm25" in shown
    assert "grows with the pool" in shown


def test_what_a_method_needs_is_asked_for(pool: str, tmp_path: Path) -> None:
    options = PlanOptions(pool=[pool], cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="bm25 needs --target"):
        plan(options, {}, method="bm25")
    with pytest.raises(UserError, match="--sample must be >= 1, got 0"):
        plan(PlanOptions(pool=[pool], sample=0, cache=str(tmp_path / "cache")), {}, method="random")
