"""Small studies with real training: a suite from local files, and what each cell trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("trl")

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
    pytest.importorskip("lm_eval")
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


@pytest.mark.slow
def test_the_page_says_which_domains_were_trained_on(tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        offline=["full", "random"],
        online=["regular", {"name": "some", "method": "random", "keep": 1}],
        cells=[["full", "regular"], ["full", "some"], ["random", "regular", "25%"]],
        baseline="full + some",
        seeds=[0, 1],
    )
    run = tmp_path / "run"
    done = compare(read_study(str(path)), run=str(run), cache=str(tmp_path / "cache"))
    text = Path(str(done.page)).read_text()
    table = text[text.index("## What was trained on") :].split("\n\n")[2].splitlines()
    assert table[0] == "| method | sums | words | different rows | tokens a row |"
    shown = {
        words[1].strip(): [word.strip() for word in words[2:5]] for line in table[2:] if (words := line.split("|"))
    }
    assert shown["full + regular"] == ["30", "30", "60"]
    pool = [json.loads(line)["domain"] for line in (run / "data" / "pool.jsonl").read_text().splitlines()]
    counts: dict[str, list[Counter[str]]] = {"full + some": [], "random + regular": []}
    for seed in (0, 1):
        ledger = pq.read_table(run / f"cells/full-some-seed{seed}/train/siftune/selection.parquet").to_pylist()
        counts["full + some"].append(Counter(pool[line["row"]] for line in ledger if line["kept"]))
        chosen = (run / f"selections/random-25pct-seed{seed}/selected.jsonl").read_text().splitlines()
        counts["random + regular"].append(Counter(json.loads(line)["domain"] for line in chosen))
    for label, found in counts.items():
        assert shown[label] == [f"{sum(one[name] for one in found) / 2:,.0f}" for name in ("sums", "words")] + ["15"]
