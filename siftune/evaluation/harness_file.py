"""A task file in lm-evaluation-harness's own YAML: read as data, refused where it names code, passed to the harness.

A file may come from anyone. Refused are `!function` tags, Python classes, metrics of the `evaluate` library (programs of the
hub or of a folder) and data sets that are scripts or pickles; templates are filled in a sandbox (`harness.sandboxed`).
Local data files are read beside the file that names them. Cost: reading the YAML, hashing its data files.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, check_keys
from ..file_keys import check_file_keys
from ..files import hash_file, hash_json, refuse_special
from ..yaml_io import read_yaml
from .draw import draw
from .harness import Built, require, sandboxed, short_reason, silent

MARKS = ("dataset_path", "doc_to_text", "output_type", "group")
"""Keys that only a task file of the harness has; so has one whose `task` is a name."""
DATA_FILES = ("json", "csv", "parquet", "arrow", "text")
"""Builders of `datasets` that read local files as data alone; its others unpickle, or read files that are not text."""
NOT_HERE = {
    "group": "a group of tasks is no task; name its tasks in a suite",
    "task_list": "a list of tasks is no task; name them in a suite",
    "use_prompt": "prompts of promptsource are not supported; write doc_to_text",
    "doc_to_image": "tasks with images are not supported",
    "doc_to_audio": "tasks with sound are not supported",
}


@dataclass(frozen=True, kw_only=True)
class HarnessFile:
    """A task of the harness, described by a file of the user."""

    path: Path
    config: Mapping[str, Any]
    """The harness's own keys, includes merged, local paths absolute."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The task's name in the file."""
        return str(self.config["task"])

    @property
    def content(self) -> str:
        """Hash of the file's content and of the local data files it names."""
        files = {str(path): hash_file(path) for path in _local_files(self.config)}
        return hash_json([repr(self.config), files])  # repr: YAML's keys may be dates


def is_harness_file(path: Path, *, what: str = "task") -> bool:
    """Whether this YAML file holds a task in the harness's own keys.

    >>> is_harness_file(Path("capitals.yaml"))
    False
    """
    content = read_yaml(path, what=what, names=True)
    return "kind" not in content and (isinstance(content.get("task"), str) or any(key in content for key in MARKS))


def read_harness_file(path: Path) -> HarnessFile:
    """The task of a file. Raises `UserError` for unknown keys, keys that name code, and missing data."""
    require(f"the task file {path}")
    where = f"task {path}"
    config = _merged(path, ())
    _check_keys(config, where)
    if not isinstance(config.get("task"), str) or not config["task"].strip():
        raise UserError(f"{where}: task is {config.get('task')!r}; set it to the task's name")
    if config.get("dataset_path") is None:
        raise UserError(f"{where} has no dataset_path; set json with data_files under dataset_kwargs, or a data set")
    _check_metrics(config, where)
    _check_data(config, where)
    return HarnessFile(path=path, config=config)


def build_file(
    task: HarnessFile, *, title: str, shots: int | None, limit: int | None, share: float | None, seed: int
) -> Built:
    """The task as the harness builds it; the prompt of every drawn question is filled once. Raises `UserError`."""
    from lm_eval.tasks import TaskManager

    where = f"task {title} ({task.path})"
    try:
        with silent(), sandboxed():
            built = TaskManager(include_defaults=False).load([dict(task.config)])["tasks"][task.name]
            usual = built.get_config("num_fewshot")
            built.set_config(key="num_fewshot", value=usual or 0 if shots is None or usual == 0 else shots)
            documents = built.eval_docs
            drawn = draw(len(documents), limit, share, seed)
    except Exception as error:
        raise UserError(f"{where}: lm-eval cannot build it ({short_reason(error)}); correct the file") from error
    with silent(), sandboxed():
        for row in range(len(documents)) if drawn is None else drawn:
            _check_row(built, documents[row], f"{where}: row {row} of its data")
        _check_examples(built, documents[0], where, seed)
    built.set_fewshot_seed(seed=seed)
    return Built({task.name: built}, None if drawn is None else {task.name: drawn}, content=task.content)


# --- keys -------------------------------------------------------------------------------------------------------------


def _merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The file's keys over those of the files it includes, as the harness merges them; local paths absolute."""
    if (place := path.resolve()) in above:
        raise UserError(f"task {path} includes itself; remove the include")
    content = read_yaml(path, what="task", names=True)
    includes = content.pop("include", None) or []
    config: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        config |= _merged(place.parent / str(name), (*above, place))
    return config | _absolute(content, place.parent)


def _check_keys(config: Mapping[str, Any], where: str) -> None:
    from lm_eval.config.task import TaskConfig

    for key, reason in NOT_HERE.items():
        if config.get(key) is not None:
            raise UserError(f"{where}: {key}: {reason}")
    check_file_keys(_without_known_filters(config, where), where)
    check_keys(config, [field.name for field in dataclasses.fields(TaskConfig)], where)


