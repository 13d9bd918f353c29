"""Nothing of the user's is deleted or overwritten: commands pointed at projects, models, pools and other inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from siftune.data.exports import MARK
from tests.faults.inputs import write_inputs
from tests.faults.said import count, refused, siftune
from tests.studies import write_study

Words = list[str]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder but the cache's and locks, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "siftune-cache" not in path.parts and path.name != ".lock"
    }


def untouched(folder: Path, words: Words) -> str:
    """Run a command that must be refused, and see that the folder is as it was; the sentence."""
    before = contents(folder)
    sentence = refused(siftune(words))
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before, sentence
    count("commands pointed at files of the user's")
    return sentence


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder: pool, seeds, model, an adapter beside its base, recipe, study and a project under git."""
    folder = tmp_path / "work"
    folder.mkdir()
    write_inputs(folder, 60)
    (folder / "model" / "README.md").write_text("# as every model of the hub has one")
    (folder / "pool.csv").write_text("instruction,output\na,b\n")
    project = folder / "project"
    (project / ".git").mkdir(parents=True)
    (project / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (project / "README.md").write_text("# A project\n")
    (project / "main.py").write_text("print()\n")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "model"}))
    (folder / "held.jsonl").write_bytes((folder / "pool.jsonl").read_bytes())
    sft = {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 32, "save_strategy": "no"}
    recipe = {"model": "./model", "train": "pool.jsonl", "eval": {"held": "held.jsonl"}, "sft": sft}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.chdir(folder)
    return folder


# --- siftune train --out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("project", "--out project holds .git, which siftune did not write"),
        ("model", "--out model is the same as"),
        ("./", "--out ./ is the working folder or contains it"),
        ("..", "--out .. is the working folder or contains it"),
        ("model/export", "--out model/export is inside"),
        ("run", "--out run is the same as the run folder"),
        ("run/model", "--out run/model is inside the run folder"),
        ("pool.jsonl", "--out pool.jsonl is the same as train"),
        ("recipe.yaml", "--out recipe.yaml is the same as the recipe"),
        ("to-model", "--out to-model is the same as"),
    ],
)
def test_train_replaces_no_folder_but_its_own(work: Path, out: str, why: str) -> None:
    pytest.importorskip("trl")
    Path("to-model").symlink_to("model")
    if out.startswith("run"):
        Path("run").mkdir()
    out = out if out != "./" else "."
    why = why.replace("./", ".")
    sentence = untouched(work, ["train", "recipe.yaml", "--run", "run", "--out", out])
    assert why in sentence or ("contains" in sentence and out in (".", "..")), sentence


def test_train_replaces_its_own_export_until_the_user_changes_it(work: Path) -> None:
    pytest.importorskip("trl")
    words = ["train", "recipe.yaml", "--run", "run", "--out", "out", "--quiet"]
    for _ in range(2):
        done = siftune(words)
        assert done.code == 0, done
    assert Path("out", MARK).is_file()
    assert Path("out/model.safetensors").read_bytes() == Path("run/model/model.safetensors").read_bytes()
    Path("out/notes.txt").write_text("mine")
    assert "holds notes.txt, which siftune did not write" in untouched(work, words)
    Path("out/notes.txt").unlink()
    Path("out/README.md").write_text("# my own words on this model")
    assert "holds README.md, which was changed after siftune wrote it" in untouched(work, words)
    again = siftune([*words[:4], "--quiet"])
    assert again.code == 0, again
    Path("run/model/notes.txt").write_text("mine")
    Path("run/model/model.safetensors").write_bytes(b"cut")  # so that the training is to be done again
    before = contents(Path("run/model"))
    assert "run/model holds" in refused(siftune([*words[:4], "--quiet"]))
    assert contents(Path("run/model")) == before


@pytest.mark.parametrize("run", ["project", "."])
@pytest.mark.parametrize(
    "words",
    [
        ["select", "random", "pool.jsonl"],
        ["train", "recipe.yaml"],
        ["evaluate", "model", "--held-out", "held=held.jsonl"],
        ["compare", "study/study.yaml"],
        ["loop", "random", "pool.jsonl", "--model", "model", "--tune", "true {train_file} {out_model}"],
        ["demo", "--rows", "100", "--steps", "0"],
    ],
    ids=lambda words: words[0],
)
def test_no_command_takes_a_folder_of_the_users_as_its_run(work: Path, words: Words, run: str) -> None:
    if words[0] == "train":
        pytest.importorskip("trl")
    if words[0] == "compare":
        write_study(Path("study"))
    if words[0] == "loop":
        words = ["loop", "inter-diversity", "pool.jsonl", "--label-column", "kind", *words[3:]]
    sentence = untouched(work, [*words, "--run", run])
    assert f" {run} " in sentence or run == ".", sentence


# --- an input is never the output -----------------------------------------------------------------------------------


