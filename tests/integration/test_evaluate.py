"""`siftune evaluate` on the embedded model and a hand-made data folder: every task, oracles, resuming, refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from siftune.cli.main import main
from siftune.demo.embedded import model_folder
from siftune.errors import UserError
from siftune.evaluation import harness
from siftune.evaluation import target as target_module
from siftune.evaluation.harness_file import build_file
from siftune.evaluation.own import build_own, rendered
from siftune.evaluation.results import averaged
from siftune.evaluation.suite import Suite
from siftune.evaluation.tasks import Questions, own_tasks, questions
from siftune.runs.evaluate import EvaluateOptions, Job, evaluate, file_name, named
from tests import evaluation_data
from tests.tiny import save_tiny

EVERY = ["nq_open", "triviaqa", "hellaswag", "gsm8k", "math", "mbpp", "humaneval", "mmlu", "scienceqa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight is a failure."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(target_module.CausalLM, "parts", property(refuse))


def suite(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def asked(name: str, folder: Path, **more: Any) -> Questions:
    return questions(own_tasks()[name], folder, **({"shots": 0, "limit": None, "seed": 0} | more))


# --- a model that knows, and one that does not ------------------------------------------------------------------------


def oracle(found: Questions, *, right: bool) -> Any:
    """A model that answers every question of a task right, or every one wrong."""
    from lm_eval.api.model import LM

    spec = found.spec
    answers: dict[str, Mapping[str, Any]] = {rendered(spec.prompt, row): row for row in found.rows}

    def row_of(prompt: str) -> Mapping[str, Any]:
        return next(row for question, row in answers.items() if prompt.endswith(question))

    def written(row: Mapping[str, Any]) -> str:
        if not right:
            return " nothing of the kind"
        if spec.name == "humaneval":
            return str(row["canonical_solution"])
        return str(rendered(str(spec.shown), row).removesuffix("```"))

    class Oracle(LM):
        max_length = 4096

        def __init__(self) -> None:
            super().__init__()
            self.prompts: list[str] = []

        def tok_encode(self, text: str) -> list[int]:
            return list(text.encode())

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            self.prompts += [request.args[0] for request in requests]
            return [written(row_of(request.args[0])) for request in requests]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            said = []
            for request in requests:
                row = row_of(request.args[0])
                best = row["choices"][row["answer"]]
                best = best if spec.options == "texts" else "ABCD"[row["answer"]]
                said.append((0.0 if (request.args[1].strip() == best.strip()) == right else -1000.0, False))
            return said

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

    return Oracle()


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_a_model_that_knows_scores_one_and_one_that_does_not_nought(name: str, right: bool, folder: Path) -> None:
    found = asked(name, folder, shots=1 if own_tasks()[name].shown or name == "mmlu" else 0)
    result = harness.run_task(
        oracle(found, right=right), build_own(found, length=4096), chat=False, allow_code=True, bars=False
    )
    metric = result.metrics[found.spec.own_metric]
    assert metric.value == float(right)
    assert metric.n == result.questions == len(found.rows)
    assert metric.stderr == 0.0
    assert result.prompts_cut == 0


def test_prompts_are_worded_as_the_task_says_with_its_worked_examples(folder: Path) -> None:
    found = asked("gsm8k", folder, shots=5, limit=1)
    model = oracle(found, right=True)
    harness.run_task(model, build_own(found, length=4096), chat=False, allow_code=False, bars=False)
    shown = [
        f"Problem: {row['question']}\nSolution: It is {2 * n}.\n#### {2 * n}\n\n"
        for n, row in enumerate(evaluation_data.QUESTIONS[:5], 1)
    ]
    assert model.prompts == ["".join(shown) + f"Problem: {found.rows[0]['question']}\nSolution:"]
    found = asked("mbpp", folder, shots=1, limit=1)
    model = oracle(found, right=True)
    harness.run_task(model, build_own(found, length=4096), chat=False, allow_code=True, bars=False)
    assert "\r" not in model.prompts[0]
    assert model.prompts[0].count("```python\n") == 2


def test_an_opening_stands_once_in_front_and_is_the_subjects(folder: Path) -> None:
    found = asked("mmlu", folder, shots=2)
    result = harness.run_task(
        oracle(found, right=True), build_own(found, length=4096), chat=False, allow_code=False, bars=False
    )
    assert {sample["part"] for sample in result.samples} == {"mmlu/counting_up", "mmlu/counting_down"}
    for sample in result.samples:
        subject = sample["part"].removeprefix("mmlu/").replace("_", " ")
        assert sample["prompt"].startswith(f"Questions about {subject}, each with one right option.\n\nQuestion: ")
        assert sample["prompt"].count("Questions about") == 1
        assert sample["prompt"].count("Answer:") == 3


# --- against the definition -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Any:
    found = target_module.Target.find(model_folder(), device="cpu")
    return found, found.load()


def likelihood(network: Any, tokenizer: Any, prompt: str, option: str) -> float:
    """log p(option | prompt), in float64, from the model's own logits, unpadded."""
    whole, before = tokenizer(prompt + option)["input_ids"], tokenizer(prompt)["input_ids"]
    assert whole[: len(before)] == before
    with torch.no_grad():
        logs = torch.log_softmax(network(torch.tensor([whole])).logits[0].double(), dim=-1)
    return sum(float(logs[place - 1, whole[place]]) for place in range(len(before), len(whole)))


