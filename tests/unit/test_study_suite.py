"""A study that measures by an evaluation suite: real training, real tasks from local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("lm_eval")

from siftune.study.compare import compare
from siftune.study.spec import read_study
from tests import evaluation_data
from tests.studies import write_study

SUITE = """
tasks:
  hellaswag: {shots: 0}
  scienceqa: {shots: 0}
"""


@pytest.mark.slow
def test_a_suites_tasks_stand_in_the_table_beside_the_held_out_losses(tmp_path: Path) -> None:
    folder = evaluation_data.write(tmp_path / "questions")
    (tmp_path / "suite.yaml").write_text(SUITE)
    path = write_study(
        tmp_path,
        suite=str(tmp_path / "suite.yaml"),
        evaluate={"data": str(folder), "limit": 2},
        offline=["random"],
        seeds=[0],
    )
    done = compare(read_study(str(path)), run=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    page = Path(str(done.page)).read_text()
    values = json.loads((tmp_path / "run" / "cells" / "random-regular-20pct-seed0" / "cell.json").read_text())["values"]
    assert {"loss/sums", "scienceqa/acc", "tasks/mean"} <= set(values)
    assert values["tasks/mean"] == pytest.approx((values["hellaswag/acc_norm"] + values["scienceqa/acc"]) / 2)
    table = page[page.index("### Suite") :].split("\n\n")[1].splitlines()
    assert "| hellaswag/acc_norm | scienceqa/acc | mean |" in table[0]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["(before tuning)", "random"]
