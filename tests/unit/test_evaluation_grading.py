"""Grading of written answers, and the process that runs a written program."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from siftune.evaluation import grading
from siftune.evaluation.programs import passes
from tests.evaluation_data import FILES


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" 9 * 2 = 18", True),
        ("so $18.00.", True),
        ("1,018", False),
        ("18 ducks, then 19", False),
        ("-18", False),
        ("none", False),
        ("", False),
    ],
)
def test_the_last_number_counts(written: str, right: bool) -> None:
    assert grading.last_number({"answer": "9 * 2 = <<9*2=18>>18\n#### 18"}, written) == float(right)


def test_thousands_and_decimals_are_numbers() -> None:
    assert grading.last_number({"answer": "#### 1,250"}, "about 1250.0") == 1.0
    assert grading.last_number({"answer": "#### 0.5"}, "it is $.50.") == 1.0
    assert grading.last_number({"answer": "#### 5"}, "we have 4,5") == 1.0
    assert grading.last_number({"answer": "#### 1234567"}, "1,234,567 in all") == 1.0
    assert grading.number("no number here") is None


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" the Danube!", True),
        ("DANUBE", True),
        ("Danube river", False),
        ("", False),
        ("the", False),
        ("Blue-Danube", True),
    ],
)
def test_a_short_answer_is_any_of_the_known_ones(written: str, right: bool) -> None:
    assert grading.short_answer({"answers": ["Danube", "Blue Danube", "The"]}, written) == float(right)


@pytest.mark.parametrize(
    ("known", "written", "right"),
    [
        (r"\boxed{\frac{3}{4}}", r"It is $\boxed{\dfrac34}$.", True),
        (r"\boxed{\frac{3}{4}}", r"\boxed{3/4}", True),
        (r"\boxed{0.75}", r"\boxed{\frac{3}{4}}", True),
        (r"\boxed{12{,}345}", r"\boxed{12345}", False),
        (r"\boxed{12,345}", r"\boxed{12345}", True),
        (r"\boxed{5\text{ cm}}", r"\boxed{x = 5}", True),
        (r"\boxed{\left( 1, 2 \right)}", r"\boxed{(1,2)}", True),
        (r"\boxed{90^\circ}", r"\boxed{90}", True),
        (r"\boxed{10\%}", r"\boxed{10}", True),
        (r"\boxed{-\frac12}", r"\boxed{\frac{-1}{2}}", True),
        (r"\boxed{7}", r"\boxed{3}, no: \boxed{7}", True),
        (r"\boxed{7}", r"\boxed{7}, no: \boxed{3}", False),
        (r"\boxed{7}", "the answer is 7", False),
        (r"\boxed{7}", r"\boxed{7", False),
        (r"\fbox{7}", r"\boxed 7", True),
        (r"\boxed{(1,2)}", r"\boxed{12}", False),
    ],
)
def test_math_compares_the_last_box_as_tidied_latex(known: str, written: str, right: bool) -> None:
    assert grading.boxed({"solution": known}, written) == float(right)


def test_every_known_solution_of_math_is_right_against_itself(shared: Path) -> None:
    from siftune.evaluation.tasks import own_tasks, read_rows

    rows = read_rows(own_tasks()["math"], shared / "data" / "eval" / "math_test.jsonl.gz")
    assert all(grading.boxed(row, row["solution"]) for row in rows)
    assert sum(grading.boxed(row, other["solution"]) for row, other in itertools.pairwise(rows)) < 200


# --- code -------------------------------------------------------------------------------------------------------------


def test_a_function_that_passes_its_tests_counts_and_one_that_does_not_does_not() -> None:
    row = FILES["humaneval"][1]
    assert grading.completes_function(row, "    return x + 1\n") == 1.0
    assert grading.completes_function(row, "    return x\n") == 0.0
    assert grading.completes_function(row, "    return (\n") == 0.0
    program = FILES["mbpp_test"][2]
    assert grading.passes_tests(program, "def add(x):\r\n    return x + 2\n") == 1.0
    assert grading.passes_tests(program, "def add(x):\n    return 2\n") == 0.0


@pytest.mark.parametrize(
    "program", ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "1 / 0", "é("]
)
def test_leaving_early_is_not_passing(program: str) -> None:
    assert not passes(program + "\nassert False")


def test_a_program_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time\ntime.sleep(3)\nopen({str(mark)!r}, 'w').close()"
    started = time.monotonic()
    assert not passes(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True: pass", seconds=1
    )
    assert time.monotonic() - started < 3
    assert not passes(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])")
    time.sleep(4)
    assert not mark.exists()


def test_memory_and_files_are_bounded() -> None:
    assert not passes("x = bytearray(8 << 30)")
    assert not passes("f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))\nf.close()")


def test_a_program_sees_neither_our_folder_nor_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIFTUNE_SECRET", "yes")
    here = str(Path.cwd())
    assert passes(
        f"import os\nassert 'SIFTUNE_SECRET' not in os.environ\nassert os.getcwd() != {here!r}\nassert __name__ == '__main__'"
    )
