"""A suite: which tasks, with how many worked examples and questions, and which held-out files. Read from YAML.

    about: what it is for
    tasks: {gsm8k: {shots: 5, limit: 500}, mine: {task: mine.yaml}, arc_challenge: {shots: 25, metric: acc_norm}}
    held_out: {mathematics: held.jsonl}

A task is one of siftune's (`tasks/`), one of a YAML file of the user's (in siftune's keys or in those of
lm-evaluation-harness), or any of lm-evaluation-harness by its name there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ..errors import UserError, check_keys, did_you_mean
from ..yaml_io import read_yaml
from .harness_file import HarnessFile, is_harness_file, read_harness_file
from .tasks import TaskSpec, own_tasks, read_task

SUITES = Path(__file__).parent / "suites"
HELD_OUT = "held-out"
"""The suite without tasks: held-out files alone."""


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task of a suite."""

    name: str
    """Its name in the results."""
    shots: int | None = None
    """Worked examples in front of every question; None is the task's own default (0 for siftune's)."""
    limit: int | None = None
    """Questions at most; of more, a seeded draw is used."""
    share: float | None = None
    """Share of the questions at most, over 0 and below 1, drawn likewise."""
    metric: str | None = None
    """The headline metric; None is the task's own."""
    average: bool = True
    """Counts in the suite's average."""
    spec: TaskSpec | None = None
    """siftune's description of the task; None for a task of the harness alone."""
    file: HarnessFile | None = None
    """The user's file of a task of the harness."""


def suite_file(suite: str | None) -> str | None:
    """The path of a suite that is a file; None for a shipped one."""
    return suite if suite is not None and Path(suite).suffix in (".yaml", ".yml") else None


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks and held-out files that are run together.

    >>> [task.name for task in Suite.read("uds").tasks]
    ['mmlu', 'scienceqa', 'gsm8k', 'humaneval']
    """

    name: str
    about: str = ""
    tasks: tuple[SuiteTask, ...] = ()
    held_out: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Domain -> file or files of rows."""

    @classmethod
    def read(cls, source: str | Path) -> Self:
        """`daar`, `uds`, `held-out`, or the path of a YAML file. Raises `UserError` for anything else."""
        if str(source) == HELD_OUT:
            return cls(name=HELD_OUT, about="loss and token accuracy of held-out rows, per domain")
        shipped = {path.stem: path for path in SUITES.glob("*.yaml")}
        path = shipped.get(str(source), Path(source))
        if str(source) not in shipped and path.suffix not in (".yaml", ".yml"):
            known = [*sorted(shipped), HELD_OUT]
            raise UserError(
                f"suite {source} is not known; {did_you_mean(str(source), known)}, or the path of a .yaml file"
            )
        if str(source) not in shipped and is_harness_file(path, what="suite"):
            task = read_harness_file(path)
            return cls(name=path.stem, tasks=(SuiteTask(name=task.name, file=task),))
        content = read_yaml(path, what="suite")
        where = f"suite {path.stem}"
        check_keys(content, ("name", "about", "tasks", "held_out"), where)
        tasks = _tasks(content.get("tasks") or {}, path, where)
        held_out = content.get("held_out") or {}
        if not isinstance(held_out, dict):
            raise UserError(f"{where}: held_out is a {type(held_out).__name__}; write one `domain: file` a line")
        if not tasks and not held_out:
            raise UserError(f"{where} has neither tasks nor held_out files; name some")
        files = {str(name): _beside(path, source) for name, source in held_out.items()}
        return cls(name=path.stem, about=str(content.get("about", "")), tasks=tasks, held_out=files)

    def without(self, names: Sequence[str]) -> Self:
        """The suite without some tasks. Raises `UserError` for a name it does not have."""
        task_names = [task.name for task in self.tasks]
        for name in names:
            if name not in task_names:
                raise UserError(f"suite {self.name} has no task {name} to skip; {did_you_mean(name, task_names)}")
        return replace(self, tasks=tuple(task for task in self.tasks if task.name not in names))

    def limited(self, limit: float | None) -> Self:
        """At most `limit` questions of every task, or that share of them where it is below 1."""
        if limit is None:
            return self
        if (wrong := _not_a_limit(limit)) is not None:
            raise UserError(f"limit={limit} {wrong}")
        if isinstance(limit, int):
            tasks = [replace(task, limit=min(limit, task.limit or limit)) for task in self.tasks]
        else:
            tasks = [replace(task, share=min(limit, task.share or limit)) for task in self.tasks]
        return replace(self, tasks=tuple(tasks))

    def check_code(self, allowed: bool) -> None:
        """Raise `UserError` where a task would run code that the model wrote and that is not allowed."""
        running = [task.name for task in self.tasks if task.spec is not None and task.spec.runs_programs]
        if running and not allowed:
            raise UserError(
                f"{' and '.join(running)} of suite {self.name} run code that the model writes, in no sandbox; pass "
                f"--allow-code (best inside a container), or --skip {','.join(running)}"
            )


def _not_a_limit(limit: Any) -> str | None:
    """The error message for an invalid number or share of questions; None where it is valid."""
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if number and (0 < limit < 1 or (isinstance(limit, int) and limit >= 1)):
        return None
    return "is no number of questions; use a whole number of at least 1, or a share over 0 and below 1"


def _beside(path: Path, source: Any) -> str | list[str]:
    """A file name of a suite, from the suite's own folder."""
    if isinstance(source, (list, tuple)):
        return [str(_beside(path, part)) for part in source]
    beside = path.parent / str(source)
    return str(beside) if beside.exists() else str(source)


def _tasks(listed: Any, path: Path, where: str) -> tuple[SuiteTask, ...]:
    if isinstance(listed, list):
        listed = {str(name): None for name in listed}
    if not isinstance(listed, dict):
        raise UserError(f"{where}: tasks is a {type(listed).__name__}; write one `task: {{shots: n}}` a line")
    return tuple(_task(str(name), options, path, f"{where}, task {name}") for name, options in listed.items())


def _task(name: str, options: Any, path: Path, where: str) -> SuiteTask:
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise UserError(f"{where}: {options!r} is no mapping; write {{shots: 5, limit: 100}}")
    check_keys(options, ("shots", "limit", "metric", "average", "task"), where)
    shots, limit = options.get("shots"), options.get("limit")
    if shots is not None and (not isinstance(shots, int) or isinstance(shots, bool) or shots < 0):
        raise UserError(f"{where}: shots: {shots} is no number of shots; use a whole number of at least 0")
    if limit is not None and (wrong := _not_a_limit(limit)) is not None:
        raise UserError(f"{where}: limit: {limit} {wrong}")
    if not isinstance(options.get("average", True), bool):
        raise UserError(f"{where}: average: {options['average']} is not known; use true or false")
    settings = {key: value for key, value in options.items() if key != "task"}
    if isinstance(limit, float):
        settings["share"] = settings.pop("limit")
    if "task" not in options:
        return SuiteTask(name=name, spec=own_tasks().get(name), **settings)
    file = path.parent / str(options["task"])
    if is_harness_file(file):
        return SuiteTask(name=name, file=read_harness_file(file), **settings)
    return SuiteTask(name=name, spec=read_task(file), **settings)
