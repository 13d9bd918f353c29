"""Every chat template that TRL ships, with five kinds of chat (and a call as the answer): right, or a reason."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from siftune.data.bad_row import BadRow
from siftune.data.formats import Reading, text_of
from siftune.models.tokenize_rows import answer_tokens
from siftune.records import Row
from tests.tiny import tiny_tokenizer

_SPEC = find_spec("trl")
FOLDER = (
    Path(_SPEC.submodule_search_locations[0]) / "chat_templates" if _SPEC and _SPEC.submodule_search_locations else None
)
TEMPLATES = sorted(FOLDER.glob("*.jinja")) if FOLDER is not None and FOLDER.is_dir() else []
MARKS = re.compile(r"<\|[\w.▁]+\|>|<｜[\w▁]+｜>|<(?:start|end)_of_turn>|<turn\|>|<end_of_utterance>|</s>")
"""Tokens that a template writes around turns, which its own model's tokenizer has as special ones."""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "A city."}},
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ASK, CALLING = user("Is it warm in Rome?"), assistant(None, tool_calls=[CALL])
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": "25 C"}
KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one turn": ({"messages": [user("Who?"), assistant("Answer one.")]}, ["Answer one."]),
    "several": (
        {"messages": [user("Who?"), assistant("Answer one."), user("Why?"), assistant("Answer two.")]},
        ["Answer two."],
    ),
    "system": (
        {"messages": [{"role": "system", "content": "Be brief."}, user("Who?"), assistant("Answer one.")]},
        ["Answer one."],
    ),
    "tools": ({"messages": [ASK, CALLING, RESULT, assistant("Yes, warm.")], "tools": [TOOL]}, ["Yes, warm."]),
    "call": ({"messages": [ASK, CALLING], "tools": [TOOL]}, ["weather", "city", "Rome"]),
    "reasoning": (
        {"messages": [user("Who?"), assistant("Answer one.", reasoning_content="Deep thoughts.")]},
        ["Deep thoughts.", "Answer one."],
    ),
}
ALWAYS = ("one turn", "several", "system")
"""Kinds that every template holds."""
TOOLS = ("qwen2_5", "qwen3", "llama3_1", "glm4moe", "gptoss", "qwen3_vl", "gemma4_v5")
REASONING = ("qwen3", "qwen3_6", "glm4moe", "gptoss", "nemotron_3_nano", "qwen3_5_nothink", "qwen3_5_think")


def tokens_or_reason(row: Row, tokenizer: Any) -> tuple[list[int], list[int]] | str:
    try:
        return answer_tokens(row, tokenizer, text="chat", max_length=9999)
    except BadRow as bad:
        return str(bad)


@pytest.mark.skipif(not TEMPLATES, reason="trl ships no chat templates here")
@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_every_template_of_trl_is_right_or_a_reason(path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = path.read_text()
    marks = sorted(set(MARKS.findall(path.read_text())))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    for kind, (original, parts) in KINDS.items():
        row = Reading("messages").row(0, "", original)
        tokens = tokens_or_reason(row, tokenizer)
        if isinstance(tokens, str):
            assert tokens.startswith("chat template "), tokens
            assert kind not in ALWAYS, (kind, tokens)
            assert not (kind in ("tools", "call") and path.stem in TOOLS), (kind, tokens)
            assert not (kind == "reasoning" and path.stem in REASONING), tokens
            continue
        ids, labels = tokens
        learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        text = tokenizer.decode(learnt)
        assert all(part in text for part in parts), (kind, text)
        last = text.rstrip()
        ends = [mark for mark in (*marks, tokenizer.eos_token) if last.endswith(mark)]
        assert ends, (kind, text)
        assert ids[-1] == learnt[-1], "nothing follows the last label token"
        full = text_of(row, tokenizer)
        assert all(part in full for part in parts)