def test_select_never_replaces_what_it_reads(work: Path) -> None:
    Path("link.jsonl").symlink_to("pool.jsonl")
    os.link("pool.jsonl", "hard.jsonl")
    Path("rows").mkdir()
    Path("rows/one.jsonl").write_bytes(Path("pool.jsonl").read_bytes())
    random = ["select", "random", "--keep", "10%", "--run", "run"]
    for pool, out in (
        ("pool.jsonl", "pool.jsonl"),
        ("pool.jsonl", "./project/../pool.jsonl"),
        ("pool.jsonl", str(work / "pool.jsonl")),
        ("pool.jsonl", "link.jsonl"),
        ("link.jsonl", "pool.jsonl"),
        ("pool.jsonl", "hard.jsonl"),
        ("*l.jsonl", "pool.jsonl"),
        ("rows", "rows/chosen.jsonl"),
        ("rows/one.jsonl", "rows"),
    ):
        untouched(work, [*random, pool, "--out", out])
        assert not Path("run").exists() or not list(Path("run").glob("*.parquet"))
    daar = ["select", "daar", "pool.jsonl", "--model", "model", "--seeds", "seeds.jsonl", "--run", "run"]
    assert "--seeds (seeds.jsonl)" in untouched(work, [*daar, "--out", "seeds.jsonl"])
    assert "--model (model)" in untouched(work, [*daar, "--out", "model/chosen.jsonl"])
    assert "contains" in untouched(work, [*random, "rows/one.jsonl", "--run", "rows"])
    assert "is inside the run folder" in untouched(work, [*random, "pool.jsonl", "--out", "run/rows.parquet"])


def test_select_may_replace_an_ordinary_file(work: Path) -> None:
    Path("chosen.jsonl").write_text("an earlier selection")
    words = ["select", "random", "pool.jsonl", "--keep", "10%", "--run", "run", "--out", "chosen.jsonl", "--quiet"]
    assert siftune(words).code == 0
    assert len(Path("chosen.jsonl").read_text().splitlines()) == 6


def test_keep_replaces_neither_the_pool_nor_the_run(work: Path) -> None:
    assert siftune(["select", "random", "pool.jsonl", "--keep", "10%", "--run", "run", "--quiet"]).code == 0
    os.link("pool.jsonl", "hard.jsonl")
    keep = ["keep", "run", "--keep", "5"]
    assert "the run's pool (pool.jsonl)" in untouched(work, [*keep, "--out", "pool.jsonl"])
    untouched(work, [*keep, "--out", "hard.jsonl"])
    assert "is inside the run folder run" in untouched(work, [*keep, "--out", "run/selected.jsonl"])
    assert siftune([*keep, "--out", "five.jsonl", "--quiet"]).code == 0


def test_plan_replaces_no_pool(work: Path) -> None:
    words = ["plan", "pool.jsonl", "--model", "model", "--seeds", "seeds.jsonl", "--out"]
    for out in ("pool.jsonl", "seeds.jsonl", "model/config.json"):
        untouched(work, [*words, out])


def test_score_reference_replaces_only_its_own_table(work: Path) -> None:
    pytest.importorskip("trl")
    import pyarrow.parquet as pq

    from siftune.data.load import load_pool

    pool = load_pool("pool.jsonl")
    pool.source.write(range(20), Path("rows.parquet"))
    pool.source.write(range(20), Path("reference.parquet"))  # the default name
    words = ["score-reference", "recipe.yaml", "--reference", "model", "--set", "train=rows.parquet"]
    assert "is the same as train (rows.parquet)" in untouched(work, [*words, "--out", "rows.parquet"])
    assert "exists and has no reference.parquet.made-by.json beside it" in untouched(work, words)
    assert "is inside" in untouched(work, [*words, "--out", "model/table.parquet"])
    Path("table.parquet.parts").mkdir()
    Path("table.parquet.parts/notes.txt").write_text("mine")
    words += ["--out", "table.parquet"]
    assert "table.parquet.parts holds notes.txt" in untouched(work, words)
    Path("table.parquet.parts/notes.txt").rename("notes.txt")
    Path("table.parquet.made-by.json").write_text('{"who": "me"}')
    assert "table.parquet.made-by.json was not written by siftune" in untouched(work, words)
    Path("table.parquet.made-by.json").unlink()
    for more in ([], ["--score-tokens", "64"]):  # another one of ours is replaced
        done = siftune([*words, *more, "--quiet"])
        assert done.code == 0, done
    assert pq.read_table("table.parquet").num_rows > 0


