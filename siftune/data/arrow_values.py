"""Arrow columns as Python values, and the columns that cannot be read as such, refused by name.

Every type is read as the value that pyarrow gives, except `arrow.json` (the `Json()` of `datasets`), which becomes the
value that its text holds, at any depth, as `dataset[i]` does. Dictionary-encoded, run-end-encoded and view types are
stored as the plain type of their values: an Arrow file cannot hold changing dictionaries, and rows of views cannot be
taken. Cost: none for columns without JSON; one parse per JSON value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, is_failure, one_line

Convert = Callable[[Any], Any]

DEEPEST = 60
"""Levels of lists and objects in a row, itself included; Arrow's own files stop at 64."""


class NotJson(ValueError):
    """The text of a JSON column that is no JSON."""


def deeper_than(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` levels deep."""
    level = [value]
    for _ in range(limit):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


# --- columns that can be stored ---------------------------------------------------------------------------------------


def plain_columns(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    """The batch with every column in a type that can be stored, taken and read as Python values.

    Raises `UserError` with the file's `name` and the column's for one that cannot.
    """
    duplicate = next((column for column in batch.schema.names if batch.schema.names.count(column) > 1), None)
    if duplicate is not None:
        raise UserError(f"{name} has the column {duplicate!r} twice; rename one of them")
    arrays, fields = [], []
    for column, field in zip(batch.columns, batch.schema, strict=True):
        try:
            target = _plain_type(field.type)
            if target != field.type:
                column, field = _cast(column, target), field.with_type(target)
            _probe(target)
        except Exception as error:  # each type of Arrow fails with an error of its own
            if not is_failure(error):
                raise
            raise UserError(
                f"{name}: the column {field.name!r} has the Arrow type {_short(field.type)}, which cannot be read "
                f"({one_line(error)}); convert or remove the column"
            ) from error
        arrays.append(column)
        fields.append(field)
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields, metadata=batch.schema.metadata))


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 80 else text[:77] + "..."


def _cast(column: pa.Array, target: pa.DataType) -> pa.Array:
    if isinstance(column, pa.RunEndEncodedArray):
        column = pc.run_end_decode(column)
    if column.type == target:
        return column
    try:
        cast = column.cast(target)
        cast.validate(full=True)
    except pa.ArrowException:  # Arrow's cast of some nested lists writes buffers that are too short
        cast = pa.array(column.to_pylist(), target)
    return cast


@cache
def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The same type, with plain types in place of dictionaries, run ends and views, at any depth."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain_type(kind.value_type)
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        if len(set(names)) < len(names):
            raise ValueError("an object with two fields of one name")
        return pa.struct([_plain_field(kind.field(index)) for index in range(kind.num_fields)])
    if types.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field), keys_sorted=kind.keys_sorted)
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(_plain_field(kind.value_field))
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    target = _plain_type(field.type)
    return field if target == field.type else field.with_type(target)


@cache
def _probe(kind: pa.DataType) -> None:
    """Raise where values of this type cannot be stored in an Arrow file, taken by position, or read."""
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        pa.scalar(0, pa.int64()).cast(kind).as_py()  # a time zone that is not known here
    for index in range(kind.num_fields):
        _probe(kind.field(index).type)
    if pa.types.is_union(kind):
        raise ValueError("values of several types")
    empty = pa.nulls(1, kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else pa.nulls(1, kind)
    if isinstance(kind, pa.BaseExtensionType):
        empty = kind.wrap_array(empty)
    batch = pa.record_batch([empty], names=["column"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    pa.ipc.open_file(sink.getvalue()).get_batch(0).take(pa.array([0])).to_pylist()
    if converter(kind) is None and isinstance(kind, pa.BaseExtensionType):
        _probe(kind.storage_type)


# --- rows as Python values --------------------------------------------------------------------------------------------


def python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch as objects. Raises whatever pyarrow raises for a value that Python cannot hold, and
    `NotJson`.

    >>> python_rows(pa.record_batch({"text": ["a"]}))
    [{'text': 'a'}]
    """
    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in batch.schema:
        convert = converter(field.type)
        if convert is not None:
            for row in rows:
                row[field.name] = convert(row[field.name])
    return rows


@cache
def converter(kind: pa.DataType) -> Convert | None:
    """What is left to do to a value that pyarrow gives for this type; None where it is complete."""
    types = pa.types
    if isinstance(kind, pa.JsonType):
        return _json
    if isinstance(kind, pa.BaseExtensionType):
        return None
    if types.is_struct(kind):
        inner = {kind.field(index).name: converter(kind.field(index).type) for index in range(kind.num_fields)}
        changed = {name: convert for name, convert in inner.items() if convert is not None}
        return _struct(changed) if changed else None
    if types.is_map(kind):
        key, item = converter(kind.key_type), converter(kind.item_type)
        return _pairs(key or _same, item or _same) if key or item else None
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        each = converter(kind.value_type)
        return None if each is None else lambda value: None if value is None else [each(item) for item in value]
    return None


def _same(value: Any) -> Any:
    return value


def _json(text: str | None) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotJson(f"a JSON column holds text that is no JSON ({one_line(error, 60)})") from error
    if text.count("{") + text.count("[") > DEEPEST and deeper_than(value, DEEPEST):
        raise NotJson(f"a JSON column is nested more than {DEEPEST} levels deep")
    return value


def _struct(changed: dict[str, Convert]) -> Convert:
    def convert(value: Any) -> Any:
        return value if value is None else {**value, **{name: each(value[name]) for name, each in changed.items()}}

    return convert


def _pairs(key: Convert, item: Convert) -> Convert:
    return lambda value: value if value is None else [(key(name), item(content)) for name, content in value]


def failing_column(batch: pa.RecordBatch) -> str:
    """The name of the first column whose value in this batch cannot be read."""
    for index, name in enumerate(batch.schema.names):
        try:
            python_rows(
                pa.RecordBatch.from_arrays([batch.column(index)], schema=pa.schema([batch.schema.field(index)]))
            )
        except Exception:
            return str(name)
    return "?"
