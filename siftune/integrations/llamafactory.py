"""LLaMA-Factory: sift every batch from its YAML file, with one more section.

    python -m siftune.integrations.llamafactory train.yaml
    torchrun --nproc_per_node 4 -m siftune.integrations.llamafactory train.yaml

    siftune:                       # in train.yaml
      method: uds
      keep: 1/8

LLaMA-Factory refuses keys that it does not know, so this takes the section out, keeps the rest as it is, and calls
LLaMA-Factory's own `run_exp`; its trainer is sifted when it trains. Words of the form `key=value` override the file, as they do
for `llamafactory-cli train`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..output import say
from ..yaml_io import parse_yaml, read_yaml
from .every_trainer import install
from .request import Request

SECTION = "siftune"


def arguments(words: Sequence[str]) -> tuple[dict[str, Any], Request]:
    """LLaMA-Factory's own arguments, and the request of the `siftune` section. Raises `UserError`."""
    if not words or not words[0].endswith((".yaml", ".yml")):
        raise UserError(
            "python -m siftune.integrations.llamafactory needs LLaMA-Factory's YAML file as its first word, "
            f"got {words[0] if words else 'nothing'!r}"
        )
    values = read_yaml(words[0], what="LLaMA-Factory's file", names=True)
    for word in words[1:]:
        key, separator, value = word.partition("=")
        if not separator:
            raise UserError(f"{word!r} is no override; write key=value, as for llamafactory-cli train")
        values[key.lstrip("-")] = parse_yaml(value, key)
    if values.get(SECTION) is None:
        raise UserError(
            f"{words[0]} has no section {SECTION}; add {SECTION}: {{method: uds, keep: 1/8}}, or run llamafactory-cli train"
        )
    return values, Request.of_section(values.pop(SECTION), name=f"{words[0]}: {SECTION}")


def main(words: Sequence[str]) -> int:
    """Train as `llamafactory-cli train` does, on the rows that the section's method keeps; returns the exit code."""
    from ..hook.selector import selector_of

    try:
        values, request = arguments(words)
        selector_of(request.selector, section=f"{words[0]}: {SECTION}").check()
    except UserError as error:
        say(f"siftune: {' '.join(str(error).split())}", error=True)
        return 2
    try:
        from llamafactory.train.tuner import run_exp
    except ModuleNotFoundError as error:
        say(f"siftune: LLaMA-Factory cannot be imported ({error}); install it in this environment", error=True)
        return 2
    install(request)
    run_exp(args=values)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
