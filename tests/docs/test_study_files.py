"""Every shipped study is read and planned as it stands; those of this machine's size also check their methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from siftune.errors import UserError
from siftune.study.cells import arms_of, cells_of
from siftune.study.compare import compare
from siftune.study.plan import check_equal, plan_arm
from siftune.study.spec import Study, read_study

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("offline-20", "online-rows", "online-tokens", "both")
FULL = tuple(f"{name}-full" for name in SMALL)
FILES = {
    f"pools/{name}{part}.jsonl.gz": b""
    for name in ("common_sense", "reasoning", "math", "code")
    for part in ("", "_heldout")
}


def read(name: str, data: Path) -> Study:
    for file in FILES:
        (data / file).parent.mkdir(exist_ok=True)
        (data / file).touch()
    return read_study(str(ROOT / "docs" / "results" / f"{name}.yaml"), {"model": "m", "data": str(data)})


@pytest.mark.parametrize("name", SMALL + FULL)
def test_a_study_names_itself_and_trains_equally(tmp_path: Path, name: str) -> None:
    study = read(name, tmp_path)
    assert study.name == name
    arms = arms_of(study)
    plans = {arm: plan_arm(study, arm, rows=study.rows or 38_969, mean_tokens=100.0) for arm in arms}
    check_equal(study, arms, plans)
    assert len(cells_of(study)) == len(arms) * 3


def test_without_its_variables_a_study_says_which(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the variable data has no value; pass --set data=VALUE"):
        read_study(str(ROOT / "docs" / "results" / "both.yaml"), {"model": "m"})


def test_the_demo_study_checks_on_the_embedded_model(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    study = read_study(str(ROOT / "examples" / "study-demo.yaml"))
    done = compare(study, run=str(tmp_path / "run"), dry_run=True)
    assert len(done.cells) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_on_real_rows_every_method_checks(tmp_path: Path, shared: Path, tiny_base: Path, name: str) -> None:
    pytest.importorskip("trl")
    changes = {"model": str(tiny_base), "data": str(shared / "data"), "rows": 400, "reference_rows": 40}
    study = read_study(str(ROOT / "docs" / "results" / f"{name}.yaml"), changes)
    assert compare(study, run=str(tmp_path / "run"), dry_run=True).plans