def test_evaluate_replaces_nothing_that_it_reads(work: Path) -> None:
    Path("suite.yaml").write_text("held_out: {held: held.jsonl}\n")
    Path("data").mkdir()
    Path("data/a.json").write_text("{}")
    words = ["evaluate", "model", "--suite", "suite.yaml", "--run", "run", "--out"]
    for out in ("model/config.json", "held.jsonl"):
        refusal = untouched(work, [*words, out])
    assert "not a .json file" in refusal
    Path("held.json").write_bytes(Path("pool.jsonl").read_bytes())
    assert "the held-out rows held (held.json)" in untouched(
        work, ["evaluate", "model", "--held-out", "held=held.json", "--out", "held.json"]
    )
    words[1] = "adapter"
    assert "(model)" in untouched(work, [*words, "model/results.json"])


def test_compare_replaces_nothing_that_it_reads(work: Path) -> None:
    write_study(Path("study"))
    Path("study/page.md").write_text("mine")
    Path("figures").mkdir()
    Path("figures/pool.jsonl").write_bytes(Path("study/pool-sums.jsonl").read_bytes())
    assert "is inside" in untouched(work, ["compare", "study/study.yaml", "--run", "run", "--out", "study/model/a.md"])
    words = ["compare", "study/study.yaml", "--set", "pool.sums=figures/pool.jsonl", "--run", "run", "--out", "page.md"]
    assert "the figures beside --out figures contains" in untouched(work, words)
    Path("mine").mkdir()
    Path("mine/study.json").write_text('{"title": "my own study"}')
    sentence = untouched(work, ["compare", "study/study.yaml", "--run", "mine"])
    assert "mine/study.json was not written by siftune" in sentence


def test_loop_replaces_nothing_that_it_reads(work: Path) -> None:
    words = ["loop", "inter-diversity", "pool.jsonl", "--label-column", "kind", "--model", "model"]
    tune = ["--tune", "true {train_file} {out_model}", "--run", "run"]
    untouched(work, [*words, *tune, "--out", "pool.jsonl"])
    untouched(work, [*words, *tune, "--out", "model/all.jsonl"])
    recipe = ["--recipe", "recipe.yaml", "--run", "run"]
    untouched(work, [*words, *recipe, "--out", "held.jsonl"])
    for name in ("loop.json", "pool-2.jsonl", "tune-1"):  # what a loop writes
        Path("mine").mkdir(exist_ok=True)
        Path("mine", name).write_text("mine")
        assert f"holds {name}" in untouched(work, [*words, *tune[:2], "--run", "mine"])
        Path("mine", name).unlink()


def test_report_replaces_only_pages(work: Path) -> None:
    for name in ("jinja2", "plotly"):
        pytest.importorskip(name)
    assert siftune(["select", "random", "pool.jsonl", "--keep", "10%", "--run", "run", "--quiet"]).code == 0
    words = ["report", "run", "--map-rows", "0"]
    for out in ("pool.jsonl", "run/manifest.json", "project/main.py"):
        assert "is not an HTML file; pass a path that ends in .html" in untouched(work, [*words, "--out", out])
    Path("run/report.html").write_text("<html>my own page of this run</html>")
    assert "run/report.html was not written by siftune report" in untouched(work, words)
    Path("run/report.html").unlink()
    for _ in range(2):
        assert siftune([*words, "--quiet"]).code == 0
    Path("page-figures").mkdir()
    Path("page-figures/pool.jsonl").write_bytes(Path("pool.jsonl").read_bytes())
    assert siftune(["select", "random", "page-figures/pool.jsonl", "--run", "other", "--quiet"]).code == 0
    sentence = untouched(work, ["report", "other", "--map-rows", "0", "--figures", "--out", "page.html"])
    assert "contains the run's pool" in sentence


def test_demo_takes_no_folder_of_the_users(work: Path) -> None:
    Path("mine/data").mkdir(parents=True)
    Path("mine/data/pool.jsonl").write_text("mine")
    words = ["demo", "--rows", "100", "--steps", "0", "--run", "mine"]
    assert "--run mine holds data" in untouched(work, words)
    assert "is inside the run folder" in untouched(work, [*words, "--out", "mine/data/pool.jsonl"])


Save = Callable[[Path], object]


def test_a_fit_is_saved_over_no_file_of_the_users(work: Path) -> None:
    import numpy as np

    from siftune.errors import UserError
    from siftune.offline.centroids import FILE, LabelCentroids
    from siftune.offline.daar.written import copy_written

    centroids = LabelCentroids(("a", "b"), np.zeros((2, 3)), np.zeros(2), np.ones(2, np.int64))
    saves: list[tuple[str, Save]] = [
        (FILE, centroids.save),
        ("seeds.jsonl", lambda folder: copy_written(Path("nowhere"), folder)),
    ]
    for name, save in saves:
        Path("mine").mkdir(exist_ok=True)
        Path("mine", name).write_text("mine")
        with pytest.raises(UserError, match="was not written by siftune"):
            save(Path("mine"))
        assert Path("mine", name).read_text() == "mine"
    centroids.save("new")
    centroids.save("new")
