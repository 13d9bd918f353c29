"""The descriptions of the domains, and the prompts that request rows of them (DaaR, arXiv 2502.04380, stage 1).

Read from YAML: `domains.yaml` beside this file holds descriptions of the paper's four domains and the default prompts;
a user's file names other domains. Reading is strict: an unknown key names the nearest known one. Cost: a small file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import UserError, check_keys
from ...yaml_io import parse_yaml, read_yaml

THRESHOLD = 0.85
"""tau where a domain gives none: the paper's (0.90 for its mathematics)."""
PROMPTS: dict[str, tuple[str, ...]] = {
    "system": (),
    "seeds": ("domain", "description", "avoid", "count"),
    "augment": ("domain", "description", "avoid", "examples"),
    "avoid": ("domain", "description"),
    "example": ("number", "instruction", "input", "output"),
}
"""Every prompt, and the words in braces that it may hold."""
PARTS = ("domains", "prompts", "settings")
NEEDED = {"seeds": ("description",), "augment": ("description", "examples"), "example": ("instruction", "output")}
"""Placeholders that a prompt must hold."""

DomainSource = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Domain:
    """One domain: its name, its sentence, how alike two of its rows may be."""

    name: str
    description: str
    threshold: float | None = None
    """tau: a new row's cosine to every row kept stays below it. None: the stage's own."""


@dataclass(frozen=True)
class Wording:
    """The prompts; `{word}` is filled in, any other brace stays as it is."""

    seeds: str
    augment: str
    avoid: str
    example: str
    system: str = ""


@dataclass(frozen=True)
class Descriptions:
    """The input of the writing stage."""

    domains: tuple[Domain, ...]
    wording: Wording
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Synthesis`, as the file sets them."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    def seed_messages(self, domain: Domain, count: int) -> tuple[tuple[str, str], ...]:
        """The conversation that asks for `count` rows of a domain, with no example (stage 1a)."""
        words = self._words(domain) | {"count": str(count)}
        return self._conversation(fill(self.wording.seeds, words))

    def augment_messages(self, domain: Domain, shown: Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
        """The conversation that asks for one more row, unlike the rows shown (stage 1b)."""
        rows = [fill(self.wording.example, {**row, "number": str(number)}) for number, row in enumerate(shown, 1)]
        examples = "\n".join(rows).rstrip("\n")
        return self._conversation(fill(self.wording.augment, self._words(domain) | {"examples": examples}))

    def _words(self, domain: Domain) -> dict[str, str]:
        other_domains = [other for other in self.domains if other.name != domain.name]
        avoid = "".join(
            fill(self.wording.avoid, {"domain": o.name, "description": o.description}).rstrip("\n") + "\n"
            for o in other_domains
        )
        return {"domain": domain.name, "description": domain.description, "avoid": avoid}

    def _conversation(self, request: str) -> tuple[tuple[str, str], ...]:
        system = (("system", self.wording.system.strip()),) if self.wording.system.strip() else ()
        return (*system, ("user", request.strip()))


def fill(template: str, words: Mapping[str, str]) -> str:
    """Put words into a template in one pass, so that braces inside a word are only text.

    >>> fill("{a} {b} {c}", {"a": "{b}", "b": "2"})
    '{b} 2 {c}'
    """
    return re.sub(r"\{(\w+)\}", lambda match: words.get(match[1], match[0]), template)


def read_descriptions(source: DomainSource | None = None) -> Descriptions:
    """Domains and wording from a YAML file or a mapping; None gives the paper's four domains.

    The mapping is `{name: sentence}`, or has any of the keys `domains`, `prompts` and `settings`; a domain is a
    sentence or `{"description": ..., "threshold": ...}`. Raises `UserError` by file and key.

    >>> read_descriptions({"law": "Questions of law.", "music": "Musical notation."}).names
    ('law', 'music')
    """
    shipped = parse_yaml(resources.files(__package__).joinpath("domains.yaml").read_text("utf-8"), "domains.yaml")
    default = Wording(**shipped["prompts"])
    if source is None:
        return Descriptions(_domains(shipped["domains"], "domains.yaml"), default)
    if isinstance(source, Mapping):
        content, place = source, "domains"
    else:
        place = f"domains {source}"
        content = read_yaml(
            Path(source).expanduser(), what="domains", write="write one `name: one sentence` a line", names=True
        )
    if not any(isinstance(content.get(part), Mapping) for part in PARTS):
        return Descriptions(_domains(content, place), default)
    check_keys(content, PARTS, place)
    settings = content.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{place}: settings is not a mapping; write one `name: value` a line")
    domains = (
        _domains(content["domains"], place) if "domains" in content else _domains(shipped["domains"], "domains.yaml")
    )
    return Descriptions(domains, _wording(content.get("prompts"), default, place), dict(settings))


def _domains(content: Any, place: str) -> tuple[Domain, ...]:
    if not isinstance(content, Mapping):
        raise UserError(f"{place}: domains is not a mapping; write one `name: one sentence` a line")
    domains = []
    for name, value in content.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"{place} names a domain {name!r}; use letters, digits and _ . + -")
        threshold = None
        if isinstance(value, Mapping):
            check_keys(value, ("description", "threshold"), f"{place}, domain {name}")
            threshold, value = value.get("threshold"), value.get("description")
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{place} gives the domain {name!r} no description; write one sentence")
        domains.append(Domain(name, " ".join(value.split()), _threshold(threshold, f"{place}, domain {name}")))
    if len(domains) < 2:
        raise UserError(f"{place} holds {len(domains)} domain; describe at least 2")
    return tuple(domains)


def _threshold(value: Any, place: str) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= 1:
        raise UserError(f"{place}: threshold={value!r} is not a cosine in (0, 1]")
    return float(value)


def _wording(content: Any, default: Wording, place: str) -> Wording:
    if content is None:
        return default
    if not isinstance(content, Mapping):
        raise UserError(f"{place}: prompts is not a mapping; use {', '.join(PROMPTS)}")
    check_keys(content, tuple(PROMPTS), f"{place}, prompts")
    for name, text in content.items():
        if not isinstance(text, str) or (name in ("seeds", "augment", "example") and not text.strip()):
            raise UserError(f"{place}: the prompt {name} is not a text")
        words = set(re.findall(r"\{(\w+)\}", text))
        if wrong := sorted(words - set(PROMPTS[name])):
            raise UserError(
                f"{place}: the prompt {name} holds {{{wrong[0]}}}, which is not one of "
                f"{', '.join('{' + word + '}' for word in PROMPTS[name]) or 'none'}"
            )
        if absent := [word for word in NEEDED.get(name, ()) if word not in words]:
            raise UserError(f"{place}: the prompt {name} lacks {{{absent[0]}}}; put it in")
    return Wording(**{**{name: getattr(default, name) for name in PROMPTS}, **content})
