"""A data folder with a few rows for every task of both suites, in the fields that docs/evaluate.md names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = [
    {"question": f"What is {n} plus {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
    for n in range(1, 8)
]
TRIVIA = [{"question": f"Which number follows {n}?", "answers": [str(n + 1), f"the {n + 1}"]} for n in range(4)]
CHOICES = [
    {"subject": subject, "question": f"Which is number {n}?", "choices": ["one", "two", "three", "four"], "answer": n}
    for subject in ("counting_up", "counting_down")
    for n in range(4)
]
PROGRAMS = [
    {
        "task_id": n,
        "text": f"Write a function that adds {n}.",
        "code": f"def add(x):\r\n    return x + {n}",
        "test_setup_code": "",
        "test_list": [f"assert add({k}) == {n + k}" for k in range(3)],
    }
    for n in range(4)
]
FILES: dict[str, Sequence[Mapping[str, Any]]] = {
    "gsm8k_test": QUESTIONS,
    "gsm8k_train": QUESTIONS,
    "math_test": [{"problem": f"Find ${n}+1$.", "solution": f"It is $\\boxed{{{n + 1}}}$."} for n in range(4)],
    "nq_open_dev": TRIVIA,
    "triviaqa_1k": TRIVIA,
    "hellaswag_val": [
        {
            "context": "Sewing: She takes a needle and",
            "choices": ["threads it.", "flies.", "sings", "eats"],
            "answer": 0,
        },
        {
            "context": "Cooking: He opens the oven and",
            "choices": ["naps.", "takes the bread out.", "x", "y"],
            "answer": 1,
        },
        {"context": "Running: They reach the line and", "choices": ["stop.", "melt", "read", "rain"], "answer": 0},
    ],
    "mmlu_test": CHOICES,
    "mmlu_dev": [row for row in CHOICES for _ in range(2)],
    "scienceqa_text_test": [
        {"question": "Which is a bird?", "choices": ["emu", "trout"], "answer": 0},
        {"question": "Which is a metal?", "choices": ["wood", "iron", "glass"], "answer": 1},
    ],
    "scienceqa_text_train": [{"question": "Which is a fish?", "choices": ["emu", "trout"], "answer": 1}],
    "humaneval": [
        {
            "task_id": f"Own/{n}",
            "prompt": f'def add(x):\n    """Add {n} to x."""\n',
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(2) == {n + 2}\n",
            "entry_point": "add",
        }
        for n in range(3)
    ],
    "mbpp_test": PROGRAMS,
    "mbpp_train": PROGRAMS,
}


def write(folder: Path, *, plain: Sequence[str] = ("gsm8k_test",)) -> Path:
    """All files, gzip-compressed but for `plain`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in FILES.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name in plain:
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        else:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder
