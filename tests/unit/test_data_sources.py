"""Pools of every kind: compressed text, tables, frames, lists, folders of data sets, and files whose suffix is wrong."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftune.data.load import load_pool
from siftune.errors import UserError

ROWS = [{"instruction": f"Say {n}", "output": f'word "{n}",\tend\n.'} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()


def _put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _tsv(path: Path) -> Path:
    return _put(path, pd.DataFrame(ROWS).to_csv(sep="\t", index=False).encode())


def _arrow(path: Path, *, stream: bool) -> Path:
    table = pa.Table.from_pylist(ROWS)
    opened = pa.ipc.new_stream(str(path), table.schema) if stream else pa.ipc.new_file(str(path), table.schema)
    with opened as writer:
        writer.write_table(table)
    return path


class ArrowFrame:
    """A data frame of another library, as Polars' is: it hands out Arrow columns and no more."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return pa.Table.from_pylist(ROWS).__arrow_c_stream__(requested_schema)


READ: dict[str, Callable[[Path], Any]] = {
    "tsv": lambda p: _tsv(p / "a.tsv"),
    "bz2": lambda p: _put(p / "a.jsonl.bz2", bz2.compress(LINES)),
    "xz": lambda p: _put(p / "a.jsonl.xz", lzma.compress(LINES)),
    "json.xz": lambda p: _put(p / "a.json.xz", lzma.compress(ARRAY)),
    "arrow file": lambda p: _arrow(p / "a.arrow", stream=False),
    "arrow stream": lambda p: _arrow(p / "a.arrow", stream=True),
    "list": lambda p: ROWS,
    "pandas": lambda p: pd.DataFrame(ROWS),
    "pandas with an index": lambda p: pd.DataFrame(ROWS, index=["a", "b", "c"]),
    "another frame": lambda p: ArrowFrame(),
    "arrow table": lambda p: pa.Table.from_pylist(ROWS),
    "iterable dataset": lambda p: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "data": lambda p: _put(p / "a.json", json.dumps({"data": ROWS}).encode()),
    "data with other keys": lambda p: _put(
        p / "a.json", json.dumps({"version": "1.0", "n": 3, "data": ROWS, "about": {"x": [1]}}, indent=2).encode()
    ),
    "json lines called json": lambda p: _put(p / "a.json", LINES),
}


