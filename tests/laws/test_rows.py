"""Laws of the rows' way in and out: nothing is lost, changed or invented, whatever the bytes; memory stays."""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune.data.load import counts, load_pool
from siftune.errors import UserError
from siftune.records import Pool

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
ANSWER = TEXT.filter(lambda text: bool(text.strip()))
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT)
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
EXTRA = st.dictionaries(TEXT, VALUE, max_size=3)


@st.composite
def alpaca_row(draw: st.DrawFn) -> dict[str, Any]:
    named = {"instruction": draw(TEXT), "output": draw(ANSWER)}
    if draw(st.booleans()):
        named["input"] = draw(TEXT)
    items = [
        *named.items(),
        *(item for item in draw(EXTRA).items() if item[0] not in {*named, "messages", "conversations"}),
    ]
    return dict(draw(st.permutations([item for item in items if item[0] != "input" or "input" in named])))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def load(folder: str, data: bytes, name: str = "in.jsonl", **options: Any) -> Pool:
    path = Path(folder, name)
    path.write_bytes(data)
    return load_pool(path, cache=Path(folder, "cache"), **options)


def exact(value: Any) -> str:
    """Values, their types and the order of their keys: 1, 1.0 and True differ, -0.0 and 0.0 too."""
    return repr(value)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(alpaca_row(), min_size=1, max_size=6), ascii=st.booleans(), way=st.sampled_from(["lines", "array", "indented"]))  # fmt: skip
def test_any_json_rows_come_back_with_values_types_and_key_order(
    rows: list[dict[str, Any]], ascii: bool, way: str
) -> None:
    if way == "lines":
        data, name = "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows), "in.jsonl"
    else:
        data, name = json.dumps(rows, ensure_ascii=ascii, indent=1 if way == "indented" else None), "in.json"
    with tempfile.TemporaryDirectory() as folder:
        pool = load(folder, data.encode(), name)
        assert exact(pool.source.originals(range(len(rows)))) == exact(rows)
        for suffix in (".jsonl", ".json", ".jsonl.gz"):
            pool.source.write(range(len(rows)), Path(folder, "out" + suffix))
            again = load_pool(Path(folder, "out" + suffix), cache=Path(folder, "cache"))
            assert exact(again.source.originals(range(len(rows)))) == exact(rows)
            assert again.fingerprint == pool.fingerprint
        written = Path(folder, "out.jsonl").read_bytes()
        if way == "lines":
            assert written == data.encode() + b"\n"
        assert exact([json.loads(line) for line in written.split(b"\n") if line]) == exact(rows)
        assert json.loads(Path(folder, "out.json").read_bytes()) == rows
        assert gzip.decompress(Path(folder, "out.jsonl.gz").read_bytes()) == written


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"text": ANSWER, "n": st.none() | st.integers(-(2**63), 2**63 - 1),
        "x": st.none() | st.floats(), "l": st.none() | st.lists(TEXT, max_size=2)}), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_table_rows_come_back_in_any_order(rows: list[dict[str, Any]], order: Any) -> None:
    schema = pa.schema([("text", pa.string()), ("n", pa.int64()), ("x", pa.float64()), ("l", pa.list_(pa.string()))])
    rows = [{name: row[name] for name in schema.names} for row in rows]
    chosen = order.sample(range(len(rows)), k=order.randint(0, len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), Path(folder, "in.parquet"))
        pool = load_pool(Path(folder, "in.parquet"), cache=Path(folder, "cache"))
        assert exact(pool.source.originals(chosen)) == exact([rows[row] for row in chosen])
        pool.source.write(chosen, Path(folder, "out.parquet"))
        back = pq.read_table(Path(folder, "out.parquet"))
        assert back.schema.equals(schema)
        assert exact(back.to_pylist()) == exact([rows[row] for row in chosen])


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), data=st.data())
def test_permuting_rows_permutes_ids_and_keeps_the_number_of_duplicates(rows: list[str], data: st.DataObject) -> None:
    places = data.draw(st.permutations(range(len(rows))))

    def lines(names: list[str]) -> bytes:
        return b"\n".join(json.dumps({"text": name}).encode() for name in names)

    with tempfile.TemporaryDirectory() as folder:
        pool = load(folder, lines(rows), duplicates="drop")
        moved = load(folder, lines([rows[place] for place in places]), duplicates="drop")
        ids = pool.source.ids(range(len(rows)))
        assert moved.source.ids(range(len(rows))) == [ids[place] for place in places]
        assert pool.duplicates == moved.duplicates == len(rows) - len(set(rows))
        for row, reason in pool.reasons.items():
            assert reason == f"duplicate of row {rows.index(rows[row])}"
        assert len(pool.eligible) == len(set(rows))


# --- any bytes at all -----------------------------------------------------------------------------------------------

