"""Task files in lm-evaluation-harness's own YAML: run as they are, refused where they name code, and shares as limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from siftune.cli.main import main
from siftune.demo.embedded import model_folder
from siftune.errors import UserError
from siftune.evaluation.draw import draw
from siftune.evaluation.harness_file import build_file, is_harness_file, read_harness_file
from siftune.evaluation.suite import Suite
from siftune.runs.evaluate import evaluate

ROWS = 8
TASK = """
task: birds
dataset_path: json
dataset_kwargs: {data_files: {test: birds.jsonl, train: shots.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Which is a bird? {{ question }}\\nAnswer:"
doc_to_choice: "{{ options }}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
WRITTEN = """
include: birds.yaml
task: written
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{ options[gold] }}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
filter_list: [{name: first, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, ignore_case: true}]
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    for name, count in (("birds", ROWS), ("shots", 3)):
        rows = [{"question": f"{name} {n}", "options": ["emu", "trout"], "gold": n % 2} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "birds.yaml").write_text(TASK)
    (tmp_path / "written.yaml").write_text(WRITTEN)
    return tmp_path / "birds.yaml"


def test_a_task_file_of_the_harness_is_a_suite_as_it_is(
    birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    words = ["evaluate", str(model_folder()), "--suite", str(birds), "--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*words, "--json", "--quiet"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["tasks"]["birds"]["acc"]["n"] == ROWS
    assert results["about"]["birds"]["source"] == f"lm-eval {birds}"
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples" / "birds.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == [f"Which is a bird? birds {n}\nAnswer:" for n in range(ROWS)]
    assert [sample["options"] for sample in samples] == [[" emu", " trout"]] * ROWS
    assert [sample["target"] for sample in samples] == [n % 2 for n in range(ROWS)]


def test_a_suite_names_task_files_with_shots_metric_and_share(birds: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "tasks:\n  ours: {task: birds.yaml, shots: 2, limit: 0.5, metric: acc_norm}\n  other: {task: written.yaml, limit: 3}\n"
    )
    results = evaluate(model_folder(), str(suite), run=str(tmp_path / "run"), device="cpu")
    assert results.tasks["ours"]["acc_norm"]["n"] == ROWS // 2
    assert results.tasks["other"]["exact_match,first"]["n"] == 3
    assert results.standing == {"ours": "acc_norm", "other": "exact_match,first"}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples" / "ours.jsonl").read_text().splitlines()]
    assert all(sample["prompt"].count("Which is a bird? shots") == 2 for sample in samples)


@pytest.mark.parametrize(("limit", "count"), [(0.3, 3), (0.01, 1), (5, 5), (1, 1), (99, ROWS)])
def test_a_limit_below_one_is_a_share(limit: float, count: int, birds: Path) -> None:
    (task,) = Suite.read(birds).limited(limit).tasks
    assert task.file is not None
    built = build_file(task.file, title="t", shots=None, limit=task.limit, share=task.share, seed=0)
    assert (ROWS if built.samples is None else len(built.samples["birds"])) == count


def test_shares_and_numbers_bound_each_other() -> None:
    assert [
        len(draw(10, *bounds, seed=1) or range(10)) for bounds in ((3, 0.5), (7, 0.5), (None, 0.01), (None, None))
    ] == [
        3,
        5,
        1,
        10,
    ]
    assert set(draw(10, None, 0.2, seed=1) or []) < set(draw(10, None, 0.5, seed=1) or [])
    suite = Suite.read("daar").limited(0.1)
    assert {(task.limit, task.share) for task in suite.tasks if task.name == "gsm8k"} == {(500, 0.1)}
    for limit in (0, 0.0, 1.0, 1.5, -0.1, float("nan"), True):
        with pytest.raises(UserError, match=f"limit={limit} is no number of questions; .* a share over 0 and below 1"):
            suite.limited(limit)


def test_a_share_goes_through_the_command_line(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(model_folder()), "--suite", str(birds), "--dry-run", "--json", "--limit"]
    assert main([*words, "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["limit"] == 0.5
    assert main([*words, "1.5"]) == 2
    assert "limit=1.5 is no number of questions" in capsys.readouterr().err


def test_changed_rows_and_templates_are_another_run(birds: Path) -> None:
    before = read_harness_file(birds).content
    assert read_harness_file(birds).content == before
    birds.write_text(TASK.replace("Which", "What"))
    worded = read_harness_file(birds).content
    (birds.parent / "birds.jsonl").write_text((birds.parent / "birds.jsonl").read_text().replace("trout", "trees"))
    assert len({before, worded, read_harness_file(birds).content}) == 3


def test_patterns_and_folders_of_data_are_read_beside_the_file(birds: Path) -> None:
    birds.write_text(TASK.replace("test: birds.jsonl", "test: bird*.jsonl"))
    built = build_file(read_harness_file(birds), title="t", shots=None, limit=None, share=None, seed=0)
    assert len(built.tasks["birds"].eval_docs) == ROWS
    (birds.parent / "rows").mkdir()
    (birds.parent / "birds.jsonl").rename(birds.parent / "rows" / "test.jsonl")
    birds.write_text(
        TASK.replace("dataset_path: json", "dataset_path: rows")
        .replace("fewshot_split: train", "")
        .replace("dataset_kwargs: {data_files: {test: birds.jsonl, train: shots.jsonl}}", "")
    )
    built = build_file(read_harness_file(birds), title="t", shots=None, limit=None, share=None, seed=0)
    assert len(built.tasks["birds"].eval_docs) == ROWS


CODE = "names code to run, which no file may"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("doc_to_target: gold", "doc_to_target: !function tools.gold"), CODE),
        (("test_split: test", "test_split: test\nprocess_docs: !function tools.docs"), CODE),
        (("test_split: test", "test_split: test\nunsafe_code: true"), CODE),
        (("test_split: test", "test_split: test\ncustom_dataset: tools"), CODE),
        (("test_split: test", "test_split: test\nclass: tools.Task"), CODE),
        (("data_files:", "trust_remote_code: true, data_files:"), CODE),
        (("metric: acc_norm", "metric: ./tools"), "metric ./tools is none of lm-eval's own; any other is code"),
        (("metric: acc_norm", "metric: acc_norm, hf_evaluate: true"), "metric acc_norm is none of lm-eval's own"),
        (
            ("metric: acc_norm", "metric: acc_norm, aggregation: tools.mean"),
            r"aggregation tools\.mean .* none of lm-eval's",
        ),
        (("metric_list: [", "metric_list: [acc, "), "metric_list holds 'acc'"),
        (("test_split: test", "test_split: test\nfilter_list: [{name: a, filter: [{function: tools.f}]}]"), CODE),
        (("test_split: test", "test_split: test\nfilter_list: [{name: a}]"), "filter_list is not one"),
        (("dataset_path: json", "dataset_path: pandas"), "dataset_path: pandas is not supported; use one of json"),
        (("dataset_path: json", "dataset_path: tools.py"), r"tools\.py is a script"),
        (("dataset_path: json\n", ""), "has no dataset_path"),
        (("task: birds", "task: "), "task is None; set it to the task's name"),
        (("task: birds", "group: birds\ntask: [a, b]"), "a group of tasks is no task"),
        (("test_split: test", "test_split: test\nuse_prompt: promptsource:x"), "write doc_to_text"),
        (("test_split", "test_spit"), "unknown key 'test_spit'; did you mean test_split"),
        (("test: birds", "test: absent"), r"its data file .*absent\.jsonl does not exist"),
        (("test_split: test", "test_split: test\ninclude: birds.yaml"), "includes itself"),
        (("test_split: test", "test_split: test\ninclude: code.yaml"), CODE),
        (("metadata: {", "metadata: {api_key: x1, "), "is a secret"),
    ],
)
def test_what_is_code_or_is_not_understood_is_one_sentence(birds: Path, change: tuple[str, str], message: str) -> None:
    (birds.parent / "tools.py").write_text("raise SystemExit('the code ran')\n")
    (birds.parent / "code.yaml").write_text("doc_to_text: !function tools.text\n")
    assert TASK.count(change[0]) == 1
    birds.write_text(TASK.replace(*change))
    with pytest.raises(UserError, match=message):
        Suite.read(birds)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "lm-eval cannot build it"),
        ("{{ absent }}", "lm-eval cannot build it .*'absent' is undefined"),
        ("{% if question == 'birds 5' %}{{ absent }}{% endif %}", "row 5 of its data cannot be rendered"),
        (
            "{% if question == 'birds 5' %}{{ ''['__cl' ~ 'ass__'].mro() }}{% endif %}",
            "row 5 of its data cannot be rendered",
        ),
    ],
)
def test_templates_are_filled_in_a_sandbox_and_before_the_model(birds: Path, template: str, message: str) -> None:
    birds.write_text(TASK.replace("{{ question }}", template))
    with pytest.raises(UserError, match=message):
        build_file(read_harness_file(birds), title="t", shots=None, limit=None, share=None, seed=0)


def test_rows_and_examples_that_do_not_fit_are_one_sentence(birds: Path) -> None:
    def build(**how: Any) -> None:
        build_file(
            read_harness_file(birds), title="t", **{"shots": None, "limit": None, "share": None, "seed": 0, **how}
        )

    with pytest.raises(UserError, match=r"4 worked examples cannot be shown .* lower its shots"):
        build(shots=4)
    build(shots=3)
    (birds.parent / "birds.jsonl").write_text(json.dumps({"question": "q", "options": ["emu"], "gold": 1}) + "\n")
    with pytest.raises(UserError, match=r"lm-eval cannot build it"):
        build()
    rows = [{"question": "q", "options": ["emu"], "gold": gold} for gold in (0, 1)]
    (birds.parent / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"row 1 of its data has the answer 1 and 1 options; correct the row"):
        build()
    (birds.parent / "birds.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match="lm-eval cannot build it"):
        build()


def test_files_of_siftunes_own_keys_are_not_taken_for_the_harnesss(tmp_path: Path) -> None:
    for text in ("kind: write\nprompt: Q\n", "tasks: {gsm8k: null}\n", "task: {gsm8k: null}\n", ""):
        (tmp_path / "a.yaml").write_text(text)
        assert not is_harness_file(tmp_path / "a.yaml")
