"""`siftune evaluate MODEL`: the papers' task sets, any of lm-evaluation-harness's, and held-out loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..output import say
from ..runs.options import options_of
from .common import print_json, read
from .parser import Command


def run(words: list[str]) -> int:
    from ..runs.evaluate import EvaluateOptions, Job
    from ..runs.evaluate import run as run_job

    command = Command(
        "evaluate",
        "siftune evaluate MODEL --suite daar|uds|FILE [options]",
        "Run a suite of tasks on a model, and measure loss on held-out rows.",
        options_of(EvaluateOptions),
        positional="model",
        examples=(
            "siftune evaluate ./model --suite uds --data ./eval --limit 100 --skip humaneval",
            "siftune evaluate ./model --adapter ./adapter --suite daar --data ./eval --allow-code",
            "siftune evaluate ./model --held-out mathematics=m.jsonl,coding=c.jsonl",
        ),
    )
    values = read(command, words)
    if values is None:
        return 0
    options = EvaluateOptions(**values)
    from ..evaluation.results import HELD_COLUMNS, TASK_COLUMNS, facts, lines
    from ..runs.evaluate import RESULTS, TABLE
    from ..screen import console
    from .terminal import Bars, progress, show_stages, table

    verbose = not (options.quiet or options.json)
    shown = console()
    job = Job(options)
    done = run_job(
        job,
        on_event=shown.line if verbose else lambda line: None,
        bars=isinstance(progress(enabled=verbose), Bars),
    )
    if done.folder is None:
        _show_plan(job.plan, as_json=options.json, verbose=verbose)
    elif options.json:
        print_json({"run": str(done.folder), **facts(done)})
    elif options.quiet:
        say(done.folder / RESULTS)
    else:
        for columns, rows in zip((TASK_COLUMNS, HELD_COLUMNS), lines(done), strict=True):
            if rows:
                shown.print(table("", columns, rows, numbers=range(1, len(columns) - 1)))
        show_stages(shown, done.manifest)
        say()
        say(f"{done.folder}/{TABLE}, {RESULTS}, samples/   the same results, and every question with its answer")
    return 0


def _show_plan(plan: Mapping[str, Any], *, as_json: bool, verbose: bool) -> None:
    """Print the plan of a dry run."""
    if as_json:
        print_json(plan)
    elif verbose:
        say("dry run: model, tasks and files are valid; no question was sent to the model")
        for name, about in plan["tasks"].items():
            count = "all" if about["questions"] is None else f"{about['questions']:,}"
            say(f"  {name}: {count} questions, {about['shots']} worked examples, from {about['source']}")
        for name, facts in plan["held_out"].items():
            say(f"  held-out {name}: {facts['rows']:,} rows")