def _without_known_filters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration without the names of the harness's own filters, whose key is `function`."""
    import lm_eval.filters  # noqa: F401 (registers them)
    from lm_eval.api.registry import filter_registry

    pipelines = config.get("filter_list")
    if pipelines is None:
        return dict(config)
    steps = []
    try:
        for pipeline in pipelines:
            for step in pipeline["filter"]:
                is_known = isinstance(step["function"], str) and step["function"] in filter_registry
                steps.append({key: value for key, value in step.items() if key != "function" or not is_known})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{where}: filter_list is not one; write [{{name: n, filter: [{{function: regex}}]}}]"
        ) from error
    return {**config, "filter_list": steps}


def _check_metrics(config: Mapping[str, Any], where: str) -> None:
    """Only the harness's own metrics: any other name is a program that `evaluate` would fetch and run."""
    import lm_eval.api.metrics  # noqa: F401 (registers them)
    from lm_eval.api.registry import aggregation_registry, metric_registry

    listed = config.get("metric_list")
    for metric in listed if isinstance(listed, list) else [] if listed is None else [listed]:
        name = metric.get("metric") if isinstance(metric, Mapping) else metric
        if not isinstance(metric, Mapping) or not isinstance(name, str):
            raise UserError(f"{where}: metric_list holds {metric!r}; write [{{metric: acc}}]")
        if name not in metric_registry or metric.get("hf_evaluate"):
            raise UserError(
                f"{where}: metric {name} is none of lm-eval's own; any other is code, which a task file must not name"
            )
        if (aggregation := metric.get("aggregation")) is not None and aggregation not in aggregation_registry:
            raise UserError(f"{where}: aggregation {aggregation} of metric {name} is none of lm-eval's, such as mean")


# --- data -------------------------------------------------------------------------------------------------------------


def _absolute(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same keys, with local data paths relative to the file's folder."""
    config = dict(content)
    source = config.get("dataset_path")
    if isinstance(source, str) and (folder / source).exists() and source not in DATA_FILES:
        config["dataset_path"] = str(folder / source)
    if isinstance(options := config.get("dataset_kwargs"), Mapping):
        config["dataset_kwargs"] = {
            key: _paths(value, folder) if key in ("data_files", "data_dir") else value for key, value in options.items()
        }
    return config


def _paths(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return value if "://" in value else str(folder / value)
    if isinstance(value, Mapping):
        return {key: _paths(inner, folder) for key, inner in value.items()}
    return [_paths(inner, folder) for inner in value] if isinstance(value, list) else value


def _check_data(config: Mapping[str, Any], where: str) -> None:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    source = str(config["dataset_path"])
    if source in _PACKAGED_DATASETS_MODULES and source not in DATA_FILES:
        raise UserError(f"{where}: dataset_path: {source} is not supported; use one of {', '.join(DATA_FILES)}")
    if source.endswith(".py") or (os.path.isdir(source) and any(Path(source).glob("*.py"))):
        raise UserError(
            f"{where}: dataset_path: {source} is a script, and a task file must not name code; use its data"
        )
    if not isinstance(config.get("dataset_kwargs") or {}, Mapping):
        raise UserError(f"{where}: dataset_kwargs is no mapping; write {{data_files: {{test: rows.jsonl}}}}")
    for path in _local_files(config):
        refuse_special(path)
        if not path.exists():
            raise UserError(f"{where}: its data file {path} does not exist; create it or correct dataset_kwargs")


def _local_files(config: Mapping[str, Any]) -> Iterator[Path]:
    """Local data files, patterns and folders as the files they match."""
    options = config.get("dataset_kwargs") or {}
    source = str(config["dataset_path"])
    for text in [
        *_texts(options.get("data_files")),
        *_texts(options.get("data_dir")),
        *([source] if os.path.isabs(source) else []),
    ]:
        path = Path(text)
        if "://" in text:
            continue
        if path.is_dir():
            yield from sorted(inner for inner in path.rglob("*") if inner.is_file())
        elif any(sign in path.name for sign in "*?["):
            yield from sorted(path.parent.glob(path.name)) or [path]
        else:
            yield path


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


# --- questions --------------------------------------------------------------------------------------------------------


def _check_row(built: Any, document: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` where a template cannot be filled from a row, or its answer is none of the options."""
    try:
        built.doc_to_text(document)
        target = built.doc_to_target(document)
        options = None if built.config.doc_to_choice is None else built.doc_to_choice(document)
    except Exception as error:
        raise UserError(
            f"{where} cannot be rendered ({short_reason(error)}); correct the row or the templates"
        ) from error
    if options is None or isinstance(target, list):
        return
    if target not in (range(len(options)) if isinstance(target, int) else options):
        raise UserError(f"{where} has the answer {target!r} and {len(options)} options; correct the row")


def _check_examples(built: Any, document: Mapping[str, Any], where: str, seed: int) -> None:
    """Raise `UserError` where there are fewer worked examples than the task's shots."""
    count = built.get_config("num_fewshot")
    if not count:
        return
    try:
        built.set_fewshot_seed(seed=seed)
        built.fewshot_context(document, num_fewshot=count)
    except Exception as error:
        raise UserError(
            f"{where}: {count} worked examples cannot be shown ({short_reason(error)}); lower its shots"
        ) from error
