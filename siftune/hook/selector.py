"""An online method from a YAML section: `method` and that method's own fields, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .. import registry
from ..errors import UserError, did_you_mean
from ..online.base import OnlineMethod


def selector_of(
    options: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None, section: str = "siftune"
) -> OnlineMethod:
    """The online method that a YAML section names: `method` (default uds) and that method's own options.

    `defaults` are values for options that the section does not set, ignored for a method without such an option;
    `section` is what messages call the mapping. Raises `UserError` for an unknown method or option, with the nearest
    known one, and for a missing `keep`.

    >>> selector_of({"method": "uds", "keep": "1/8"}).keep
    '1/8'
    """
    chosen = dict(options)
    method = registry.find("online", str(chosen.pop("method", "uds"))).load()
    known = [field.name for field in dataclasses.fields(method) if field.init]
    for name in chosen:
        if name not in known:
            hint = did_you_mean(name, known, otherwise="leave it out")
            raise UserError(f"{section}: {name} is no option of {method.name}; known: {', '.join(known)}; {hint}")
    for field in dataclasses.fields(method):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in chosen:
            if field.name == "keep":
                raise UserError(f"{section}: {method.name} needs keep, the rows to train on, such as keep: 1/8")
            raise UserError(f"{section}: {method.name} needs {field.name}; set it beside method and keep")
    if isinstance(chosen.get("sketch"), list):
        chosen["sketch"] = tuple(chosen["sketch"])
    inherited = {name: value for name, value in (defaults or {}).items() if name in known}
    selector: OnlineMethod = method(**{**inherited, **chosen})
    return selector
