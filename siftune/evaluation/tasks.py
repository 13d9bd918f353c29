"""One of siftune's tasks: its YAML, its rows from a local file or the hub, checked before any model is loaded.

`tasks/NAME.yaml` has the prompt of a question, the grading of an answer, the file of the data folder that holds the rows,
the fields that they need, and the task's name in lm-evaluation-harness. The prompts are siftune's own wording; with the
harness's own task (no data folder) its wording and grading apply instead.
Cost: reading the file; a few microseconds per row.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, check_keys
from ..files import hash_file, hash_json, refuse_special
from ..redaction import shortened
from ..yaml_io import read_yaml
from .draw import draw
from .grading import GRADES, RUN_PROGRAMS

TASKS = Path(__file__).parent / "tasks"
LETTERS = "ABCDEFGHIJ"
ENDINGS = (".jsonl.gz", ".jsonl")
FieldKind = Literal["text", "texts", "index"]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task, as its YAML describes it."""

    name: str
    """The file's name without its ending."""
    kind: Literal["write", "choose"]
    """The model writes an answer, or its likeliest option counts."""
    file: str | None = None
    """The rows: FILE.jsonl.gz or FILE.jsonl in the data folder; a path, for the user's own task file."""
    fields: dict[str, FieldKind] = field(default_factory=dict)
    """What a row must hold: `text`, `texts` (a list) or `index` (of the right option, from 0)."""
    prompt: str = ""
    """Jinja over a row's fields: the question as the model reads it."""
    opening: str = ""
    """Jinja: text that comes once before the examples and the question."""
    shown: str | None = None
    """Jinja: the answer of a worked example; None for options."""
    delimiter: str = " "
    """Between a prompt and its answer."""
    shots: tuple[Mapping[str, Any], ...] = ()
    """Worked examples, written here ..."""
    shots_file: str | None = None
    """... or the first rows of another file of the folder."""
    by: str | None = None
    """Field that splits the task: examples come from rows with the same value."""
    stop: tuple[str, ...] = ()
    """What ends a written answer, beside the end-of-text token."""
    max_tokens: int = 256
    """Tokens of a written answer at most."""
    grade: str | None = None
    """How a written answer is graded: a name in `grading.GRADES`."""
    options: Literal["letters", "texts"] = "letters"
    """What is weighed: the letter of an option, or its text."""
    metric: str | None = None
    """The headline metric; a `write` task has that of its grade."""
    runs_code: bool = False
    """Grading runs code that the model wrote."""
    hub: str | None = None
    """The task's name in lm-evaluation-harness ..."""
    hub_metric: str | None = None
    """... and its headline metric there (`metric` or `metric,filter`)."""
    hub_needs: str | None = None
    """What to install for it beside lm-eval."""
    hub_rows: Mapping[str, str] | None = None
    """Or, where the harness has no such task: the hub's data set for siftune's (path, split, shots_split, without,
    first)."""

    def __post_init__(self) -> None:
        where = f"task {self.name}"
        if self.kind not in ("write", "choose"):
            raise UserError(f"{where}: kind: {self.kind} is not known; use write or choose")
        for name, kind in self.fields.items():
            if kind not in ("text", "texts", "index"):
                raise UserError(f"{where}: field {name} is {kind}, which is not known; use text, texts or index")
        if self.kind == "write" and self.grade not in GRADES:
            raise UserError(f"{where}: grade: {self.grade} is not known; use one of {', '.join(GRADES)}")
        if self.kind == "choose" and {"choices", "answer"} - set(self.fields):
            raise UserError(f"{where} chooses, so its fields need choices: texts and answer: index")
        if self.kind == "choose" and self.metric not in ("acc", "acc_norm"):
            raise UserError(f"{where}: metric: {self.metric} is not known; use acc or acc_norm")
        if self.grade is not None and (lacking := set(GRADES[self.grade][2]) - set(self.fields)):
            raise UserError(f"{where}: grade: {self.grade} reads {', '.join(sorted(lacking))}; name it under fields")
        if self.options not in ("letters", "texts"):
            raise UserError(f"{where}: options: {self.options} is not known; use letters or texts")
        if not self.prompt:
            raise UserError(f"{where} has no prompt; write one, such as 'Question: {{{{ question }}}}\\nAnswer:'")

    @property
    def runs_programs(self) -> bool:
        """Whether grading runs code that the model wrote, whatever `runs_code` is."""
        return self.runs_code or self.grade in RUN_PROGRAMS

    @property
    def own_metric(self) -> str:
        """The metric of siftune's own grading."""
        return GRADES[self.grade][1] if self.grade is not None else str(self.metric)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric of siftune's own grading."""
        return (self.own_metric,) if self.kind == "write" or self.options == "letters" else ("acc", "acc_norm")

    @property
    def key(self) -> str:
        """Content hash of the YAML."""
        return hash_json(dataclasses.asdict(self))


