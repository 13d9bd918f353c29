"""Lengths in words, against a count by a regular expression, in every row format and on real rows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from siftune.data.load import load_pool
from siftune.offline.length import Length
from siftune.offline.output_length import OutputLength
from tests.pools import make_pool


def words(*parts: str) -> int:
    return sum(len(re.findall(r"\S+", part)) for part in parts)


def test_alpaca_rows_count_instruction_and_input_or_the_output() -> None:
    rows = [
        {"instruction": "Add two\tnumbers.", "input": " 1 and  2 ", "output": "three\n\nor 3"},
        {"instruction": "", "input": "", "output": "x"},
        {"instruction": "a\u00a0b c", "input": "", "output": "日本語 です"},
    ]
    pool = make_pool(rows, {})
    assert Length().fit(pool).score(pool).values.tolist() == [6.0, 0.0, 3.0]
    assert OutputLength().fit(pool).score(pool).values.tolist() == [3.0, 1.0, 2.0]


def test_chat_rows_count_all_turns_before_the_last_answer_or_that_answer() -> None:
    turns = [("user", "one two"), ("assistant", "three"), ("user", "four"), ("assistant", "five six seven")]
    pool = make_pool([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    assert Length().score(pool).values.tolist() == [4.0]
    assert OutputLength().score(pool).values.tolist() == [3.0]


def test_plain_text_is_an_answer_without_a_question() -> None:
    pool = make_pool([{"text": "one two"}, {"text": "three"}])
    assert Length().score(pool).values.tolist() == [0.0, 0.0]
    assert OutputLength().score(pool).values.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("name", ["code", "math"])
def test_real_rows(shared: Path, name: str) -> None:
    pool = load_pool(shared / "data" / "pools" / f"{name}_heldout.jsonl.gz", on_bad_row="skip")
    originals = pool.source.originals(pool.eligible.tolist())
    question, answer = Length().score(pool).values, OutputLength().score(pool).values
    expected = [words(row["instruction"], row.get("input") or "") for row in originals]
    np.testing.assert_array_equal(question[pool.eligible], np.array(expected, np.float32))
    np.testing.assert_array_equal(answer[pool.eligible], np.array([words(row["output"]) for row in originals]))
