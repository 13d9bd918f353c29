"""Arrow types: what each is read as, where it is text, and the columns that are refused by name."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.records import Pool

TEXT = "an answer"


def _json(texts: list[str | None]) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _time(value: int, kind: pa.DataType) -> pa.Array:
    return pa.array([value, None], pa.int64()).cast(kind)


def _values() -> dict[str, tuple[pa.Array, Any]]:
    """A column of two rows (most with a null in the second) for every type, and its first value."""
    amount = decimal.Decimal("1.23")
    second = datetime.datetime(1970, 1, 1, 0, 0, 1)
    lists = {
        "list": pa.list_(pa.string()),
        "large_list": pa.large_list(pa.string()),
        "fixed_size_list": pa.list_(pa.string(), 1),
        "list_view": pa.list_view(pa.string()),
        "large_list_view": pa.large_list_view(pa.string()),
        "list of dictionary": pa.list_(pa.dictionary(pa.int32(), pa.string())),
        "list of string_view": pa.list_(pa.string_view()),
    }
    binaries = {
        "binary": pa.binary(),
        "large_binary": pa.large_binary(),
        "fixed": pa.binary(1),
        "view": pa.binary_view(),
    }
    return {
        "null": (pa.nulls(2), None),
        "bool": (pa.array([True, None]), True),
        **{str(kind): (pa.array([1, None], kind), 1) for kind in (pa.int8(), pa.uint64(), pa.float16(), pa.float64())},
        **{str(kind): (pa.array([amount, None], kind), amount) for kind in (
            pa.decimal32(5, 2), pa.decimal64(9, 2), pa.decimal128(9, 2), pa.decimal256(50, 2))},
        **{str(kind): (pa.array([TEXT, None], kind), TEXT) for kind in (pa.string(), pa.large_string(), pa.string_view())},
        **{name: (pa.array([b"x", None], kind), b"x") for name, kind in binaries.items()},
        "date32": (pa.array([second.date(), None]), second.date()),
        "date64": (pa.array([second.date(), None], pa.date64()), second.date()),
        "time32": (_time(1, pa.int64()).cast(pa.int32()).cast(pa.time32("s")), second.time()),
        "time64": (_time(10**9, pa.time64("ns")), second.time()),
        **{f"timestamp {unit}": (_time(10**power, pa.timestamp(unit)), second)
           for unit, power in (("s", 0), ("ms", 3), ("us", 6), ("ns", 9))},
        "timestamp with zone": (_time(1, pa.timestamp("s", "UTC")), second.replace(tzinfo=datetime.UTC)),
        **{f"duration {unit}": (_time(10**power, pa.duration(unit)), datetime.timedelta(seconds=1))
           for unit, power in (("s", 0), ("ms", 3), ("us", 6), ("ns", 9))},
        "interval": (pa.array([pa.MonthDayNano([1, 2, 3]), None]), (1, 2, 3)),
        **{name: (pa.array([[TEXT], None], kind), [TEXT]) for name, kind in lists.items()},
        "struct": (pa.array([{"a": 1}, None]), {"a": 1}),
        "struct of string_view": (pa.array([{"a": TEXT}, None], pa.struct([("a", pa.string_view())])), {"a": TEXT}),
        "map": (pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())), [("k", 1)]),
        "dictionary": (pa.array([TEXT, None]).dictionary_encode(), TEXT),
        "run_end_encoded": (
            pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array([TEXT, None])), TEXT),
        "uuid": (pa.array([uuid.UUID(int=5).bytes, None], pa.binary(16)).cast(pa.uuid()), uuid.UUID(int=5)),
        "bool8": (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None], pa.int8())), True),
        "opaque": (pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "t", "v"), pa.array([TEXT, None])), TEXT),
        "tensor": (pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(4).reshape(2, 2)), [0, 1]),
        "json": (_json(['{"a": [1, null]}', None]), {"a": [1, None]}),
        "json text": (_json(['"one\\n\\"two\\""', None]), 'one\n"two"'),
        "list of json": (pa.ListArray.from_arrays(pa.array([0, 2, 2], pa.int32()), _json(['{"a": 1}', "[2]"])), [{"a": 1}, [2]]),
        "struct of json": (pa.StructArray.from_arrays([_json(['"x"', "1"])], ["a"]), {"a": "x"}),
        "map of json": (pa.MapArray.from_arrays(pa.array([0, 1, 1], pa.int32()), pa.array(["k"]), _json(["[1]"])), [("k", [1])]),
    }  # fmt: skip


VALUES = _values()
TEXTS = {"string", "large_string", "string_view", "dictionary", "run_end_encoded", "opaque", "json text"}


def _write(table: pa.Table, folder: Path) -> Path:
    path = folder / "pool.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("name", VALUES)
def test_a_carried_column_is_its_python_value_in_every_type(name: str, tmp_path: Path) -> None:
    column, value = VALUES[name]
    pool = load_pool(_write(pa.table({"text": pa.array([TEXT, TEXT]), "other": column}), tmp_path))
    assert pool.source.originals([1, 0])[1]["other"] == value
    pool.source.write([1, 0], tmp_path / "out.jsonl")
    again = load_pool(tmp_path / "out.jsonl", cache=tmp_path / "cache")
    assert again.source.ids([0, 1]) == pool.source.ids([1, 0]), "ids are those of the JSON form"
    if name != "interval":  # Parquet has none
        pool.source.write([1, 0], tmp_path / "out.parquet")
        assert load_pool(tmp_path / "out.parquet").source.originals([1])[0]["other"] == value


@pytest.mark.parametrize("name", VALUES)
def test_a_text_column_is_text_or_a_bad_row_in_every_type(name: str, tmp_path: Path) -> None:
    column, _ = VALUES[name]
    table = pa.table({"instruction": pa.array(["?", "?"]), "output": column})
    first = pa.table({"instruction": pa.array(["?"]), "output": pa.array(["!"])})
    pool = load_pool([_write(table, tmp_path), first], on_bad_row="skip", format="alpaca")
    if name in TEXTS:
        assert pool.read([0])[0].output == VALUES[name][1]
        assert dict(pool.reasons) == {1: "missing field: output"}
    else:
        assert pool.reasons[0].startswith(("wrong type: output is ", "missing field: output"))


REFUSED = {
    "time zone": _time(1, pa.timestamp("us", "Mars/Base")),
    "two fields": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"]),
    "sparse union": pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array(["a", "b"]), pa.array([1, 2])]),
    "dense union": pa.UnionArray.from_dense(
        pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array(["a"]), pa.array([1])]
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("column", ["text", "other"])
def test_a_type_without_a_python_value_is_refused_at_load_with_the_columns_name(
    name: str, column: str, tmp_path: Path
) -> None:
    table = pa.table({"text": pa.array([TEXT, TEXT])} | {column: REFUSED[name]})
    with pytest.raises(UserError, match=f"pool.arrow: the column '{column}' has the Arrow type"):
        load_pool(_write(table, tmp_path), on_bad_row="skip")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([TEXT]), pa.array([TEXT])], names=["text", "text"])
    with pytest.raises(UserError, match="has the column 'text' twice"):
        load_pool(_write(table, tmp_path))


def test_a_value_beyond_pythons_range_is_a_bad_row_that_names_its_column(tmp_path: Path) -> None:
    column = pa.array([1, 2**62], pa.int64()).cast(pa.timestamp("s"))
    pool = load_pool(_write(pa.table({"text": [TEXT, TEXT], "when": column}), tmp_path), on_bad_row="skip")
    assert list(pool.reasons) == [1]
    assert pool.reasons[1].startswith("wrong type: when: ")
    bad = pa.table({"text": [TEXT, TEXT], "facts": _json(["1", "{"])})
    pool = load_pool(_write(bad, tmp_path), on_bad_row="skip")
    assert pool.reasons[1].startswith("wrong type: facts: a JSON column holds text that is no JSON")
    deep = pa.table({"text": [TEXT, TEXT], "facts": _json(["1", "[" * 100 + "]" * 100])})
    assert "levels deep" in load_pool(_write(deep, tmp_path), on_bad_row="skip").reasons[1]


# --- Json() columns of datasets ---------------------------------------------------------------------------------------

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
MIXED: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": 'one\n"two"'}, {"role": "assistant", "content": 'x "y"'}], "facts": {"a": 1}},
    {"messages": [{"role": "user", "content": "q"}, CALL], "facts": [1, {"b": ["c", None]}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "facts": "plain"},
]  # fmt: skip


def _dataset(folder: Path) -> datasets.Dataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MIXED))
    return datasets.Dataset.from_json(str(path), cache_dir=str(folder / "cache"))


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no Json()")
def test_json_columns_are_exactly_what_the_dataset_gives(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    assert "Json" in repr(dataset.features), "one row differs, so datasets types the column by itself"
    dataset.to_parquet(tmp_path / "pool.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for source in (dataset, tmp_path / "pool.parquet", tmp_path / "saved"):
        pool: Pool = load_pool(source)
        assert pool.source.originals(range(3)) == [dataset[index] for index in range(3)]
        assert [row.output for row in pool.read([0, 2])] == ['x "y"', "r"]
        pool.source.write([2, 0], tmp_path / "out.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert lines == [dataset[2], dataset[0]]
        pool.source.write([2, 0], tmp_path / "out.parquet")
        assert pq.read_schema(tmp_path / "out.parquet").types == dataset.data.schema.types


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no Json()")
def test_json_answers_are_texts_and_other_values_bad_rows() -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "completion": datasets.Json()})
    rows = {"prompt": ["a", "b", "c"], "completion": ['one\n"two"', {"x": 1}, [2]]}
    pool = load_pool(datasets.Dataset.from_dict(rows, features=features), on_bad_row="skip")
    assert pool.read([0])[0].output == 'one\n"two"'
    assert dict(pool.reasons) == {
        1: "wrong type: completion is an object, not a string",
        2: "wrong type: completion is a list, not a string",
    }
