"""Chats with tools, reasoning, flags and every spelling of roles: what a row keeps, and how it is rendered."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from siftune.data.bad_row import BadRow
from siftune.data.formats import Reading, text_of
from siftune.data.load import load_pool
from siftune.data.render import Dropped, render
from siftune.errors import UserError
from siftune.models.tokenize_rows import answer_tokens
from siftune.offline.answer_text import answer_text
from siftune.offline.rating import turns_of
from siftune.records import Row
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city.", "parameters": {"type": "object"}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ASK, ANSWER = {"role": "user", "content": "Is it warm in Rome?"}, {"role": "assistant", "content": "Yes, 25 degrees."}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "25 C"}
AGENT = {"messages": [ASK, CALLING, RESULT, ANSWER], "tools": [TOOL]}

TOOLS_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}{%- for t in tools %}{{ t | tojson }}{%- endfor %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{%- endif %}"
    "{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def tokenizer(template: str = TOOLS_TEMPLATE) -> Any:
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def read(original: dict[str, Any], **roles: str) -> Row:
    format = "messages" if "messages" in original or "conversations" in original else "alpaca"
    if "prompt" in original:
        format = "prompt-completion"
    return Reading(format, roles=roles).row(0, "id", original)


def labels(row: Row, template: str = TOOLS_TEMPLATE) -> str:
    made = tokenizer(template)
    ids, learnt = answer_tokens(row, made, text="chat", max_length=2000)
    return str(made.decode([token for token, label in zip(ids, learnt, strict=True) if label != -100]))


# --- what a row keeps -------------------------------------------------------------------------------------------------


def test_a_row_keeps_complete_messages_and_tools() -> None:
    row = read(AGENT)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert row.messages == (ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT, ANSWER)
    assert row.tools == (TOOL,)
    assert row.output == "Yes, 25 degrees."
    assert row.instruction == 'Is it warm in Rome?\ntool call: weather({"city": "Rome"})\ntool result: 25 C'


@pytest.mark.parametrize(
    "original",
    [
        AGENT | {"tools": json.dumps([TOOL])},
        AGENT | {"tools": [TOOL["function"]]},
        AGENT | {"tools": [json.dumps(TOOL)]},
        AGENT | {"messages": json.dumps(AGENT["messages"])},
        AGENT | {"messages": [ASK, {key: value for key, value in CALLING.items() if key != "content"}, RESULT, ANSWER]},
        AGENT | {"messages": [ASK, {**CALLING, "function_call": None, "reasoning_content": None}, RESULT, ANSWER]},
        AGENT | {"messages": [{**ASK, "content": [{"type": "text", "text": ASK["content"]}]}, CALLING, RESULT, ANSWER]},
        {"prompt": [ASK, CALLING, RESULT], "completion": [ANSWER], "tools": [TOOL]},
    ],
)
def test_other_spellings_of_the_same_chat_are_the_same_row(original: dict[str, Any]) -> None:
    assert read(original) == read(AGENT)


def test_the_older_function_call_and_sharegpts_are_tool_calls() -> None:
    expected = ["user", "assistant", "tool", "assistant"]
    old = [ASK, {"role": "assistant", "content": None, "function_call": CALL["function"]}, {"role": "function", "name": "weather", "content": "25 C"}, ANSWER]  # fmt: skip
    share = [{"from": "human", "value": "Is it warm?"}, {"from": "function_call", "value": json.dumps(CALL["function"])}, {"from": "observation", "value": "25 C"}, {"from": "gpt", "value": "Yes."}]  # fmt: skip
    for row in (read({"messages": old}), read({"conversations": share})):
        assert [message["role"] for message in row.messages] == expected
        (call,) = row.messages[1]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": {"city": "Rome"}}


@pytest.mark.parametrize("user", ["user", "human", "Human", "User"])
@pytest.mark.parametrize("assistant", ["assistant", "gpt", "GPT", "chatgpt", "bing", "model", "Assistant"])
def test_role_names_of_common_data_sets_are_mapped(user: str, assistant: str) -> None:
    row = read({"conversations": [{"from": user, "value": "Hi"}, {"from": assistant, "value": "Ho"}]})
    assert [message["role"] for message in row.messages] == ["user", "assistant"]


@pytest.mark.parametrize("name", ["tool", "ipython", "function", "observation"])
def test_role_names_of_results_are_mapped(name: str) -> None:
    row = read({"messages": [ASK, CALLING, {"role": name, "content": "25 C"}, ANSWER]})
    assert row.messages[2]["role"] == "tool"


def test_further_roles_are_mapped_by_the_user(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "b", "content": "Hi"}, {"role": "a", "content": "Ho"}]}) + "\n")
    with pytest.raises(UserError, match="message 1 of messages has the role b; map it with --roles"):
        load_pool(path)
    pool = load_pool(path, roles={"a": "assistant", "b": "user"})
    assert pool.read([0])[0].output == "Ho"
    assert load_pool(path, roles={"a": "assistant", "b": "user"}).fingerprint == pool.fingerprint
    with pytest.raises(UserError, match="roles maps 'a' to 'asistant', which is no role; did you mean assistant"):
        load_pool(path, roles={"a": "asistant"})


def test_a_developer_message_keeps_its_role() -> None:
    row = read({"messages": [{"role": "developer", "content": "Be kind."}, ASK, ANSWER]})
    assert row.messages[0]["role"] == "developer"


def test_a_system_column_and_alpacas_history_are_turns() -> None:
    row = read({"messages": [ASK, ANSWER], "system": "Be brief."})
    assert row.messages == ({"role": "system", "content": "Be brief."}, ASK, ANSWER)
    own = {"role": "system", "content": "My own."}
    assert read({"messages": [own, ASK, ANSWER], "system": "Be brief."}).messages[0] == own
    alpaca = {"instruction": "And 2 + 2?", "input": "", "output": "4", "system": "Add.", "history": [["1 + 1?", "2"]]}
    row = read(alpaca)
    assert [message["content"] for message in row.messages] == ["Add.", "1 + 1?", "2", "And 2 + 2?", "4"]
    assert (row.instruction, row.output) == ("Add.\n1 + 1?\n2\nAnd 2 + 2?", "4")
    assert read({"instruction": "a", "output": "b", "system": "", "history": []}).messages == ()


# --- what can be learnt -----------------------------------------------------------------------------------------------


def test_chats_are_trimmed_to_what_can_be_learnt_and_counted(tmp_path: Path) -> None:
    greeting, thanks = {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Thanks"}
    system = {"role": "system", "content": "Be brief."}
    chats = [[system, greeting, ASK, ANSWER], [ASK, ANSWER, thanks], [ASK, ANSWER]]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        pool = load_pool(path)
    assert [row.messages for row in pool.read([0, 1])] == [(system, ASK, ANSWER), (ASK, ANSWER)]
    notes = " ".join(str(warning.message) for warning in shown)
    assert "1 row with messages before the first question" in notes
    assert "1 row with messages after the last supervised answer" in notes
    pool.source.write([0, 1, 2], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == path.read_bytes(), "written rows are the user's own"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
def test_an_answer_whose_flag_is_false_is_not_learnt(flag: dict[str, Any]) -> None:
    chat = [ASK, ANSWER, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Cold."}]
    marked = CHAT_TEMPLATE
    assert labels(read({"messages": chat}), marked) == "Yes, 25 degrees.<|im_end|>Cold.<|im_end|>"
    first = [ASK, {**ANSWER, **flag}, *chat[2:]]
    assert labels(read({"messages": first}), marked) == "Cold.<|im_end|>"
    last = [*chat[:3], {**chat[3], **flag}]
    assert labels(read({"messages": last}), marked) == "Yes, 25 degrees.<|im_end|>"
    assert labels(read({"messages": last})) == "Yes, 25 degrees.<|im_end|>"
    assert "weight" not in read({"messages": first}).messages[1], "a template is not given the flag"


def test_a_tool_call_is_an_answer_and_an_empty_message_is_none() -> None:
    row = read({"messages": [ASK, CALLING], "tools": [TOOL]})
    assert row.output == 'tool call: weather({"city": "Rome"})'
    assert labels(row).startswith('<call>{"name": "weather"')
    with pytest.raises(BadRow, match="empty answer"):
        read({"messages": [ASK, {"role": "assistant", "content": ""}]})


# --- rendering --------------------------------------------------------------------------------------------------------


def test_tools_calls_results_and_reasoning_reach_every_reader_of_text() -> None:
    thinking = {**ANSWER, "reasoning_content": "25 is warm."}
    row = read(AGENT | {"messages": [ASK, CALLING, RESULT, thinking]})
    text = text_of(row, tokenizer())
    for part in ("The weather of a city.", '"arguments": {"city": "Rome"}', "25 C", "25 is warm.", "Yes, 25 degrees."):
        assert part in text
    assert labels(row) == "<think>\n25 is warm.\n</think>\nYes, 25 degrees.<|im_end|>"
    where = answer_text(row, tokenizer())
    assert where.text[where.begin : where.end] == "Yes, 25 degrees."
    call = answer_text(read({"messages": [ASK, CALLING], "tools": [TOOL]}), tokenizer())
    assert call.text[call.begin : call.end].startswith("<call>")


def test_without_a_template_calls_and_results_are_plain_text() -> None:
    text = 'Is it warm in Rome?\ntool call: weather({"city": "Rome"})\ntool result: 25 C\nYes, 25 degrees.'
    assert text_of(read(AGENT)) == text


def test_judges_of_turns_see_calls_and_results() -> None:
    first, second = turns_of(read(AGENT))
    assert first.output == 'tool call: weather({"city": "Rome"})'
    assert (second.instruction, second.output) == ("tool result: 25 C", "Yes, 25 degrees.")


@pytest.mark.parametrize(
    ("template", "original", "what"),
    [
        (CHAT_TEMPLATE, AGENT, "drops the tools"),
        (CHAT_TEMPLATE, {"messages": AGENT["messages"]}, "drops a tool call of message 2"),
        (CHAT_TEMPLATE, {"messages": [ASK, {**ANSWER, "reasoning_content": "Hm."}]}, "drops the reasoning of the answer"),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}", {"messages": [ASK, RESULT, ANSWER]}, "message 2 \\(tool\\)"),
        ("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", {"messages": [ASK, ANSWER]}, "drops or rewrites the answer"),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", {"messages": [ASK, {"role": "assistant", "content": "<think>Hm.</think>Yes"}]}, "drops the reasoning"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_hold_is_a_reason(template: str, original: dict[str, Any], what: str) -> None:
    row = read(original)
    for use in (lambda: text_of(row, tokenizer(template)), lambda: labels(row, template)):
        with pytest.raises(BadRow, match=f"chat template .*{what}"):
            use()


def test_a_template_that_takes_parts_is_given_parts() -> None:
    parts = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    assert text_of(read({"messages": [ASK, ANSWER]}), tokenizer(parts)).startswith("Is it warm in Rome?<|im_end|>")
    assert labels(read({"messages": [ASK, ANSWER]}), parts) == "Yes, 25 degrees.<|im_end|>"


def test_a_template_that_takes_arguments_as_text_is_given_text() -> None:
    text = TOOLS_TEMPLATE.replace("(c.function | tojson)", "c.function.name + c.function.arguments")
    assert '<call>weather{"city": "Rome"}</call>' in text_of(read(AGENT), tokenizer(text))


def test_a_template_without_a_developer_or_system_role_still_holds_its_text() -> None:
    row = read({"messages": [{"role": "developer", "content": "Be kind."}, ASK, ANSWER]})
    only = "{% for m in messages if m.role in ['system', 'user', 'assistant'] %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    assert text_of(row, tokenizer(only)).startswith("<system>Be kind.")
    neither = (
        "{% for m in messages if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    )
    merged = render(tokenizer(neither), row.messages, merge_system=True).text
    assert merged.startswith("<user>Be kind.\n\nIs it warm in Rome?")
    with pytest.raises(Dropped, match="drops the system message"):
        render(tokenizer(neither), row.messages)


# --- the end of an answer ---------------------------------------------------------------------------------------------


def test_an_answer_that_the_next_turns_mark_ends_is_learnt_with_that_mark() -> None:
    glm = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert labels(read({"messages": [ASK, ANSWER]}), glm) == "Yes, 25 degrees.<|im_start|>"


def test_an_answer_that_nothing_ends_is_learnt_with_the_end_of_text() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert labels(read({"messages": [ASK, ANSWER]}), bare).endswith("Yes, 25 degrees.\n<eos>")
    made = tokenizer(bare)
    made.eos_token = None
    with pytest.raises(BadRow, match="does not end an answer"):
        answer_tokens(read({"messages": [ASK, ANSWER]}), made, text="chat", max_length=99)


def test_marks_that_leave_out_the_end_are_extended_to_it() -> None:
    late = CHAT_TEMPLATE.replace(" + '<|im_end|>' }}{% endgeneration %}{{ '", " }}{% endgeneration %}{{ '<|im_end|>")
    assert late != CHAT_TEMPLATE
    for template in (late, CHAT_TEMPLATE):
        assert labels(read({"messages": [ASK, ANSWER]}), template) == "Yes, 25 degrees.<|im_end|>"
