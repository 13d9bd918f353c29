"""The options of every command as typed dataclasses: the command line and YAML files are parsed from these alone.

An option's help is its field's docstring, its type the field's type, its default the field's default. A method's own
options come the same way from the method's dataclass, so an option is defined beside the code that reads it. Parsing is
strict: an unknown key or option is an error that names the nearest known one. Does not import torch.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..budget import Keep
from ..errors import UserError, did_you_mean
from ..redaction import redact
from ..yaml_io import read_yaml

PARTS = ("engine", "store", "cache")
"""Fields of a method that the pipeline sets; never options."""
ONE_RUN = ("ask_again",)
"""Options of a method that concern one run and not its result: no part of a run's identity."""


@dataclass(kw_only=True)
class Everywhere:
    """Options of every command."""

    run: str | None = None
    """Run folder; the default name holds a hash of options and inputs, so the same command finds its own run."""
    out: str | None = None
    """File for the result (.jsonl, .jsonl.gz, .json or .parquet); the run folder always has a copy."""
    seed: int = 0
    """Seed of every random draw."""
    quiet: bool = False
    """Print only the result's path."""
    json: bool = False
    """Print only one JSON object."""
    config: str | None = None
    """YAML file with any of these options, such as a run folder's config.yaml; the command line takes precedence."""
    cache: str | None = None
    """Cache folder; default $SIFTUNE_CACHE, else ~/.cache/siftune."""


@dataclass(kw_only=True)
class Reading:
    """How the pool is read."""

    pool: list[str] = field(default_factory=list)
    """Files (.jsonl, .json, .parquet, .csv, .gz, .zst), folders, globs or hub ids."""
    columns: dict[str, str] | None = None
    """Column names of your files, as field=column: instruction=question,output=answer."""
    roles: dict[str, str] | None = None
    """The role of each further role name in your chats, as name=role: teacher=assistant,pupil=user."""
    format: Literal["alpaca", "prompt-completion", "messages", "text"] | None = None
    """Format of the rows; default: detected."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A bad row stops the command before any model is loaded, or is skipped with its reason in rows.parquet."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Rows equal to an earlier one are kept and counted, or dropped with a reason."""


@dataclass(kw_only=True)
class Cutting:
    """How many rows are kept."""

    keep: Keep | None = None
    """A share of the usable rows (20%, 0.2, 1/5) or a number of rows (8000); 20% when no budget is set."""
    tokens: int | None = None
    """Budget in tokens instead of rows: best rows first while they fit."""
    quota: dict[str, str | int | float] | None = None
    """Amount per domain instead of one overall budget: mathematics=50%,*=10%."""
    target_mix: dict[str, float] | None = None
    """Target share per domain (mathematics=0.6,coding=0.4): ranks rows by importance weight instead of the score."""
    order: Literal["original", "score"] = "original"
    """Order of the rows in the result: the pool's order, or best first."""


@dataclass(kw_only=True)
class Filtering:
    """Which rows are left out before the others are scored."""

    near_duplicates: float | str | None = None
    """Leave out near-copies of an earlier row: words and pairs of words in common over all of either, from this share on (0.8)."""
    decontaminate: str | None = None
    """Leave out rows that hold text of benchmarks: FILE,FILE (.jsonl, .jsonl.gz), or SUITE:FOLDER with the data folder of siftune evaluate."""


@dataclass(kw_only=True)
class Running:
    """Where and how the command runs."""

    engine: Literal["local", "ray"] = "local"
    """Where the pool's shards are scored: on this machine or on a Ray cluster; never changes a result."""
    workers: int | None = None
    """Number of processes or Ray actors that score, each with its own model; default: one per GPU, or as many as fit on Ray."""
    ray_address: str | None = None
    """Ray cluster: auto, HOST:PORT or ray://HOST:PORT; default: one is started on this machine."""
    worker_cpus: float = 1.0
    """CPUs that a Ray worker reserves."""
    worker_gpus: float | None = None
    """GPUs that a Ray worker reserves (0.5: two on one); default 1 where the cluster has GPUs, else 0."""
    shards: str | None = None
    """Score only part i of n (2/8) into the cache; the same command without --shards then merges."""
    dry_run: bool = False
    """Check rows, model folder, seeds and budget, print what would run, and stop."""


@dataclass(kw_only=True)
class SelectOptions(Running, Filtering, Cutting, Reading, Everywhere):
    """`siftune select METHOD POOL...`"""


@dataclass(kw_only=True)
class KeepOptions(Cutting, Everywhere):
    """`siftune keep RUN`"""


@dataclass(kw_only=True)
class PlanOptions(Reading, Everywhere):
    """`siftune plan POOL...`"""

    sample: int = 256
    """Rows tokenised and timed, drawn by --seed."""


@dataclass(kw_only=True)
class DemoOptions(Everywhere):
    """`siftune demo`"""

    rows: int = 6000
    """Rows drawn from the embedded pool of 10,000, by --seed."""
    steps: int = 40
    """Optimiser steps of the fine-tuning with and without UDS; 0 skips it."""