def read_task(path: Path) -> TaskSpec:
    """The task of a YAML file. Raises `UserError` for a key or a value that a task does not have."""
    content = read_yaml(path, what="task")
    known_keys = [item.name for item in dataclasses.fields(TaskSpec) if item.name != "name"]
    check_keys(content, known_keys, f"task {path}")
    if "kind" not in content:
        raise UserError(f"task {path} has no kind; set write or choose")
    values: dict[str, Any] = {
        name: tuple(value) if name in ("shots", "stop") else value for name, value in content.items()
    }
    if path.parent != TASKS:  # a user's file is beside the YAML that names it
        values |= {
            name: str((path.parent / values[name]).resolve()) for name in ("file", "shots_file") if values.get(name)
        }
    try:
        return TaskSpec(name=path.stem, **values)
    except TypeError as error:
        raise UserError(f"task {path}: {error}") from error


@cache
def own_tasks() -> Mapping[str, TaskSpec]:
    """The tasks that come with siftune, by name."""
    return {path.stem: read_task(path) for path in sorted(TASKS.glob("*.yaml"))}


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Questions:
    """A task's rows that are evaluated: drawn, checked, with their worked examples."""

    spec: TaskSpec
    rows: Rows
    """The rows drawn, in the file's order."""
    shots: Mapping[str, Rows]
    """Worked examples per value of `spec.by` ("" without)."""
    total: int
    """Rows of the file."""
    source: str
    content: str
    """Hash of the files read and of the draw."""

    def leaves(self) -> Iterator[tuple[str, Rows, Rows]]:
        """(value of `by`, rows, worked examples), one per value that has rows."""
        groups: dict[str, Rows] = {}
        for row in self.rows:
            groups.setdefault(str(row[self.spec.by]) if self.spec.by else "", []).append(row)
        for value, rows in groups.items():
            yield value, rows, self.shots.get(value, [])


def questions(
    spec: TaskSpec, folder: Path | None, *, shots: int, limit: int | None, share: float | None = None, seed: int
) -> Questions:
    """The rows of a task, from the data folder, or from the hub where that is None.

    Where there are more than `limit` or than the `share` of them, they are drawn by `seed` (`draw`). Raises `UserError` for a missing file, a row that lacks a field, or too few worked examples.
    """
    if folder is None and spec.hub_rows is not None:
        rows, examples, source = _from_hub(spec, shots)
        content = hash_json([source, len(rows)])
    else:
        path = find_file(spec, folder, spec.file)
        rows, source, examples = read_rows(spec, path), str(path), [dict(row) for row in spec.shots]
        content = hash_file(path)
        if shots and spec.shots_file is not None:
            shots_path = find_file(spec, folder, spec.shots_file)
            examples, content = read_rows(spec, shots_path), hash_json([content, hash_file(shots_path)])
    total = len(rows)
    if (drawn := draw(total, limit, share, seed)) is not None:
        limit = len(drawn)
        rows = [rows[index] for index in drawn]
    chosen = _examples(spec, rows, examples, shots)
    return Questions(spec, rows, chosen, total, source, hash_json([content, shots, limit, seed]))


def _examples(spec: TaskSpec, rows: Rows, examples: Rows, shots: int) -> dict[str, Rows]:
    """The first `shots` examples for each value of `by` that the rows have."""
    if not shots:
        return {}
    values = list(dict.fromkeys(str(row[spec.by]) if spec.by else "" for row in rows))
    by_value = {}
    for value in values:
        matching = [row for row in examples if not spec.by or str(row[spec.by]) == value][:shots]
        if len(matching) < shots:
            of = f" for {spec.by} {value}" if spec.by else ""
            raise UserError(
                f"task {spec.name} asks for {shots} worked examples{of} and has {len(matching)}"
                + (f" in {spec.shots_file}" if spec.shots_file else "")
                + "; lower its shots"
            )
        by_value[value] = matching
    return by_value


