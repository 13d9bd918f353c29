"""lm-evaluation-harness: its tasks built by name, any tasks run, its results as siftune's.

The harness's `evaluate` does the work: batches, likelihoods, generation, chat templates. What siftune adds: rows are
drawn by a seed over the whole task, a task's parts (MMLU's subjects) are pooled by question, and every question with its
answer and grade can be read afterwards. No global random state is touched.
Cost: the model's; the harness's index of its own tasks takes seconds to build, siftune's tasks need none.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtra, UserError, did_you_mean
from ..redaction import shortened
from .draw import draw

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAIN_FILTER = "none"
"""The harness's name for no filter; left out of a metric's name."""


@dataclass(frozen=True)
class Metric:
    """One number of a task."""

    value: float
    stderr: float
    """Sample standard deviation over sqrt(n); NaN where there is none."""
    n: int
    """Questions."""


@dataclass(frozen=True)
class TaskResult:
    """The result of one task."""

    metrics: Mapping[str, Metric]
    questions: int
    prompts_cut: int
    """Questions whose prompt was truncated on the left to fit the model."""
    samples: list[dict[str, Any]] = field(repr=False, default_factory=list)
    """Per question: prompt, generated answer (or the options' log-likelihoods), grades."""


@dataclass(frozen=True, eq=False)
class Built:
    """A task as the harness runs it: its parts, and which questions of each (None is all)."""

    tasks: Mapping[str, Any]
    samples: Mapping[str, list[int]] | None = None
    reasons: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Per part, why the answer to a question has the grade 0, filled in as answers are graded."""
    content: str | None = None
    """Hash of the task's file and of its rows; None for a task that the harness has by name."""


def require(needed_for: str) -> None:
    """Raise `MissingExtra` where the harness is not installed."""
    try:
        with silent():
            import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtra("lm-eval", extra="evaluate", needed_for=needed_for) from error


# --- tasks of the harness ---------------------------------------------------------------------------------------------


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    with silent():
        return TaskManager()


def check_known(name: str, *, own_tasks: Sequence[str]) -> None:
    """Raise `UserError` for a task that neither siftune nor the harness has."""
    if name not in (known := _manager().all_tasks):
        raise UserError(f"task {name} is none of siftune's nor of lm-eval's; {_close(name, [*own_tasks, *known])}")


def _close(name: str, known: Sequence[str]) -> str:
    return did_you_mean(name, known, otherwise="list them with: lm-eval ls tasks")


def build_hub(
    name: str,
    *,
    title: str,
    shots: int | None,
    limit: int | None,
    share: float | None = None,
    seed: int,
    needs: str | None = None,
) -> Built:
    """A task of the harness by its name there, its data from the hub. Raises `UserError` where it cannot be loaded."""
    try:
        with silent():
            tasks: dict[str, Any] = _manager().load([name])["tasks"]
    except Exception as error:
        missing = f"; run: pip install '{needs}'" if needs and isinstance(error, ImportError) else ""
        raise UserError(
            f"task {title}: lm-eval's {name} cannot be loaded ({short_reason(error)}){missing or '; pass --data FOLDER'}"
        ) from error
    for task in tasks.values():
        usual = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=usual or 0 if shots is None or usual == 0 else shots)
        task.set_fewshot_seed(seed=seed)
    sizes = [len(task.eval_docs) for task in tasks.values()]
    chosen = draw(sum(sizes), limit, share, seed)
    if chosen is None:
        return Built(tasks)
    drawn = np.asarray(chosen)
    starts = np.cumsum([0, *sizes])
    samples = {
        part: (drawn[(drawn >= begin) & (drawn < end)] - begin).tolist()
        for part, begin, end in zip(tasks, starts[:-1], starts[1:], strict=True)
    }
    kept = {part: rows for part, rows in samples.items() if rows}
    return Built({part: tasks[part] for part in kept}, kept)


def short_reason(error: BaseException) -> str:
    """The first line of an error, or its type where it has no message."""
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0], 160)