SEEDS = [
    b'{"instruction": "a", "output": "b", "n": [1.5, null, true]}',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    b'{"prompt": "a", "completion": "b \\ud83d\\ude00"}',
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
    b'{"text": "caf\xc3\xa9, \\u0000"}',
    b'[{"text": "a"}, {"text": "b"}]',
    b'instruction,output\na,"b\nc"\n',
]
PIECE = st.sampled_from([*SEEDS, b"\n", b"\r\n", b"\0", b"[", b"]", b'"', b",", b"{", b"}", b"\\", b"NaN", b"\xef\xbb\xbf", b"\xff", b"9" * 5000])  # fmt: skip


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    data = bytearray(b"".join(draw(st.lists(PIECE | st.binary(max_size=8), max_size=12))))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            place = draw(st.integers(0, len(data) - 1))
            data[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=3))
    return bytes(data)


def survives(data: bytes, name: str) -> None:
    """One sentence, or a pool whose rows all are good or have a reason, and good rows come back."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            pool = load(folder, data, name, on_bad_row="skip")
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            str(error).encode()
            return
        good = pool.eligible.tolist()
        assert len(good) + len(pool.reasons) == len(pool) == len(pool.source.ids(range(len(pool))))
        assert sum(counts(pool.reasons).values()) == len(pool.reasons)
        assert all(row.output.strip() for row in pool.read(good))
        lines = [line for _, line in pool.source.locations(range(len(pool)))]
        assert lines == sorted(lines)
        if name == "a.jsonl":
            assert lines == [n for n, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1) if line.strip(b"\r") and not line.strip(b"\r").isspace()]  # fmt: skip
        "".join(pool.reasons.values()).encode()
        pool.source.write(good, Path(folder, "out.jsonl"))
        again = load_pool(Path(folder, "out.jsonl"), cache=Path(folder, "cache"), format=pool.format)
        assert again.source.ids(range(len(good))) == pool.source.ids(good)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_any_bytes_give_rows_with_reasons_or_one_sentence(name: str) -> None:
    settings(max_examples=120, deadline=None)(given(mangled())(lambda data: survives(data, name)))()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_packed_files_give_rows_with_reasons_or_one_sentence(name: str, tmp_path: Path) -> None:
    whole = tmp_path / name
    pool = load(str(tmp_path), b"\n".join([SEEDS[0]] * 50))
    if name.endswith(".gz"):
        whole.write_bytes(gzip.compress(b"\n".join([SEEDS[0]] * 50)))
    else:
        pool.source.write(range(50), whole)
    sound = whole.read_bytes()

    def damaged(place: int, byte: int, cut: bool) -> None:
        place %= len(sound)
        survives(sound[:place] if cut else sound[:place] + bytes([byte]) + sound[place + 1 :], name)

    test = given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())(damaged)
    settings(max_examples=40, deadline=None)(test)()


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_any_bytes_many_times(name: str) -> None:
    settings(max_examples=20_000, deadline=None)(given(mangled())(lambda data: survives(data, name)))()


# --- memory and time ------------------------------------------------------------------------------------------------

PASS = """
import json, sys
from pathlib import Path
from siftune.data.load import load_pool
from siftune.runs.folder import peak_memory_mb
source, out, cache = sys.argv[1:]
pool = load_pool(source, cache=cache)
for shard in pool.shards():
    assert len(pool.read(range(shard.start, shard.stop))) == len(shard)
pool.source.write(range(0, len(pool), 2), Path(out))
print(json.dumps([len(pool), peak_memory_mb()]))
"""


def peak_megabytes(folder: Path, rows: int, suffix: str = ".jsonl") -> int:
    """Peak memory of a process that loads, reads and writes that many distinct rows of about 300 bytes."""
    path = folder / f"{rows}.jsonl"
    with open(path, "w") as handle:
        for row in range(rows):
            handle.write(json.dumps({"instruction": f"Question {row} " + "why " * 20, "input": "", "output": f"{row} " * 20}) + "\n")  # fmt: skip
    if suffix == ".parquet":
        load_pool(path, cache=folder / "cache").source.write(range(rows), path.with_suffix(suffix))
        # What is read at once is a row group, whose size is the file's own.
        pq.write_table(pq.read_table(path.with_suffix(suffix)), path.with_suffix(suffix), row_group_size=5000)
    given = [str(path.with_suffix(suffix)), str(folder / f"out{suffix}"), str(folder / f"cache-{rows}")]
    done = subprocess.run([sys.executable, "-c", PASS, *given], capture_output=True, text=True, check=True)
    count, peak = json.loads(done.stdout)
    assert count == rows
    return int(peak)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_pool(tmp_path: Path, suffix: str) -> None:
    small, large = (peak_megabytes(tmp_path, rows, suffix) for rows in (10_000, 100_000))
    # 90,000 more rows are 27 MB of text; as Python objects they would be above 100 MB. The pool's own arrays, and for
    # Parquet the pages that Arrow's allocator holds on to, are allowed for.
    assert large - small < (60 if suffix == ".parquet" else 40), (small, large)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_rows_fit_into_two_gigabytes_and_about_a_minute(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert peak_megabytes(tmp_path, 1_000_000) < 2_000
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 180, "load, read and write of a million rows"
    assert os.path.getsize(tmp_path / "out.jsonl") > 100_000_000