@pytest.mark.parametrize("kind", READ)
def test_every_source_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    pool = load_pool(READ[kind](tmp_path))
    assert pool.source.originals(range(3)) == ROWS
    assert pool.source.ids(range(3)) == load_pool(ROWS).source.ids(range(3))
    pool.source.write([2, 0], tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [ROWS[2], ROWS[0]]


def test_an_iterable_dataset_is_read_once() -> None:
    passes = []

    def rows() -> Any:
        passes.append(1)
        yield from ROWS

    class Once:
        def __iter__(self) -> Any:
            return rows()

    dataset = datasets.IterableDataset.from_generator(rows)
    passes.clear()
    assert len(load_pool(dataset)) == 3
    assert len(passes) == 1


def test_lists_hold_text_for_values_that_json_lacks_and_reasons_for_rows_that_are_no_objects() -> None:
    rows: list[Any] = [{**ROWS[0], "when": datetime.date(2020, 1, 2)}, 7, {**ROWS[1], "x": object()}]
    pool = load_pool(rows, on_bad_row="skip")
    assert pool.source.originals([0])[0]["when"] == "2020-01-02"
    assert pool.reasons[1] == "not an object: int"
    assert pool.reasons[2].startswith("wrong type: ")


def test_one_json_object_with_the_key_data_is_told_from_json_lines(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    lines = "".join(json.dumps({"data": chat, "n": n}) + "\n" for n in range(2))
    pool = load_pool(_put(tmp_path / "a.json", lines.encode()), columns={"messages": "data"})
    assert len(pool) == 2
    cut = _put(tmp_path / "b.json", json.dumps({"data": ROWS}).encode()[:-4])
    assert "the array is not closed" in next(iter(load_pool(cut, on_bad_row="skip").reasons.values()))
    tail = _put(tmp_path / "c.json", json.dumps({"data": ROWS}).encode() + b" more")
    assert "text after the end" in next(iter(load_pool(tail, on_bad_row="skip").reasons.values()))


def _splits(folder: Path) -> Path:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(folder)
    return folder


def _clone(folder: Path) -> Path:
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "data" / f"{name}.parquet")
    _put(folder / "README.md", b"---\nlicense: mit\n---\n")
    return folder


def _flat_clone(folder: Path) -> Path:
    for name in ("train.jsonl", "validation.jsonl"):
        _put(folder / name, LINES)
    _put(folder / ".gitattributes", b"*.jsonl filter=lfs\n")
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DatasetDict folder": (lambda p: _splits(p / "d"), r"is a DatasetDict with the splits (train, test|test, train)"),
    "clone": (lambda p: _clone(p / "d"), r"is a data set with the splits test, train; .* such as '.*/data/test\*.parquet'"),
    "flat clone": (lambda p: _flat_clone(p / "d"), "is a data set with the splits train, validation"),
    "a description": (lambda p: _put(p / "dataset_infos.json", b"{}"), "describes a data set and holds no rows"),
    "gzip as text": (lambda p: _put(p / "a.jsonl", gzip.compress(LINES)), r"holds gzip data, not text; rename it to a.jsonl.gz"),
    "gzip as csv": (lambda p: _put(p / "a.csv", gzip.compress(b"text\na\n")), "holds gzip data"),
    "bzip2 as text": (lambda p: _put(p / "a.json", bz2.compress(LINES)), "rename it to a.json.bz2"),
    "xz as text": (lambda p: _put(p / "a.jsonl", lzma.compress(LINES)), "holds xz data"),
    "gzip twice": (lambda p: _put(p / "a.jsonl.gz", gzip.compress(gzip.compress(LINES))), "holds gzip data"),
    "zip as text": (lambda p: _put(p / "a.jsonl", b"PK\x03\x04rest"), "holds a zip archive, not text; unpack it"),
    "parquet as text": (lambda p: _put(p / "a.json", b"PAR1rest"), "holds a Parquet file, not text; rename it to end in .parquet"),
    "array as lines": (lambda p: _put(p / "a.jsonl", ARRAY), "holds one JSON array, not one object per line; rename it to end in .json"),
    "array over lines": (lambda p: _put(p / "a.jsonl", json.dumps(ROWS, indent=1).encode()), "holds one JSON array"),
    "broken xz": (lambda p: _put(p / "a.jsonl.xz", lzma.compress(LINES)[:40]), "cannot be read to its end"),
    "broken bz2": (lambda p: _put(p / "a.jsonl.bz2", bz2.compress(LINES)[:40]), "cannot be read to its end"),
    "no bz2": (lambda p: _put(p / "a.jsonl.bz2", LINES), "cannot be read to its end"),
    "no arrow": (lambda p: _put(p / "a.arrow", b"ARROW1 and no more"), "cannot be read to its end"),
    "a frame that Arrow cannot hold": (lambda p: pd.DataFrame({"text": ["a", 1, [2]]}), "pass its rows as a list of objects"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_pool_of_rows_is_named(kind: str, tmp_path: Path) -> None:
    make, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=sentence):
        load_pool(make(tmp_path), on_bad_row="skip")


def test_the_description_of_a_data_set_beside_its_rows_is_no_row(tmp_path: Path) -> None:
    for name in ("dataset_info.json", "dataset_infos.json", "rows.json"):
        _put(tmp_path / "d" / name, ARRAY if name == "rows.json" else b'{"default": {"features": {}}}')
    for source in (tmp_path / "d", str(tmp_path / "d" / "*.json")):
        assert load_pool(source).source.originals(range(3)) == ROWS


def test_one_split_of_a_clone_is_read_by_the_pattern_that_the_sentence_names(tmp_path: Path) -> None:
    folder = _clone(tmp_path / "d")
    with pytest.raises(UserError) as refused:
        load_pool(folder)
    pattern = str(refused.value).rsplit("'", 2)[1]
    assert load_pool(pattern).source.originals(range(3)) == ROWS
