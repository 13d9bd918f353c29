"""When a reply of the writing stage ends early: never inside a row, always once the rows are there, and not for less."""

from __future__ import annotations

import random

import pytest

from siftune.models.generate import Ending
from siftune.offline.daar.endings import LONGEST_UNIT, REPEATED, REPETITION, WITHOUT_ROW, end_after, repeats_itself
from siftune.offline.daar.parsing import parse_rows
from tests.unit.test_daar_parsing import CODE, FORMS, FRUIT, PAIR

WORDS = ["the", "a", "of", "row", "sum", "list", "word", "page", "tree", "north", "water", "seven", "small", "light"]


@pytest.mark.parametrize("form", FORMS)
def test_one_row_is_complete_where_the_next_begins_and_no_row_is_cut(form: str) -> None:
    text = FORMS[form]
    endings = [ending for end in range(1, len(text) + 1) if (ending := end_after(1)(text[:end])) is not None]
    kept = [[item.row for item in parse_rows(text[: ending.length]) if item.reason is None] for ending in endings]
    assert {ending.finish_reason for ending in endings} <= {"stop"}
    assert all(rows[0] == FRUIT for rows in kept)
    assert kept[:1] == [[FRUIT]] or "\r" in text, "a reply with a second row did not end after the first"


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("json")])
def test_the_last_row_of_a_labelled_reply_is_left_to_the_model(form: str) -> None:
    assert end_after(2)(FORMS[form]) is None


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("json")])
def test_a_row_in_json_is_complete_at_its_brace(form: str) -> None:
    ending = end_after(2)(FORMS[form])
    assert ending is not None
    assert [item.row for item in parse_rows(FORMS[form][: ending.length])] == PAIR


def test_rows_that_cannot_be_used_are_not_counted() -> None:
    text = "Instruction: A\nOutput: ...\n\nInstruction: B\nOutput: C\n\nInstruction: D\n"
    assert end_after(1)(text) == Ending(text.index("\n\nInstruction: D"), "stop")
    assert end_after(2)(text) is None


def test_code_with_empty_lines_goes_on() -> None:
    text = f"Instruction: {CODE['instruction']}\nOutput: {CODE['output']}\n\n\nThen print it:\n\n```python\nprint(1)\n"
    assert end_after(1)(text) is None


def test_a_reply_inside_a_thought_goes_on() -> None:
    hums = " ".join(random.Random(0).choices(WORDS, k=WITHOUT_ROW))
    assert end_after(1)("<think>\nInstruction: A\nOutput: B\n\nInstruction: C\nOutput: D\n" + hums) is None
    closed = "<think>no</think>\nInstruction: A\nOutput: B\n\nInstruction: C"
    assert end_after(1)(closed) == Ending(closed.index("\n\nInstruction: C"), "stop")


@pytest.mark.parametrize("unit", [1, 7, 63, LONGEST_UNIT])
def test_repetition_is_exact_and_long(unit: str | int) -> None:
    chance = random.Random(unit)
    piece = "".join(chance.choice("abcdefghij ,.\n") for _ in range(int(unit)))
    repeated = (piece * (REPEATED // int(unit) + 1))[-REPEATED:]
    assert repeats_itself("Instruction: go\nOutput: " + repeated)
    assert end_after(1)("Instruction: go\nOutput: " + repeated) == Ending(24 + REPEATED, REPETITION)
    assert not repeats_itself("!" + repeated[1:])
    assert not repeats_itself(repeated[1:])


def test_tables_lists_and_ordinary_text_are_no_repetition() -> None:
    counted = "\n".join(f"{number}. The number {number} is followed by {number + 1}." for number in range(200))
    chance = random.Random(0)
    prose = " ".join(chance.choices(WORDS, k=2000))
    for text in (counted, prose, "| a | b |\n" + "| 0 | 0 |\n" * 30, "x = [" + "0, " * 200):
        assert not repeats_itself(text)


def test_a_reply_that_never_begins_a_row_ends() -> None:
    chance = random.Random(0)
    remarks = " ".join(chance.choices(WORDS, k=2000))
    assert end_after(5)(remarks[: WITHOUT_ROW - 1]) is None
    assert end_after(5)(remarks[:WITHOUT_ROW]) == Ending(WITHOUT_ROW, "stop")
    assert (
        end_after(5)(remarks[: WITHOUT_ROW - 60] + "\nInstruction: Add one and one, and explain the sum." + "a" * 99)
        is None
    )
