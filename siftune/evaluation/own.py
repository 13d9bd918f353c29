"""One of siftune's tasks in the form that lm-evaluation-harness runs: prompts, worked examples, options, grading.

The harness sees documents that hold a row's number; texts are looked up and prompts filled here, so that the text of a row
is never read as a template. Cost: filling a template per prompt, tens of microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ..errors import UserError
from .grading import GRADES, Failed
from .harness import Built, silent
from .tasks import LETTERS, Questions, Rows, TaskSpec


def build_own(questions: Questions, *, length: int) -> Built:
    """The task for the harness, one part per value of `by`. `length` is the model's, half of it for a written answer."""
    from lm_eval.api.task import ConfigurableTask

    spec = questions.spec
    tasks, reasons = {}, {}
    with silent():
        for value, rows, shots in questions.leaves():
            name = f"{spec.name}/{value}" if value else spec.name
            reasons[name] = dict[int, str]()
            tasks[name] = ConfigurableTask(config=_config(name, spec, rows, shots, length, reasons[name]))
    return Built(tasks, reasons=reasons)


def _config(name: str, spec: TaskSpec, rows: Rows, shots: Rows, length: int, reasons: dict[int, str]) -> dict[str, Any]:
    """The harness's configuration. A document is a row's number; its text is looked up here, so that the text of a row is
    never read as a template."""
    every = [*rows, *shots]

    def row_of(doc: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = every[doc["row"]]
        return row

    def documents(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        opening = [rendered(spec.opening, row) for row in rows]
        return {"test": Dataset.from_dict({"row": list(range(len(rows))), "opening": opening})}

    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": documents,
        "test_split": "test",
        "doc_to_text": lambda doc: rendered(spec.prompt, row_of(doc)),
        "target_delimiter": spec.delimiter,
        "num_fewshot": len(shots),
        "fewshot_config": {
            "sampler": "first_n",
            "samples": [{"row": len(rows) + index, "opening": ""} for index in range(len(shots))],
        },
    }
    if spec.opening:
        config["description"] = "opening"  # the document's field of this name
    return config | (_written(spec, row_of, length, reasons) if spec.kind == "write" else _chosen(spec, row_of))


def _written(
    spec: TaskSpec, row_of: Callable[[Any], dict[str, Any]], length: int, reasons: dict[int, str]
) -> dict[str, Any]:
    """`reasons` collects, by row, why an answer has the grade 0, where its grade has a reason."""
    grade, metric, _ = GRADES[str(spec.grade)]

    def graded(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
        value = grade(row_of(doc), answers[0])
        if isinstance(value, Failed):
            reasons[doc["row"]] = value.reason
        return {metric: float(value)}

    return {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: rendered(spec.shown or "", row_of(doc)),
        "process_results": graded,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "until": list(spec.stop),
            "max_gen_toks": min(spec.max_tokens, length // 2),
            "do_sample": False,
        },
    }


def _chosen(spec: TaskSpec, row_of: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    def options(doc: Any) -> list[str]:
        choices = row_of(doc)["choices"]
        return list(LETTERS[: len(choices)]) if spec.options == "letters" else choices

    return {
        "output_type": "multiple_choice",
        "doc_to_choice": options,
        "doc_to_target": lambda doc: row_of(doc)["answer"],
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in spec.metrics],
    }


@cache
def _templates() -> Any:
    """Sandboxed Jinja, because a suite may come from anyone."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["regex_replace"] = lambda text, pattern, new="": re.sub(pattern, new, text)
    return environment


def rendered(template: str, row: Mapping[str, Any]) -> str:
    """A template filled with a row's fields. Raises `UserError` for a field the row lacks.

    >>> rendered("Question: {{ question }}", {"question": "why?"})
    'Question: why?'
    """
    from jinja2 import TemplateError

    try:
        return str(_templates().from_string(template).render(**row))
    except TemplateError as error:
        raise UserError(f"the prompt {template!r} cannot be filled: {error}; name the row's own fields") from error
