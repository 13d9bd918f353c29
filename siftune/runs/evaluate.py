"""Evaluate a model: a suite's tasks and held-out files, into a run folder that resumes task by task.

Everything that can be checked without the weights is checked first: names, files, rows, worked examples, the adapter's
base. A finished task is never run again; the model is loaded only when a task is left to run. The run writes
results.json (task -> metric -> value, stderr, n), table.md, samples/TASK.jsonl (every prompt, answer and grade).
Cost: the harness's for tasks, one forward pass for held-out rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data.protect import refuse_overlap
from ..errors import UserError
from ..evaluation.results import Results, averaged, facts, markdown
from ..evaluation.suite import Suite, SuiteTask, suite_file
from ..files import atomic_path, hash_json, read_json, write_json
from ..progress import doing
from .cut import refuse_inside
from .folder import RunFolder, identity, make_folder
from .job import RUNS, plain
from .options import Everywhere

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel

RESULTS, TABLE = "results.json", "table.md"
OF_THE_RESULT = ("shots", "limit", "metric", "average")


@dataclass(kw_only=True)
class EvaluateOptions(Everywhere):
    """`siftune evaluate MODEL`"""

    model: str | None = None
    """Model folder or hub id; a folder that holds only an adapter is loaded on the base it names."""
    adapter: str | None = None
    """PEFT adapter (folder or hub id), merged into the model before anything is measured."""
    suite: str | None = None
    """daar, uds, held-out, or a YAML file (a suite, or a task of lm-eval's); held-out when only --held-out is set."""
    data: str | None = None
    """Folder with the tasks' rows as JSON Lines (docs/evaluate.md); default: read from the hub."""
    limit: int | float | None = None
    """Maximum number of questions of a task, or a share below 1 (0.1), drawn by --seed; a smaller one draws a subset."""
    skip: str | None = None
    """Tasks of the suite to leave out: humaneval,mbpp."""
    held_out: dict[str, str] | None = None
    """Files of held-out rows for loss and token accuracy, one per domain: mathematics=m.jsonl,coding=c.jsonl."""
    held_out_rows: int | None = None
    """Maximum number of rows of each held-out file, from its beginning."""
    text: Literal["auto", "chat", "prompt"] = "auto"
    """How a held-out row becomes tokens; use the value of the training run."""
    max_length: int = 512
    """Maximum number of tokens of a held-out row."""
    columns: dict[str, str] | None = None
    """Column names of the held-out files, as field=column: instruction=question,output=answer."""
    roles: dict[str, str] | None = None
    """The role of each further role name in the held-out chats, as name=role: teacher=assistant,pupil=user."""
    format: Literal["alpaca", "prompt-completion", "messages", "text"] | None = None
    """Format of the held-out rows; default: detected."""
    chat: bool = False
    """Format the tasks' questions with the model's chat template; for instruct models."""
    allow_code: bool = False
    """Let HumanEval and MBPP run code that the model writes. There is no sandbox: see docs/evaluate.md."""
    batch_size: int = 8
    """Prompts of a batch."""
    device: str = "auto"
    """auto takes CUDA, else MPS, else the CPU; or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 for a 16-bit checkpoint on CUDA, float32 everywhere else."""
    dry_run: bool = False
    """Check model, adapter, tasks and files, print the number of questions, and stop."""


def evaluate(model: str | Path, suite: str | Suite | None = None, **options: Any) -> Results:
    """Run a suite on a model; `options` are the fields of `EvaluateOptions`, and `on_event`, which is called with
    a line per task.

    Raises `UserError` for invalid names, files, rows, adapters or options, before any weight is read.

    >>> evaluate("./model", "uds", data="eval", limit=100, skip="humaneval").average
    """
    on_event: Callable[[str], None] = options.pop("on_event", lambda line: None)
    known = [item.name for item in fields(EvaluateOptions)]
    if wrong := [name for name in options if name not in known]:
        raise UserError(f"evaluate() has no option {wrong[0]}; known are {', '.join(known)}")
    loaded = suite if isinstance(suite, Suite) else None
    job = Job(EvaluateOptions(model=str(model), suite=None if loaded else suite, **options), loaded)  # type: ignore[arg-type]
    return run(job, on_event=on_event)


class Job:
    """An evaluation whose options, files and rows are checked; no weight is read yet."""

    def __init__(self, options: EvaluateOptions, suite: Suite | None = None) -> None:
        from ..evaluation import harness
        from ..evaluation.held_out import encode
        from ..evaluation.target import Target

        self.options = options
        if options.out is not None and (not options.out.endswith(".json") or Path(options.out).is_dir()):
            raise UserError(f"--out {options.out} is not a .json file; pass a path that ends in .json")
        if options.batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {options.batch_size}")
        self.suite = _suite(options, suite)
        self.files = dict(self.suite.held_out) | dict(options.held_out or {})
        inputs = {f"--{name}": getattr(options, name) for name in ("model", "adapter", "data", "config")}
        inputs["--suite"] = suite_file(options.suite)
        inputs |= {f"the held-out rows {name}": files for name, files in self.files.items()}
        refuse_overlap({"--out": options.out, "--run": options.run}, inputs)
        if not self.suite.tasks and not self.files:
            raise UserError("nothing to evaluate; pass --suite daar, uds or a file, or --held-out NAME=FILE")
        if self.suite.tasks:
            harness.require("a suite of tasks")
            for task in self.suite.tasks:
                if task.spec is None and task.file is None:
                    harness.check_known(task.name, own_tasks=list(_own_tasks()))
        if not options.model:
            raise UserError("siftune evaluate needs a model: siftune evaluate MODEL --suite daar")
        if options.data is not None and not Path(options.data).is_dir():
            raise UserError(
                f"data={options.data!r} is not a folder; pass the folder that holds gsm8k_test.jsonl.gz and the other task files"
            )
        self.target = Target.find(options.model, adapter=options.adapter, device=options.device, dtype=options.dtype)
        if options.chat and not getattr(self.target.tokenizer, "chat_template", None):
            raise UserError(f"--chat needs a chat template, and model={options.model!r} has none; remove --chat")
        self.questions = {task.name: _questions(task, options) for task in self.suite.tasks}
        for task in self.suite.tasks:
            check_metric(task, self.questions[task.name])
        self.encoded = (
            encode(
                self.target.tokenizer,
                self.files,
                text=options.text,
                max_length=min(options.max_length, self.target.length),
                max_rows=options.held_out_rows,
                columns=options.columns,
                roles=options.roles,
                format=options.format,
            )
            if self.files
            else {}
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """Every option that decides the result: config.yaml."""
        values = {item.name: getattr(self.options, item.name) for item in fields(EvaluateOptions)}
        for name in ("run", "out", "quiet", "json", "config", "cache", "dry_run"):
            values.pop(name)
        values["suite"] = self.suite.name if values["suite"] is None else values["suite"]
        return {"command": "evaluate"} | {name: plain(value) for name, value in values.items() if value is not None}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Content hashes of model, tasks and held-out rows."""
        hashes: dict[str, Any] = {"model": self.target.key}
        for task in self.suite.tasks:
            task_key = task.spec.key if task.spec is not None else None
            parts = [
                task_key,
                *(getattr(task, name) for name in OF_THE_RESULT),
                getattr(self.questions[task.name], "content", None),
                *([task.share] if task.share is not None else []),
            ]
            hashes[f"task {task.name}"] = hash_json(parts)
        return hashes | {f"held-out {name}": hash_json(encoded.rows) for name, encoded in self.encoded.items()}

    @property
    def plan(self) -> dict[str, Any]:
        """The tasks and rows that the run would evaluate."""
        tasks = {task.name: _about(task, self.questions[task.name]) for task in self.suite.tasks}
        held_out = {
            name: {"rows": len(encoded.rows), "skipped": encoded.skipped} for name, encoded in self.encoded.items()
        }
        return {"config": self.config, "tasks": tasks, "held_out": held_out}


def _suite(options: EvaluateOptions, loaded: Suite | None) -> Suite:
    from ..evaluation.suite import HELD_OUT

    name = options.suite or (HELD_OUT if options.held_out else None)
    if loaded is None and name is None:
        raise UserError("siftune evaluate needs --suite daar, uds or a YAML file, or --held-out NAME=FILE")
    suite = loaded or Suite.read(str(name))
    skipped = [part.strip() for part in (options.skip or "").split(",") if part.strip()]
    suite = suite.without(skipped).limited(options.limit)
    suite.check_code(options.allow_code)
    return suite


def _own_tasks() -> Iterable[str]:
    from ..evaluation.tasks import own_tasks

    return own_tasks()


def _questions(task: SuiteTask, options: EvaluateOptions) -> Any:
    """The task's questions: siftune's own (`Questions`), or the harness's (`Built`)."""
    from ..evaluation import harness
    from ..evaluation.harness_file import build_file
    from ..evaluation.tasks import questions

    spec, folder = task.spec, None if options.data is None else Path(options.data)
    how: dict[str, Any] = {"limit": task.limit, "share": task.share, "seed": options.seed}
    if task.file is not None:
        return build_file(task.file, title=task.name, shots=task.shots, **how)
    if spec is not None and (folder is not None or spec.hub is None):
        return questions(spec, folder, shots=task.shots or 0, **how)
    name, needs = (spec.hub, spec.hub_needs) if spec is not None else (task.name, None)
    return harness.build_hub(str(name), title=task.name, shots=task.shots, needs=needs, **how)


def _about(task: SuiteTask, questions: Any) -> dict[str, Any]:
    """The facts of a task that are known before it runs."""
    is_own = hasattr(questions, "rows")
    return {
        "questions": len(questions.rows) if is_own else None,
        "held": questions.total if is_own else None,
        "shots": task.shots if task.shots is not None or not is_own else 0,
        "source": questions.source if is_own else f"lm-eval {task.spec.hub if task.spec else task.file or task.name}",
        "metric": headline_metric(task, is_own=is_own),
    }


def headline_metric(task: SuiteTask, *, is_own: bool) -> str | None:
    """The headline metric of a task: the suite's choice, else the default of siftune's grading or of the harness's task."""
    if task.metric is not None or task.spec is None:
        return task.metric
    return task.spec.own_metric if is_own else task.spec.hub_metric


def check_metric(task: SuiteTask, questions: Any) -> None:
    """Raise `UserError` where the suite names a metric that the task does not report."""
    if task.metric is None:
        return
    if hasattr(questions, "rows"):
        metrics = questions.spec.metrics
    else:
        metrics = tuple(dict.fromkeys(name for part in questions.tasks.values() for name in part.aggregation()))
    if task.metric.partition(",")[0] not in metrics:
        raise UserError(f"task {task.name} of the suite has no metric {task.metric}; use one of {', '.join(metrics)}")


def named(name: str | None, metrics: Sequence[str]) -> str | None:
    """The metric that a name refers to: the exact name, else its first filter, else the first metric.

    >>> named("exact_match", ["exact_match,strict-match", "exact_match,flexible-extract"])
    'exact_match,strict-match'
    """
    matching = [metric for metric in metrics if name in (metric, metric.partition(",")[0])]
    return name if name in metrics else next(iter([*matching, *metrics]), None)


# --- running ----------------------------------------------------------------------------------------------------------


def run(job: Job, *, on_event: Callable[[str], None] = lambda line: None, bars: bool = False) -> Results:
    """Run the tasks that are not finished, and gather the results."""
    if job.options.dry_run:
        return Results(None, {}, {}, None, {}, about=job.plan["tasks"], manifest=job.plan)
    key = identity(job.config, job.inputs)
    folder = Path(job.options.run) if job.options.run else RUNS / f"evaluate-{job.suite.name}-{key}"
    refuse_inside(job.options.out, folder, but=RESULTS)
    pieces = len(job.encoded) + len(job.suite.tasks)
    with (
        RunFolder(folder, config=job.config, inputs=job.inputs) as opened,
        doing("evaluation", pieces, unit="tasks") as evaluation,
    ):
        loaded = Loaded(job)
        for name, encoded in job.encoded.items():
            with opened.stage(f"held-out {name}", hash_json([key, "held-out", name])) as stage:
                if not stage.reused:
                    on_event(f"held-out {name}: {len(encoded.rows):,} rows")
                    stage.files = [_measure(loaded, name, encoded, folder)]
                    stage.counts = {"rows": len(encoded.rows)}
            evaluation.advance()
        for task in job.suite.tasks:
            with opened.stage(task.name, hash_json([key, "task", task.name])) as stage:
                if not stage.reused:
                    on_event(f"{task.name}: running")
                    stage.files = _ask_task(loaded, task, folder, bars=bars)
                    stage.counts = {"questions": read_json(folder / stage.files[0])["about"]["questions"]}
            evaluation.advance()
        results = _gather(job, folder)
        write_json(folder / RESULTS, facts(results))
        with atomic_path(folder / TABLE) as temporary:
            temporary.write_text(markdown(_title(job), results), encoding="utf-8")
        manifest = opened.finish(results=facts(results))
    if job.options.out is not None:
        write_json(job.options.out, facts(results))
    return replace(results, manifest=manifest)


class Loaded:
    """The model, loaded on first use."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def network(self) -> PreTrainedModel:
        """The model itself."""
        return self.job.target.load()

    @cached_property
    def harness_model(self) -> HFLM:
        """The model, wrapped for the harness."""
        from ..evaluation import harness

        target = self.job.target
        size = self.job.options.batch_size
        return harness.model_of(self.network, target.tokenizer, batch_size=size, length=target.length)


def _measure(loaded: Loaded, name: str, encoded: Any, folder: Path) -> str:
    from ..evaluation.held_out import measure

    path = f"held-out/{file_name(name)}.json"
    write_json(folder / path, measure(loaded.network, encoded).facts)
    return path


def _ask_task(loaded: Loaded, task: SuiteTask, folder: Path, *, bars: bool) -> list[str]:
    from ..evaluation import harness, own

    job, questions = loaded.job, loaded.job.questions[task.name]
    built = own.build_own(questions, length=job.target.length) if hasattr(questions, "rows") else questions
    answers = harness.run_task(
        loaded.harness_model, built, chat=job.options.chat, allow_code=job.options.allow_code, bars=bars
    )
    about = _about(task, questions) | {"questions": answers.questions, "prompts_cut": answers.prompts_cut}
    about["metric"] = named(about["metric"], list(answers.metrics))
    metrics = {name: metric.__dict__ for name, metric in answers.metrics.items()}
    names = [f"tasks/{file_name(task.name)}.json", f"samples/{file_name(task.name)}.jsonl"]
    make_folder(folder / "samples")
    with atomic_path(folder / names[1]) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for sample in answers.samples:
            lines.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
    write_json(folder / names[0], {"metrics": metrics, "about": about})
    return names


def _title(job: Job) -> str:
    adapted = f" with the adapter {job.options.adapter}" if job.options.adapter else ""
    return f"{job.options.model}{adapted}, suite {job.suite.name}"


def file_name(name: str) -> str:
    """A task's or domain's name as a file name; a hash is appended where characters were replaced.

    >>> file_name("mathematics")
    'mathematics'
    """
    bare = re.sub(r"[^\w.-]", "-", name).lstrip(".")[:80]
    return bare if bare == name else f"{bare}-{hash_json(name)[:8]}"


def _gather(job: Job, folder: Path) -> Results:
    results = {task.name: read_json(folder / f"tasks/{file_name(task.name)}.json") for task in job.suite.tasks}
    held_out = {name: read_json(folder / f"held-out/{file_name(name)}.json") for name in job.encoded}
    tasks = {name: result["metrics"] for name, result in results.items()}
    headline_metrics = {
        name: result["about"]["metric"] for name, result in results.items() if result["about"]["metric"]
    }
    counted = [task.name for task in job.suite.tasks if task.average and task.name in headline_metrics]
    average = averaged([tasks[name][headline_metrics[name]] for name in counted])
    return Results(
        folder, tasks, headline_metrics, average, held_out, {name: result["about"] for name, result in results.items()}
    )
