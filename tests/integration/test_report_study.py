"""The page of a study, and every page's charts as PNG and SVG."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftune.cli.main import main
from siftune.errors import UserError
from siftune.reports import report
from tests.browser.runs import rows_of, selected, study_cells, study_run, trained_run, write_jsonl

pytest.importorskip("plotly", reason="the page needs plotly and jinja2 (the extra report)")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return study_run(tmp_path / "study")


def test_a_study_shows_its_tables(study: Path) -> None:
    text = report.write(study).read_text(encoding="utf-8")
    lines = [line for line in study_cells() if line["label"] == "random"]
    for value in ("loss/maths", "loss/mean", "accuracy/maths"):
        numbers = [line[value] for line in lines]
        assert f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}" in text
    assert "-0.200\n[-0.300, -0.100]" in text
    assert "2.000" in text, "the untouched model's mean over the domains"
    assert "m&lt;script&gt;" in text
    assert "budget 20%" in text
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text)[-2:] == ["Cost", "How it was made"]


def test_the_differences_are_drawn_with_their_intervals(study: Path) -> None:
    text = report.write(study).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    chart = data["measure-0-0-differences"]
    (series,) = chart["series"]
    assert series["x"] == [-0.2, 0.1]
    assert series["xerror"] == pytest.approx([0.1, 0.2])
    assert series["open"] == [False, True], "full of the interval that excludes 0"
    assert [chart["yticktext"][chart["yticks"].index(place)] for place in series["y"]] == ["full", "daar"]


def test_one_seed_has_no_interval(study: Path) -> None:
    table = pq.read_table(study / "differences.parquet").to_pylist()
    lines = [line | {"low": math.nan, "high": math.nan, "sd": math.nan, "n": 1} for line in table]
    pq.write_table(pa.Table.from_pylist(lines), study / "differences.parquet")
    text = report.write(study).read_text(encoding="utf-8")
    assert "-0.200" in text
    assert "nan" not in text.partition('id="library"')[0].lower().replace("&nan", "")


def test_damaged_tables_are_one_sentence(study: Path) -> None:
    (study / "differences.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"cannot be read .*; run siftune compare again"):
        report.write(study)
    pq.write_table(pa.table({"label": pa.array([], pa.string())}), study / "cells.parquet")
    pq.write_table(pa.table({"label": pa.array([], pa.string())}), study / "differences.parquet")
    with pytest.raises(UserError, match="without a finished cell"):
        report.write(study)


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_chart_of_every_page_is_drawn_twice_and_the_same_way(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pool = write_jsonl(tmp_path / "pool.jsonl", rows_of(90))
    run = selected(pool, tmp_path / "runs" / "one", "output-length", cache=tmp_path / "cache")
    selected(pool, tmp_path / "runs" / "two", "random", cache=tmp_path / "cache")
    trained = trained_run(tmp_path / "out")
    drawn = {}
    for folder, more in ((study, {}), (trained, {"rows": str(write_jsonl(tmp_path / "rows.jsonl", rows_of(60)))})):
        report.write(folder, figures=True, cache=tmp_path / "cache", **more)  # type: ignore[arg-type]
        drawn[folder.name] = {path.name for path in (folder / "report-figures").iterdir()}
    assert {"measure-0-0-differences.svg", "measure-0-1-differences.png"} <= drawn["study"]
    assert {"total.svg", "kept-0.svg", "kept-topic.png", "loss.svg", "length.svg", "times.png"} <= drawn["out"]
    words = ["report", str(run), "--map-rows", "0", "--figures", "--cache", str(tmp_path / "cache"), "--json"]
    assert main(words) == 0
    figures = Path(json.loads(capsys.readouterr().out)["figures"])
    made = {path.name: path.read_bytes() for path in figures.iterdir()}
    assert {"scores.svg", "composition-topic.svg", "overlap-chosen-by.png"} <= made.keys()
    assert len(made) % 2 == 0
    for name, content in made.items():
        if name.endswith(".svg"):
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            assert content.startswith(b"\x89PNG")
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == made


def test_names_that_mean_something_to_a_drawing_library_are_drawn_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row | {"topic": ("$x^2$", "<b>&amp;", "_hidden", "\\frac{")[number % 4]}
        for number, row in enumerate(rows_of(80))
    ]
    run = selected(
        write_jsonl(tmp_path / "pool.jsonl", rows), tmp_path / "run", "output-length", cache=tmp_path / "cache"
    )
    report.write(run, figures=True, map_rows=0, cache=tmp_path / "cache")
    drawn = (run / "report-figures" / "composition-topic.svg").read_text()
    text = "".join(ElementTree.fromstring(drawn).itertext())
    for name in ("$x^2$", "<b>&amp;", "_hidden", "\\frac{"):
        assert name in text
