"""`siftune compare`: what it draws, refuses, prints and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from siftune.cli.main import main
from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.study.compare import compare
from siftune.study.data import prepare
from siftune.study.spec import read_study
from tests.studies import WORDS, Fakes, write_study
from tests.tiny import tiny_tokenizer


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes(tmp_path / "log")
    made.install(monkeypatch.setattr)
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


USES_ALL: dict[str, Any] = {
    "offline": ["full", "random"],
    "online": [
        "regular",
        {"name": "greats", "method": "greats", "keep": 2, "validation": "{validation}"},
        {"name": "rho", "method": "rho-loss", "keep": 2, "reference": "{reference}"},
        {"name": "seeded", "method": "rho-loss", "keep": 2, "reference": "{seeds}"},
    ],
    "cells": [["full", "regular"], ["full", "greats"], ["full", "rho"]],
    "baseline": "full + greats",
}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_drawn_equally_once_and_never_twice(tmp_path: Path) -> None:
    study = read_study(str(write_study(tmp_path, **USES_ALL)))
    data = prepare(study, tmp_path / "data")
    drawn = lines(data.pool)
    assert len(drawn) == data.rows == 60
    assert {name: sum(row["domain"] == name for row in drawn) for name in WORDS} == {"sums": 30, "words": 30}
    assert [row["domain"] for row in drawn[:30]] != ["sums"] * 30  # shuffled
    places = data.places(study, 0)
    rest, validation = lines(Path(places["rest"])), lines(Path(places["validation"]))
    assert (len(rest), len(validation)) == (10, 4)
    measured = [row for path in data.held_out.values() for row in lines(path)]
    assert len(measured) == 12
    said = [row["instruction"] for row in [*drawn, *rest, *validation, *measured]]
    seeds = [row["instruction"] for seed in study.seeds for row in lines(Path(data.places(study, seed)["seeds"]))]
    assert len(set(said)) == len(said)
    assert not set(seeds) & set(said)
    assert len(lines(Path(data.places(study, 1)["seeds"]))) == 2 * 3
    tokens = sum(
        min(64, len(tiny_tokenizer()(f"{row['instruction']}\n{row['output']}")["input_ids"]) + 1) for row in drawn
    )
    assert data.facts["tokens"] == tokens


def test_the_draw_is_the_same_again_and_another_with_another_seed(tmp_path: Path) -> None:
    study = read_study(str(write_study(tmp_path)))
    first = prepare(study, tmp_path / "a").pool.read_bytes()
    stamp = (tmp_path / "a" / "pool.jsonl").stat().st_mtime_ns
    assert prepare(study, tmp_path / "a").pool.stat().st_mtime_ns == stamp
    assert prepare(study, tmp_path / "b").pool.read_bytes() == first
    other = read_study(str(write_study(tmp_path, draw_seed=1)))
    assert prepare(other, tmp_path / "c").pool.read_bytes() != first


def test_rows_that_cannot_be_trained_on_are_not_drawn_but_counted(tmp_path: Path) -> None:
    path = write_study(tmp_path, rows=None)
    long = {"instruction": "x" * 100, "input": "", "output": "never read"}
    with (tmp_path / "pool-sums.jsonl").open("a") as handle:
        handle.write(json.dumps(long) + "\n")
    data = prepare(read_study(str(path)), tmp_path / "data")
    assert data.rows == 100
    assert data.facts["unusable"] == {"no answer tokens after truncation": 1}


def test_held_out_rows_that_the_pool_has_are_left_out(tmp_path: Path) -> None:
    path = write_study(tmp_path, rows=None)
    shared = (tmp_path / "pool-sums.jsonl").read_text().splitlines()[:5]
    held = tmp_path / "held-sums.jsonl"
    held.write_text("".join(line + "\n" for line in shared) + held.read_text())
    data = prepare(read_study(str(path)), tmp_path / "data")
    assert data.facts["held_out_in_pool"] == 5
    pool = {row["instruction"] for row in lines(data.pool)}
    assert not pool & {row["instruction"] for row in lines(data.held_out["sums"])}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 1000}, "needs 500 rows of sums, which holds 50"),
        ({"held_out_rows": 29, **USES_ALL}, "needs seed_rows=3 rows of sums beyond those measured"),
        ({"label": "output"}, "already has a column 'output'"),
        ({"rows": 100, **USES_ALL}, "not drawn; lower rows"),
        ({"budgets": [61]}, "budget 61 of random exceeds the 60 rows"),
        ({"online": [{"method": "random", "keep": 9}], "offline": ["full"]}, "keep=9 exceeds the 4 candidates"),
        ({"model": "gone/model/"}, "is not a folder here"),
        ({"recipe": {"text": "talk", "sft": {}}}, "text='talk' is not known"),
    ],
)  # fmt: skip
def test_what_the_rows_cannot_give_is_one_sentence(
    tmp_path: Path, fakes: Fakes, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")) as caught:
        compare(read_study(str(write_study(tmp_path, **changes))), run=str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not fakes.calls


def test_real_recipes_and_methods_are_checked_before_anything_runs(tmp_path: Path) -> None:
    sft = {"max_length": 64, "learning_rat": 1}
    with pytest.raises(UserError, match=r"sft.learning_rat is no key of trl.SFTConfig; did you mean learning_rate"):
        compare(read_study(str(write_study(tmp_path, recipe={"sft": sft}))), run=str(tmp_path / "a"), dry_run=True)
    online = [{"method": "uds", "keep": 2, "norm": "spectral"}]
    study = read_study(str(write_study(tmp_path, online=online, offline=["full"], baseline="uds")))
    with pytest.raises(UserError, match="online uds: norm='spectral'"):
        compare(study, run=str(tmp_path / "b"), dry_run=True)


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_cell_that_trained_less_fails_with_both_numbers_and_the_others_stay(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from siftune.study import cell as cells

    def short(work: Any, recipe: Any, run: Path) -> Any:
        model, manifest = fakes.train(work, recipe, run)
        return model, {**manifest, "tokens": {**manifest["tokens"], "trained_rows": 3}} if "long" in str(
            run
        ) else manifest

    monkeypatch.setattr(cells, "train", short)
    with pytest.raises(UserError, match="trained 3 rows and the baseline 12, more than one step") as caught:
        compare(read_study(str(write_study(tmp_path))), run=str(tmp_path / "run"))
    assert "2 more in" in str(caught.value)
    assert len(list((tmp_path / "run").glob("cells/*/cell.json"))) == 9
    assert "Note: long-regular-20pct-seed0 trained 3 rows" in (tmp_path / "run" / "study.md").read_text()


def test_equal_tokens_end_every_cell_at_the_same_total(tmp_path: Path, fakes: Fakes) -> None:
    recipe = {
        "text": "prompt",
        "sft": {"max_length": 64, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"},
    }
    study = read_study(str(write_study(tmp_path, equal="tokens", tokens=200, recipe=recipe)))
    done = compare(study, run=str(tmp_path / "run"))
    assert done.frame is not None
    table = pq.read_table(tmp_path / "run" / "cells.parquet").to_pylist()
    assert {row["trained_tokens"] for row in table if row["label"] != "full"} == {210}
    changed = read_study(str(write_study(tmp_path, equal="tokens", tokens=300, recipe=recipe)))
    with pytest.raises(UserError, match="holds cells of 200 trained tokens"):
        compare(changed, run=str(tmp_path / "run"))


def test_a_failed_cell_is_named_and_the_rest_is_done(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from siftune.study import cell as cells

    def fails(work: Any, recipe: Any, run: Path) -> Any:
        if run.parent.name == "long-regular-20pct-seed1":
            raise UserError("no room\nleft")
        return fakes.train(work, recipe, run)

    monkeypatch.setattr(cells, "train", fails)
    path, run = write_study(tmp_path), tmp_path / "run"
    assert main(["compare", str(path), "--run", str(run), "--quiet"]) == 2
    assert "long-regular-20pct-seed1: no room left" in capsys.readouterr().err
    assert "cell long-regular-20pct-seed1 failed" in (run / "study.md").read_text()
    monkeypatch.setattr(cells, "train", fakes.train)
    calls = len(fakes.calls)
    assert main(["compare", str(path), "--run", str(run), "--quiet"]) == 0
    assert [call.split()[0] for call in fakes.calls[calls:]] == ["train", "measure"]


# --- what it leaves ---------------------------------------------------------------------------------------------------


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path, fakes: Fakes) -> None:
    compare(read_study(str(write_study(tmp_path))), run=str(tmp_path / "run"))
    for changes, said in (({"rows": 50}, "its rows was 60 and is now 50"), ({"offline": ["full", "random", {"name": "long", "method": "length"}]}, "offline long was")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            compare(read_study(str(write_study(tmp_path, **changes))), run=str(tmp_path / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis.txt and no study.json"):
        compare(read_study(str(write_study(tmp_path))), run=str(tmp_path / "other"))


def test_the_tables_hold_what_the_cells_hold(tmp_path: Path, fakes: Fakes) -> None:
    compare(read_study(str(write_study(tmp_path))), run=str(tmp_path / "run"))
    table = pq.read_table(tmp_path / "run" / "cells.parquet").to_pylist()
    assert len(table) == 9
    for row in table:
        assert row["loss/mean"] == pytest.approx((row["loss/sums"] + row["loss/words"]) / 2)
    long = {row["seed"]: row["loss/mean"] for row in table if row["label"] == "long"}
    random = {row["seed"]: row["loss/mean"] for row in table if row["label"] == "random"}
    differences = pq.read_table(tmp_path / "run" / "differences.parquet").to_pylist()
    found = next(row for row in differences if row["label"] == "long" and row["value"] == "loss/mean")
    assert found["mean"] == pytest.approx(sum(long[seed] - random[seed] for seed in long) / 3)
    assert found["n"] == 3
    page = (tmp_path / "run" / "table.md").read_text()
    mean = sum(long.values()) / 3
    line = next(line for line in page.splitlines() if line.startswith("| long | 3 |"))
    assert line.split("|")[-2].strip().startswith(f"{mean:.3f} ± ")


def test_a_page_can_be_published_with_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(tmp_path / "log").install(monkeypatch.setattr, figures=True)
    out = tmp_path / "docs" / "page.md"
    compare(
        read_study(str(write_study(tmp_path))),
        run=str(tmp_path / "run"),
        out=str(out),
        command="siftune compare x.yaml",
    )
    text = out.read_text()
    assert "siftune compare x.yaml" in text
    assert str(tmp_path) not in text
    for name in ("differences", "domains", "tokens"):
        assert f"figures/page-{name}.svg" in text
        assert (tmp_path / "docs" / "figures" / f"page-{name}.svg").is_file()


def test_the_pages_command_names_files_and_not_a_machines_folders(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path / "rows", seeds=[0])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sets = ["model=../rows/model", "rows=48", f"offline=[random, {' ' * 300}length]"]
    assert main(["compare", str(path), "--run", "run", *(word for one in sets for word in ("--set", one))]) == 0
    said = (tmp_path / "here" / "run" / "study.md").read_text()
    assert "siftune compare study.yaml --set model=model --set rows=48 --set 'offline=[random,  " in said


def test_the_reference_is_made_once_for_every_cell_that_asks(tmp_path: Path, fakes: Fakes) -> None:
    compare(read_study(str(write_study(tmp_path, **USES_ALL))), run=str(tmp_path / "run"))
    assert fakes.calls.count("tabulate") == 1
    assert fakes.calls.index("tabulate") < fakes.calls.index("train full-rho-seed0")
    assert not (tmp_path / "run" / "reference" / "train" / "model").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_lists_the_cells_and_trains_nothing(
    tmp_path: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    assert main(["compare", str(path), "--run", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "9 cells" in said
    assert "nothing was trained" in said
    assert not fakes.calls
    assert (
        main(["compare", str(path), "--run", str(tmp_path / "run"), "--dry-run", "--json", "--set", "seeds=[4]"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["cells"] == ["full-regular-seed4", "random-regular-20pct-seed4", "long-regular-20pct-seed4"]
    assert facts["plans"]["long"]["trained_rows"] == 12


def test_it_ends_with_what_was_made_where_and_what_next(
    tmp_path: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = write_study(tmp_path), tmp_path / "run"
    assert main(["compare", str(path), "--run", str(run)]) == 0
    said = capsys.readouterr()
    assert f"9 cells trained now, 9 finished in total -> {run}/study.md" in said.out
    assert "next: " in said.out
    assert "100% " in said.err
    assert main(["compare", str(path), "--run", str(run), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{run}/study.md\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a study"),
        (["gone.yaml"], "cannot be read"),
        (["STUDY", "--part", "4/3"], "is not a part"),
        (["STUDY", "--out", "x.html"], "ends in .md"),
        (["STUDY", "--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["STUDY", "--set", "rows"], "is not KEY=VALUE"),
        (["STUDY", "--set", "row=3"], "no variable or key row; did you mean rows?"),
    ],
)
def test_the_commands_own_mistakes(
    tmp_path: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    path = write_study(tmp_path)
    assert main(["compare", *(str(path) if word == "STUDY" else word for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_rows_of_a_study_load_as_any_pool(tmp_path: Path) -> None:
    study = read_study(str(write_study(tmp_path)))
    data = prepare(study, tmp_path / "data")
    assert len(load_pool(str(data.pool)).eligible) == 60
