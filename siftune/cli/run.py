"""`siftune run [options] -- COMMAND...`: run any training command with selection in every batch."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from .. import registry
from ..errors import UserError
from ..progress import end
from ..runs.options import Option, default_of, field_docs, options_of, read_config
from .common import read
from .parser import Command


@dataclass(kw_only=True)
class RunOptions:
    """`siftune run -- COMMAND`"""

    online: str | None = None
    """Online method: any name of `siftune methods`; its options follow."""
    only_class: str | None = None
    """Sift only trainers of this class or of a class derived from it; default: every trainer that fine-tunes on rows."""
    allow_fresh_selector: bool = False
    """Resume from a checkpoint that holds no selection state."""
    dry_run: bool = False
    """Attach, check the first batch, print what would be done, and stop before the first step."""
    config: str | None = None
    """YAML file with any of these options, also `method` for `online`; the command line takes precedence."""


EXAMPLES = (
    "siftune run --online uds --keep 1/8 -- torchrun --nproc_per_node 4 train.py",
    "siftune run --online uds --keep 1/8 -- accelerate launch train.py",
    "siftune run --online uds --keep 1/8 -- llamafactory-cli train llama.yaml",
    "siftune run --config sift.yaml --dry-run -- axolotl train config.yaml",
)


def run(words: list[str]) -> int:
    options, command = split_command(words)
    method = _method(options)
    if method is None and not {"-h", "--help"} & set(options):
        known = ", ".join(entry.name for entry in registry.methods("online"))
        raise UserError(f"siftune run needs --online METHOD, one of {known}; see siftune run --help")
    own = method_options(method) if method else []
    reader = Command(
        "run",
        "siftune run --online METHOD --keep AMOUNT [options] -- COMMAND...",
        "Run a training command and train on the rows that an online method keeps of every batch, in each of its processes. "
        "Nothing in the command changes. siftune run --online METHOD --help shows that method's options.",
        [*options_of(RunOptions), *own],
        examples=EXAMPLES,
    )
    values = read(reader, options)
    if values is None:
        return 0
    chosen = RunOptions(**{item.name: values[item.name] for item in dataclasses.fields(RunOptions)})
    if not command:
        raise UserError(
            "siftune run needs a command after --, as in: siftune run --online uds --keep 1/8 -- torchrun train.py"
        )
    from ..hook.selector import selector_of
    from ..integrations.launch import launch
    from ..integrations.request import Request

    selector = {option.name: values[option.name] for option in own if values[option.name] != option.default}
    selector = {"method": method, **selector}
    selector_of(selector, section="siftune run").check()
    request = Request(
        selector=selector,
        only_class=chosen.only_class,
        dry_run=chosen.dry_run,
        allow_fresh_selector=chosen.allow_fresh_selector,
    )
    end()  # the command prints its own progress
    return launch(command, request)


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and the command after it."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _method(words: list[str]) -> str | None:
    """The method's name, from --online, else from the configuration file."""
    named = _value_of(words, "--online")
    if named is None and (path := _value_of(words, "--config")):
        config = read_config(path)
        named = config.get("online", config.get("method"))
    return None if named is None else registry.find("online", str(named)).name


def _value_of(words: list[str], flag: str) -> str | None:
    """The last value of an option, before the complete parser can be built."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    values += [after for word, after in itertools.pairwise(words) if word == flag]
    return values[-1] if values else None


def method_options(method: str) -> list[Option]:
    """Every option of an online method, as a recipe's `online:` section has them.

    Fields with several types of value (a file, a list) are read as YAML.
    """
    cls = registry.find("online", method).load()
    group = f"The method {method}"
    options = options_of(cls, group=group)
    textual = {option.name for option in options}
    notes = field_docs(cls)
    return options + [
        Option(item.name, Any, default_of(item), notes.get(item.name, ""), group)
        for item in dataclasses.fields(cls)
        if item.init and item.name not in textual
    ]