@dataclass(frozen=True)
class Option:
    """One option, as the parser, the help and the error messages use it."""

    name: str
    type: Any
    default: Any
    help: str
    group: str

    @property
    def flag(self) -> str:
        """As written on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """True when the option takes no value."""
        return self.type is bool and self.default is False

    @property
    def is_list(self) -> bool:
        """True when the option takes the words without dashes, any number of them."""
        return bool(self.type == list[str])

    @property
    def is_mapping(self) -> bool:
        """True when the option takes pairs, `a=1,b=2`."""
        return any((typing.get_origin(part) or part) is dict for part in (self.type, *typing.get_args(self.type)))

    @property
    def repeats(self) -> bool:
        """True for `--set KEY=VALUE` and `--request KEY=VALUE`, which may be passed once for each key."""
        return self.name in ("set", "request")

    @property
    def expects(self) -> str:
        """The type in words, for errors."""
        if self.repeats:
            return "KEY=VALUE"
        choices = [value for part in (self.type, *typing.get_args(self.type)) for value in _choices(part)]
        if choices:
            return "one of " + ", ".join(choices)
        words = {int: "a whole number", float: "a number", bool: "true or false", dict: "pairs name=value"}
        members = [typing.get_origin(part) or part for part in (typing.get_args(self.type) or (self.type,))]
        if (typing.get_origin(self.type) or self.type) is dict:
            members = [dict]
        return " or ".join(dict.fromkeys(words.get(part, "text") for part in members if part is not type(None)))


def _choices(part: Any) -> list[str]:
    return [str(value) for value in typing.get_args(part)] if typing.get_origin(part) is Literal else []


def options_of(cls: type[Any], *, group: str | None = None, skip: Sequence[str] = ()) -> list[Option]:
    """The options of a dataclass, grouped by the class in whose body each is written (first line of its docstring).

    Fields that the pipeline sets, that are not arguments of `__init__` or whose type has no text form are left out.
    """
    hints = typing.get_type_hints(cls)
    options = {}
    notes = field_docs(cls)
    for base in cls.__mro__:
        if not dataclasses.is_dataclass(base):
            continue
        title = group or (inspect.getdoc(base) or base.__name__).split("\n")[0].rstrip(".")
        for item in dataclasses.fields(base):
            if item.name not in inspect.get_annotations(base) or item.name in options:
                continue
            if not item.init or item.name.startswith("_") or item.name in skip:
                continue
            kind = textual(hints[item.name])
            if kind is not None:
                options[item.name] = Option(item.name, kind, default_of(item), notes.get(item.name, ""), title)
    return [options[item.name] for item in dataclasses.fields(cls) if item.name in options]


def default_of(item: dataclasses.Field[Any]) -> Any:
    """A field's default value, `None` where it has none."""
    if item.default is not dataclasses.MISSING:
        return item.default
    return None if item.default_factory is dataclasses.MISSING else item.default_factory()


def textual(hint: Any) -> Any:
    """The part of a type that can be written on a command line or in YAML; None when there is none."""
    if hint is Path:
        return str
    if hint in (str, int, float, bool, type(None)) or typing.get_origin(hint) is Literal:
        return hint
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [textual(part) for part in typing.get_args(hint)]
        kept = tuple(dict.fromkeys(part for part in parts if part is not None and part is not type(None)))
        if not kept:
            return None
        return typing.Union[kept + ((type(None),) if type(None) in typing.get_args(hint) else ())]  # noqa: UP007
    if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        inner = [Any if part is object else textual(part) for part in typing.get_args(hint)]
        return dict[inner[0], inner[1]] if None not in inner else None  # type: ignore[valid-type]
    return list[str] if hint == list[str] else None


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The string under each field of a class and of its bases, on one line; a class's own string comes before a base's."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        notes |= _own_field_docs(base)
    return notes


@functools.cache
def _own_field_docs(cls: type[Any]) -> dict[str, str]:
    """The strings under the fields that are written in the class's own body."""
    if cls is object:
        return {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # a class made at run time has no source
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    notes = {}
    for above, below in itertools.pairwise(body):
        match above, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                notes[name] = " ".join(text.split())
    return notes


def read_config(path: str) -> dict[str, Any]:
    """A configuration file as a mapping of option names; hyphens and underscores are the same. Raises `UserError`."""
    values = read_yaml(path, what="--config", write="write one `option: value` per line")
    return {key.replace("-", "_"): value for key, value in values.items()}


def write_yaml(config: Mapping[str, Any]) -> str:
    """A configuration as YAML text, keys in their order, secrets masked."""
    import yaml

    return str(yaml.safe_dump(redact(dict(config)), sort_keys=False, allow_unicode=True))


def unknown(name: str, known: Sequence[str], *, what: str, where: str) -> UserError:
    """The error for an unknown name: repeats it and names the nearest known one."""
    return UserError(f"{where} has no {what} {name}; {did_you_mean(name, known, otherwise=f'see {where} --help')}")


def pairs(text: Any) -> Any:
    """`a=1,b=50%` as a mapping, the command line's short form of one; a mapping is returned unchanged.

    >>> pairs("mathematics=50%,*=10%")
    {'mathematics': '50%', '*': '10%'}
    """
    if not isinstance(text, str) or text.lstrip().startswith("{"):
        return text
    mapping: dict[str, str] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or not name.strip() or not value.strip():
            raise UserError(f"{text!r} is not a list of pairs; write name=value,name=value")
        mapping[name.strip()] = value.strip()
    return mapping