@contextlib.contextmanager
def sandboxed() -> Iterator[None]:
    """Inside, the harness fills templates in a Jinja sandbox, because a task file may come from anyone."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(plain.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = plain


# --- running ----------------------------------------------------------------------------------------------------------


def model_of(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, length: int) -> HFLM:
    """The model, wrapped for the harness."""
    import copy

    from lm_eval.models.huggingface import HFLM

    with silent():
        # A tokenizer of its own: the harness sets its padding.
        return HFLM(pretrained=network, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=length)


def run_task(model: HFLM, built: Built, *, chat: bool, allow_code: bool, bars: bool) -> TaskResult:
    """Run every question of a task on the model and grade the answers."""
    from lm_eval.evaluator import evaluate

    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        with silent(bars=bars), sandboxed():
            output: Any = evaluate(
                lm=model,
                task_dict={"tasks": dict(built.tasks)},
                samples=None if built.samples is None else dict(built.samples),
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                confirm_run_unsafe_code=allow_code,
            )
    finally:
        if allow_code:
            _restore("HF_ALLOW_CODE_EVAL", before)
    samples = [
        _sample(part, sample, built.reasons.get(part, {})) for part in built.tasks for sample in output["samples"][part]
    ]
    first = {(sample["part"], sample["question"]): sample for sample in reversed(samples)}
    with silent():
        cut = sum(_is_cut(model, sample) for sample in first.values())
    return TaskResult(_pooled(built, output), len(first), cut, samples)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _sample(part: str, sample: Mapping[str, Any], reasons: Mapping[int, str]) -> dict[str, Any]:
    """One question as samples/TASK.jsonl holds it: prompt, generated answer, grades."""
    prompt, second = sample["arguments"][0][:2]
    facts = {"part": part, "question": sample["doc_id"], "filter": sample["filter"], "prompt": prompt}
    if isinstance(second, dict):
        facts |= {"said": sample["resps"][0][0], "read_as": sample["filtered_resps"][0]}
        facts["max_tokens"] = second.get("max_gen_toks")
    else:
        facts["options"] = [arguments[1] for arguments in sample["arguments"]]
        facts["log_likelihood"] = [
            response[0][0] if isinstance(response[0], (list, tuple)) else response[0] for response in sample["resps"]
        ]
    target = sample["target"]
    facts["target"] = target if isinstance(target, (str, int, list)) else str(target)
    facts |= {name: sample[name] for name in sample["metrics"]}
    return facts | ({"reason": reasons[sample["doc_id"]]} if sample["doc_id"] in reasons else {})


def _is_cut(model: HFLM, sample: Mapping[str, Any]) -> bool:
    """Whether the harness truncated the prompt on the left."""
    if "said" in sample:
        return len(model.tok_encode(sample["prompt"])) > int(model.max_length) - (sample["max_tokens"] or 0)
    longest = max(sample["options"], key=len)
    return len(model.tok_encode(sample["prompt"] + longest)) > int(model.max_length) + 1


def _pooled(built: Built, output: Mapping[str, Any]) -> dict[str, Metric]:
    """Every metric over all questions of all parts; a metric that is no mean only where there is one part."""
    from lm_eval.api.metrics import mean

    values: dict[str, list[float]] = {}
    plain: dict[str, Metric] = {}
    for part, task in built.tasks.items():
        for sample in output["samples"][part]:
            for metric in sample["metrics"]:
                value, title = sample[metric], _title(metric, sample["filter"])
                averaged = task.aggregation().get(metric, mean) is mean
                if averaged and isinstance(value, (bool, int, float, np.number)):
                    values.setdefault(title, []).append(float(value))
                elif len(built.tasks) == 1:
                    part_value = output["results"][part].get(f"{metric},{sample['filter']}")
                    plain[title] = Metric(_number(part_value), math.nan, len(output["samples"][part]))
    return {title: averaged_metric(numbers) for title, numbers in values.items()} | plain


def averaged_metric(values: Sequence[float]) -> Metric:
    """Mean and its standard error.

    >>> averaged_metric([0.0, 1.0, 1.0, 0.0])
    Metric(value=0.5, stderr=0.28867513459481287, n=4)
    """
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    return Metric(float(array.mean()), error, len(array))


def _title(metric: str, name: str) -> str:
    return metric if name == PLAIN_FILTER else f"{metric},{name}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float, np.number)) else math.nan


@contextlib.contextmanager
def silent(*, bars: bool = False) -> Iterator[None]:
    """Suppress the harness's log and standard output, and its progress bars unless `bars`."""
    from ..models.load import quiet

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    aside = sys.stderr if bars else io.StringIO()
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(aside):
            yield
    finally:
        log.setLevel(level)
