"""Rows from a model's reply: instruction, input and output, in any of the usual forms.

Read are labelled rows (`Instruction:` ... `Output:`; numbered, bold, as headings, with `Question`/`Answer` and the like
for labels, the input missing) and JSON (an array, an object, one a line, in a code fence, cut off at the end), with any
remarks around them. A part that cannot be read is returned with a reason; nothing is guessed. Cost: a few passes over
the text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST_CHARACTERS = 20_000
"""A longer field is from a model that did not stop, not an example."""
LONGEST_REPLY = 100_000
"""Characters of a reply, reasoning left out; a longer one is not a list of a few rows, and slow to search."""

FAMILIES: tuple[dict[str, tuple[str, ...]], ...] = (
    {"instruction": ("instruction",), "input": ("input",), "output": ("output", "response")},
    {
        "instruction": ("question", "problem", "task", "prompt", "query", "q"),
        "input": ("input", "context"),
        "output": ("answer", "solution", "output", "response", "completion", "a"),
    },
    {
        "instruction": ("instructions",),
        "input": ("input", "inputs"),
        "output": ("output", "outputs", "answer", "response"),
    },
)
"""Labels for each field; a family is tried where a text has no label of those before it for the instruction."""
EMPTY = {"", "none", "n/a", "na", "nil", "null", "empty", "no input", "noinput", "-", "--", "—", '""', "''"}
"""Texts of an input that mean that there is none."""
PLACEHOLDERS = {"...", "…", "what is asked", "the complete, correct answer", "output", "answer", "your answer here"}
CLOSING = re.compile(
    r"\n[^\S\n]*\n(?:let me know|i hope|hope (?:this|these)|feel free|would you like|if you(?:'d| would| need| want)|"
    r"these (?:\w+ ){0,2}examples|this example|note that these|is there anything|please let me)\b[^\n]*\s*\Z",
    re.IGNORECASE,
)
"""A model's closing remark after the last row."""
HEADING = re.compile(
    r"\n[ \t]*(?:[-=*_]{3,}|[#*_ \t]*(?:(?:training )?(?:example|sample|row|entry|triple|task|item)[ \t]*)?#?\(?\d+[.):]?[*_:. \t]*)[ \t]*\Z",
    re.IGNORECASE,
)
"""A number, an `Example 2` or a rule before the next row."""


_THOUGHT = re.compile(r"<(?P<closes>/?)think(?:ing)?>", re.IGNORECASE)


@dataclass(frozen=True)
class ParsedRow:
    """One row as written, or one that cannot be used, with the reason."""

    instruction: str = ""
    input: str = ""
    output: str = ""
    reason: str | None = None
    """None for a good row; else `kind: detail`."""

    @property
    def row(self) -> dict[str, str]:
        """The row's own fields."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}


def parse_rows(text: str, *, cut: bool = False) -> list[ParsedRow]:
    """Every row in a reply, in order; `cut` marks a reply that reached its token limit, so its last row is incomplete.

    A reply without any row gives one `ParsedRow` with the reason.

    >>> [parsed.row for parsed in parse_rows("1. **Instruction:** Add.\\n**Input:** 1 + 1\\n**Output:** 2")]
    [{'instruction': 'Add.', 'input': '1 + 1', 'output': '2'}]
    """
    text = _without_thoughts(text.replace("\r\n", "\n"))
    if not text.strip():
        return [ParsedRow(reason="empty reply")]
    if len(text) > LONGEST_REPLY:
        return [ParsedRow(reason=f"too long: a reply of more than {LONGEST_REPLY} characters")]
    parsed = [row for row, _ in _json_rows(text)] if _looks_like_json(text) else []
    complete_json = bool(parsed) and text.rstrip().rstrip("`").rstrip().endswith(("]", "}"))
    parsed = parsed or list(_labelled_rows(text))
    if not parsed:
        return [ParsedRow(reason="no row found: neither labels nor JSON")]
    if cut and not complete_json:
        last = parsed[-1]
        parsed[-1] = ParsedRow(**last.row, reason="torn: the reply reached its token limit")
    return [_checked(item) for item in parsed]


def complete_length(text: str, rows: int) -> int | None:
    """Characters of a reply up to the end of its row number `rows`, counting usable rows alone; None while that row may
    still be written on: a labelled row has ended where the next one begins, one in JSON at its closing brace.

    >>> complete_length("Instruction: Add.\nInput: 1, 1\nOutput: 2\n\nInstruction: Sub", 1)
    41
    """
    seen = _without_thoughts(text)
    if "\r" in text or not text.endswith(seen):
        return None
    before = len(text) - len(seen)
    if _looks_like_json(seen):
        ends = [end for row, end in _json_rows(seen) if _checked(row).reason is None]
        return before + ends[rows - 1] if len(ends) >= rows else None
    for start in _instruction_starts(seen)[rows:]:
        if sum(row.reason is None for row in parse_rows(seen[:start])) >= rows:
            return before + len(_without_heading(seen[:start]))
    return None


def starts_a_row(text: str) -> bool:
    """Whether a reply so far holds the beginning of a row, or reasoning that may still be followed by one."""
    return bool(_instruction_starts(text)) or _looks_like_json(text) or "<think" in text.lower()


def _instruction_starts(text: str) -> list[int]:
    """Where labelled rows begin."""
    for family in FAMILIES:
        starts = [m.start() for m in _labels(text, family) if m["field"].lower() in family["instruction"]]
        if starts:
            return starts
    return []


def _without_thoughts(text: str) -> str:
    """The text after a model's reasoning, if there is any; reasoning that never ends leaves nothing."""
    parts: list[str] = []
    start, thought = 0, -1  # where the text that stays begins, and where the open thought does
    for mark in _THOUGHT.finditer(text):
        if not mark["closes"]:
            thought = mark.start() if thought < 0 else thought
            continue
        if thought < 0:  # closed and never opened: all before it was the thought
            parts.clear()
        else:
            parts.append(text[start:thought])
        start, thought = mark.end(), -1
    parts.append(text[start:] if thought < 0 else text[start:thought])
    return "".join(parts)


