"""Grades of generated answers. One small function per kind of answer: text in, 1.0 or 0.0 out.

Numbers and short answers are compared after normalisation, MATH's as LaTeX text: two ways of writing one value that
normalisation does not unify count as different, so the accuracy is a lower bound. Code counts when it passes its tests.

    tidy("The Danube!") == "danube",    tidy_math(r"\\dfrac34") == tidy_math(r"\\frac{3}{4}")
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Self

from .programs import failure

Grade = Callable[[Mapping[str, Any], str], float]
"""(row of the task's file, what the model wrote up to the first stop) -> 1.0 or 0.0."""


class Failed(float):
    """The grade 0.0 with the reason for it, which the question's sample shows."""

    reason: str

    def __new__(cls, reason: str) -> Self:
        """A grade of 0.0."""
        grade = super().__new__(cls, 0.0)
        grade.reason = reason
        return grade


NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+", re.ASCII)


def last_number(row: Mapping[str, Any], written: str) -> float:
    """The last number written equals the one after `####` in the row's `answer` (GSM8K)."""
    answer = number(written)
    return float(answer is not None and answer == number(str(row["answer"]).rpartition("####")[2]))


def number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators dropped.

    >>> number("so 1,250.0 in all.")
    Decimal('1250.0')
    """
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


# --- short answers ----------------------------------------------------------------------------------------------------


def short_answer(row: Mapping[str, Any], written: str) -> float:
    """Equal to any of the row's `answers` but for case, punctuation, articles and spaces (NQ, TriviaQA)."""
    tidied = tidy(written)
    return float(bool(tidied) and any(tidied == tidy(answer) for answer in row["answers"]))


def tidy(text: str) -> str:
    """Lower case, without punctuation, articles and runs of spaces.

    >>> tidy(" The  Danube!")
    'danube'
    """
    bare = "".join(" " if letter in "-/" else letter for letter in text.lower())
    bare = "".join(letter for letter in bare if letter not in string.punctuation + "‘’“”´`")
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


# --- MATH -------------------------------------------------------------------------------------------------------------


def boxed(row: Mapping[str, Any], written: str) -> float:
    r"""The last `\boxed{}` written, tidied, equals that of the row's `solution` (MATH)."""
    answer, solution = last_boxed(written), last_boxed(str(row["solution"]))
    if answer is None or solution is None:
        return 0.0
    answer, solution = tidy_math(answer), tidy_math(solution)
    if answer == solution:
        return 1.0
    values = [_value(text) for text in (answer, solution)]
    return float(None not in values and values[0] == values[1])


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` with balanced braces; None without one.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|[^\s{])", text))):
        if match[1] != "{":
            return match[1]
        depth = 0
        for place in range(match.end() - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[match.end() : place]
    return None


_DROPPED = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|!|,|;|:|quad|qquad|ldots)(?![a-zA-Z])|\\ |~|\$|\^\{?\\circ\}?"
)
_WORDED = re.compile(r"\\(?:text|mbox|textbf|mathrm|textrm|mathbf)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(?:(\d)(\d)|(\d)\{([^{}]*)\}|\{([^{}]*)\}(\d))")
_UNIT = re.compile(
    r"(?<=[\d}])(?:degrees?|dollars?|cents?|units?|inches|feet|meters?|cm|mph|hours?|minutes?|days?|squareunits?)$"
)


def tidy_math(text: str) -> str:
    r"""LaTeX without spaces, sizes, dollar and percent signs, degrees and units, with every fraction spelt one way.

    >>> tidy_math(r"\dfrac34 \text{ cm}")
    '\\frac{3}{4}'
    """
    text = text.replace("\\%", "").replace("%", "").replace("\\$", "")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cdot", "\\times")
    text = _WORDED.sub(r"\1", _DROPPED.sub("", text))
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _SHORT_FRACTION.sub(_spelt, text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^-\\frac\{", r"\\frac{-", text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text).rstrip(".")
    text = re.sub(r"^[a-zA-Z]=(?=.)", "", text)
    return _UNIT.sub("", text)


def _spelt(match: re.Match[str]) -> str:
    above, below = (part for part in match.groups() if part is not None)
    return f"\\frac{{{above}}}{{{below}}}"


def _value(text: str) -> Decimal | None:
    """The value of a plain number or a fraction of two, to 12 digits."""
    match = re.fullmatch(r"\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}|(-?[\d.]+)", text)
    try:
        if match is None:
            return None
        if match[3] is not None:
            return Decimal(match[3])
        return round(Decimal(match[1]) / Decimal(match[2]), 12)
    except (InvalidOperation, ZeroDivisionError):
        return None


# --- code -------------------------------------------------------------------------------------------------------------


def completes_function(row: Mapping[str, Any], written: str) -> float:
    """The row's `prompt` with the written code passes the row's `test` (HumanEval, pass@1). Runs the code."""
    return _grade_of(f"{row['prompt']}{written}\n\n{row['test']}\n\ncheck({row['entry_point']})\n")


def passes_tests(row: Mapping[str, Any], written: str) -> float:
    """The written code passes every test of the row's `test_list` (MBPP, pass@1). Runs the code."""
    before = str(row.get("test_setup_code") or "").replace("\r\n", "\n")
    return _grade_of("\n".join([before, written, *row["test_list"]]) + "\n")


def _grade_of(program: str) -> float:
    reason = failure(program)
    return 1.0 if reason is None else Failed(reason)


GRADES: dict[str, tuple[Grade, str, tuple[str, ...]]] = {
    "last_number": (last_number, "exact_match", ("answer",)),
    "short_answer": (short_answer, "exact_match", ("answers",)),
    "boxed": (boxed, "exact_match", ("solution",)),
    "completes_function": (completes_function, "pass@1", ("prompt", "test", "entry_point")),
    "passes_tests": (passes_tests, "pass@1", ("test_list",)),
}
"""Ways of grading by name: the function, its metric's name, and the fields of a row that it reads."""

RUN_PROGRAMS = ("completes_function", "passes_tests")
"""Those that run code that the model wrote."""
