"""`siftune compare STUDY`: methods x budgets x seeds at equal budget, with tables and figures."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..output import say
from ..runs.options import Everywhere, options_of
from .common import page_line, print_json, read
from .parser import Command

if TYPE_CHECKING:
    from ..study.compare import Outcome
    from ..study.spec import Study


@dataclass(kw_only=True)
class CompareOptions(Everywhere):
    """`siftune compare STUDY`"""

    study: str | None = None
    """The study's YAML file."""
    set: dict[str, str] = field(default_factory=dict)
    """Variables and keys of the study (data=./pools,seeds=[0],recipe.sft.learning_rate=1e-4); repeatable."""
    jobs: int | None = None
    """Number of processes; default: the study's value."""
    threads: int | None = None
    """Threads of each process; default: the study's value."""
    part: str | None = None
    """Run only part i of n of the cells (2/8), in a folder that all parts share."""
    dry_run: bool = False
    """Check everything, list the cells and their cost, and stop."""


def command() -> Command:
    """The options of `siftune compare`."""
    compare_options = options_of(CompareOptions)
    return Command(
        "compare",
        "siftune compare STUDY.yaml [options]",
        "Methods x budgets x seeds at the same number of trained rows or tokens: table, intervals, figures.",
        compare_options,
        positional="study",
        fixed=(),
        examples=(
            "siftune compare study.yaml --dry-run",
            "siftune compare study.yaml --jobs 2 --out study.md",
            "siftune compare study.yaml --set data=./pools --set seeds=[0,1,2,3,4]",
            "siftune compare study.yaml --part 2/8 --run shared/study",
        ),
    )


def run(words: list[str]) -> int:
    values = read(command(), words)
    if values is None:
        return 0
    options = CompareOptions(**values)
    if options.study is None:
        raise UserError("siftune compare needs a study: siftune compare STUDY.yaml; examples/study-demo.yaml is one")
    if options.out is not None and not options.out.endswith(".md"):
        raise UserError(f"--out {options.out} is not a Markdown file; pass a path that ends in .md")
    from ..data.protect import refuse_overlap
    from ..study.compare import compare
    from ..study.spec import read_study

    study = _adjusted(read_study(options.study, _parsed(options.set)), options)
    refuse_overlap(
        {"--out": options.out, "--run": options.run}, {"the study": options.study, "--config": options.config}
    )
    verbose = not (options.quiet or options.json)
    done = compare(
        study,
        run=options.run,
        out=options.out,
        part=options.part,
        cache=options.cache,
        dry_run=options.dry_run,
        command=_shown(options),
        on_event=_print_share if verbose else lambda name, share: None,
    )
    if options.json:
        print_json(_facts(done, dry_run=options.dry_run))
    elif options.dry_run and verbose:
        _show_plan(study, done)
    elif options.quiet:
        say(done.page or done.folder)
    else:
        _show(study, done)
    return 0


def _parsed(settings: Mapping[str, str]) -> dict[str, Any]:
    """Values as YAML reads them."""
    from ..yaml_io import set_value

    return {name: set_value(name, value) for name, value in settings.items()}


def _adjusted(study: Study, options: CompareOptions) -> Study:
    for name in ("jobs", "threads"):
        value = getattr(options, name)
        if value is not None:
            if value < 1:
                raise UserError(f"--{name} must be >= 1, got {value}")
            study = replace(study, **{name: value})
    return study


def _shown(options: CompareOptions) -> str:
    """The command for the page, with files and folders by name only: a published page holds no paths of a machine."""
    words = ["siftune", "compare", Path(str(options.study)).name]
    for name, value in options.set.items():
        place = os.path.isabs(value) or os.path.exists(value)  # Path.exists raises for a long list
        words += ["--set", f"{name}={Path(value).name if place else value}"]
    words += [
        word
        for name in ("jobs", "threads")
        if getattr(options, name)
        for word in (f"--{name}", str(getattr(options, name)))
    ]
    return shlex.join(words)


def _print_share(name: str, share: float) -> None:
    say(f"siftune: {share:4.0%} {name}", error=True)


def _facts(done: Outcome, *, dry_run: bool) -> dict[str, Any]:
    from dataclasses import asdict

    plans = {name: asdict(plan) for name, plan in done.plans.items()}
    return {
        "run": str(done.folder),
        "dry_run": dry_run,
        "cells": [cell.name for cell in done.cells],
        "ran": done.ran,
        "complete": done.complete,
        "page": None if done.page is None else str(done.page),
        "plans": plans,
    }


def _show_plan(study: Study, done: Outcome) -> None:
    from ..screen import console
    from .terminal import table

    shown = console()
    seeds = len(study.seeds)
    columns = ("method", "rows", "steps", "trained rows", "trained tokens", "tokens forward")
    lines = [
        (
            name,
            f"{plan.rows:,}",
            f"{plan.steps:,}",
            f"{plan.trained_rows:,}",
            f"{plan.trained_tokens:,}",
            f"{plan.forward_tokens:,}",
        )
        for name, plan in done.plans.items()
    ]
    shown.print(table(f"study {study.name}: {len(done.cells)} cells", columns, lines, numbers=range(1, 6)))
    trained = sum(plan.trained_tokens for plan in done.plans.values()) * seeds
    forward = sum(plan.forward_tokens for plan in done.plans.values()) * seeds
    say(
        f"per seed, of {seeds} seeds; in total about {trained:,} tokens trained and {forward:,} forward, without the "
        "selections' scoring (rows are exact, tokens are estimated from the pool's mean)"
    )
    say("dry run: nothing was trained")
    say(f"next: siftune compare {study.name}.yaml   (folder {done.folder})")


def _show(study: Study, done: Outcome) -> None:
    from ..screen import console
    from ..study.cells import groups_of
    from ..study.frame import main_value
    from ..study.tables import interval, shown
    from .terminal import table

    if done.frame is None or done.page is None:
        say(f"{done.ran} of this part's {len(done.cells)} cells were trained now; results are in {done.folder}/cells")
        say("next: run the other parts, then the same command without --part to write tables and figures")
        return
    frame = done.frame
    value = main_value(frame.names)
    for group in groups_of(frame.arms):
        difference_by_arm = {
            comparison.arm: comparison.difference for comparison in frame.compared(group) if comparison.value == value
        }
        lines = []
        for arm in frame.arms:
            if arm.group in (group, None):
                difference = interval(difference_by_arm[arm]).replace("**", "") if arm in difference_by_arm else "-"
                tokens = f"{frame.tokens(arm, 'trained_tokens').mean:,.0f}" if frame.of(arm, value) else "-"
                lines.append((arm.label, len(frame.of(arm, value)), tokens, shown(frame.mean(arm, value)), difference))
        columns = (
            "method",
            "seeds",
            "trained tokens",
            f"{value} (mean ± sd)",
            f"difference to {study.baseline} [95 %]",
        )
        console().print(table(f"{study.name} {group}".strip(), columns, lines, numbers=range(1, 5)))
    say(f"{done.ran} cells trained now, {len(frame.done)} finished in total -> {done.page}")
    say(f"  {done.folder}/table.md, figures/   the tables; differences by method and domain, tokens against loss")
    say(f"  {done.folder}/cells.parquet, differences.parquet   every number")
    say(f"  {page_line(done.folder)}")
    say(f"next: read {done.page}; to add seeds, pass --run {done.folder} --set seeds=[...]")
