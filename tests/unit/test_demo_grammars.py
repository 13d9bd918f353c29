"""The grammars of the demo's corpus: deterministic, in disjoint parts, and right in every answer that can be recomputed."""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections import Counter
from fractions import Fraction

import pytest

pytest.importorskip("tools.demo", reason="the grammars are in the repository alone")
from tools.demo import grammars, prompts
from tools.demo.domains.reasoning import letters

ROWS = grammars.rows(6000, 0)


def of(kind: str, domain: str | None = None) -> list[dict[str, str]]:
    found = [row for row in ROWS if row["kind"] == kind and domain in (None, row["source"])]
    assert found, kind
    return found


def test_a_seed_fixes_the_rows_and_another_seed_changes_them() -> None:
    assert grammars.rows(300, 3) == grammars.rows(300, 3)
    assert grammars.rows(300, 3) != grammars.rows(300, 4)
    assert grammars.seed_rows(5, 3) == grammars.seed_rows(5, 3)


def test_six_thousand_distinct_rows_of_four_domains() -> None:
    assert len({(row["instruction"], row["input"]) for row in ROWS}) == 6000
    counts = Counter(row["source"] for row in ROWS)
    assert set(counts) == set(grammars.DOMAINS)
    assert min(counts.values()) > 1200
    assert all(row["instruction"].strip() and row["output"].strip() for row in ROWS)
    assert all(text == text.strip() for row in ROWS for text in (row["instruction"], row["output"]))


def test_lengths_vary() -> None:
    words = sorted(len(" ".join((row["instruction"], row["input"], row["output"])).split()) for row in ROWS)
    assert words[300] <= 8
    assert words[-300] >= 40


def test_the_parts_share_no_question() -> None:
    seeds = {(row["instruction"], row["input"]) for seed in range(3) for row in grammars.seed_rows(15, seed)}
    held = {(row["instruction"], row["input"]) for seed in range(3) for row in grammars.held_out(400, seed)}
    pool = {(row["instruction"], row["input"]) for row in ROWS}
    assert not pool & seeds
    assert not pool & held
    assert not seeds & held


def test_seed_rows_are_as_many_as_asked_and_cover_the_kinds() -> None:
    rows = grammars.seed_rows(20, 1)
    assert Counter(row["domain"] for row in rows) == dict.fromkeys(grammars.DOMAINS, 20)
    assert len({(row["instruction"], row["input"]) for row in rows}) == 80


def test_asking_for_more_than_the_grammars_hold_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grammars.DOMAINS, "reasoning", [("letters", 1.0, letters)])
    with pytest.raises(ValueError, match=r"about \d+ different reasoning rows; ask for fewer than 500"):
        grammars.rows(2000, 0)


# --- the answers are right ------------------------------------------------------------------------------------------


def test_every_program_written_as_an_answer_runs_and_does_what_was_asked() -> None:
    checked = 0
    source = grammars.stream("coding", 11)
    for kind, made in (next(source) for _ in range(3000)):
        if kind not in ("program", "formula", "repair", "rewrite"):
            continue
        assert made.check, made
        space: dict[str, object] = {"ANSWER": made.output}
        if kind != "rewrite":
            exec(made.output, space)
        exec(made.check, space)
        checked += 1
    assert checked > 1500


def runs(*sources: str) -> bool:
    space: dict[str, object] = {}
    try:
        for source in sources:
            exec(source, space)
    except (SyntaxError, NameError, TypeError):
        return False
    return True


def test_a_broken_program_is_broken_and_its_repair_is_not() -> None:
    source = grammars.stream("coding", 12)
    repairs = [made for kind, made in (next(source) for _ in range(600)) if kind == "repair"]
    assert len(repairs) > 50
    assert not any(runs(made.input, made.check) for made in repairs)
    assert all(runs(made.output, made.check) for made in repairs)


