"""Recognition of formats, what is bad in each, mapped columns, and the one text form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from siftune.data.formats import BadRow, Reading, candidates, check_format, recognise, text_of
from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.records import Row
from tests.tiny import tiny_tokenizer

ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}

GOOD: list[tuple[dict[str, Any], str, tuple[str, str, str], int]] = [
    (ALPACA, "alpaca", ("Add.", "1 + 1", "2"), 0),
    ({"instruction": "Add.", "output": "2", "text": "all of it"}, "alpaca", ("Add.", "", "2"), 0),
    ({"instruction": "Add.", "input": None, "output": "2"}, "alpaca", ("Add.", "", "2"), 0),
    ({"prompt": "1 + 1 =", "completion": " 2"}, "prompt-completion", ("1 + 1 =", "", " 2"), 0),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "prompt-completion", ("Be kind.\nHi", "", "Hello"), 3),
    ({"messages": [USER, ANSWER]}, "messages", ("Hi", "", "Hello"), 2),
    ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, "messages", ("Be kind.\nHi\nHello\nHi", "", "Hello"), 5),
    ({"messages": [USER, {"role": "tool", "content": "7"}, ANSWER], "prompt": "Hi"}, "messages", ("Hi\ntool result: 7", "", "Hello"), 3),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "messages", ("Hi", "", "Hello"), 2),
    ({"text": "Once."}, "text", ("", "", "Once."), 0),
]  # fmt: skip


@pytest.mark.parametrize(("original", "format", "parts", "turns"), GOOD)
def test_every_format_is_recognised_and_read(
    original: dict[str, Any], format: str, parts: tuple[str, str, str], turns: int
) -> None:
    assert recognise(original, {}) == format
    row = Reading(format).row(3, "id", original)
    assert (row.instruction, row.input, row.output) == parts
    assert len(row.messages) == turns
    assert row.row == 3


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instruction": "Add."}, "missing field: output"),
    ("alpaca", {"instruction": "Add.", "output": None}, "missing field: output"),
    ("alpaca", {"instruction": "Add.", "output": " \n\t"}, "empty answer: output"),
    ("alpaca", {"instruction": ["Add."], "output": "2"}, "wrong type: instruction is a list, not a string"),
    ("alpaca", {"instruction": "Add.", "output": 2}, "wrong type: output is a number, not a string"),
    ("alpaca", {"instruction": "Add.", "input": {}, "output": "2"}, "wrong type: input is an object, not a string"),
    ("alpaca", {"text": "Once."}, "another format: text in a pool of alpaca rows"),
    ("prompt-completion", {"prompt": "1", "completion": ""}, "empty answer: completion"),
    ("prompt-completion", {"prompt": "1", "completion": [ANSWER]}, "wrong type: completion is a list, not a string"),
    ("prompt-completion", {"prompt": [USER, ANSWER], "completion": []}, "missing field: completion holds no message"),
    ("prompt-completion", {"prompt": [USER], "completion": [USER]}, "wrong roles: completion ends with user, not with assistant"),
    ("prompt-completion", ALPACA, "another format: alpaca in a pool of prompt-completion rows"),
    ("text", {"text": True}, "wrong type: text is a boolean, not a string"),
    ("messages", {"messages": "Hi"}, "wrong type: messages is a string, not a list of messages"),
    ("messages", {"messages": []}, "missing field: messages holds no message"),
    ("messages", {"messages": ["Hi"]}, "wrong type: message 1 of messages is a string, not an object"),
    ("messages", {"messages": [USER]}, "wrong roles: messages ends with user, not with assistant"),
    ("messages", {"messages": [ANSWER]}, "wrong roles: messages starts with assistant, not with user"),
    ("messages", {"messages": [SYSTEM]}, "wrong roles: messages starts with system, not with user"),
    ("messages", {"messages": [USER, SYSTEM, ANSWER]}, "wrong roles: messages has a system message that is not the first"),
    ("messages", {"messages": [USER, {"role": "robot", "content": "x"}]}, "wrong roles: message 2 of messages has the role robot; map it with --roles"),
    ("messages", {"messages": [USER, {"role": ["user"], "content": "x"}]}, "wrong roles: message 2 of messages has the role ['user']"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "wrong type: the content of message 2 of messages is null, not a string"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": " "}]}, "empty answer: the last message of messages"),
    ("messages", {"conversations": [{"from": "gpt", "value": "x"}]}, "wrong roles: conversations starts with assistant, not with user"),
    ("messages", {"a": 1}, "missing field: messages"),
    ("messages", {"messages": [USER, ANSWER], "system": 3}, "wrong type: system is a number, not a string"),
    ("messages", {"messages": [USER, ANSWER], "tools": "search"}, "wrong type: tools is a string, not a list of tools"),
    ("messages", {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "wrong type: a tool call of message 2 of messages has no function name"),
    ("messages", {"messages": [USER, {"role": "assistant", "tool_calls": 7}]}, "wrong type: the tool_calls of message 2 of messages are a number, not a list"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]}, "not text alone: the content of message 1 of messages has a part of the type image_url"),
    ("messages", {"messages": [USER, ANSWER | {"weight": 0.5}]}, "wrong type: weight of message 2 of messages is 0.5; set it to 0 or 1, false or true"),
    ("messages", {"messages": [USER, ANSWER | {"train": False}]}, "not to imitate: no answer of messages is supervised (weight, train or loss is 0 in all of them)"),
    ("messages", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "f(1)"}]}, "wrong type: message 2 of conversations is a function_call that is no JSON object with name and arguments"),
    ("alpaca", ALPACA | {"history": [["a"]]}, "wrong type: entry 1 of history is not a question and its answer"),
    ("alpaca", ALPACA | {"history": "x"}, "wrong type: history is a string, not a list of pairs"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "original", "reason"), BAD)
def test_every_kind_of_bad_row_has_its_reason(format: str, original: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as told:
        Reading(format).parts(original)
    assert str(told.value) == reason


def test_names_from_the_data_are_shown_short_and_printable() -> None:
    with pytest.raises(BadRow) as told:
        Reading("messages").parts({"messages": [{"role": "\ud800\n" + "x" * 1000, "content": ""}]})
    assert str(told.value).isprintable()
    assert str(told.value).isascii()
    assert len(str(told.value)) < 140


# --- mapped columns -------------------------------------------------------------------------------------------------


def test_columns_map_the_users_names_to_fields(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text('{"question": "Add.", "answer": "2", "prompt": "p", "completion": "c"}\n{"question": "Add."}\n')
    pool = load_pool(path, columns={"instruction": "question", "output": "answer"}, on_bad_row="skip")
    assert pool.format == "alpaca"
    (row,) = pool.read([0])
    assert (row.instruction, row.output) == ("Add.", "2")
    assert pool.reasons == {1: "missing field: answer"}
    assert pool.source.originals([0])[0]["question"] == "Add."
    other = load_pool(path, columns={"prompt": "question", "completion": "answer"}, on_bad_row="skip")
    assert other.format == "prompt-completion"
    assert other.fingerprint != pool.fingerprint


def test_a_mapped_chat_column(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"turns": [USER, ANSWER]}) + "\n")
    assert load_pool(path, columns={"messages": "turns"}).read([0])[0].output == "Hello"


@pytest.mark.parametrize(
    ("columns", "said"),
    [({"answer": "x"}, "'answer', which is not one of"), ({"prompt": "a", "output": "b"}, "no single format has")],
)
def test_impossible_columns_are_one_sentence(columns: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        candidates(columns)


def test_a_format_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps(ALPACA | {"text": "as text"}) + "\n")
    assert load_pool(path).format == "alpaca"
    pool = load_pool(path, format="text")
    assert pool.format == "text"
    assert pool.read([0])[0].output == "as text"
    with pytest.raises(UserError, match="format='chat' is not known; use one of messages"):
        load_pool(path, format="chat")
    with pytest.raises(UserError, match="but the text format has text"):
        check_format("text", {"output": "x"})


# --- the text form --------------------------------------------------------------------------------------------------


def test_the_text_form_joins_the_parts_that_hold_something() -> None:
    assert text_of(Row(0, "", "Add.", "1 + 1", "2")) == "Add.\n1 + 1\n2"
    assert text_of(Row(0, "", "Add.", "", "2")) == "Add.\n2"
    assert text_of(Row(0, "", "", "", "Once."), tiny_tokenizer()) == "Once."


def test_chat_rows_go_through_the_template_where_there_is_one() -> None:
    row = Reading("messages").row(0, "", {"messages": [SYSTEM, USER, ANSWER]})
    with_template = text_of(row, tiny_tokenizer())
    assert with_template.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert with_template.rstrip().endswith("Hello<|im_end|>")
    assert text_of(row, tiny_tokenizer(template=False)) == "Be kind.\nHi\nHello"
    assert text_of(row) == "Be kind.\nHi\nHello"


def test_a_template_that_refuses_a_row_leaves_its_contents() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}{{ m.content }};{% endfor %}"
    assert (
        text_of(Reading("messages").row(0, "", {"messages": [SYSTEM, USER, ANSWER]}), tokenizer)
        == "Be kind.\nHi\nHello"
    )
    assert text_of(Reading("messages").row(0, "", {"messages": [USER, ANSWER]}), tokenizer) == "Hi;Hello;"