def _checked(parsed: ParsedRow) -> ParsedRow:
    """The row without decoration around its fields, or with the reason why it cannot be used."""
    if parsed.reason is not None:
        return parsed
    instruction, output = parsed.instruction.strip(), parsed.output.strip()
    material = parsed.input.strip()
    if _bare(material) in EMPTY:
        material = ""
    row = {"instruction": instruction, "input": material, "output": output}
    reason = None
    if not instruction:
        reason = "empty instruction"
    elif not output:
        reason = "empty output"
    elif _bare(output) in PLACEHOLDERS or _bare(instruction) in PLACEHOLDERS:
        reason = "placeholder: the form was repeated, not filled in"
    elif output == instruction:
        reason = "output repeats the instruction"
    elif max(map(len, row.values())) > MOST_CHARACTERS:
        reason = f"too long: more than {MOST_CHARACTERS} characters in one field"
    elif any("\0" in part or any("\ud800" <= c <= "\udfff" for c in part) for part in row.values()):
        reason = "unusable characters"
    return ParsedRow(**row, reason=reason)


def _bare(text: str) -> str:
    return text.strip().strip("[]()<>{}*_`. \t").lower() if text.strip() not in ("...", "…") else text.strip()


# --- JSON -------------------------------------------------------------------------------------------------------------


def _names(field: str) -> list[str]:
    return [name for family in FAMILIES for name in family[field] if len(name) > 1]


def _looks_like_json(text: str) -> bool:
    """Whether a quoted key for the instruction occurs before any label at the start of a line."""
    key = re.search(rf'[{{,]\s*"(?:{"|".join(_names("instruction"))})"\s*:', text, re.IGNORECASE)
    labels = [match.start() for family in FAMILIES for match in _labels(text, family) if len(match["field"]) > 1]
    return key is not None and all(key.start() < place for place in labels)


