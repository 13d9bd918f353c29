"""No output is an input, and no folder is replaced that holds anything which siftune did not write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from siftune.data import exports
from siftune.data.exports import MARK, check_export, check_replaceable, clear, discard, place, seal, why_kept
from siftune.data.load import load_pool
from siftune.data.protect import (
    CLAIM,
    RUN,
    claim,
    foreign_name,
    refuse_foreign,
    refuse_nested,
    refuse_overlap,
    setting_inputs,
)
from siftune.errors import UserError
from siftune.files import atomic_path
from siftune.records import Scores
from siftune.runs.folder import RunFolder, check_run_folder
from tests.training_rows import write_alpaca


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/pool.jsonl").write_text("{}\n")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")


# --- outputs and inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "value", "why"),
    [
        ("data/pool.jsonl", "data/pool.jsonl", "is the same as the input (data/pool.jsonl)"),
        ("./data/../data/pool.jsonl", ["data/pool.jsonl"], "is the same as"),
        ("link.jsonl", "data/pool.jsonl", "is the same as"),
        ("hard.jsonl", "data/pool.jsonl", "is the same as"),
        ("data/pool.jsonl", "link.jsonl", "is the same as the input (link.jsonl)"),
        ("data/pool.jsonl", "data/*.jsonl", "is the same as"),
        ("hard.jsonl", "data", "is the same as"),
        ("data/new.jsonl", "data", "is inside the input (data)"),
        ("door/new.jsonl", "data", "is inside"),
        ("model/deep/er/run", Path("model"), "is inside"),
        ("data", "data/pool.jsonl", "contains the input (data/pool.jsonl)"),
        (".", "model", "contains"),
        ("base/out", "adapter", "is inside the input (base)"),
        ("base", "adapter", "is the same as the input (base)"),
    ],
)
def test_an_output_that_is_an_input_is_refused(output: str, value: object, why: str) -> None:
    Path("link.jsonl").symlink_to("data/pool.jsonl")
    os.link("data/pool.jsonl", "hard.jsonl")
    Path("door").symlink_to("data")
    for name in ("base", "adapter"):
        Path(name).mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    with pytest.raises(UserError) as error:
        refuse_overlap({"--out": output}, {"the input": value})
    assert str(error.value).startswith(f"--out {Path(output)} ")
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("output", "value"),
    [
        ("chosen.jsonl", "data/pool.jsonl"),
        ("data/new.jsonl", "data/pool.jsonl"),
        ("model", "owner/model"),  # a hub id
        ("runs/a", ["data", "model", None, 3]),
        (None, "data"),
        ("data-more", "data"),
    ],
)
def test_other_outputs_are_not(output: str | None, value: object) -> None:
    refuse_overlap({"--out": output}, {"the input": value})


def test_a_run_may_read_its_own_configuration_again() -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("")
    with pytest.raises(UserError, match="contains"):
        refuse_overlap({"--run": "run"}, {"--config": "run/config.yaml"})
    Path("run/manifest.json").write_text("{}")
    refuse_overlap({"--run": "run"}, {"--config": "run/config.yaml"})
    with pytest.raises(UserError, match="is the same"):
        refuse_overlap({"--out": "run/config.yaml"}, {"--config": "run/config.yaml"})


def test_a_word_that_is_never_a_path_is_no_input() -> None:
    assert setting_inputs({"method": "daar", "device": "data", "seeds": "s.jsonl", "layer": 3}, "--{}") == {
        "--seeds": "s.jsonl"
    }


def test_a_subset_never_replaces_its_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numpy as np

    path = write_alpaca(Path("data/pool.jsonl"), 10)
    before = path.read_bytes()
    pool = load_pool("data/pool.jsonl")
    subset = Scores(pool, "test", np.arange(10, dtype=np.float32)).keep(count=3)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # the pool's paths do not depend on it
    for out in (tmp_path / "data" / "pool.jsonl", Path("../data/pool.jsonl")):
        with pytest.raises(UserError, match="the same as the pool"):
            subset.write(out)
    assert (tmp_path / "data/pool.jsonl").read_bytes() == before
    existing = Path("chosen.jsonl")
    existing.write_text("an ordinary file")  # a file that is named is replaced, as by every command
    assert len(subset.write(existing).read_text().splitlines()) == 3


def test_only_ordinary_files_are_replaced() -> None:
    os.mkfifo("pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"), atomic_path("pipe"):
        pass
    assert Path("pipe").is_fifo()


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".git", "notes.txt", "config.yaml", ".env"])
def test_a_folder_of_the_users_is_no_run_folder(name: str) -> None:
    Path("mine").mkdir()
    Path("mine", name).write_text("mine")
    with (
        pytest.raises(UserError, match=f"holds {name} and no manifest.json"),
        RunFolder(Path("mine"), config={}, inputs={}),
    ):
        pass
    with pytest.raises(UserError, match=f"holds {name} and no {CLAIM}"):
        claim(Path("mine"), "loop")
    assert Path("mine", name).read_text() == "mine"


def test_a_manifest_of_something_else_is_left_alone() -> None:
    Path("mine").mkdir()
    Path("mine/manifest.json").write_text('{"name": "a web page"}')
    with (
        pytest.raises(UserError, match="did not write; pass another --run"),
        RunFolder(Path("mine"), config={}, inputs={}),
    ):
        pass
    assert Path("mine/manifest.json").read_text() == '{"name": "a web page"}'
    assert not Path("mine/config.yaml").exists()


def test_a_claimed_folder_belongs_to_its_kind() -> None:
    claim(Path("new"), "loop")
    Path("new/anything").touch()
    claim(Path("new"), "loop")
    with pytest.raises(UserError, match="belongs to a loop of siftune, not to a demo"):
        claim(Path("new"), "demo")
    assert foreign_name(Path("new"), (CLAIM,)) == "anything"


def test_files_saved_into_a_folder_replace_only_ours() -> None:
    with pytest.raises(UserError, match=r"model/config.json was not written by siftune"):
        refuse_foreign(Path("model"), ["config.json"], RUN)
    refuse_foreign(Path("model"), ["other.json"], RUN)
    Path("model/manifest.json").write_text('{"name": "x"}')
    with pytest.raises(UserError):
        refuse_foreign(Path("model"), ["config.json"], RUN)
    Path("model/manifest.json").write_text('{"config": {}, "inputs": {}, "stages": []}')
    refuse_foreign(Path("model"), ["config.json"], RUN)


# --- exports --------------------------------------------------------------------------------------------------------


def export(text: str = "new") -> Path:
    folder = Path("finished")
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "deep" / "file").write_text(text)
    return folder


def test_an_export_replaces_an_export() -> None:
    place(export("one"), Path("out"))
    assert why_kept(Path("out")) is None
    place(export("two"), Path("out"))
    assert Path("out/weights").read_text() == "two"
    assert sorted(path.name for path in Path().iterdir()) == ["data", "model", "out"]
    Path("empty").mkdir()
    place(export(), Path("empty"))
    assert Path("empty/deep/file").is_file()


PLANTED = {
    "a file": lambda out: (out / "notes.txt").write_text("mine"),
    "a hidden file": lambda out: (out / ".env").write_text("mine"),
    "a file deeper": lambda out: (out / "deep" / "notes.txt").write_text("mine"),
    "an empty folder": lambda out: (out / "mine").mkdir(),
    "a repository": lambda out: ((out / ".git").mkdir(), (out / ".git" / "HEAD").write_text("mine")),
    "a link": lambda out: (out / "link").symlink_to("/"),
    "a changed file": lambda out: (out / "weights").write_text("mine, by now"),
    "a changed file of the same size": lambda out: (out / "weights").write_text("eno"),
    "no mark": lambda out: (out / MARK).unlink(),
    "a mark of something else": lambda out: (out / MARK).write_text("[]"),
    "a damaged mark": lambda out: (out / MARK).write_text('{"files"'),
}


def everything(folder: Path) -> dict[str, str | None]:
    return {str(path): path.read_text() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", PLANTED)
def test_an_export_with_anything_of_the_users_stays(name: str) -> None:
    place(export("one"), Path("out"))
    PLANTED[name](Path("out"))
    before = everything(Path("out"))
    with pytest.raises(UserError, match=r"so it is not replaced; move it away"):
        check_export("--out", Path("out"))
    new = export("two")
    with pytest.raises(UserError):
        place(new, Path("out"))
    assert not discard(Path("out"))
    assert everything(Path("out")) == before
    assert new.is_dir()


def test_a_mark_that_lists_files_elsewhere_removes_none() -> None:
    place(export(), Path("out"))
    content = json.loads(Path("out", MARK).read_text())
    content["files"]["../data/pool.jsonl"] = [3, None]
    Path("out", MARK).write_text(json.dumps(content))
    assert discard(Path("out"))
    assert Path("data/pool.jsonl").is_file()


def test_the_working_folder_and_those_above_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("work/inner").mkdir(parents=True)
    monkeypatch.chdir("work")
    for out in (".", "..", "../../", "inner/.."):
        with pytest.raises(UserError, match="is the working folder or contains it"):
            check_export("--out", Path(out))
    check_export("--out", Path("inner"))


def test_a_file_is_no_folder() -> None:
    with pytest.raises(UserError, match=r"--out data/pool.jsonl is a file"):
        check_replaceable(Path("data/pool.jsonl"), "--out")


def test_the_old_export_comes_back_where_the_new_one_cannot_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    place(export("one"), Path("out"))
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if Path(source).name == "finished":
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(exports.os, "rename", full)
    with pytest.raises(UserError, match="disk is full"):
        place(export("two"), Path("out"))
    assert Path("out/weights").read_text() == "one"


def test_an_export_that_a_kill_left_aside_comes_back() -> None:
    place(export("one"), Path("out"))
    Path("out").rename(".out.siftune-old")
    place(export("two"), Path("out"))
    assert Path("out/weights").read_text() == "two"
    assert not Path(".out.siftune-old").exists()
    Path(".out.siftune-old").mkdir()
    Path(".out.siftune-old/mine").write_text("mine")
    with pytest.raises(UserError, match=r"\.out\.siftune-old holds mine"):
        place(export("three"), Path("out"))
    assert Path("out/weights").read_text() == "two"
    assert Path(".out.siftune-old/mine").read_text() == "mine"


def test_sizes_alone_serve_large_files() -> None:
    folder = export("abc")
    seal(folder, hashed=False)
    assert why_kept(folder) is None
    (folder / "weights").write_text("abcd")
    assert why_kept(folder) == "holds weights, which was changed after siftune wrote it"


def test_a_cache_folder_with_another_file_is_not_cleared() -> None:
    folder = Path("cache")
    folder.mkdir()
    (folder / "meta.json").touch()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"cache holds notes.txt, which siftune did not write"):
        clear(folder, ["meta.json", "*.npy"])
    assert (folder / "meta.json").exists()
    (folder / "notes.txt").unlink()
    clear(folder, ["meta.json", "*.npy"])
    assert not folder.exists()


def test_a_folder_below_a_file_is_refused_before_anything_is_made() -> None:
    Path("file").write_text("")
    with pytest.raises(UserError, match="a file, not a folder"):
        check_export("--out", Path("file/out"))
    for name in ("file", "file/run"):
        with pytest.raises(UserError, match="a file, not a folder"):
            check_run_folder(Path(name))


@pytest.mark.parametrize("output", ["new", "new/out", ".", "other/../new"])
def test_two_folders_to_be_made_are_never_in_each_other(output: str) -> None:
    with pytest.raises(UserError, match="are inside one another"):
        refuse_nested("--out", Path(output), "the run folder", Path("new"))
    refuse_nested("--out", Path("newer"), "the run folder", Path("new"))
