"""`siftune report`: the right numbers in the page, what it says where something is missing, bad input in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from siftune.cli.main import main
from siftune.data.load import load_pool
from siftune.demo import corpus, embedded
from siftune.errors import MissingExtra, UserError
from siftune.reports import maps, page, report
from siftune.reports.probe import read_probe_set
from siftune.reports.rows_file import read_selection, texts_of
from siftune.reports.training_run import read_training
from tests.browser.runs import DOMAINS, rows_of, selected, trained_run, write_jsonl

pytest.importorskip("plotly", reason="the page needs plotly and jinja2 (the extra report)")


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pool.jsonl", rows_of(90))


@pytest.fixture
def run(pool: Path, tmp_path: Path) -> Path:
    return selected(pool, tmp_path / "runs" / "one", "output-length", cache=tmp_path / "cache")


def data_of(path: Path) -> dict[str, Any]:
    """The page's data, as a browser would read it."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S
    )
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def sections(path: Path) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", path.read_text(encoding="utf-8"))


# --- a selection ----------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_fetches_nothing(run: Path, tmp_path: Path) -> None:
    done = report.write(run, map_rows=0, cache=tmp_path / "cache")
    assert done == run / "report.html"
    text = done.read_text(encoding="utf-8")
    head = text.partition("<script")[0]
    assert "default-src 'none'" in head.replace("&#39;", "'")
    assert "unsafe-eval" not in head
    assert not re.search(r"<(?:link|img|iframe|script[^>]+src)", text.partition('id="library"')[0])
    assert (
        report.write(run, tmp_path / "again.html", map_rows=0, cache=tmp_path / "cache").read_bytes()
        == done.read_bytes()
    )