def test_every_program_that_is_read_prints_its_answer() -> None:
    for row in of("reading"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(row["input"], {})
        assert printed.getvalue().strip() == row["output"], row


def test_every_equality_in_the_mathematics_rows_holds() -> None:
    pattern = re.compile(r"(?<![\w^./-])(-?[\d(][\d+*/() -]*?[\d)]) = (-?\d+(?:/\d+)?)(?![\w*/^]| [+*/] \d)")
    checked = 0
    for row in ROWS:
        if row["source"] != "mathematics" or "remainder" in row["output"]:
            continue
        for left, right in pattern.findall(row["output"]):
            value = eval(re.sub(r"\d+", lambda m: f"Fraction({m.group()})", left), {"Fraction": Fraction})
            assert value == Fraction(right), (left, right, row)
            checked += 1
    assert checked > 500


def number(text: str) -> Fraction:
    found = re.findall(r"-?\d+(?:/\d+)?", text)
    return Fraction(found[-1])


def test_arithmetic_percentages_and_equations_are_right() -> None:
    for row in of("arithmetic"):
        left, sign, right = re.findall(r"(\d+) (\+|-|\*|plus|minus|times) (\d+)", row["instruction"])[0]
        x, y = int(left), int(right)
        value = {"+": x + y, "plus": x + y, "-": x - y, "minus": x - y, "*": x * y, "times": x * y}[sign]
        assert number(row["output"].split("=")[-1]) == value, row
    for row in of("percent"):
        share, whole = map(int, re.findall(r"\d+", row["instruction"]))
        assert number(row["output"]) == Fraction(share * whole, 100), row
    for row in of("equation"):
        factor, sign, shift, right = re.findall(r"(\d+)[xyn] ([+-]) (\d+) (?:=|equal to) (-?\d+)", row["instruction"])[
            0
        ]
        root = number(row["output"])
        assert int(factor) * root + (int(shift) if sign == "+" else -int(shift)) == int(right), row
    for row in of("division"):
        whole, divisor = sorted(map(int, re.findall(r"\d+", row["instruction"])), reverse=True)
        rest = f" with remainder {whole % divisor}" if whole % divisor else ""
        assert row["output"] == f"{whole} / {divisor} = {whole // divisor}{rest}.", row


def test_word_problems_are_right() -> None:
    for row in of("sharing"):
        have, give, more = map(int, re.findall(r"\d+", row["instruction"]))
        assert number(row["output"]) == have - give + more, row
    for row in of("shopping"):
        figures = list(map(int, re.findall(r"\d+", row["instruction"])))
        paid, product = (
            (figures[0], figures[1] * figures[2])
            if "has" in row["instruction"]
            else (figures[2], figures[0] * figures[1])
        )
        assert number(row["output"]) == paid - product, row
    for row in of("ages"):
        gap, total = map(int, re.findall(r"\d+", row["instruction"]))
        assert number(row["output"]) == (total - gap) // 2, row


def test_the_order_puzzles_are_right() -> None:
    more = {"taller": "tallest", "older": "oldest", "faster": "fastest", "stronger": "strongest", "richer": "richest"}
    for row in of("ranking"):
        text = f"{row['instruction']} {row['input']}"
        clues = re.findall(r"(\w+) is (\w+er) than (\w+)\.", text)
        above = [(left, right) if word in more else (right, left) for left, word, right in clues]
        names = {name for pair in above for name in pair}
        asked = re.search(r"the (\w+est)\?", text)
        assert asked
        beaten = {pair[1 if asked.group(1) in more.values() else 0] for pair in above}
        said = re.search(r"(\w+)(?: is the \w+est)?\.$", row["output"])
        assert said
        assert names - beaten == {said.group(1)}, row


def test_things_are_where_they_were_put_last() -> None:
    for row in of("tracking"):
        text = f"{row['input']} {row['instruction']}"
        item = re.search(r"puts the (\w+) into", text).group(1)  # type: ignore[union-attr]
        moved = re.findall(rf"(?:puts the {item} into|moves (?:it|the {item}) to) the (\w+)\.", text)
        assert f"the {moved[-1]}" in row["output"], row


def test_weekdays_are_right() -> None:
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for row in of("weekday"):
        steps = int(re.search(r"\d+", row["instruction"]).group())  # type: ignore[union-attr]
        start = next(day for day in days if day in row["instruction"])
        said = [day for day in re.findall(r"\w+day", row["output"]) if day in days]
        assert said[-1] == days[(days.index(start) + steps) % 7], row


# --- requests for rows ----------------------------------------------------------------------------------------------


def test_requests_for_rows_teach_answers_in_the_stated_form() -> None:
    for seed in range(40):
        request, answer = prompts.conversation(random.Random(seed), seed)
        assert request["role"] == "user"
        assert re.search(r"^Domain: \S", request["content"], re.M)
        assert len(re.findall(r"^Instruction: \S", answer["content"], re.M)) == len(
            re.findall(r"^Output: \S", answer["content"], re.M)
        )
        asked = re.match(r"Write (\d+) different", request["content"])
        assert len(re.findall(r"^Instruction:", answer["content"], re.M)) == (int(asked.group(1)) if asked else 1)
