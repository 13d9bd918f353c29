"""The results of an evaluation: as JSON, as Markdown tables, and the average over tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TASK_COLUMNS = ("task", "metric", "value", "±", "questions", "shots", "prompts cut")
HELD_COLUMNS = ("held-out", "loss", "±", "token accuracy", "tokens", "rows", "skipped")


@dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    >>> results.tasks["gsm8k"]["exact_match"]["value"], results.held_out["mathematics"]["loss"]
    """

    folder: Path | None
    """The run folder; None for a dry run."""
    tasks: Mapping[str, Mapping[str, Mapping[str, float]]]
    """task -> metric -> {value, stderr, n}; a share is between 0 and 1, an undefined number None."""
    standing: Mapping[str, str]
    """task -> its headline metric, the one that enters the average."""
    average: Mapping[str, Any] | None
    """{value, stderr, tasks} over the tasks that count; None where there are none."""
    held_out: Mapping[str, Mapping[str, Any]]
    """domain -> the facts of `HeldOut`."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Per task: questions, rows of the file, worked examples, cut prompts, source, seconds."""
    manifest: Mapping[str, Any] = field(default_factory=dict)


def averaged(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Plain mean over tasks with the standard error of independent ones; None without tasks, or with an undefined one.

    >>> averaged([{"value": 0.25, "stderr": 0.3}, {"value": 0.75, "stderr": 0.4}])
    {'value': 0.5, 'stderr': 0.25, 'tasks': 2}
    """
    if not metrics or any(metric["value"] is None for metric in metrics):
        return None
    count = len(metrics)
    errors = [metric["stderr"] for metric in metrics]
    error = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / count
    return {"value": sum(metric["value"] for metric in metrics) / count, "stderr": error, "tasks": count}


def facts(results: Results) -> dict[str, Any]:
    """The content of results.json."""
    return {name: getattr(results, name) for name in ("tasks", "standing", "average", "held_out", "about")}


def lines(results: Results) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Table lines of the tasks and of the held-out files, as text."""
    tasks: list[tuple[str, ...]] = []
    for name, metrics in results.tasks.items():
        about = results.about[name]
        shots = "-" if about["shots"] is None else str(about["shots"])
        for metric, result in metrics.items():
            mark = "" if metric == results.standing.get(name) else " (aside)"
            tasks.append((name, metric + mark, *shown(result), f"{result['n']:,}", shots, f"{about['prompts_cut']:,}"))
    if results.average is not None:
        tasks.append(("average", f"{results.average['tasks']} tasks", *shown(results.average), "", "", ""))
    held_out = [
        (
            name,
            _fixed(result["loss"], 4),
            _fixed(result["loss_stderr"], 4),
            _fixed(result["token_accuracy"], 2, times=100),
            f"{result['tokens']:,}",
            f"{result['rows']:,}",
            ", ".join(f"{count} {reason}" for reason, count in result["skipped"].items()) or "-",
        )
        for name, result in results.held_out.items()
    ]
    return tasks, list(held_out)


def _fixed(value: float | None, digits: int, *, times: float = 1) -> str:
    return "-" if value is None else f"{times * value:.{digits}f}"


def shown(result: Mapping[str, Any]) -> tuple[str, str]:
    """A value and its standard error: shares in percent."""
    value, error = result["value"], result["stderr"]
    times = 100 if value is not None and 0 <= value <= 1 else 1
    return _fixed(value, 2, times=times), _fixed(error, 2, times=times)


def markdown(title: str, results: Results) -> str:
    """table.md: both tables, and what the columns mean."""
    tasks, held_out = lines(results)
    text = [f"# {title}", ""]
    for columns, rows in ((TASK_COLUMNS, tasks), (HELD_COLUMNS, held_out)):
        if rows:
            text += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            text += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    text += [
        "Shares are in percent, losses in nats per answer token; ± is one standard error. Prompts cut are questions "
        "whose worked examples were shortened on the left to fit the model.",
        "",
    ]
    return "\n".join(text)
