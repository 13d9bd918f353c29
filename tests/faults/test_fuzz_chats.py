"""Fuzzed chats with tools, and fuzzed Arrow tables: a row or a reason, a table or one sentence; never anything else."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from siftune.data.bad_row import BadRow
from siftune.data.formats import Reading, text_of
from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.models.tokenize_rows import answer_tokens
from siftune.offline.rating import turns_of
from siftune.records import Pool
from tests.tiny import tiny_tokenizer
from tests.unit.test_chat_rows import AGENT, TOOLS_TEMPLATE

HOSTILE: tuple[Any, ...] = (None, "", " ", "{", "[]", "[1]", '{"name": 3}', 0, -1.5, True, [], {}, [[]], ["text"], {"type": "image"}, "<think>", "\x00")  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool", "gpt", "function_call", "nobody", None)


def mutated(draw: random.Random, value: Any) -> Any:
    """The value with something inside it dropped, doubled, or replaced."""
    if draw.random() < 0.03:
        return draw.choice(HOSTILE)
    if isinstance(value, dict):
        kept = {key: mutated(draw, item) for key, item in value.items() if draw.random() > 0.02}
        if "role" in kept and draw.random() < 0.05:
            kept["role"] = draw.choice(ROLES)
        return kept if draw.random() > 0.03 else json.dumps(kept)
    if isinstance(value, list):
        items = [mutated(draw, item) for item in value if draw.random() > 0.02]
        return items + items[-1:] if draw.random() < 0.05 else items
    return value


def reason_of(reading: Reading, original: dict[str, Any]) -> str | None:
    try:
        reading.check(original)
    except BadRow as bad:
        return str(bad)
    return None


@pytest.mark.parametrize("seed", range(4))
def test_any_chat_with_tools_is_a_row_or_a_reason(seed: int) -> None:
    draw, tokenizer = random.Random(seed), tiny_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    reading, good = Reading("messages"), 0
    extras = {"system": "Be brief.", "weight": 1}
    for number in range(150):
        original = mutated(draw, json.loads(json.dumps(AGENT | (extras if number % 3 == 0 else {}))))
        if not isinstance(original, dict):
            continue
        if (reason := reason_of(reading, original)) is not None:
            assert reason.isprintable()
            assert len(reason) < 300
            continue
        good += 1
        row = reading.row(number, "", original)
        assert row.output.strip()
        assert all(isinstance(message["content"], str) for message in row.messages)
        assert all(turn.instruction.strip() or turn.output.strip() for turn in turns_of(row))
        for use in (lambda row=row: text_of(row, tokenizer), lambda row=row: text_of(row)):
            with contextlib.suppress(BadRow):
                assert use().strip()
        with contextlib.suppress(BadRow):
            ids, labels = answer_tokens(row, tokenizer, text="chat", max_length=3000)
            assert labels[-1] == ids[-1] != -100
    assert good > 10, "the fuzzer leaves too few rows good"


LEAVES: tuple[Callable[[], pa.DataType], ...] = (
    pa.null, pa.bool_, pa.int8, pa.uint64, pa.float16, pa.float64, pa.string, pa.large_string, pa.string_view,
    pa.binary, pa.large_binary, pa.binary_view, lambda: pa.binary(3), pa.date32, pa.date64, lambda: pa.time64("ns"),
    lambda: pa.timestamp("ns", "UTC"), lambda: pa.timestamp("s", "No/Where"), lambda: pa.duration("ms"),
    lambda: pa.decimal128(9, 2), lambda: pa.decimal256(50, 2), pa.month_day_nano_interval, pa.json_, pa.uuid, pa.bool8,
    lambda: pa.dictionary(pa.int32(), pa.string()), lambda: pa.run_end_encoded(pa.int32(), pa.string()),
)  # fmt: skip


def any_type(draw: random.Random, depth: int = 0) -> pa.DataType:
    if depth > 2 or draw.random() < 0.45:
        return draw.choice(LEAVES)()
    inner = any_type(draw, depth + 1)
    kind = draw.randrange(8)
    if kind < 5:
        makers = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda item: pa.list_(item, 2))
        return makers[kind](inner)
    if kind == 5:
        return pa.map_(pa.string(), inner)
    other = any_type(draw, depth + 1)
    return pa.struct([("a", inner), ("b" if draw.random() < 0.9 else "a", other)])


def pool_or_sentence(path: Path, cache: Path) -> Pool | str:
    try:
        return load_pool(path, cache=cache, on_bad_row="skip")
    except UserError as refused:
        return str(refused)


@pytest.mark.parametrize("seed", range(4))
def test_any_arrow_type_is_read_or_refused_by_the_columns_name(seed: int, tmp_path: Path) -> None:
    draw, read = random.Random(seed), 0
    for number in range(25):
        kind = any_type(draw)
        path = tmp_path / f"{number}.arrow"
        try:
            table = pa.table({"text": ["one", "two"], "odd": pa.nulls(2, kind)})
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        except (pa.ArrowException, ValueError, TypeError):  # a type of which pyarrow cannot build or write a column
            continue
        pool = pool_or_sentence(path, tmp_path / "cache")
        if isinstance(pool, str):
            assert "'odd'" in pool, (kind, pool)
            continue
        read += 1
        assert [row["text"] for row in pool.source.originals([1, 0])] == ["two", "one"]
        pool.source.write([0], tmp_path / f"{number}.jsonl")
        with contextlib.suppress(UserError):  # Parquet lacks some types
            pool.source.write([1], tmp_path / f"{number}.parquet")
    assert read > 5