def find_file(spec: TaskSpec, folder: Path | None, name: str | None) -> Path:
    """The file of a task's rows in the data folder. Raises `UserError` where there is none."""
    if name is None:
        raise UserError(f"task {spec.name} names no file of rows; remove --data, or pass --skip {spec.name}")
    if folder is None and not Path(name).is_absolute() and spec.hub is not None:
        raise UserError(f"task {spec.name} has its rows in a data folder; pass --data FOLDER")
    base = Path(name) if folder is None else folder / name
    tried = [base, *(base.with_name(base.name + ending) for ending in ENDINGS)]
    for path in tried:
        refuse_special(path)
        if path.is_file():
            return path
    raise UserError(
        f"task {spec.name} needs {tried[1]} (or {ENDINGS[1]}), which does not exist; create it, or pass --skip {spec.name}"
    )


def read_rows(spec: TaskSpec, path: Path) -> Rows:
    """Every row of a JSON Lines file, checked against the task's fields. Raises `UserError` with file and line."""
    rows: Rows = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(checked(spec, _object(line), f"{path} line {number}"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"task {spec.name}: {path} cannot be read ({error}); download it again") from error
    if not rows:
        raise UserError(f"task {spec.name}: {path} holds no row; download it again")
    return rows


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def checked(spec: TaskSpec, row: Any, where: str) -> dict[str, Any]:
    """The row, if it has every field of the task. Raises `UserError`."""
    if not isinstance(row, dict):
        raise UserError(f"task {spec.name}: {where} is not a JSON object; fix it")
    for name, kind in spec.fields.items():
        value = row.get(name)
        texts = isinstance(value, list) and value and all(isinstance(part, str) for part in value)
        good = {
            "text": isinstance(value, str),
            "texts": texts,
            "index": isinstance(value, int) and not isinstance(value, bool),
        }[kind]
        if not good:
            words = {"text": "a text", "texts": "a list of texts", "index": "a whole number"}[kind]
            raise UserError(f"task {spec.name}: {where} needs {name!r} as {words}, not {str(value)[:40]!r}")
    if spec.kind == "choose" and not 0 <= row["answer"] < len(row["choices"]) <= len(LETTERS):
        raise UserError(
            f"task {spec.name}: {where} has answer {row['answer']} and {len(row['choices'])} choices; the answer is "
            f"counted from 0, of at most {len(LETTERS)}"
        )
    return row


def _from_hub(spec: TaskSpec, shots: int) -> tuple[Rows, Rows, str]:
    """Rows and worked examples of a data set on the hub."""
    from datasets import load_dataset

    hub_rows = spec.hub_rows
    assert hub_rows is not None
    splits: Sequence[str] = [hub_rows["split"], *([hub_rows["shots_split"]] if shots else [])]
    try:
        loaded = [load_dataset(hub_rows["path"], split=split) for split in splits]
    except Exception as error:
        reason = shortened((str(error).strip().splitlines() or [type(error).__name__])[0], 160)
        raise UserError(
            f"task {spec.name}: the hub's data set {hub_rows['path']} cannot be read ({reason}); pass --data FOLDER"
        ) from error
    parts = [from_data_set(spec, data) for data in loaded]
    return parts[0], parts[1] if shots else [], f"hub {hub_rows['path']}"


def from_data_set(spec: TaskSpec, data: Any) -> Rows:
    """The rows of a `datasets.Dataset` that have nothing in column `without`; the column `first` opens the question."""
    hub_rows = spec.hub_rows or {}
    without, first = hub_rows.get("without"), hub_rows.get("first")
    columns = [name for name in data.column_names if name != without]
    empty = range(len(data)) if without is None else [i for i, value in enumerate(data[without]) if value is None]
    rows = []
    for index, row in enumerate(data.select_columns(columns).select(list(empty))):
        if first and row.get(first):
            row["question"] = f"{row[first]}\n{row['question']}"
        rows.append(checked(spec, row, f"{hub_rows.get('path', 'data set')} row {index}"))
    return rows