def _json_rows(text: str) -> Iterator[tuple[ParsedRow, int]]:
    """Every object with an instruction, wherever it is, and where it ends; a broken one does not hide those after
    it."""
    decoder, place = json.JSONDecoder(strict=False, parse_float=_finite, parse_constant=_finite), 0
    while (place := text.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            rows = list(_objects(value))
        except RecursionError:
            yield ParsedRow(reason="broken JSON: nested too deeply"), place
            return
        except ValueError:
            key = re.match(rf'\{{\s*"(?:{"|".join(_names("instruction"))})"\s*:', text[place:], re.IGNORECASE)
            if key:
                yield ParsedRow(reason="broken JSON"), place + 1
            place += 1
            continue
        yield from ((row, end) for row in rows)
        place = end


def _finite(number: str) -> float:
    """A JSON number; `ValueError` for one that overflows, for NaN and for Infinity: as a field's text it would be
    wrong."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is not a JSON number")
    return value


def _objects(value: Any) -> Iterator[ParsedRow]:
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)
    elif isinstance(value, Mapping):
        lower = {str(name).strip().lower(): inner for name, inner in value.items()}
        fields = {f: next((lower[n] for n in _names(f) if n in lower), None) for f in FAMILIES[0]}
        if fields["instruction"] is None:
            for inner in value.values():
                yield from _objects(inner)
        else:
            texts = {name: _text(inner) for name, inner in fields.items()}
            yield ParsedRow(**texts)


def _text(value: Any) -> str:
    """A JSON value as the text of a field: lists of strings are lines, other values their JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return "" if value in ([], {}) else json.dumps(value, ensure_ascii=False)


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(text: str, family: Mapping[str, tuple[str, ...]]) -> list[re.Match[str]]:
    """Labels at the start of a line, or after a number or `Example 2:` there: before a colon, or decorated and
    alone."""
    words = "|".join(sorted((word for field in family.values() for word in field), key=len, reverse=True))
    pattern = rf"""
        ^[ \t]*(?:[-•>+]\s+)?                                                                # a list's dot
        (?:[\#*_]*[ \t]*(?:(?:example|sample|row|task|item)[ \t]*)?\#?\(?\d+[ \t]*[.):](?:[*_]+(?=\s))?\s*)?   # 1.  Example 1:
        (?P<mark>[\#*_`\[<]*)[ \t]*
        (?P<field>{words})(?![A-Za-z])
        (?:[ \t]*\#?\d+)?[ \t]*[*_`\]>]*[ \t]*(?P<colon>[:：]?)[ \t]*(?:[*_]+(?=\s|$))?[ \t]*
    """
    matches = re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE | re.VERBOSE)
    return [m for m in matches if m["colon"] or (m["mark"] and text[m.end() : m.end() + 1] in ("", "\n"))]


def _labelled_rows(text: str) -> Iterator[ParsedRow]:
    for family in FAMILIES:
        fields = {word: name for name, words in family.items() for word in words}
        labels = [
            (fields[m["field"].lower()], bool(re.search(r"[*_`\]>]", text[m.end("field") : m.end()])), m)
            for m in _labels(text, family)
        ]
        if any(name == "instruction" for name, _, _ in labels):
            yield from _rows_between(text, labels)
            return


def _rows_between(text: str, labels: list[tuple[str, bool, re.Match[str]]]) -> Iterator[ParsedRow]:
    """Rows from instruction to instruction. Input and output count once, in order, and only in the instruction's own
    decoration: what else looks like a label is part of a text, such as the sample input of a programming task."""
    rows: list[list[tuple[str, re.Match[str]]]] = []
    bold = False
    for name, marked, match in labels:
        if name == "instruction":
            rows.append([(name, match)])
            bold = marked
        elif rows and marked == bold:
            seen = [field for field, _ in rows[-1]]
            if name not in seen and not (name == "input" and "output" in seen):
                rows[-1].append((name, match))
    for index, row in enumerate(rows):
        stop = rows[index + 1][0][1].start() if index + 1 < len(rows) else len(text)
        last = index + 1 == len(rows)
        parts: dict[str, str] = {}
        for place, (name, match) in enumerate(row):
            until = row[place + 1][1].start() if place + 1 < len(row) else stop
            parts[name] = text[match.end() : until]
        if "output" not in parts:
            parts = _on_one_line(parts)
        if "output" not in parts:
            yield ParsedRow(parts["instruction"].strip(), parts.get("input", "").strip(), reason="no output found")
            continue
        parts["output"] = _tail(parts["output"], last=last)
        yield ParsedRow(**parts)


def _on_one_line(parts: dict[str, str]) -> dict[str, str]:
    """A row whose labels follow each other on one line: `Instruction: ... Input: ... Output: ...`."""
    name = "input" if "input" in parts else "instruction"
    if re.search(r"\b(?:Output|Response):", parts[name]) is None:
        return parts
    match = re.fullmatch(r"(.*?)(?:\bInput:(.*?))?\b(?:Output|Response):(.*)", parts[name], re.DOTALL)
    if match is None:
        return parts
    return {**parts, name: match[1], **({"input": match[2]} if match[2] is not None else {}), "output": match[3]}


def _without_heading(text: str) -> str:
    """A text without the number or the heading of the row after it."""
    while (shorter := HEADING.sub("", text.rstrip())) != text.rstrip():
        text = shorter
    return text.rstrip()


def _tail(output: str, *, last: bool) -> str:
    """An output without the next row's number, a closing fence that it never opened, or the model's closing remark."""
    if last:
        output = CLOSING.sub("", output)
    if not last:
        output = _without_heading(output)
    if last:
        output = re.sub(r"\n[ \t]*[-=*_]{3,}[ \t]*\Z", "", output.rstrip())
    output = re.sub(r"\n[ \t]*```[ \t]*\n\s*```\w*\s*\Z", "", output)  # one fence closed, the next row's opened
    if output.count("```") % 2 and output.rstrip().endswith("```"):
        output = output.rstrip()[:-3]
    return output
