"""The run folder: what is in it, what it refuses, what it repeats; and a whole small DaaR run through the pipeline."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.files import FolderLock, temporary_beside
from siftune.models.backbone import Backbone
from siftune.runs.folder import RunFolder, read_manifest
from siftune.runs.options import KeepOptions, SelectOptions
from siftune.runs.select import Selection, recut, select
from siftune.runs.stored import read_scores, write_rows, write_scores
from tests.tiny import save_tiny

ROWS = 4200  # two shards
CONTRACT = ["row", "id", "file", "line", "tokens", "score", "kept", "reason", "pseudo_label"]


def write_pool(path: Path, rows: int, *, bad: bool = False) -> Path:
    draw = random.Random(3)
    words = {"sums": ["add", "seven", "twelve"], "birds": ["wren", "nest", "egg"]}
    lines = []
    for index in range(rows):
        kind = draw.choice(list(words))
        row = {"instruction": f"{index} {draw.choice(words[kind])}", "output": draw.choice(words[kind]), "kind": kind}
        lines.append(json.dumps(row))
    if bad:
        lines[7] = "{oops"
        lines[9] = json.dumps({"instruction": "x", "output": ""})
        lines[11] = lines[10]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool with bad rows, seeds, a tiny model, and one finished DaaR run with its cache."""
    folder = tmp_path_factory.mktemp("run")
    write_pool(folder / "pool.jsonl", ROWS, bad=True)
    seeds = [("sums", "9001 add", "seven"), ("sums", "9002 twelve", "add"), ("birds", "9003 wren", "egg")]
    with open(folder / "seeds.jsonl", "w") as handle:
        for domain, instruction, output in seeds:
            handle.write(json.dumps({"domain": domain, "instruction": instruction, "output": output}) + "\n")
    save_tiny(folder / "model")
    daar(folder, "first")
    return folder


def daar(folder: Path, run: str, **more: Any) -> Selection:
    options: dict[str, Any] = {"keep": "10%", "cache": str(folder / "cache"), "on_bad_row": "skip", **more}
    settings = {"model": str(folder / "model"), "seeds": str(folder / "seeds.jsonl")}
    settings |= {"probe_rows": 300, "max_length": 16}
    return select("daar", SelectOptions(pool=[str(folder / "pool.jsonl")], run=str(folder / run), **options), settings)


def status(selection: Selection) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in selection.manifest["stages"]}


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_rows_parquet_is_the_contract(inputs: Path) -> None:
    table = pq.read_table(inputs / "first" / "rows.parquet")
    assert table.column_names == [*CONTRACT, "p_sums", "p_birds"]
    types = [str(field.type) for field in table.schema]
    assert types == ["int64", "string", "string", "int64", "int32", "float", "bool", *["string"] * 2, *["float"] * 2]
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == list(range(ROWS))
    kept = [row["row"] for row in rows if row["kept"]]
    assert len(kept) == round(0.1 * (ROWS - 2))
    for row in rows:
        assert (row["score"] is None) == (row["reason"] is not None)
        assert (row["score"] is None) == (row["pseudo_label"] is None) == (row["p_sums"] is None)
    assert rows[7]["reason"].startswith("unparsable line")
    assert rows[9]["reason"].startswith("empty answer")
    assert rows[8]["line"] == 9
    lines = (inputs / "pool.jsonl").read_text().splitlines()
    assert (inputs / "first" / "selected.jsonl").read_text().splitlines() == [lines[row] for row in kept]
    best = sorted((row for row in rows if row["score"] is not None), key=lambda row: (-row["score"], row["row"]))
    assert sorted(row["row"] for row in best[: len(kept)]) == kept


def test_the_manifest_tells_the_run(inputs: Path) -> None:
    manifest = read_manifest(inputs / "first")
    assert manifest["status"] == "finished"
    assert [stage["name"] for stage in manifest["stages"]] == ["load", "fit", "score", "write"]
    assert manifest["rows"]["reasons"] == {"empty answer": 1, "unparsable line": 1}
    assert manifest["rows"]["duplicates"] == 1
    assert manifest["versions"]["torch"]
    assert set(manifest["inputs"]) == {"siftune", "pool", "seeds", "model"}
    assert 0 <= manifest["info"]["validation_accuracy"] <= 1
    text = (inputs / "first" / "manifest.json").read_text()
    import socket

    assert socket.gethostname() not in text


def test_running_again_repeats_nothing_and_changes_no_byte(inputs: Path) -> None:
    names = ["selected.jsonl", "rows.parquet", "scores.safetensors", "domain_probe.safetensors"]
    before = {name: (inputs / "first" / name).read_bytes() for name in names}
    again = daar(inputs, "first")
    assert set(status(again).values()) == {"reused"}
    assert {name: (inputs / "first" / name).read_bytes() for name in names} == before
    other = daar(inputs, "second")
    assert other.manifest["stages"][2]["counts"]["shards_reused"] == 2, "another folder finds the cache's shards"
    cold = daar(inputs, "third", cache=str(inputs / "cold"))
    assert cold.manifest["stages"][2]["counts"]["shards_computed"] == 2
    for folder in ("second", "third"):
        assert {name: (inputs / folder / name).read_bytes() for name in names} == before


