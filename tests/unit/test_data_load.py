"""Every kind of source gives the same pool; bad rows, duplicates and sources that fail are told exactly."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import siftune.data.load as load_module
from siftune.data.build import later_duplicates
from siftune.data.load import counts, load_pool
from siftune.errors import UserError
from siftune.files import hash_json, temporary_beside

ROWS = [{"instruction": f"Ask {i} é", "input": "", "output": f'Say "{i}",\nthen stop'} for i in range(5)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _write(path: Path) -> Path:
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return path
    if ".csv" in name:
        with open(path.with_suffix(".tmp"), "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
        data = path.with_suffix(".tmp").read_bytes()
        path.with_suffix(".tmp").unlink()
    elif name.startswith("array"):
        data = json.dumps(ROWS, indent=2).encode()
    else:
        data = jsonl(ROWS)
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return path


KINDS = ["a.jsonl", "a.ndjson", "a.JSONL", "a.jsonl.gz", "a.jsonl.zst", "lines.json", "array.json", "array.json.gz", "a.csv", "a.csv.gz", "a.parquet"]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows_and_ids(tmp_path: Path, name: str) -> None:
    pool = load_pool(str(_write(tmp_path / name)))
    assert (len(pool), pool.format, dict(pool.reasons), pool.duplicates) == (5, "alpaca", {}, 0)
    assert pool.source.originals([4, 0]) == [ROWS[4], ROWS[0]]
    assert pool.source.ids(range(5)) == [hash_json(row) for row in ROWS]
    assert [row.output for row in pool.read([1, 3])] == [ROWS[1]["output"], ROWS[3]["output"]]
    assert pool.fingerprint == load_pool(_write(tmp_path / "other.jsonl")).fingerprint


@pytest.mark.parametrize(
    ("name", "lines"),
    [("a.jsonl", [1, 2, 3, 4, 5]), ("array.json", [2, 7, 12, 17, 22]), ("a.csv", [2, 4, 6, 8, 10]), ("a.parquet", [1, 2, 3, 4, 5])],
)  # fmt: skip
def test_rows_know_their_file_and_line(tmp_path: Path, name: str, lines: list[int]) -> None:
    path = _write(tmp_path / name)
    assert load_pool(path).source.locations(range(5)) == [(str(path), line) for line in lines]


def test_a_folder_and_a_glob_are_sorted_by_name_and_kinds_mix(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    for name in ("b.parquet", "a.jsonl", "c.csv", "d.parquet"):
        _write(folder / name)
    (folder / "README.md").write_text("not rows")
    (folder / ".hidden.jsonl").write_text("not rows")
    pool = load_pool(folder)
    assert (len(pool), pool.duplicates) == (20, 15)
    assert [file for file, _ in pool.source.locations([0, 5, 10, 15, 19])] == [
        str(folder / name) for name in ("a.jsonl", "b.parquet", "c.csv", "d.parquet", "d.parquet")
    ]
    assert pool.source.originals([17, 0, 6, 12]) == [ROWS[2], ROWS[0], ROWS[1], ROWS[2]]
    assert [row.row for row in pool.read([17, 0, 6])] == [17, 0, 6]
    assert len(load_pool(str(folder / "*.parquet"))) == 10
    assert load_pool([folder / "a.jsonl", datasets.Dataset.from_list(ROWS)]).duplicates == 5


def test_a_dataset_with_its_own_order(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    plain = load_pool(dataset)
    assert plain.source.originals(range(5)) == ROWS
    picked = load_pool(dataset.select([3, 1]))
    assert picked.source.originals(range(2)) == [ROWS[3], ROWS[1]]
    assert picked.fingerprint != plain.fingerprint
    dataset.save_to_disk(tmp_path / "saved")
    assert load_pool(tmp_path / "saved").fingerprint == plain.fingerprint
    with pytest.raises(UserError, match="splits train"):
        load_pool(datasets.DatasetDict(train=dataset))
    assert load_pool(dataset.to_iterable_dataset()).source.ids([0, 4]) == plain.source.ids([0, 4])


def test_a_hub_id_asks_datasets_for_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_pool("owner/name")) == 5
    pool = load_pool("owner/name:train_sft")
    assert pool.source.locations([2]) == [("owner/name:train_sft", 3)]
    assert asked == [("owner/name", "train"), ("owner/name", "train_sft")]


# --- sources that fail ----------------------------------------------------------------------------------------------

FAILING: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda p: p / "no.jsonl", "no.jsonl does not exist"),
    ("missing folder", lambda p: p / "no", "no does not exist"),
    ("hub", lambda p: "owner/name-that-is-not", "neither a file nor a folder here, and its split train"),
    ("unknown kind", lambda p: _put(p / "a.docx", b"x"), "is not known; use .jsonl"),
    ("empty folder", lambda p: p, "holds no file that can be read"),
    ("glob", lambda p: str(p / "*.jsonl"), "matches no file"),
    ("empty", lambda p: _put(p / "a.jsonl", b""), "holds no rows"),
    ("blank", lambda p: _put(p / "a.jsonl", b"\n \r\n"), "holds no rows"),
    ("empty array", lambda p: _put(p / "a.json", b" [ ] "), "holds no rows"),
    ("header alone", lambda p: _put(p / "a.csv", b"text\n"), "holds no rows"),
    ("empty table", lambda p: _table(p / "a.parquet"), "holds no rows"),
    ("truncated gz", lambda p: _put(p / "a.jsonl.gz", gzip.compress(os.urandom(9999))[:5000]), "cannot be read to its end"),
    ("no gz", lambda p: _put(p / "a.jsonl.gz", b"{}"), "cannot be read to its end"),
    ("truncated zst", lambda p: _put(p / "a.jsonl.zst", b"\x28\xb5\x2f\xfd\x24"), "cannot be read to its end"),
    ("no parquet", lambda p: _put(p / "a.parquet", b"PAR1 no PAR1"), "cannot be read to its end"),
    ("all bad", lambda p: _put(p / "a.jsonl", b'{"text": ""}\n{"text": " "}\n'), "all 2 rows are bad"),
    ("no objects", lambda p: _put(p / "a.jsonl", b"x\ny\n"), "none of the 2 rows has a known format"),
    ("unknown columns", lambda p: _put(p / "a.jsonl", b'{"q": 1, "a": 2}\n'), "has q, a, where messages or instruction\\+output or"),
    ("twice a column", lambda p: _put(p / "a.csv", b"text,text\na,b\n"), "names the column 'text' twice"),
    ("a number", lambda p: 3, "a int is not a source of rows"),
    ("no source", lambda p: [], "the list of sources is empty"),
    ("NUL in the name", lambda p: "a\0b", "is not a path"),
]  # fmt: skip


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _table(path: Path) -> Path:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    return path


@pytest.mark.parametrize(("make", "said"), [case[1:] for case in FAILING], ids=[case[0] for case in FAILING])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_source_that_fails_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], Any], said: str, on_bad_row: Any
) -> None:
    with pytest.raises(UserError, match=said) as told:
        load_pool(make(tmp_path), on_bad_row=on_bad_row)
    assert "\n" not in str(told.value)
    assert not list((tmp_path / "siftune-cache").rglob("*siftune-tmp"))


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="on_bad_row='ignore'"):
        load_pool(path, on_bad_row="ignore")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="duplicates='no'"):
        load_pool(path, duplicates="no")  # type: ignore[arg-type]


# --- bad rows -------------------------------------------------------------------------------------------------------

GOOD = b'{"instruction": "a", "output": "b"}'
BAD_LINES: list[tuple[str, bytes, str]] = [
    ("unparsable", b'{"instruction": "a" "output"}', "unparsable line: Expecting ',' delimiter at column 21"),
    ("cut", b'{"instruction": "a', "unparsable line: Unterminated string starting at column 17"),
    ("raw control", b'{"instruction": "a\tb"}', "unparsable line: Invalid control character at column 19"),
    ("two", GOOD + GOOD, "unparsable line: Extra data at column 36"),
    ("list", b"[1, 2]", "not an object: a list"),
    ("string", b'"text"', "not an object: a string"),
    ("number", b"3", "not an object: a number"),
    ("null", b"null", "not an object: null"),
    ("missing", b'{"instruction": "a"}', "missing field: output"),
    ("type", b'{"instruction": "a", "output": 7}', "wrong type: output is a number, not a string"),
    ("empty", b'{"instruction": "a", "output": ""}', "empty answer: output"),
    ("NUL", b'{"instruction": "a", "output": "x\\u0000"}', "NUL character: output"),
    ("NUL below", b'{"instruction": "a", "output": "x", "m": [{"\\u0000": 1}]}', "NUL character: m"),
    ("raw NUL", b'{"instruction": "a", "output": "x\0"}', "unparsable line: Invalid control character at column 34"),
    ("surrogate", b'{"instruction": "a\\ud800", "output": "x"}', "lone surrogate: instruction"),
    ("surrogate key", b'{"instruction": "a", "output": "x", "\\udfff": 1}', "lone surrogate: \\udfff"),
    ("UTF-8", b'{"instruction": "\xc3\x28", "output": "x"}', "invalid UTF-8: byte 18"),
    ("UTF-16", '{"text": "a"}'.encode("utf-16"), "invalid UTF-8: byte 1"),
    ("NaN", b'{"instruction": "a", "output": "x", "score": NaN}', "NaN or Infinity: NaN"),
    ("infinity", b'{"instruction": "a", "output": "x", "score": [-Infinity]}', "NaN or Infinity: -Infinity"),
    ("too large", b'{"instruction": "a", "output": "x", "score": {"v": 1e999}}', "NaN or Infinity: score"),
    ("huge", b'{"instruction": "a", "output": "x", "n": ' + b"9" * 5000 + b"}", "huge integer: more than 4300 digits"),
    ("deep", b'{"instruction": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply: more than 60 levels"),
    ("deep enough", b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "nested too deeply: more than 60 levels"),
    ("mixed", b'{"prompt": "a", "completion": "b"}', "another format: prompt-completion in a pool of alpaca rows"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), [case[1:] for case in BAD_LINES], ids=[case[0] for case in BAD_LINES])
def test_every_kind_of_bad_line_has_its_reason_and_place(tmp_path: Path, line: bytes, reason: str) -> None:
    path = _put(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + line + b"\n" + GOOD)
    pool = load_pool(path, on_bad_row="skip")
    assert dict(pool.reasons) == {1: reason}
    assert (len(pool), pool.eligible.tolist(), pool.duplicates) == (3, [0, 2], 1)
    assert pool.source.locations([0, 1, 2]) == [(str(path), 1), (str(path), 3), (str(path), 4)]
    assert len(pool.source.ids([1])[0]) == 32
    assert isinstance(pool.source.originals([1])[0], dict)
    kind = reason.partition(":")[0]
    with pytest.raises(UserError) as told:
        load_pool(path)
    assert str(told.value) == (
        f"{path}, line 3: {reason}; 1 of 3 rows are bad (1 {kind}); fix them or pass --on-bad-row skip"
    )


def test_what_only_looks_bad_is_good(tmp_path: Path) -> None:
    lines = [
        b'{"instruction": "a \\\\u0000 is a NUL", "output": "b"}',
        b'{"instruction": "\\ud83d\\ude00", "output": "' + "😀\u2028\x85".encode() + b'"}',
        b'{"instruction": "a", "output": "b", "n": 123456789012345678901234567890}',
        b'{"instruction": "a", "output": "' + b"[{" * 200 + b'", "deep": ' + b"[" * 59 + b"]" * 59 + b"}",
    ]
    pool = load_pool(_put(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert (len(pool), dict(pool.reasons)) == (4, {})
    assert pool.source.originals([2])[0]["n"] == 123456789012345678901234567890


def test_the_sentence_names_the_first_and_counts_all(tmp_path: Path) -> None:
    bad = [b"x", b'{"instruction": "a"}', b'{"instruction": "a", "output": " "}', b'{"output": "a"}', b'{"output": 1}']
    path = _put(tmp_path / "a.jsonl", b"\n".join([GOOD, *bad]))
    with pytest.raises(UserError, match=r"line 2: unparsable line: .* 5 of 6 rows are bad \(3 missing field, 1 unparsable line, 1 empty answer\)"):  # fmt: skip
        load_pool(path)
    pool = load_pool(path, on_bad_row="skip")
    assert counts(pool.reasons) == {"missing field": 3, "unparsable line": 1, "empty answer": 1}


@pytest.mark.parametrize(
    ("text", "reasons", "lines"),
    [
        (b'[{"text": "a"}, {text: 1}, {"text": "b"}]', {1: "unparsable line"}, [1, 1, 1]),
        (b'[{"text": "a"},\n3,\n\n{"text": "b"}]', {1: "not an object"}, [1, 2, 4]),
        (b'[{"text": "a"}\n,\n{"text": "b"', {1: "unparsable line"}, [1, 3]),
        (b'[{"text": "a"}]\n{"text": "b"}', {1: "unparsable line"}, [1, 2]),
        (b'[{"text": "a"}, ]', {1: "unparsable line"}, [1, 1]),
        (b'[{"text": "a ] , \\" [ {"},{"text": "\xff"}]', {1: "invalid UTF-8"}, [1, 1]),
        (b'[{"text": "a"}, {"text": "b}]', {1: "unparsable line"}, [1, 1]),
    ],
)
def test_bad_elements_of_an_array(tmp_path: Path, text: bytes, reasons: dict[int, str], lines: list[int]) -> None:
    pool = load_pool(_put(tmp_path / "a.json", text), on_bad_row="skip")
    assert {row: reason.partition(":")[0] for row, reason in pool.reasons.items()} == reasons
    assert [line for _, line in pool.source.locations(range(len(pool)))] == lines


def test_an_array_longer_than_a_piece_keeps_rows_and_lines(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + 'x\\"é],' * (i % 7) * 30} for i in range(20_000)] + [{"text": "y" * 3_000_000}]
    pool = load_pool(_put(tmp_path / "a.json", json.dumps(rows, indent=1, ensure_ascii=False).encode()))
    assert len(pool) == len(rows)
    assert pool.source.originals([0, 9_999, 20_000]) == [rows[0], rows[9_999], rows[20_000]]
    assert [line for _, line in pool.source.locations([0, 9_999, 20_000])] == [2, 29_999, 60_002]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a,b,c\n", "unparsable line: 3 values for 2 columns"),
        (b'a,"b"c\n', "unparsable line: ',' expected after '\"'"),
        (b"a,\xff\n", "invalid UTF-8: in a value"),
        (b"a,\n", "empty answer: output"),
        (b"a,\0\n", "NUL character: output"),
    ],
)
def test_bad_csv_rows(tmp_path: Path, line: bytes, reason: str) -> None:
    pool = load_pool(
        _put(tmp_path / "a.csv", b"\xef\xbb\xbfinstruction,output\r\na,b\r\n\r\n" + line + b"c,d\n"), on_bad_row="skip"
    )
    assert dict(pool.reasons) == {1: reason}
    assert [line for _, line in pool.source.locations(range(3))] == [2, 4, 5]
    assert pool.source.originals([2]) == [{"instruction": "c", "output": "d"}]


def test_bad_table_rows_and_values_that_json_lacks(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")])  # fmt: skip
    table = pa.table(
        {
            "text": broken,
            "when": pa.array([1, 2, 3], pa.timestamp("us", tz="UTC")),
            "score": [float("nan"), 1.0, None],
            "kind": pa.array(["p", "q", "p"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pool = load_pool(tmp_path / "a.parquet", on_bad_row="skip")
    assert dict(pool.reasons) == {1: "invalid UTF-8: in a value of text"}
    assert [row.output for row in pool.read([0, 2])] == ["a", "c"]
    assert pool.source.originals([2])[0]["kind"] == "p"
    assert len(set(pool.source.ids([0, 1, 2]))) == 3
    expected = {"text": "c", "when": "1970-01-01T00:00:00.000003+00:00", "score": None, "kind": "p"}
    assert pool.source.ids([2]) == [hash_json(expected)]


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_duplicates_are_counted_and_dropped_on_request(tmp_path: Path) -> None:
    again = b'{"output": "b",   "instruction": "a"}'
    path = _put(tmp_path / "a.jsonl", b"\n".join([GOOD, b'{"instruction": "a", "output": "c"}', again, GOOD]))
    kept = load_pool(path)
    assert (kept.duplicates, dict(kept.reasons), len(kept)) == (2, {}, 4)
    dropped = load_pool(path, duplicates="drop")
    assert (dropped.duplicates, len(dropped)) == (2, 4)
    assert dict(dropped.reasons) == {2: "duplicate of row 0", 3: "duplicate of row 0"}
    assert dropped.eligible.tolist() == [0, 1]
    assert dropped.fingerprint != kept.fingerprint


def test_ids_that_share_a_half_are_no_duplicates() -> None:
    ids = np.zeros((5, 16), dtype=np.uint8)
    ids[:, 0], ids[:, 15] = [1, 1, 2, 1, 2], [1, 2, 2, 1, 1]
    assert later_duplicates(ids).tolist() == [[3, 0]]


# --- the stored rows ------------------------------------------------------------------------------------------------


def test_a_pool_pickles_small_and_reads_the_same_elsewhere(tmp_path: Path) -> None:
    pool = load_pool([_write(tmp_path / "a.jsonl"), _write(tmp_path / "a.parquet")])
    pool.read([0, 7])
    data = pickle.dumps(pool)
    assert len(data) < 1500
    script = "import pickle, sys; p = pickle.load(sys.stdin.buffer); print([r.output for r in p.read([1, 8])], len(p))"
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert done.stdout.decode().strip() == repr([ROWS[1]["output"], ROWS[3]["output"]]) + " 10"


def test_the_second_load_parses_nothing_and_changed_bytes_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "a.jsonl")
    first = load_pool(path)
    built = []
    build = load_module._build
    monkeypatch.setattr(load_module, "_build", lambda *given: (built.append(1), build(*given))[1])
    moved = tmp_path / "moved.jsonl"
    path.rename(moved)
    second = load_pool(moved)
    assert built == []
    assert second.fingerprint == first.fingerprint
    assert second.source.locations([0]) == [(str(moved), 1)]
    moved.write_bytes(moved.read_bytes().replace(b"Ask 3", b"Ask 9"))
    assert load_pool(moved).source.originals([3])[0]["instruction"] == "Ask 9 é"
    assert built == [1]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_damaged_store_is_made_again(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path / f"a.{kind}")
    pool = load_pool(path)
    folder = pool.source.folder  # type: ignore[attr-defined]
    originals, ids, places = (getattr(pool.source, name)(range(5)) for name in ("originals", "ids", "locations"))
    draw = random.Random(0)
    names = sorted(file.name for file in folder.iterdir() if file.stat().st_size)
    assert {"ids.npy", "lines.npy", "offsets.npy", "sums.npy", "meta.json", "reasons.json"} <= {*names}
    for name in names:
        for damage in ("cut", "flipped", "flipped", "removed"):
            file = folder / name
            data = bytearray(file.read_bytes())
            if damage == "removed":
                file.unlink()
            elif damage == "cut":
                os.truncate(file, len(data) // 2)
            else:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                file.write_bytes(data)
            again = load_pool(path)
            assert again.fingerprint == pool.fingerprint
            assert again.source.originals(range(5)) == originals, (name, damage)
            assert again.source.ids(range(5)) == ids, (name, damage)
            assert again.source.locations(range(5)) == places, (name, damage)


@pytest.mark.parametrize("name", ["lines.bin", "offsets.npy", "sums.npy"])
def test_a_row_that_is_damaged_after_loading_is_one_sentence_and_the_next_load_stores_it_again(
    tmp_path: Path, name: str
) -> None:
    path = _write(tmp_path / "a.jsonl")
    pool = load_pool(path)
    file = pool.source.folder / name  # type: ignore[attr-defined]
    data = bytearray(file.read_bytes())
    data[-8 if name == "offsets.npy" else -4] ^= 4
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged; run the same command again to rewrite it"):
        pool.read([4])
    assert load_pool(path).read([4])[0].instruction == ROWS[4]["instruction"]


def test_a_killed_load_leaves_nothing_that_a_later_one_keeps(tmp_path: Path) -> None:
    script = (
        "import os, sys; import siftune.data.build as b; from siftune.data.load import load_pool\n"
        "b.later_duplicates = lambda ids: os.kill(os.getpid(), 9)\nload_pool(sys.argv[1])"
    )
    path = _write(tmp_path / "a.jsonl")
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    pools = tmp_path / "siftune-cache" / "pools"
    assert len(list(pools.iterdir())) == 1
    assert load_pool(path).source.originals([4]) == [ROWS[4]]
    assert len(list(pools.iterdir())) == 1
    assert not list(pools.glob(".*"))


def test_two_writers_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.jsonl")
    build = load_module._build

    def overtaken(*given: Any) -> str:
        monkeypatch.setattr(load_module, "_build", build)
        load_pool(path)
        return build(*given)

    monkeypatch.setattr(load_module, "_build", overtaken)
    assert load_pool(path).source.originals([4]) == [ROWS[4]]
    assert len(list((tmp_path / "siftune-cache" / "pools").iterdir())) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.jsonl")
    build = load_module._build

    def changing(*given: Any) -> str:
        path.write_bytes(jsonl(ROWS[:2]))
        return build(*given)

    monkeypatch.setattr(load_module, "_build", changing)
    with pytest.raises(UserError, match="changed while it was read"):
        load_pool(path)
    assert not list((tmp_path / "siftune-cache" / "pools").iterdir())


def test_an_unusable_cache_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pools: .*choose another"):
        load_pool(_write(tmp_path / "a.jsonl"), cache=_put(tmp_path / "file", b""))
    assert temporary_beside(tmp_path / "x").parent == tmp_path


def test_real_pools_load_whole(shared: Path) -> None:
    names = ("common_sense", "reasoning", "math", "code")
    pool = load_pool([shared / "data" / "pools" / f"{name}.jsonl.gz" for name in names])
    assert (len(pool), pool.format, dict(pool.reasons)) == (38_969, "alpaca", {})
    last = pool.source.originals([38_968])[0]
    assert set(last) == {"instruction", "input", "output", "source"}
    assert pool.read([38_968])[0].output == last["output"]