@pytest.mark.parametrize("name", ["hellaswag", "mmlu", "scienceqa"])
def test_multiple_choice_is_the_naive_likelihood(name: str, folder: Path, embedded: Any) -> None:
    target, network = embedded
    found = asked(name, folder, shots=2 if name == "mmlu" else 0)
    model = harness.model_of(network, target.tokenizer, batch_size=3, length=target.length)
    result = harness.run_task(model, build_own(found, length=target.length), chat=False, allow_code=False, bars=False)
    right, normed = [], []
    for sample in result.samples:
        values = [likelihood(network, target.tokenizer, sample["prompt"], option) for option in sample["options"]]
        np.testing.assert_allclose(sample["log_likelihood"], values, rtol=1e-4, atol=1e-4)
        right.append(int(np.argmax(values)) == sample["target"])
        lengths = [len(option.removeprefix(" ")) for option in sample["options"]]
        normed.append(int(np.argmax(np.array(values) / lengths)) == sample["target"])
    assert result.metrics["acc"].value == np.mean(right)
    assert result.metrics["acc"].stderr == pytest.approx(np.std(right, ddof=1) / np.sqrt(len(right)))
    if name == "hellaswag":
        assert result.metrics["acc_norm"].value == np.mean(normed)


def test_a_written_answer_is_the_naive_greedy_one(folder: Path, embedded: Any) -> None:
    target, network = embedded
    found = asked("nq_open", folder, shots=2)
    model = harness.model_of(network, target.tokenizer, batch_size=3, length=target.length)
    result = harness.run_task(model, build_own(found, length=target.length), chat=False, allow_code=False, bars=False)
    tokenizer, ends = target.tokenizer, {network.config.eos_token_id}
    for sample, row in zip(result.samples, found.rows, strict=True):
        ids = tokenizer(sample["prompt"])["input_ids"]
        begin = len(ids)
        while len(ids) - begin < 24:
            with torch.no_grad():
                token = int(network(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            if token in ends or "\n" in tokenizer.decode(ids[begin:]):
                break
        said = tokenizer.decode(ids[begin:], skip_special_tokens=True).split("\n")[0]
        assert sample["said"] == said
        assert sample["exact_match"] == float(said.strip().lower() in [answer.lower() for answer in row["answers"]])


def test_no_random_state_is_touched(folder: Path, embedded: Any) -> None:
    target, network = embedded
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    found = asked("hellaswag", folder)
    model = harness.model_of(network, target.tokenizer, batch_size=3, length=target.length)
    harness.run_task(model, build_own(found, length=target.length), chat=False, allow_code=False, bars=False)
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())


# --- the command ------------------------------------------------------------------------------------------------------


def run_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code = main(["evaluate", *words, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def check_every_task(found: Mapping[str, Any], run: Path, limit: int) -> None:
    spent = {"questions": limit}
    for name in found["tasks"]:
        metric = found["tasks"][name][found["standing"][name]]
        assert 0 <= metric["value"] <= 1
        assert metric["n"] == spent["questions"] == found["about"][name]["questions"]
        samples = (run / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        values = [json.loads(line)[found["standing"][name]] for line in samples]
        assert metric["value"] == pytest.approx(np.mean(values))


@pytest.mark.slow
def test_every_task_of_both_suites_runs_on_a_hand_made_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ", ".join(f"{name}: {{shots: 1}}" for name in EVERY if name not in ("hellaswag", "humaneval"))
    every = suite(tmp_path / "every.yaml", f"tasks: {{hellaswag: null, humaneval: null, {names}}}")
    run = tmp_path / "run"
    words = [str(model_folder()), "--suite", str(every), "--data", str(folder), "--limit", "2", "--allow-code"]
    found = run_json([*words, "--run", str(run), "--device", "cpu"], capsys)
    assert sorted(found["tasks"]) == sorted(EVERY)
    check_every_task(found, run, 2)
    assert found["average"]["tasks"] == len(EVERY)
    text = (run / "table.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in EVERY)
    assert json.loads((run / "results.json").read_text())["tasks"] == found["tasks"]
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["daar", "uds"])
def test_both_suites_run_on_the_real_files(
    name: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model_folder()), "--suite", name, "--data", str(shared / "data" / "eval"), "--limit", "2"]
    found = run_json([*words, "--allow-code", "--run", str(tmp_path / "run"), "--device", "cpu"], capsys)
    assert list(found["tasks"]) == [task.name for task in Suite.read(name).tasks]
    check_every_task(found, tmp_path / "run", 2)
    assert found["average"]["tasks"] == {"daar": 7, "uds": 4}[name]


def choices(path: Path) -> Path:
    return suite(path, "tasks: {hellaswag: null, scienceqa: null, mmlu: {shots: 1, average: false}}")


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_gives_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = choices(tmp_path / "three.yaml")
    options: dict[str, Any] = {"data": str(folder), "device": "cpu"}
    whole = evaluate(model_folder(), str(said), run=str(tmp_path / "whole"), **options)
    real, seen = harness.run_task, list[str]()

    def killed(model: Any, built: harness.Built, **more: Any) -> harness.TaskResult:
        seen.append(next(iter(built.tasks)).split("/")[0])
        if seen == ["hellaswag", "scienceqa"]:
            raise KeyboardInterrupt
        return real(model, built, **more)

    monkeypatch.setattr(harness, "run_task", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_folder(), str(said), run=str(tmp_path / "run"), **options)
    again = evaluate(model_folder(), str(said), run=str(tmp_path / "run"), **options)
    assert seen == ["hellaswag", "scienceqa", "scienceqa", "mmlu"]
    assert again.tasks == whole.tasks
    assert again.average == whole.average
    for name in ("results.json", "table.md", "samples/mmlu.jsonl", "tasks/scienceqa.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    monkeypatch.setattr(target_module.Target, "load", lambda self: pytest.fail("the model was loaded"))
    assert evaluate(model_folder(), str(said), run=str(tmp_path / "run"), **options).tasks == whole.tasks
    with pytest.raises(UserError, match="holds another run: its option limit was None and is now 1"):
        evaluate(model_folder(), str(said), run=str(tmp_path / "run"), limit=1, **options)


def test_changed_rows_are_another_run(folder: Path, tmp_path: Path) -> None:
    copy = evaluation_data.write(tmp_path / "copy")
    said = suite(tmp_path / "one.yaml", "tasks: {hellaswag: null}")
    options: dict[str, Any] = {"data": str(copy), "run": str(tmp_path / "run"), "device": "cpu"}
    evaluate(model_folder(), str(said), **options)
    rows = [*evaluation_data.FILES["hellaswag_val"], evaluation_data.FILES["hellaswag_val"][0]]
    evaluation_data.gzip.open(copy / "hellaswag_val.jsonl.gz", "wt").write("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="holds another run: its input task hellaswag"):
        evaluate(model_folder(), str(said), **options)


def test_held_out_alone_needs_no_suite_and_no_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "require", lambda why: pytest.fail("the harness was asked for"))
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(3, 9)]
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "x"}]), encoding="utf-8")
    words = [
        str(model_folder()),
        "--held-out",
        f"counting={held},again={held}",
        "--held-out-rows",
        "4",
        "--device",
        "cpu",
    ]
    out = tmp_path / "out.json"
    found = run_json([*words, "--run", str(tmp_path / "run"), "--out", str(out)], capsys)
    assert found["held_out"]["counting"] == found["held_out"]["again"]
    assert found["held_out"]["counting"]["rows"] == 4
    assert found["held_out"]["counting"]["skipped"] == {"missing field": 1}
    assert found["tasks"] == {}
    assert found["average"] is None
    assert json.loads(out.read_text())["held_out"] == found["held_out"]
    assert main(["evaluate", *words, "--run", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "results.json")
    assert main(["evaluate", *words, "--run", str(tmp_path / "run")]) == 0
    assert "token accuracy" in capsys.readouterr().out
    config = str(tmp_path / "run" / "config.yaml")
    assert run_json(["--config", config, "--run", str(tmp_path / "run")], capsys)["held_out"] == found["held_out"]


@pytest.mark.usefixtures("no_weights")
def test_a_dry_run_says_what_would_be_asked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = choices(tmp_path / "three.yaml")
    words = ["evaluate", str(model_folder()), "--suite", str(said), "--data", str(folder), "--limit", "3", "--dry-run"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    assert "mmlu: 3 questions, 1 worked examples, from" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {name: about["questions"] for name, about in plan["tasks"].items()} == {
        "hellaswag": 3,
        "scienceqa": 2,
        "mmlu": 3,
    }
    assert not (tmp_path / "run").exists()


def test_chat_puts_the_question_into_the_models_template(folder: Path, tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    said = suite(tmp_path / "one.yaml", "tasks: {mmlu: {shots: 1}}")
    evaluate(tiny, str(said), data=str(folder), limit=1, chat=True, run=str(tmp_path / "run"), device="cpu")
    sample = json.loads((tmp_path / "run" / "samples" / "mmlu.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("<|im_start|>system\nQuestions about counting")
    assert sample["prompt"].count("<|im_start|>assistant") == 2
    assert sample["prompt"].endswith("<|im_start|>assistant\n")
    assert sample["options"] == ["A", "B", "C", "D"]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "daar"], "mbpp and humaneval of suite daar run code"),
        (["--suite", "dar"], "did you mean daar"),
        (["--suite", "uds", "--skip", "humaneval", "--limit", "0"], "limit=0 is no number of questions"),
        (["--suite", "uds", "--skip", "humaneval", "--data", "/nowhere"], "data='/nowhere' is not a folder"),
        (["--suite", "uds", "--skip", "human"], "did you mean humaneval"),
        ([], "needs --suite daar, uds or a YAML file"),
        (["--suite", "held-out"], "nothing to evaluate"),
        (["--held-out", "a=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--held-out", "a"], "not a list of pairs"),
        (["--suite", "uds", "--batch-size", "0"], "batch_size must be >= 1, got 0"),
        (["--suite", "uds", "--out", "x.parquet"], "--out x.parquet is not a .json file"),
        (["--suit", "uds"], "did you mean --suite"),
        (["--suite", "uds", "--text", "chatty"], "one of auto, chat, prompt"),
    ],
)
def test_mistakes_are_one_sentence_before_any_weight(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(model_folder()), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("no_weights")
def test_more_mistakes_before_any_weight(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = str(suite(tmp_path / "one.yaml", "tasks: {hellaswag: null}"))
    with pytest.raises(UserError, match="not a folder here"):
        evaluate("./no-model", said, data=str(folder))
    with pytest.raises(UserError, match="--chat needs a chat template"):
        evaluate(save_tiny(tmp_path / "plain", template=False), said, data=str(folder), chat=True)
    with pytest.raises(UserError, match="no option batches"):
        evaluate(model_folder(), said, batches=3)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"task hellaswag needs .*hellaswag_val\.jsonl\.gz"):
        evaluate(model_folder(), said, data=str(empty))
    with pytest.raises(UserError, match="needs a model"):
        Job(EvaluateOptions(suite=said, data=str(folder)))
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'siftune\[evaluate\]'"):
        evaluate(model_folder(), said, data=str(folder))


# --- tasks of the harness ---------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness whose own tasks are two parts of a group, with their rows in local files in place of the hub."""
    from lm_eval.tasks import TaskManager

    for part, count in (("small", 2), ("large", 6)):
        rows = [{"q": f"{part} {n}", "options": ["yes", "no"], "gold": n % 2} for n in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{part}.yaml").write_text(
            f"task: pair_{part}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/{part}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: options\n"
            "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\nfewshot_split: test\n"
        )
    (tmp_path / "pair.yaml").write_text("group: pair\ntask: [pair_small, pair_large]\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(harness, "_manager", lambda: TaskManager(include_path=str(tmp_path), include_defaults=False))


@pytest.mark.slow
@pytest.mark.usefixtures("theirs")
def test_a_task_of_the_harness_runs_by_name_with_its_parts_pooled(tmp_path: Path) -> None:
    said = suite(tmp_path / "s.yaml", "tasks: {pair: {shots: 1, metric: acc_norm}}")
    found = evaluate(model_folder(), str(said), run=str(tmp_path / "run"), device="cpu")
    assert found.tasks["pair"]["acc"]["n"] == 8
    assert found.standing == {"pair": "acc_norm"}
    assert found.about["pair"]["source"] == "lm-eval pair"
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples" / "pair.jsonl").read_text().splitlines()]
    assert sum(sample["part"] == "pair_large" for sample in samples) == 6
    assert all(sample["prompt"].count("\n\n") == 1 for sample in samples)
    assert found.tasks["pair"]["acc"]["value"] == np.mean([sample["acc"] for sample in samples])


@pytest.mark.usefixtures("theirs")
def test_a_limit_is_drawn_over_all_parts_of_a_task() -> None:
    whole = harness.build_hub("pair", title="pair", shots=None, limit=None, seed=0)
    assert whole.samples is None
    for seed in range(5):
        built = harness.build_hub("pair", title="pair", shots=2, limit=3, seed=seed)
        assert built.samples is not None
        assert sum(map(len, built.samples.values())) == 3
        assert list(built.samples) == list(built.tasks)
        assert all(rows == sorted(rows) for rows in built.samples.values())
        assert {task.get_config("num_fewshot") for task in built.tasks.values()} == {2}
    drawn = {str(harness.build_hub("pair", title="pair", shots=0, limit=3, seed=seed).samples) for seed in range(5)}
    assert len(drawn) > 1


@pytest.mark.usefixtures("theirs", "no_weights")
def test_a_task_that_nobody_has_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task pari is none of siftune's nor of lm-eval's; did you mean pair\?"):
        evaluate(model_folder(), str(suite(tmp_path / "s.yaml", "tasks: {pari: null}")))
    (tmp_path / "small.jsonl").unlink()
    with pytest.raises(UserError, match=r"task pair: lm-eval's pair cannot be loaded \(.*pass --data FOLDER"):
        evaluate(model_folder(), str(suite(tmp_path / "s.yaml", "tasks: {pair: null}")))


def test_every_name_that_our_tasks_have_in_the_harness_is_there() -> None:
    import lm_eval.tasks

    names = {spec.hub for spec in own_tasks().values() if spec.hub}
    folders = [str(Path(lm_eval.tasks.__file__).parent / name) for name in (*names, "benchmarks")]
    assert names <= set(lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False).all_tasks)


@pytest.mark.usefixtures("theirs", "no_weights")
def test_a_metric_that_a_task_does_not_give_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task pair of the suite has no metric f1; use one of acc, acc_norm"):
        evaluate(model_folder(), str(suite(tmp_path / "s.yaml", "tasks: {pair: {metric: f1}}")))
    with pytest.raises(UserError, match="task mmlu of the suite has no metric acc_norm; use one of acc"):
        evaluate(model_folder(), str(suite(tmp_path / "s.yaml", "tasks: {mmlu: {metric: acc_norm}}")), data=str(folder))


# --- small things -----------------------------------------------------------------------------------------------------


def test_an_average_is_plain_and_never_over_an_undefined_value() -> None:
    assert averaged([]) is None
    assert averaged([{"value": None, "stderr": None}]) is None
    assert averaged([{"value": 1.0, "stderr": None}, {"value": 0.0, "stderr": 0.1}]) == {
        "value": 0.5,
        "stderr": None,
        "tasks": 2,
    }


def test_a_metric_by_name_is_itself_or_the_first_of_its_filters() -> None:
    assert named("a", ["b", "a,x", "a"]) == "a"
    assert named("a", ["b", "a,x", "a,y"]) == "a,x"
    assert named("a,y", ["b", "a,x", "a,y"]) == "a,y"
    assert named(None, ["b", "a"]) == "b"
    assert named("a", []) is None


def test_names_become_files_of_their_own() -> None:
    assert file_name("a/b") != file_name("a-b") == "a-b"
    assert "/" not in file_name("../x")
    assert not file_name("..").startswith(".")


@pytest.mark.slow
def test_the_suite_and_the_task_of_the_documentation_run(folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    for name, text in zip(("suite.yaml", "capitals.yaml", "rivers.yaml"), blocks, strict=True):
        assert text.startswith(f"# {name}")
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = [{"country": "Italy", "answers": ["Rome"]}, {"country": "Peru", "answers": ["Lima"]}]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    held = {"instruction": "Count.", "output": "1 2 3"}
    (tmp_path / "m.jsonl").write_text(json.dumps(held) + "\n", encoding="utf-8")
    said = Suite.read(tmp_path / "suite.yaml")
    assert [(task.name, task.shots, task.limit) for task in said.tasks] == [
        ("gsm8k", 8, 200),
        ("arc_challenge", 25, None),
        ("capitals", 1, None),
    ]
    found = evaluate(
        model_folder(),
        said.without(["arc_challenge", "gsm8k"]),
        data=str(folder),
        run=str(tmp_path / "run"),
        device="cpu",
    )
    assert found.tasks["capitals"]["exact_match"]["n"] == 2
    assert found.average is None
    assert found.held_out["mathematics"]["rows"] == 1
    sample = json.loads((tmp_path / "run" / "samples" / "capitals.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == "The capital of Austria is Vienna.\n\nThe capital of Italy is"
    rivers = [{"city": "Vienna", "rivers": ["the Danube", "the Seine"], "answer": 0}]
    (tmp_path / "rivers.jsonl").write_text("\n".join(map(json.dumps, rivers)), encoding="utf-8")
    (task,) = Suite.read(tmp_path / "rivers.yaml").tasks
    assert task.file is not None
    built = build_file(task.file, title="rivers", shots=None, limit=None, share=None, seed=0)
    assert built.tasks["rivers"].doc_to_text(built.tasks["rivers"].eval_docs[0]) == "Which river flows through Vienna?"


def test_the_documentation_names_every_file_and_field_of_every_task() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    for name, spec in own_tasks().items():
        row = next(line for line in lines if line.startswith(f"| `{name}` |"))
        task = next((task for task in Suite.read("daar").tasks if task.name == name), None)
        if task is not None and task.limit is not None:
            assert f"| {task.limit:,} |" in row
        fields = [line for line in lines if f"`{spec.file}`" in line.split("|")[1]][-1]
        assert all(f"`{field}`" in fields for field in spec.fields), name
        assert spec.shots_file is None or name == "scienceqa" or f"`{spec.shots_file}`" in fields
