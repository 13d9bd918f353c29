"""Rows out of replies, in every form that models have been seen to use, and reasons for what is none."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune.offline.daar.parsing import parse_rows

FRUIT = {"instruction": "Name a fruit.", "input": "", "output": "An apple."}
SUM = {"instruction": "Add the numbers.", "input": "1, 2", "output": "The sum is 3."}
CODE = {
    "instruction": "Write a function that adds.",
    "input": "",
    "output": "```python\ndef add(a, b):\n    return {'sum': a + b}\n```",
}
PAIR = [FRUIT, SUM]

FORMS = {
    "plain": "Instruction: Name a fruit.\nInput:\nOutput: An apple.\n\nInstruction: Add the numbers.\nInput: 1, 2\nOutput: The sum is 3.",
    "numbered": "1.\nInstruction: Name a fruit.\nInput: \nOutput: An apple.\n2.\nInstruction: Add the numbers.\nInput: 1, 2\nOutput: The sum is 3.",
    "numbered, same line": "1. Instruction: Name a fruit.\n   Output: An apple.\n\n2) Instruction: Add the numbers.\n   Input: 1, 2\n   Output: The sum is 3.",
    "bold": "**Instruction:** Name a fruit.\n**Input:** None\n**Output:** An apple.\n\n---\n\n**Instruction:** Add the numbers.\n**Input:** 1, 2\n**Output:** The sum is 3.",
    "bold before the colon": "1. **Instruction**: Name a fruit.\n   **Input**: N/A\n   **Output**: An apple.\n\n2. **Instruction**: Add the numbers.\n   **Input**: 1, 2\n   **Output**: The sum is 3.",
    "bold with the number": "**1. Instruction:** Name a fruit.\n**Output:** An apple.\n\n**2. Instruction:** Add the numbers.\n**Input:** 1, 2\n**Output:** The sum is 3.",
    "example headings": "### Example 1\n**Instruction:** Name a fruit.\n**Input:** (none)\n**Output:** An apple.\n\n### Example 2:\n**Instruction:** Add the numbers.\n**Input:** 1, 2\n**Output:** The sum is 3.",
    "headings alone": "#### Instruction\nName a fruit.\n#### Input\n\n#### Output\nAn apple.\n\n#### Instruction\nAdd the numbers.\n#### Input\n1, 2\n#### Output\nThe sum is 3.",
    "numbers after the label": "Instruction 1: Name a fruit.\nInput 1: \nOutput 1: An apple.\n\nInstruction 2: Add the numbers.\nInput 2: 1, 2\nOutput 2: The sum is 3.",
    "a list": "- Instruction: Name a fruit.\n- Input: none\n- Output: An apple.\n\n- Instruction: Add the numbers.\n- Input: 1, 2\n- Output: The sum is 3.",
    "brackets": "[Instruction]: Name a fruit.\n[Input]: []\n[Output]: An apple.\n[Instruction]: Add the numbers.\n[Input]: 1, 2\n[Output]: The sum is 3.",
    "response": "### Instruction:\nName a fruit.\n\n### Response:\nAn apple.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n1, 2\n\n### Response:\nThe sum is 3.",
    "chatter": "Sure! Here are two examples, as you wished:\n\n1.\nInstruction: Name a fruit.\nInput: None\nOutput: An apple.\n\n2.\nInstruction: Add the numbers.\nInput: 1, 2\nOutput: The sum is 3.\n\nLet me know if you need more examples!",
    "one fence": "```\nInstruction: Name a fruit.\nInput: \nOutput: An apple.\n\nInstruction: Add the numbers.\nInput: 1, 2\nOutput: The sum is 3.\n```",
    "a fence each": "```\nInstruction: Name a fruit.\nOutput: An apple.\n```\n\n```text\nInstruction: Add the numbers.\nInput: 1, 2\nOutput: The sum is 3.\n```",
    "windows lines": "Instruction: Name a fruit.\r\nInput:\r\nOutput: An apple.\r\n\r\nInstruction: Add the numbers.\r\nInput: 1, 2\r\nOutput: The sum is 3.\r\n",
    "thinking": "<think>\nThe user wants rows.\nInstruction: no\nOutput: no\n</think>\nInstruction: Name a fruit.\nOutput: An apple.\nInstruction: Add the numbers.\nInput: 1, 2\nOutput: The sum is 3.",
    "wide colon": "Instruction：Name a fruit.\nOutput：An apple.\nInstruction：Add the numbers.\nInput：1, 2\nOutput：The sum is 3.",
    "json array": json.dumps(PAIR),
    "json fenced": "Here you go:\n```json\n" + json.dumps(PAIR, indent=2) + "\n```\nI hope this helps.",
    "json lines": "\n".join(map(json.dumps, PAIR)),
    "json inside": json.dumps({"examples": PAIR}),
    "json keys": json.dumps(
        [{"Instruction": "Name a fruit.", "Input": None, "Output": "An apple."}, {"question": "Add the numbers.", "context": "1, 2", "answer": "The sum is 3."}]
    ),
    "json with raw line breaks": '[{"instruction": "Name a fruit.",\n "output": "An apple."},\n{"instruction": "Add the numbers.", "input": "1, 2", "output": "The sum is 3."},\n]',
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    found = parse_rows(FORMS[form])
    assert [item.reason for item in found] == [None, None]
    assert [item.row for item in found] == PAIR


def test_questions_and_answers() -> None:
    found = parse_rows("1. Question: What is red?\n   Answer: Blood.\n\n2. Question: Who?\n   Answer: She.")
    assert [item.row["output"] for item in found] == ["Blood.", "She."]
    assert [item.row["instruction"] for item in parse_rows("Q: A?\nA: B\n\nQ: C?\nA: D")] == ["A?", "C?"]


def test_labels_in_the_plural_are_read_where_there_is_no_other() -> None:
    (found,) = parse_rows("Instructions: What color is snow?\nOutput: White.")
    assert found.row == {"instruction": "What color is snow?", "input": "", "output": "White."}
    (recipe,) = parse_rows("Instruction: Give a recipe.\nOutput: Ingredients: flour\nInstructions: Knead it.")
    assert recipe.output == "Ingredients: flour\nInstructions: Knead it."


@pytest.mark.parametrize(
    "text",
    [
        f"Instruction: {CODE['instruction']}\nInput:\nOutput:\n{CODE['output']}",
        f"**Instruction:** {CODE['instruction']}\n**Input:**\n**Output:**\n{CODE['output']}\n\nThese examples cover adding.",
        json.dumps(CODE),
    ],
)
def test_code_keeps_its_braces_and_fences(text: str) -> None:
    assert [item.row for item in parse_rows(text)] == [CODE]


def test_a_sample_input_inside_a_task_is_part_of_the_task() -> None:
    (found,) = parse_rows(
        "**Instruction:** Sum a list. For instance:\nInput: [1, 2]\nOutput: 3\n**Input:** [4, 5]\n**Output:** 9"
    )
    assert found.instruction == "Sum a list. For instance:\nInput: [1, 2]\nOutput: 3"
    assert (found.input, found.output) == ("[4, 5]", "9")


def test_an_output_may_hold_labels_lists_and_json() -> None:
    output = 'Steps:\n1. First\n2. Second\nInput: none needed\n{"instruction": "x", "output": "y"}'
    (found,) = parse_rows(f"Instruction: How?\nOutput: {output}")
    assert found.output == output


def test_all_on_one_line() -> None:
    (found,) = parse_rows("1. Instruction: Add. Input: 3, 4 Output: 7")
    assert found.row == {"instruction": "Add.", "input": "3, 4", "output": "7"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty reply"),
        ("<think>I could write", "empty reply"),
        ("I am sorry, I cannot do that.", "no row found: neither labels nor JSON"),
        ("Instruction: A\nInput: B\n", "no output found"),
        ("Instruction:\nOutput: B", "empty instruction"),
        ("Instruction: A\nInput: B\nOutput:\n", "empty output"),
        ("Instruction: what is asked\nOutput: the complete, correct answer", "placeholder"),
        ("Instruction: A\nOutput: ...", "placeholder"),
        ("Instruction: A\nOutput: A", "output repeats the instruction"),
        ("Instruction: A\nOutput: " + "b" * 30_000, "too long"),
        ("Instruction: A\nOutput: b\0c", "unusable characters"),
        ("Instruction: A\nOutput: b\ud800", "unusable characters"),
        ('{"instruction": "A", "outp', "broken JSON"),
    ],
)
def test_what_is_no_row_has_a_reason(text: str, reason: str) -> None:
    (found,) = parse_rows(text)
    assert str(found.reason).startswith(reason)


def test_good_rows_beside_bad_ones_are_kept() -> None:
    found = parse_rows("Instruction: A\nOutput: B\n\nInstruction: C\n\nInstruction: D\nOutput: E")
    assert [(item.instruction, item.reason) for item in found] == [("A", None), ("C", "no output found"), ("D", None)]


def test_the_last_row_of_a_torn_reply_is_not_used() -> None:
    found = parse_rows("Instruction: A\nOutput: B\n\nInstruction: C\nOutput: It goes on and", cut=True)
    assert [item.reason for item in found] == [None, "torn: the reply reached its token limit"]
    torn = json.dumps(PAIR)[:-20]
    assert [item.reason is None for item in parse_rows(torn, cut=True)] == [True, False]


words = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
sentences = st.lists(words, min_size=2, max_size=6).map(lambda parts: "Say " + " ".join(parts) + ".")
rows = st.fixed_dictionaries({"instruction": sentences, "input": st.just("") | sentences, "output": sentences})
LAYOUTS = (
    "{n}.\nInstruction: {instruction}\nInput: {input}\nOutput: {output}\n",
    "{n}. **Instruction:** {instruction}\n**Input:** {input}\n**Output:** {output}\n\n",
    "### Example {n}\nInstruction: {instruction}\nInput: {input}\nOutput: {output}\n\n",
)


@settings(max_examples=150, deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), st.sampled_from(LAYOUTS))
def test_any_rows_come_back_from_any_layout(wanted: list[dict[str, str]], layout: str) -> None:
    wanted = [row for row in wanted if row["instruction"] != row["output"]]
    text = "".join(layout.format(n=n, **row) for n, row in enumerate(wanted, 1))
    assert [item.row for item in parse_rows(text) if item.reason is None] == wanted


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('Instruction:Output: \n*{}[]"`#1.') | st.characters(), max_size=200))
def test_nothing_makes_it_fail(text: str) -> None:
    for item in parse_rows(text):
        assert item.reason or (item.instruction and item.output)


@pytest.mark.parametrize(
    "filler",
    [
        "[",
        "{",
        '{"instruction":',
        "<think>",
        "</think>",
        "<think></think>",
        "Instruction: x Input:",
        "Input: ",
        "\n ",
        "\n\n",
    ],
)
def test_a_hostile_reply_is_read_in_no_time(filler: str) -> None:
    text = ("Instruction: a\nOutput: b" + filler * 50_000)[:50_000] + "x"
    started = time.process_time()
    parse_rows(text)
    parse_rows(text.replace("Output", "Result"))
    assert time.process_time() - started < 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"instruction": "a", "output": ' + "[" * 40_000 + "]" * 40_000 + "}", "nested too deeply"),
        ("x" * 200_000, "a reply of more than 100000 characters"),
        ('{"instruction": "a", "output": 1e999}', "broken JSON"),
        ('{"instruction": "a", "output": NaN}', "broken JSON"),
        ('{"instruction": "a", "output": ' + "9" * 5000 + "}", "broken JSON"),
    ],
)
def test_what_json_cannot_hold_is_no_row(text: str, reason: str) -> None:
    (item,) = parse_rows(text)
    assert reason in str(item.reason)


def test_rows_nested_as_deep_as_json_allows_never_fail() -> None:
    row = json.dumps(FRUIT)
    for depth in range(100, 1100, 25):
        text = '{"instruction": null, "a": ' + "[" * depth + row + "]" * depth + "}"
        assert len(parse_rows(text)) == 1


def test_thoughts_are_removed_wherever_they_are() -> None:
    row = "Instruction: Name a fruit.\nOutput: An apple."
    for text in (
        f"<think>a</think>{row}",
        f"a</think>{row}",
        f"a</think>b</think>{row}",
        f"<think>a<think>b</think>{row}<thinking>c",
        f"{row}<think>a</think><THINK>b",
    ):
        (item,) = parse_rows(text)
        assert item.row == FRUIT, text
