"""Suites and tasks as read from YAML, and the rows they draw: everything before a model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from siftune.errors import UserError
from siftune.evaluation.own import rendered
from siftune.evaluation.suite import Suite
from siftune.evaluation.tasks import from_data_set, own_tasks, questions, read_task
from tests import evaluation_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation_data.write(tmp_path_factory.mktemp("data"))


def file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- suites -----------------------------------------------------------------------------------------------------------


def test_the_papers_suites_are_the_papers_tasks_and_sizes() -> None:
    daar, uds = Suite.read("daar"), Suite.read("uds")
    sizes = {
        "nq_open": 3610,
        "triviaqa": 5000,
        "hellaswag": 10042,
        "gsm8k": 500,
        "math": 1000,
        "mbpp": 500,
        "humaneval": 164,
    }
    assert {task.name: task.limit for task in daar.tasks if task.average} == sizes
    assert [task.name for task in daar.tasks if not task.average] == ["mmlu"]
    assert [task.name for task in uds.tasks] == ["mmlu", "scienceqa", "gsm8k", "humaneval"]
    assert all(task.spec is not None for suite in (daar, uds) for task in suite.tasks)
    assert {task.name for suite in (daar, uds) for task in suite.tasks} == set(own_tasks())


def test_a_suite_of_the_users_holds_tasks_of_three_kinds_and_files(tmp_path: Path) -> None:
    file(
        tmp_path / "mine.yaml",
        "kind: choose\nfile: rows\nfields: {choices: texts, answer: index}\nprompt: 'Pick:'\nmetric: acc\n",
    )
    file(tmp_path / "held.jsonl", "{}\n")
    path = file(
        tmp_path / "suite.yaml",
        "about: mine\ntasks: {gsm8k: {shots: 1}, own: {task: mine.yaml, limit: 3}, arc_easy: null}\nheld_out: {a: held.jsonl}\n",
    )
    suite = Suite.read(path)
    assert suite.name == "suite"
    own = {task.name: task for task in suite.tasks}
    assert own["gsm8k"].spec == own_tasks()["gsm8k"]
    assert own["own"].spec is not None
    assert own["own"].spec.file == str(tmp_path / "rows")
    assert own["arc_easy"].spec is None
    assert suite.held_out == {"a": str(tmp_path / "held.jsonl")}
    assert [task.limit for task in suite.limited(2).tasks] == [2, 2, 2]
    assert [task.limit for task in suite.limited(5).tasks] == [5, 3, 5]
    assert [task.name for task in suite.without(["own"]).tasks] == ["gsm8k", "arc_easy"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: {gsm8k: {shot: 5}}", "has an unknown key 'shot'; did you mean shots"),
        ("tasks: {gsm8k: {shots: -1}}", "shots: -1 is no number of shots"),
        ("tasks: {gsm8k: {limit: 0}}", "limit: 0 is no number of questions"),
        ("tasks: {gsm8k: {limit: true}}", "limit: True is no number of questions"),
        ("tasks: {gsm8k: {average: 3}}", "average: 3 is not known"),
        ("tasks: {gsm8k: 5}", "5 is no mapping"),
        ("tasks: 5", "tasks is a int"),
        ("held_out: 5", "held_out is a int"),
        ("task: {gsm8k: null}", "has an unknown key 'task'; did you mean tasks"),
        ("about: nothing", "neither tasks nor held_out"),
        ("- a", "holds a list"),
        ("tasks: [", "is not YAML"),
        ("tasks: {own: {task: absent.yaml}}", r"absent\.yaml cannot be read"),
    ],
)
def test_a_suite_that_makes_no_sense_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Suite.read(file(tmp_path / "suite.yaml", text))


def test_names_that_are_not_known_name_the_nearest() -> None:
    with pytest.raises(UserError, match="suite dar is not known; did you mean daar"):
        Suite.read("dar")
    with pytest.raises(UserError, match=r"suite nowhere\.yaml cannot be read"):
        Suite.read("nowhere.yaml")
    with pytest.raises(UserError, match="no task humanval to skip; did you mean humaneval"):
        Suite.read("uds").without(["humanval"])
    with pytest.raises(UserError, match="limit=0"):
        Suite.read("uds").limited(0)


def test_code_runs_only_when_it_is_allowed() -> None:
    with pytest.raises(
        UserError, match=r"mbpp and humaneval of suite daar run code .* --allow-code .* --skip mbpp,humaneval"
    ):
        Suite.read("daar").check_code(False)
    Suite.read("daar").check_code(True)
    Suite.read("daar").without(["mbpp", "humaneval"]).check_code(False)


# --- tasks ------------------------------------------------------------------------------------------------------------

GOOD = "kind: write\nfile: rows\nfields: {answer: text}\nprompt: 'Q'\ngrade: last_number\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("kind: write", "kind: sing"), "kind: sing is not known"),
        (("grade: last_number", "grade: magic"), "grade: magic is not known; use one of last_number"),
        (("{answer: text}", "{answer: number}"), "field answer is number"),
        (("{answer: text}", "{question: text}"), "reads answer; name it under fields"),
        (("prompt: 'Q'", "prompt: ''"), "has no prompt"),
        (("kind: write\n", ""), "has no kind"),
        (("file: rows", "fil: rows"), "has an unknown key 'fil'; did you mean file"),
        (("kind: write", "kind: choose"), "fields need choices"),
        (("grade: last_number", "grade: last_number\noptions: words"), "options: words"),
    ],
)
def test_a_task_that_makes_no_sense_is_one_sentence(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert read_task(file(tmp_path / "good.yaml", GOOD)).own_metric == "exact_match"
    with pytest.raises(UserError, match=said):
        read_task(file(tmp_path / "bad.yaml", GOOD.replace(*change)))


def test_every_task_of_ours_finds_its_rows(folder: Path) -> None:
    for name, spec in own_tasks().items():
        shots = 1 if spec.shots or spec.shots_file else 0
        asked = questions(spec, folder, shots=shots, limit=None, seed=0)
        assert len(asked.rows) == asked.total == len(evaluation_data.FILES[str(spec.file)])
        for _, rows, examples in asked.leaves():
            assert len(examples) == shots
            assert rows
            for row in [*rows, *examples]:
                assert rendered(spec.prompt, row)
                if spec.kind == "write" and spec.shown is not None:
                    assert rendered(spec.shown, row), name


def test_a_smaller_limit_draws_a_part_of_the_same_rows_and_a_seed_other_ones(folder: Path) -> None:
    def drawn(limit: int | None, seed: int = 0) -> list[str]:
        rows = questions(own_tasks()["gsm8k"], folder, shots=0, limit=limit, seed=seed).rows
        return [row["question"] for row in rows]

    whole = drawn(None)
    for seed in range(20):
        assert set(drawn(2, seed)) < set(drawn(4, seed)) < set(drawn(6, seed)) < set(whole)
    assert drawn(4) == [row for row in whole if row in drawn(4)]
    assert drawn(100) == whole
    assert len({tuple(drawn(2, seed)) for seed in range(10)}) > 1


def test_the_content_changes_with_rows_examples_and_draw(folder: Path, tmp_path: Path) -> None:
    spec = own_tasks()["gsm8k"]
    first = questions(spec, folder, shots=1, limit=3, seed=0).content
    assert first == questions(spec, folder, shots=1, limit=3, seed=0).content
    others = [
        questions(spec, folder, shots=shots, limit=limit, seed=seed).content
        for shots, limit, seed in ((0, 3, 0), (2, 3, 0), (1, 4, 0), (1, 3, 1))
    ]
    copy = evaluation_data.write(tmp_path / "copy")
    (copy / "gsm8k_train.jsonl.gz").write_bytes(gzip.compress(json.dumps(evaluation_data.QUESTIONS[3]).encode()))
    others.append(questions(spec, copy, shots=1, limit=3, seed=0).content)
    assert len({first, *others}) == 6


def test_worked_examples_come_from_the_same_subject(folder: Path) -> None:
    asked = questions(own_tasks()["mmlu"], folder, shots=2, limit=None, seed=0)
    for value, rows, examples in asked.leaves():
        assert {row["subject"] for row in [*rows, *examples]} == {value}
        assert len(examples) == 2
    with pytest.raises(UserError, match="asks for 9 worked examples for subject counting_up and has 8"):
        questions(own_tasks()["mmlu"], folder, shots=9, limit=None, seed=0)
    with pytest.raises(UserError, match="asks for 6 worked examples and has 5"):
        questions(own_tasks()["nq_open"], folder, shots=6, limit=None, seed=0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "q"}', r"line 2 needs 'answer' as a text, not 'None'"),
        ('{"question": 5, "answer": ""}', "needs 'question' as a text, not '5'"),
        ("[1]", "line 2 is not a JSON object"),
        ("{", "line 2 is not a JSON object"),
    ],
)
def test_a_row_that_lacks_a_field_is_named(tmp_path: Path, line: str, said: str) -> None:
    file(tmp_path / "gsm8k_test.jsonl", json.dumps(evaluation_data.QUESTIONS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=said):
        questions(own_tasks()["gsm8k"], tmp_path, shots=0, limit=None, seed=0)


@pytest.mark.parametrize(
    "row", [{"answer": 4}, {"answer": -1}, {"answer": True}, {"choices": []}, {"choices": ["a", 2]}]
)
def test_an_answer_that_no_choice_has_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    file(tmp_path / "mmlu_test.jsonl", json.dumps({**evaluation_data.CHOICES[0], **row}))
    with pytest.raises(UserError, match=r"mmlu_test\.jsonl line 1"):
        questions(own_tasks()["mmlu"], tmp_path, shots=0, limit=None, seed=0)


def test_missing_empty_and_broken_files_are_named(tmp_path: Path) -> None:
    spec = own_tasks()["gsm8k"]
    with pytest.raises(UserError, match=r"task gsm8k needs .*gsm8k_test\.jsonl\.gz .*--skip gsm8k"):
        questions(spec, tmp_path, shots=0, limit=None, seed=0)
    file(tmp_path / "gsm8k_test.jsonl", "\n")
    with pytest.raises(UserError, match="holds no row"):
        questions(spec, tmp_path, shots=0, limit=None, seed=0)
    (tmp_path / "gsm8k_test.jsonl.gz").write_bytes(gzip.compress(b"{}" * 9999)[:40])
    with pytest.raises(UserError, match="cannot be read"):
        questions(spec, tmp_path, shots=0, limit=None, seed=0)
    with pytest.raises(UserError, match="pass --data FOLDER"):
        questions(spec, None, shots=0, limit=None, seed=0)


def test_scienceqa_of_the_hub_becomes_text_rows_with_the_hint_first() -> None:
    from datasets import Dataset

    spec = own_tasks()["scienceqa"]
    rows = [
        {"image": None, "question": "Why?", "choices": ["a", "b"], "answer": 1, "hint": "Look.", "lecture": "l"},
        {
            "image": {"bytes": "x"},
            "question": "What is shown?",
            "choices": ["a", "b"],
            "answer": 0,
            "hint": "",
            "lecture": "",
        },
        {"image": None, "question": "Who?", "choices": ["a", "b", "c"], "answer": 2, "hint": "", "lecture": ""},
    ]
    found = from_data_set(spec, Dataset.from_list(rows))
    assert [row["question"] for row in found] == ["Look.\nWhy?", "Who?"]
    assert [row["answer"] for row in found] == [1, 2]


def test_prompts_are_filled_from_rows_and_never_run_code() -> None:
    row = {"question": "{{ 7 * 7 }}"}
    assert rendered("Q: {{ question }}", row) == "Q: {{ 7 * 7 }}"
    with pytest.raises(UserError, match="'answer' is undefined"):
        rendered("{{ answer }}", row)
    with pytest.raises(UserError, match="unsafe"):
        rendered("{{ ''.__class__.__mro__[1].__subclasses__() }}", row)
