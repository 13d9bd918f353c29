"""A named pipe, a socket or a device in the place of any input file is one sentence, at once: no reader waits for it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.files import hash_file, read_json, refuse_special
from siftune.offline.prompts import read_prompt
from siftune.online.rho_loss import read_table
from siftune.yaml_io import read_yaml
from tests.faults.inputs import write_pool
from tests.faults.said import refused, siftune
from tests.tiny import save_tiny


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path / "pipe.jsonl"


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)  # a socket's name may have 107 characters
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket.jsonl")
        yield tmp_path / "socket.jsonl"


def test_pipes_sockets_and_devices_are_refused_by_every_reader(pipe: Path, listening: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(pipe)
    device = tmp_path / "zero.jsonl"
    device.symlink_to("/dev/zero")
    for path, kind in ((pipe, "a named pipe"), (listening, "a socket"), (link, "a named pipe"), (device, "a device")):
        for read in (
            refuse_special,
            load_pool,
            hash_file,
            read_json,
            read_table,
            lambda path: read_yaml(path, what="the recipe"),
            lambda path: read_prompt(str(path), "", answer=False),
        ):
            with pytest.raises(UserError, match=f"{path.name} is {kind}, not a file"):
                read(path)


def test_a_folder_and_a_glob_with_a_pipe_are_refused(pipe: Path) -> None:
    write_pool(pipe.parent / "pool.jsonl", 5)
    for source in (pipe.parent, str(pipe.parent / "*.jsonl"), [pipe.parent / "pool.jsonl", pipe]):
        with pytest.raises(UserError, match="is a named pipe"):
            load_pool(source)


def test_what_is_no_special_file_passes(tmp_path: Path) -> None:
    refuse_special(write_pool(tmp_path / "pool.jsonl", 1))
    refuse_special(tmp_path)
    refuse_special(tmp_path / "absent")


def test_every_command_refuses_a_pipe_in_the_place_of_its_input(pipe: Path, tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool.jsonl", 20)
    model = save_tiny(tmp_path / "model", layers=1, width=16)
    common = ["--keep", "5", "--run", tmp_path / "run", "--cache", tmp_path / "cache"]
    os.mkfifo(tmp_path / "pipe.yaml")
    yaml = tmp_path / "pipe.yaml"
    for words in (
        ["select", "random", pipe, *common],
        ["select", "daar", pool, "--model", model, "--seeds", pipe, *common],
        ["select", "daar", pool, "--model", model, "--generator", model, "--domains", yaml, *common],
        ["select", "ifd", pool, "--model", model, "--prompt", pipe, *common],
        ["select", "random", pool, "--config", yaml, *common],
        ["plan", pipe, "--model", model],
        ["train", yaml],
        ["score-reference", yaml, "--reference", model],
        ["compare", yaml],
        ["evaluate", model, "--suite", yaml],
    ):
        assert "is a named pipe, not a file" in refused(siftune(words)), words
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    assert "tokenizer.json is a named pipe" in refused(siftune(["select", "ifd", pool, "--model", model, *common]))


@pytest.mark.parametrize("section", ["train", "eval"])
def test_a_recipe_that_names_a_pipe_is_refused(pipe: Path, tmp_path: Path, section: str) -> None:
    pytest.importorskip("trl")
    pool = write_pool(tmp_path / "pool.jsonl", 20)
    recipe = {"model": str(save_tiny(tmp_path / "model", layers=1, width=16)), "train": str(pool)}
    recipe |= {"train": str(pipe)} if section == "train" else {"eval": {"held": str(pipe)}}  # type: ignore[dict-item]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"sft": {"max_steps": 1}}))
    assert "is a named pipe" in refused(siftune(["train", tmp_path / "recipe.yaml", "--cache", tmp_path / "cache"]))
