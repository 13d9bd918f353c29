"""Keys that no file may hold: those that name code to run, and secrets. Recipes, studies, suites, configurations and
`--set` alike.

A file may come from anyone, so it holds data alone: a key of trl, transformers, peft or accelerate that ends in
importing or running what its value names (`trust_remote_code`, a class, a callback, a kernel of the hub) is refused,
wherever it is nested, also inside a JSON text or a JSON file that the value names. Python callers may pass such keys.
Secrets belong into the environment: the content of a file is copied into run folders and model cards.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .redaction import is_secret_key, mask_patterns

CODE = frozenset(
    (
        # transformers: a model folder's or a hub repository's own Python
        *("trust_remote_code", "code_revision", "auto_map", "auto_class", "custom_generate"),
        # transformers: kernels are Python packages of the hub; weights that are pickles
        *("use_kernels", "kernel_config", "allow_all_kernels", "weights_only", "allow_pickle"),
        # transformers and trl: arguments of a trainer and of `generate` that are Python objects
        *("optimizers", "optimizer_cls_and_kwargs", "compute_metrics", "preprocess_logits_for_metrics", "model_init"),
        *("data_collator", "stopping_criteria", "chat_template_path"),
        # peft: modules imported by name
        *("auto_mapping", "megatron_core", "megatron_config"),
        # lm-evaluation-harness
        *("custom_dataset", "confirm_run_unsafe_code", "unsafe_code"),
    )
)
"""Keys that name code, as transformers 4.57 to 5, trl, peft and accelerate name them."""
HARMLESS_WHEN_TRUE = ("weights_only",)
"""For these, true is the safe value; for the others, false."""
CODE_ENDINGS = re.compile(
    r"(?:.*_)?(?:class|classes|cls|callables?|callbacks?|functions?|funcs?|fn|fns|hooks?|plugins?|processors?|entry_?points?"
    r"|factory|import|imports)"
)
"""Endings of keys whose value is a class, a function or a path to one."""
COMPARED = ("only_class",)
"""Keys of siftune's own whose value is compared with the name of a class, and never imported."""
NAMES = re.compile(r"(?:.*_)?(?:implementation|backend)(?:_internal)?")
"""Keys whose value is one of a library's own names; a path or a repository there is code."""
JSON_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
"""Keys of `sft` whose text may name a JSON file (or, for deepspeed, be one in base64)."""
COMMANDS = {"tune": "pass --tune on the command line"}
"""Options that run a command of the user."""
CHOSEN_NAMES = (
    *(
        "pool",
        "eval",
        "held_out",
        "tasks",
        "fields",
        "columns",
        "roles",
        "quota",
        "target_mix",
        "price",
        "hub_rows",
        "shots",
    ),
)
"""Sections whose keys are names that the file's author chose: domains, tasks, the columns of rows."""
PROSE = (
    *("about", "prompt", "opening", "shown", "delimiter", "stop", "name"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix", "until"),  # lm-evaluation-harness
)
"""Keys whose text is for people or models; a text there that looks like a header is not one."""
VARIABLES = {
    "proxies": "HTTPS_PROXY", "wandb": "WANDB_API_KEY", "comet": "COMET_API_KEY", "aws": "AWS_SECRET_ACCESS_KEY",
    "judge": "OPENAI_API_KEY", "generator": "OPENAI_API_KEY", "api": "OPENAI_API_KEY", "authorization": "OPENAI_API_KEY",
    "sft": "HF_TOKEN", "model_kwargs": "HF_TOKEN", "token": "HF_TOKEN", "hub": "HF_TOKEN",
}  # fmt: skip
"""The environment variable that the library behind a key reads its secret from, by a word of the key; the first
counts."""


def check_file_keys(content: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` for a key of a file, at any depth, that names code or holds a secret.

    >>> check_file_keys({"model_kwargs": {"trust_remote_code": True}}, "recipe.yaml")
    Traceback (most recent call last):
    siftune.errors.UserError: recipe.yaml: model_kwargs.trust_remote_code names code to run, which no file may; ...
    """
    for key, value in content.items():
        if key in CHOSEN_NAMES:
            for section in value if isinstance(value, list) else [value]:
                named = section if isinstance(section, Mapping) else {"": section}
                for name, inner in named.items():
                    _check_value(inner, f"{key}.{name}".rstrip("."), where)
        else:
            _check({key: value}, "", where)


def check_texts(value: Any, name: str, where: str) -> None:
    """Raise `UserError` for a text, at any depth, that holds a password or a key: an address, a header, a command's
    flag."""
    for text in _texts(value):
        if (shown := mask_patterns(text)) != text:
            raise UserError(
                f"{where}: {name} holds a password or a key ({shown[:200]}); leave it out and set {_variable(name)} in "
                "the environment"
            )


def _check(content: Mapping[Any, Any], path: str, where: str) -> None:
    for key, value in content.items():
        name = f"{path}.{key}" if path else str(key)
        for part in str(key).replace("-", "_").lower().split("."):
            _check_key(part, value, name, where)
        _check_value(value, name, where)


def _check_key(part: str, value: Any, name: str, where: str) -> None:
    """One part of a dotted key, in lower case with underscores."""
    if part in COMMANDS and value is not None:
        raise UserError(f"{where}: {name} names a command to run, which no file may; {COMMANDS[part]}")
    harmless = value is None or value is (part in HARMLESS_WHEN_TRUE)
    plain = value is None or isinstance(value, (bool, int, float))
    foreign = NAMES.fullmatch(part) and any(mark in text for text in _texts(value) for mark in "/.")
    ending = CODE_ENDINGS.fullmatch(part) and name not in COMPARED
    if (part in CODE and not harmless) or (ending and not plain) or foreign:
        raise UserError(
            f"{where}: {name} names code to run, which no file may; leave it out (only Python code may pass it, as in "
            "siftune.Recipe.read({...}))"
        )
    if is_secret_key(part) and value is not None and not isinstance(value, bool):
        raise UserError(
            f"{where}: {name} is a secret, and files are copied into run folders and model cards; leave it out and set "
            f"{_variable(name)} in the environment"
        )


def _check_value(value: Any, name: str, where: str) -> None:
    """The value of a key: nested keys, in JSON as well."""
    last = name.rpartition(".")[2]
    if isinstance(value, Mapping):
        _check(value, name, where)
    elif isinstance(value, list):
        for inner in value:
            _check_value(inner, name, where)
    elif isinstance(value, str):
        if last not in PROSE:
            check_texts(value, name, where)
        inside = _json(_stored(value)) if last in JSON_FILES else _json(value)
        if isinstance(inside, (Mapping, list)):
            _check_value(inside, name, where)


def _stored(text: str) -> str | bytes:
    """The content that a text names: JSON, a JSON file, or JSON in base64."""
    try:
        if Path(text).is_file():
            return Path(text).read_bytes()
        return text if text.lstrip().startswith("{") else base64.urlsafe_b64decode(text)
    except (OSError, ValueError):  # the library that reads it reports the fault
        return text


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text) if text.lstrip()[:1] in ("{", b"{") else None
    except (ValueError, RecursionError):
        return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _variable(name: str) -> str:
    """The environment variable for a key's secret."""
    words = name.replace("-", "_").lower()
    return next((variable for word, variable in VARIABLES.items() if word in words), "OPENAI_API_KEY or HF_TOKEN")