def test_a_damaged_or_missing_file_is_made_again(inputs: Path) -> None:
    first = daar(inputs, "mended")
    files = {name: (inputs / "mended" / name).read_bytes() for name in ("selected.jsonl", "scores.safetensors")}
    (inputs / "mended" / "selected.jsonl").write_text("edited\n")
    assert status(daar(inputs, "mended")) == {"load": "reused", "fit": "reused", "score": "reused", "write": "computed"}
    (inputs / "mended" / "scores.safetensors").unlink()
    assert status(daar(inputs, "mended"))["score"] == "computed"
    (inputs / "mended" / "domain_probe.safetensors").unlink()
    assert status(daar(inputs, "mended"))["fit"] == "computed"
    assert {name: (inputs / "mended" / name).read_bytes() for name in files} == files
    assert first.subset is not None


def test_parts_merge_into_the_same_run(inputs: Path) -> None:
    cache = str(inputs / "parts-cache")
    for part in ("1/2", "2/2"):
        done = daar(inputs, "parts", cache=cache, shards=part)
        assert done.out is None
        assert done.manifest["stages"][-1]["counts"]["shards_computed"] == 1
    merged = daar(inputs, "parts", cache=cache)
    assert merged.manifest["stages"][2]["counts"]["shards_computed"] == 0
    for name in ("selected.jsonl", "rows.parquet"):
        assert (inputs / "parts" / name).read_bytes() == (inputs / "first" / name).read_bytes()


def test_keep_cuts_as_a_new_run_would(inputs: Path) -> None:
    said: list[dict[str, Any]] = [{"keep": 30}, {"quota": {"sums": "30%", "*": 5}}, {"target_mix": {"birds": 1.0}}]
    for index, budget in enumerate(said):
        cut = recut(
            str(inputs / "first"),
            KeepOptions(out=str(inputs / f"cut-{index}.jsonl"), cache=str(inputs / "cache"), **budget),
        )
        run = daar(inputs, f"budget-{index}", **{"keep": None, **budget})
        assert cut.out is not None
        assert run.out is not None
        assert cut.out.read_bytes() == run.out.read_bytes()
    with pytest.raises(UserError, match="physics"):
        recut(str(inputs / "first"), KeepOptions(out="x.jsonl", quota={"physics": 1}))


def test_budgets_are_checked_before_the_model(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "network", property(lambda backbone: pytest.fail("weights were loaded")))
    for budget in ({"keep": 5000}, {"keep": None, "quota": {"physics": "5%"}}, {"target_mix": {"physics": 1.0}}):
        with pytest.raises(UserError):
            daar(inputs, "never", **budget)
    daar(inputs, "never", dry_run=True)
    assert not (inputs / "never").exists()


def test_a_changed_input_is_refused_and_another_model_is_another_run(inputs: Path, tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool.jsonl", 60)
    options = SelectOptions(pool=[str(pool)], run=str(tmp_path / "run"))
    select("random", options)
    with pool.open("a") as handle:
        handle.write('{"instruction": "new", "output": "row"}\n')
    with pytest.raises(UserError, match=r"input pool .* pass another --run"):
        select("random", options)
    with pytest.raises(UserError, match="has changed"):
        recut(str(tmp_path / "run"), KeepOptions(keep=3, out=str(tmp_path / "x.jsonl")))
    with pytest.raises(UserError, match="option seed was 0 and is now 1"):
        select("random", SelectOptions(pool=[str(pool)], run=str(tmp_path / "run"), seed=1))


# --- the folder ---------------------------------------------------------------------------------------------------------


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"), pytest.raises(UserError, match="in use"):
        RunFolder(tmp_path / "run", config={}, inputs={}).__enter__()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        RunFolder(tmp_path, config={}, inputs={}).__enter__()


def test_stale_temporaries_go(tmp_path: Path) -> None:
    stale = temporary_beside(tmp_path / "x")
    stale = stale.with_name(stale.name.replace("~", "~9", 1).replace("~9", "~99999", 1))
    stale.write_text("half")
    with RunFolder(tmp_path, config={}, inputs={}):
        assert not stale.exists()


def test_a_stage_that_fails_is_not_finished(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, config={"a": 1}, inputs={})
    with pytest.raises(RuntimeError), run, run.stage("score", "k"):
        raise RuntimeError
    with RunFolder(tmp_path, config={"a": 1}, inputs={}) as again:
        assert not again.finished("score", "k")
        with again.stage("score", "k") as stage:
            assert not stage.reused
        assert again.finished("score", "k")
        assert not again.finished("score", "another key")


def test_scores_survive_the_disk_exactly(tmp_path: Path) -> None:
    pool = load_pool(write_pool(tmp_path / "pool.jsonl", 40, bad=True), on_bad_row="skip")
    scores = select("random", SelectOptions(pool=[str(tmp_path / "pool.jsonl")], on_bad_row="skip",
                                            run=str(tmp_path / "run"))).subset  # fmt: skip
    assert scores is not None
    write_scores(tmp_path / "a.safetensors", scores.scores)
    write_scores(tmp_path / "b.safetensors", read_scores(tmp_path / "a.safetensors", pool, {}))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    write_rows(tmp_path / "rows.parquet", scores.scores, np.array([3, 5]))
    assert pq.read_table(tmp_path / "rows.parquet")["kept"].to_pylist().count(True) == 2
