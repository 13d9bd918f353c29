"""What a training process of somebody else's is asked to do: the selector's options, and which trainers it is for.

A request travels as JSON in the environment variable `SIFTUNE_RUN` (`siftune run` sets it) or is a YAML file named by
`SIFTUNE_CONFIG` (the plugins of ms-swift and Oumi read it). Both hold `method` and that method's options, as a recipe's
`online:` section does. Does not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserError
from ..redaction import redact
from ..yaml_io import read_yaml

RUN = "SIFTUNE_RUN"
CONFIG = "SIFTUNE_CONFIG"
_HOW = ("only_class", "dry_run", "allow_fresh_selector")
"""Keys of a section that are not the method's options."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """How every trainer of a process is to be sifted."""

    selector: Mapping[str, Any]
    """`method` and that method's own options, as `siftune.hook.selector.selector_of` reads them."""
    only_class: str | None = None
    """Name of the trainer's class, or of one of its bases; trainers of other classes are left alone."""
    dry_run: bool = False
    """Attach, check the first batch, print what would be done and end the process before the first step."""
    allow_fresh_selector: bool = False
    """Resume from a checkpoint that holds no selection state."""
    reports: str | None = None
    """Folder in which each process leaves what it did (`siftune run` reads it)."""

    @classmethod
    def of_section(cls, section: Mapping[str, Any], *, name: str = "siftune") -> Request:
        """The request of a YAML section: the method's options, and beside them `only_class`, `dry_run` and
        `allow_fresh_selector`. Raises `UserError` for a section that is no mapping or a value of another type."""
        if not isinstance(section, Mapping):
            raise UserError(f"{name}: is {section!r}, which is no mapping; write {name}: {{method: uds, keep: 1/8}}")
        selector = {str(key).replace("-", "_"): value for key, value in section.items()}
        how = {key: selector.pop(key) for key in _HOW if key in selector}
        if "online" in selector:
            selector["method"] = selector.pop("online")
        for key, value in how.items():
            if not isinstance(value, str if key == "only_class" else bool):
                expected = "a class's name" if key == "only_class" else "true or false"
                raise UserError(f"{name}: {key} is {value!r}, and it has to be {expected}")
        return cls(selector=selector, **how)

    @classmethod
    def from_environment(cls) -> Request:
        """The request of this process. Raises `UserError` where the environment holds none."""
        if text := os.environ.get(RUN):
            return cls(**json.loads(text))
        if path := os.environ.get(CONFIG):
            values = read_yaml(path, what=CONFIG, write="write method: uds and keep: 1/8, one `key: value` a line")
            return cls.of_section(values, name=path)
        raise UserError(f"no selector is configured; set {CONFIG} to a YAML file with method: uds and keep: 1/8")

    def as_environment(self) -> dict[str, str]:
        """The environment variable that hands the request to a process and all its children.

        Raises `UserError` for an option that holds a secret: environments are printed in logs and crash reports.
        """
        values = asdict(self)
        if redact(values) != values:
            raise UserError(
                "an option of the selector holds a password or key, and options travel in the environment; save the file that it "
                "names on this machine and pass its path"
            )
        return {RUN: json.dumps(values)}
