"""What is read back is checked: a run's tables and scores, remembered hashes of weights, tokenised rows in the cache."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from siftune.data.checked_parquet import read_checked, write_checked
from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.models.backbone import Backbone
from siftune.models.chat import content_key
from siftune.reports.rows_file import read_selection
from siftune.runs.options import KeepOptions, SelectOptions
from siftune.runs.select import recut, select
from siftune.sft.dataset import training_rows
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished selection, its pool and its cache beside it."""
    folder = tmp_path_factory.mktemp("integrity")
    rows = [{"instruction": f"Add {n} and 1.", "input": "", "output": str(n + 1)} for n in range(40)]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = SelectOptions(pool=[str(folder / "pool.jsonl")], run=str(folder / "run"), cache=str(folder / "cache"))
    select("random", options)
    return folder / "run"


def flipped(content: bytes, place: int) -> bytes:
    data = bytearray(content)
    data[place] ^= 1 << place % 8
    return bytes(data)


def test_any_flipped_bit_in_a_table_is_noticed(tmp_path: Path) -> None:
    table = pa.table(
        {"row": list(range(300)), "name": [f"n{row % 7}" for row in range(300)], "share": [None, 0.5] * 150}
    )
    path = tmp_path / "a.parquet"
    write_checked(table, path)
    content, messages = path.read_bytes(), []
    for place in range(0, len(content), 3):
        path.write_bytes(flipped(content, place))
        try:
            assert read_checked(path, way_out="do it again").equals(table), place
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert all(message.startswith(f"{path} cannot be read (") for message in messages)
    assert all(message.endswith("); do it again") for message in messages)


def test_a_column_that_is_absent_is_named(tmp_path: Path) -> None:
    write_checked(pa.table({"row": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="it has no column kept"):
        read_checked(tmp_path / "a.parquet", columns=["kept"], way_out="do it again")


def test_a_report_on_damaged_rows_is_one_sentence(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    sound, path = read_selection(run), tmp_path / "run" / "rows.parquet"
    content, messages = path.read_bytes(), []
    for place in range(0, len(content), 11):
        path.write_bytes(flipped(content, place))
        try:
            selection = read_selection(tmp_path / "run")
            assert np.array_equal(selection.kept, sound.kept)
            assert np.array_equal(selection.score, sound.score, equal_nan=True)
            assert selection.places[0] == sound.places[0]
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert all("rows.parquet cannot be read" in message for message in messages)
    assert all(message.endswith("run the same siftune select command again") for message in messages)


@pytest.mark.parametrize("name", ["scores.safetensors", "manifest.json"])
def test_keep_on_a_damaged_file_is_one_sentence_or_changes_nothing(run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    path, out = tmp_path / "run" / name, str(tmp_path / "ten.jsonl")
    options = KeepOptions(keep="10%", out=out, cache=str(run.parent / "cache"))
    recut(str(run), options)
    expected, content = Path(out).read_bytes(), path.read_bytes()
    messages = []
    for place in random.Random(name).sample(range(len(content)), 60):
        path.write_bytes(flipped(content, place))
        try:
            recut(str(tmp_path / "run"), options)
            assert Path(out).read_bytes() == expected, place
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("inputs", "pool", None),
        ("config", "pool", None),
        ("config", "pool", 3),
        ("config", "columns", "x"),
        ("config", "format", 3),
    ],
)
def test_keep_on_a_manifest_that_lacks_a_part_is_one_sentence(
    run: Path, tmp_path: Path, part: str, name: str, value: object
) -> None:
    shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest[part] |= {name: value}
    if value is None:
        del manifest[part][name]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        recut(str(tmp_path / "run"), KeepOptions(keep="10%", out=str(tmp_path / "a.jsonl"), cache=str(tmp_path)))


def test_weights_rewritten_in_place_with_their_time_restored_are_noticed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    before = content_key(Backbone(str(folder), layer=1)), Backbone(str(folder), layer=1).key
    weights = next(folder.glob("*.safetensors"))
    stat, data = weights.stat(), bytearray(weights.read_bytes())
    data[-3] ^= 1
    with open(weights, "r+b") as file:
        file.write(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = weights.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert content_key(Backbone(str(folder), layer=1)) != before[0]
    assert Backbone(str(folder), layer=1).key != before[1]


def test_damaged_tokenised_rows_are_made_again(run: Path, tmp_path: Path) -> None:
    pool = load_pool(run.parent / "pool.jsonl", cache=tmp_path)

    def tokens() -> tuple[Path, list[list[int]]]:
        rows = training_rows(pool, tiny_tokenizer(), key="tiny", text="auto", max_length=64, cache=tmp_path)
        return rows.folder, rows.dataset["input_ids"][:]

    folder, sound = tokens()
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 5)):
            file.write_bytes(flipped(content, place))
            assert tokens() == (folder, sound), (file.name, place)