def test_rows_to_read_are_the_rows_they_are_called(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siftune.reports.reading.EACH", 20)
    done = report.write(run, map_rows=0, cache=tmp_path / "cache")
    table = pq.read_table(run / "rows.parquet").to_pylist()
    views = {view["key"]: view["rows"] for view in data_of(done)["rows-to-read"]["views"]}
    best = sorted(table, key=lambda row: (-row["score"], row["row"]))
    assert [row["row"] for row in views["high"]] == [row["row"] for row in best[:20]]
    assert [row["rank"] for row in views["high"]] == list(range(1, 21))
    assert [row["score"] for row in views["low"]] == [pytest.approx(row["score"]) for row in best[:-21:-1]]
    kept = [row["row"] for row in best if row["kept"]]
    others = [row["row"] for row in best if not row["kept"]]
    assert [row["row"] for row in views["cut"]] == [
        row["row"] for row in best if row["row"] in kept[-10:] + others[:10]
    ]
    originals = rows_of(90)
    for row in views["draw"]:
        assert row["question"] == originals[row["row"]]["instruction"]
        assert row["answer"] == originals[row["row"]]["output"]
        assert row["kept"] == table[row["row"]]["kept"]
        assert row["score"] == pytest.approx(table[row["row"]]["score"])
        assert row["labels"] == [f"topic: {originals[row['row']]['topic']}"]
        assert row["place"] == f"pool.jsonl:{row['row'] + 1}"
    assert "out" not in views, "no row was left out"


def test_rows_left_out_are_there_with_their_reasons(pool: Path, tmp_path: Path) -> None:
    with pool.open("a") as file:
        file.write('{"instruction": "no answer"}\n{"broken\n')
    run = selected(pool, tmp_path / "run", cache=tmp_path / "cache", on_bad_row="skip")
    done = report.write(run, map_rows=0, cache=tmp_path / "cache")
    out = next(view["rows"] for view in data_of(done)["rows-to-read"]["views"] if view["key"] == "out")
    assert [row["row"] for row in out] == [90, 91]
    assert out[0]["reason"].startswith("missing field")
    assert out[1]["question"] == '{"broken'
    text = done.read_text(encoding="utf-8")
    assert "Every row left out, by reason: 2 rows" in text


def test_other_methods_on_the_same_pool_are_compared(pool: Path, run: Path, tmp_path: Path) -> None:
    other = selected(pool, tmp_path / "runs" / "two", "random", cache=tmp_path / "cache")
    elsewhere = write_jsonl(tmp_path / "other.jsonl", rows_of(90, seed=5))
    selected(elsewhere, tmp_path / "runs" / "three", "random", cache=tmp_path / "cache")
    (tmp_path / "runs" / "four").mkdir()
    (tmp_path / "runs" / "four" / "manifest.json").write_text("{ broken")
    (tmp_path / "runs" / "four" / "rows.parquet").write_text("x")
    done = report.write(run, map_rows=0, cache=tmp_path / "cache")
    chosen = [set(np.flatnonzero(pq.read_table(one / "rows.parquet")["kept"].to_numpy())) for one in (run, other)]
    text = done.read_text(encoding="utf-8")
    assert f"output-length chose 18 rows, random 18; {len(chosen[0] & chosen[1])} are the same" in text
    assert text.count("chose 18 rows") == 4


def test_a_pool_that_is_gone_leaves_the_chosen_rows_readable(pool: Path, run: Path, tmp_path: Path) -> None:
    pool.unlink()
    done = report.write(run, cache=tmp_path / "cache")
    assert "Map" not in sections(done)
    assert "The pool is no longer at its path" in done.read_text(encoding="utf-8")
    rows = {row["row"]: row for view in data_of(done)["rows-to-read"]["views"] for row in view["rows"]}
    originals = rows_of(90)
    for row in rows.values():
        wanted = originals[row["row"]]["instruction"] if row["kept"] else "The text of this row is not available."
        assert row["question"] == wanted


def test_a_pool_that_changed_is_not_shown_as_the_one_that_was_scored(pool: Path, tmp_path: Path) -> None:
    run = selected(pool, tmp_path / "run", "output-length", cache=tmp_path / "cache", order="score")
    write_jsonl(pool, rows_of(90, seed=9))
    done = report.write(run, map_rows=0, cache=tmp_path / "cache")
    assert "The pool has changed since this run" in done.read_text(encoding="utf-8")
    originals = rows_of(90)
    rows = [row for view in data_of(done)["rows-to-read"]["views"] for row in view["rows"] if row["kept"]]
    assert all(row["question"] == originals[row["row"]]["instruction"] for row in rows)


# --- the map --------------------------------------------------------------------------------------------------------


def test_rows_that_share_words_lie_together(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("openTSNE")
    done = report.write(run, cache=tmp_path / "cache")
    data = data_of(done)["pool-map"]
    at, of = np.array([data["x"], data["y"]]).T, np.array(data["colours"][0]["of"])
    assert data["colours"][0]["name"] == "topic"
    distance = ((at[:, None] - at[None]) ** 2).sum(-1) + 1e18 * np.eye(len(at))
    assert (of[distance.argmin(axis=1)] == of).mean() > 0.9
    assert "Rows with shared words are close together; all 90 usable rows." in done.read_text(encoding="utf-8")


def test_positions_are_computed_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openTSNE")
    first = report.write(run, cache=tmp_path / "cache").read_bytes()
    monkeypatch.setattr(maps, "embed", lambda *_: pytest.fail("the cache has them"))
    assert report.write(run, cache=tmp_path / "cache").read_bytes() == first


def test_a_draw_of_the_pool_is_said_to_be_one(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("openTSNE")
    done = report.write(run, map_rows=40, cache=tmp_path / "cache")
    assert len(data_of(done)["pool-map"]["row"]) == 40
    assert "40 of 90 usable rows" in done.read_text(encoding="utf-8")


# --- DaaR: the probe from what the run left -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real DaaR run on 400 rows of the embedded corpus, by the embedded model."""
    folder = tmp_path_factory.mktemp("daar")
    data = corpus.write(folder / "data", count=400, seed=0)
    settings = {"model": str(embedded.model_folder()), "seeds": str(data / "seeds.jsonl"), "keep_features": True}
    return selected(data / "pool.jsonl", folder / "run", "daar", cache=folder / "cache", settings=settings)


def test_the_held_out_rows_are_those_of_the_fit(daar: Path) -> None:
    cache = daar.parent / "cache"
    selection = read_selection(daar)
    pool = load_pool(str(daar.parent / "data" / "pool.jsonl"), cache=cache)
    found = read_probe_set(selection, pool, cache=cache)
    assert found is not None
    info = selection.info
    assert len(found.held) == info["validation_rows"]
    right = found.probabilities[found.held].argmax(axis=1) == found.labels[found.held]
    assert right.mean() == info["validation_accuracy"]
    counts = np.bincount(found.labels, minlength=len(selection.domains)).tolist()
    assert dict(zip(selection.domains, counts, strict=True)) == info["cluster_rows"]
    stored = np.stack([pq.read_table(daar / "rows.parquet")[f"p_{name}"].to_numpy() for name in selection.domains], 1)
    np.testing.assert_allclose(stored[found.rows], found.probabilities, atol=1e-5)


def test_the_map_says_what_it_shows(daar: Path, tmp_path: Path) -> None:
    pytest.importorskip("openTSNE")
    cache = daar.parent / "cache"
    selection = read_selection(daar)
    texts = texts_of(selection, cache=cache)
    probe_set = read_probe_set(selection, texts.pool, cache=cache)  # type: ignore[arg-type]
    kept = maps.positions(selection, texts, probe_set, most=150, cache=cache)
    assert kept is not None
    assert "150 of 400 usable rows, features kept by the run" in kept.of
    config = {**selection.config, "keep_features": False}
    without = type(selection)(**{**vars(selection), "manifest": {**selection.manifest, "config": config}})
    drawn = maps.positions(without, texts, probe_set, most=150, cache=cache)
    assert drawn is not None
    assert "the probe set, drawn at random" in drawn.of
    text = maps.positions(without, texts, None, most=150, cache=cache)
    assert text is not None
    assert "No model features of this run are on disk" in text.of


def test_without_the_cache_the_page_says_so(daar: Path, tmp_path: Path) -> None:
    done = report.write(daar, tmp_path / "out.html", map_rows=0, cache=tmp_path / "empty")
    text = done.read_text(encoding="utf-8")
    assert "The probe" in sections(done)
    assert "no longer in the cache" in text
    assert "calibration" not in data_of(done)
    whole = report.write(daar, tmp_path / "out.html", map_rows=0, cache=daar.parent / "cache")
    assert "calibration" in data_of(whole)
    assert "Predictions of the probe for the rows it was not trained on" in whole.read_text(encoding="utf-8")


# --- training -------------------------------------------------------------------------------------------------------


def test_a_training_run_counts_as_its_ledger_does(tmp_path: Path) -> None:
    out = trained_run(tmp_path / "out")
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_of(60))
    done = report.write(out, rows=str(rows), cache=tmp_path / "cache")
    lines = pq.read_table(out / "siftune" / "selection.parquet").to_pylist()
    kept: dict[int, int] = {}
    for line in lines:
        kept[line["row"]] = kept.get(line["row"], 0) + line["kept"]
    data = data_of(done)
    views = {view["key"]: view["rows"] for view in data["rows-to-read"]["views"]}
    assert {row["name"] for row in views["never"]} == {f"row {row}" for row, times in kept.items() if not times}
    assert data["times"]["series"][0]["y"] == np.bincount(list(kept.values())).tolist()
    originals = rows_of(60)
    for row in views["draw"]:
        number = int(row["name"].removeprefix("row "))
        assert row["question"] == originals[number]["instruction"]
        assert row["domain"] == originals[number]["topic"]
    means = dict(zip(data["total"]["series"][2]["x"], data["total"]["series"][2]["y"], strict=True))
    totals = [line["total"] for line in lines if line["step"] == 7 and line["kept"]]
    assert means[7] == pytest.approx(np.mean(totals), rel=1e-5)
    assert [one["name"] for one in data["part-0"]["series"]] == ["alpha"]
    assert data["loss"]["series"][0]["y"][0] == 1.0
    text = done.read_text(encoding="utf-8")
    assert "60 of 240 candidates were trained on." in text
    assert "20.0 %" in text, "the share of time spent scoring"


def test_a_ledger_in_parts_and_unnamed_rows(tmp_path: Path) -> None:
    out = trained_run(tmp_path / "out")
    (out / "siftune" / "selection.parquet").unlink()
    done = report.write(out, cache=tmp_path / "cache")
    text = done.read_text(encoding="utf-8")
    assert "Training is not finished." in text
    assert "pass the file of the training rows with --rows" in text
    assert read_training(out).training_rows is None


def test_kept_rows_by_topic_over_time_sum_to_one(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_of(60))
    done = report.write(trained_run(tmp_path / "out", steps=90), rows=str(rows), cache=tmp_path / "cache")
    series = data_of(done)["kept-0"]["series"]
    assert {one["name"] for one in series} == set(DOMAINS)
    assert len(series[0]["x"]) > 1
    np.testing.assert_allclose(np.sum([one["y"] for one in series], axis=0), 1, atol=1e-3)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ({"run_folder": tmp_path / "absent"}, "is not a folder"),
        ({"run_folder": tmp_path / "empty"}, "holds no manifest.json of a selection"),
        ({"run_folder": tmp_path / "runs"}, "it holds runs: one; pass one of them"),
        ({"run_folder": run, "map_rows": 30_000}, "map_rows=30000 is not between 0 and 20,000"),
        ({"run_folder": run, "rows": "x.jsonl"}, "--rows x.jsonl is for a trainer's OUTPUT_DIR"),
        ({"run_folder": run, "out": tmp_path}, "is a folder; pass the path of a file"),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            report.write(**arguments)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_an_unfinished_selection_is_refused(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    with pytest.raises(UserError, match="not finished; run the same siftune select command again"):
        report.write(run)
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "rows.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"rows.parquet cannot be read"):
        report.write(run)


def test_rows_that_cannot_be_the_trained_ones_are_refused(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_of(20))
    with pytest.raises(UserError, match="has 20 usable rows, and the ledger names row"):
        report.write(trained_run(tmp_path / "out"), rows=str(rows), cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"absent.jsonl"):
        report.write(tmp_path / "out", rows=str(tmp_path / "absent.jsonl"), cache=tmp_path / "cache")


def test_a_missing_library_is_named_with_its_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "openTSNE" else object())
    with pytest.raises(MissingExtra, match=r"openTSNE.*pip install 'siftune\[report\]'"):
        report.write(run)


def test_the_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["report", str(run), "--map-rows", "0", "--cache", str(tmp_path / "cache")]
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    assert main(words) == 0
    assert "report.html   one page," in capsys.readouterr().out
    assert main([*words, "--quiet", "--out", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'p.html'}\n"
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == (run / "report.html").stat().st_size
    assert main(["report"]) == 2
    assert capsys.readouterr().err == "siftune: siftune report needs a run folder: siftune report RUN\n"
