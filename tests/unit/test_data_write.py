"""Chosen rows come back as the user's own rows, by every suffix."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftune.data import write
from siftune.data.load import load_pool
from siftune.data.write import SUFFIXES, check_suffix
from siftune.errors import UserError

LINES = [
    b'{"output": "b", "instruction":"a",  "n": 1.50, "deep": {"z": [1, null, 2e3], "a": true}}',
    b'  {"instruction": "caf\\u00e9 \xc3\xa9", "output": "\xf0\x9f\x98\x80", "extra": 12345678901234567890123} ',
    b'{"instruction": "c", "output": "d", "instruction": "twice"}',
]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(LINES))
    return path


def test_json_lines_come_back_byte_for_byte_in_the_order_asked(lines: Path, tmp_path: Path) -> None:
    source = load_pool(lines).source
    source.write([0, 1, 2], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b"\n".join(LINES) + b"\n"
    source.write([2, 0], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == LINES[2] + b"\n" + LINES[0] + b"\n"
    source.write([], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".json", ".JSONL"])
def test_every_text_suffix_is_read_back_the_same(lines: Path, tmp_path: Path, suffix: str) -> None:
    pool = load_pool(lines)
    out = tmp_path / f"out{suffix}"
    pool.source.write([0, 2], out)
    first = out.read_bytes()
    again = load_pool(out)
    assert again.source.originals([0, 1]) == pool.source.originals([0, 2])
    assert [list(row) for row in again.source.originals([0, 1])] == [list(r) for r in pool.source.originals([0, 2])]
    out.unlink()
    pool.source.write([0, 2], out)
    assert out.read_bytes() == first
    if suffix == ".jsonl.gz":
        assert gzip.decompress(first).splitlines() == [LINES[0], LINES[2]]
        assert first[3:8] == b"\0" * 5, "neither a name nor a time in the header"


def test_a_json_array_of_nothing(lines: Path, tmp_path: Path) -> None:
    load_pool(lines).source.write([], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_an_unknown_suffix_is_one_sentence_before_anything_is_written(lines: Path, tmp_path: Path) -> None:
    pool = load_pool(lines)
    for name in ("out.csv", "out", "out.parquet.gz"):
        with pytest.raises(UserError, match=r"use one of \.jsonl, "):
            pool.source.write([0], tmp_path / name)
        assert not (tmp_path / name).exists()
    assert [check_suffix(f"x{suffix}") for suffix in SUFFIXES] == list(SUFFIXES)


def _table() -> pa.Table:
    return pa.table(
        {
            "instruction": pa.array(["a", "b", "c", "d"] * 700, pa.large_string()),
            "output": ["w", "x", "y", "z"] * 700,
            "small": pa.array(range(2800), pa.int16()),
            "when": pa.array(range(2800), pa.timestamp("ns", tz="Europe/Berlin")),
            "price": pa.array([None, 1.5, float("nan"), 2.5] * 700, pa.float32()),
            "raw": pa.array([b"\0\xff"] * 2800),
            "tags": pa.array([["p", "q"], [], None, ["r"]] * 700),
            "info": pa.array([{"k": 1, "v": None}] * 2800, pa.struct([("k", pa.int8()), ("v", pa.string())])),
        }
    ).replace_schema_metadata({"origin": "the user's"})


def test_a_table_comes_back_in_its_own_types_and_metadata(tmp_path: Path) -> None:
    table = _table()
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=1000)
    pool = load_pool(tmp_path / "in.parquet")
    chosen = [2799, 5, 1024, 1023, 0, 2000]
    pool.source.write(chosen, tmp_path / "out.parquet")
    back = pq.read_table(tmp_path / "out.parquet")
    expected = pq.read_table(tmp_path / "in.parquet").take(chosen)
    assert back.schema.equals(expected.schema, check_metadata=True)
    assert repr(back.to_pylist()) == repr(expected.to_pylist())


def test_row_groups_end_when_they_are_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "GROUP_BYTES", 1)
    pq.write_table(_table(), tmp_path / "in.parquet")
    load_pool(tmp_path / "in.parquet").source.write(range(300), tmp_path / "out.parquet")
    back = pq.ParquetFile(tmp_path / "out.parquet")
    assert [back.metadata.row_group(index).num_rows for index in range(back.num_row_groups)] == [128, 128, 44]
    assert back.read()["small"].to_pylist() == list(range(300))


def test_a_table_as_json_lines_has_a_text_for_what_json_lacks(tmp_path: Path) -> None:
    pq.write_table(_table(), tmp_path / "in.parquet")
    load_pool(tmp_path / "in.parquet").source.write([2, 3], tmp_path / "out.jsonl")
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert list(first) == ["instruction", "output", "small", "when", "price", "raw", "tags", "info"]
    assert (first["price"], first["tags"], first["raw"], first["info"]) == (None, None, "AP8=", {"k": 1, "v": None})
    assert first["when"].startswith("1970-01-01T01:00:00")
    assert (second["price"], second["tags"], second["small"]) == (2.5, ["r"], 3)


def test_text_rows_as_parquet_have_one_type_per_column(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}] * 200 + [
        {"text": "b", "deep": {"x": 1}, "n": 2.5},
        {"deep": {"y": ["é"]}, "text": "c"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load_pool(tmp_path / "in.jsonl").source.write(range(202), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["text", "n", "deep"]
    assert table.slice(199).to_pylist() == [
        {"text": "a", "n": 1.0, "deep": None},
        {"text": "b", "n": 2.5, "deep": {"x": 1, "y": None}},
        {"text": "c", "n": None, "deep": {"x": None, "y": ["é"]}},
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "n": 1}, {"text": "b", "n": "one"}], "the column 'n' holds values of more than one type"),
        ([{"text": "a", "n": 1}] * 200 + [{"text": "b", "n": "one"}], "the column 'n' holds values of more than one type"),
        ([{"text": "a", "n": 10**30}], "the column 'n'|Parquet cannot hold"),
        ([{"text": "a", "n": {}}], "Parquet cannot hold these rows"),
    ],
)  # fmt: skip
def test_what_parquet_cannot_hold_is_one_sentence(tmp_path: Path, rows: list[dict[str, object]], said: str) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pool = load_pool(tmp_path / "in.jsonl")
    with pytest.raises(UserError, match=said) as told:
        pool.source.write(range(len(rows)), tmp_path / "out.parquet")
    assert "write a .jsonl instead" in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "siftune-cache"]


def test_a_megabyte_row_is_never_cut(tmp_path: Path) -> None:
    rows = [{"instruction": "x" * 1_500_000, "output": "é" * 1_000_000}, {"instruction": "a", "output": "b"}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    pool = load_pool(tmp_path / "in.jsonl")
    for name in ("out.jsonl", "out.parquet"):
        pool.source.write([0, 1], tmp_path / name)
        assert load_pool(tmp_path / name).source.originals([0, 1]) == rows
    (tmp_path / "in.csv").write_text("instruction,output\n" + ",".join(rows[0].values()) + "\n")
    assert load_pool(tmp_path / "in.csv").source.originals([0]) == rows[:1]
