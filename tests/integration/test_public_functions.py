"""The commands as Python functions of `siftune` itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import siftune
from siftune.errors import UserError
from tests.tiny import save_tiny


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": f"q {n}?", "output": "word " * (n + 1)}) + "\n" for n in range(20))
    )
    return path


def test_every_public_name_resolves() -> None:
    for name in siftune.__all__:
        assert getattr(siftune, name) is not None
    for name in ("select", "keep", "plan", "train", "evaluate", "compare", "report"):
        assert callable(getattr(siftune, name))


def test_select_keep_and_report(pool: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    options = siftune.SelectOptions(pool=[str(pool)], keep=5, run=str(tmp_path / "run"), cache=cache)
    selection = siftune.select("length", options)
    assert selection.subset is not None
    assert len(selection.subset) == 5
    recut = siftune.keep(
        str(selection.folder), siftune.KeepOptions(keep=2, out=str(tmp_path / "two.jsonl"), cache=cache)
    )
    assert recut.subset is not None
    assert set(recut.subset.rows.tolist()) <= set(selection.subset.rows.tolist())
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == 2
    assert siftune.report(tmp_path / "run", map_rows=0, cache=cache).is_file()


def test_plan_and_train_check_before_any_weight(pool: Path, tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model", layers=4, width=16))
    cache = str(tmp_path / "cache")
    facts = siftune.plan(
        siftune.PlanOptions(pool=[str(pool)], sample=4, cache=cache), {"model": model, "device": "cpu"}
    )
    assert facts["rows"]["usable"] == 20
    with pytest.raises(UserError, match="no_such_key"):
        siftune.train({"model": model, "train": str(pool), "no_such_key": 1})


def test_evaluate_and_compare_refuse_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        siftune.evaluate(str(tmp_path / "nowhere"), "uds", skip="humaneval")
    with pytest.raises(UserError, match=r"none\.yaml"):
        siftune.compare(siftune.read_study(str(tmp_path / "none.yaml")))
