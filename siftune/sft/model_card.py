"""The model card: what was trained, on which rows, and how they were chosen; every number is from the run's records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json
from ..redaction import redact

MANIFEST = "manifest.json"


def selection_behind(files: Sequence[str]) -> list[dict[str, Any]]:
    """For every training file in the run folder of a selection: what that run chose, from its manifest."""
    selections = []
    for file in files:
        path = Path(file).expanduser().parent / MANIFEST
        if not path.is_file():
            continue
        try:
            manifest = read_json(path)
        except UserError:
            continue
        config = manifest.get("config") if isinstance(manifest, Mapping) else None
        if isinstance(config, Mapping) and config.get("command") == "select":
            rows = manifest.get("rows", {})
            selections.append(
                {
                    "file": file,
                    "method": config.get("method"),
                    "settings": {name: value for name, value in config.items() if name not in ("command", "method")},
                    "read": rows.get("read"),
                    "kept": rows.get("kept"),
                    "domains": rows.get("domains", {}),
                }
            )
    return selections


def model_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown with the hub's front matter.

    `facts`: `recipe` (plain), `preset`, `adapter` (bool), `rows`, `selection` (of `selection_behind`), `tokens`,
    `train_loss`, `steps`, `seconds`, `versions`, `siftune`.
    """
    facts = redact(facts)
    recipe = facts["recipe"]
    base = recipe["model"]
    parts = [
        _front(base, adapter=facts["adapter"]),
        f"# {Path(base).name}, fine-tuned on sifted rows\n",
        f"{'An adapter for' if facts['adapter'] else 'All weights of'} `{base}`, trained by siftune {facts['siftune']} "
        "(`siftune train`).\n",
        "## Rows\n",
        _table(_row_lines(recipe, facts["rows"])),
        *(_selection(chosen) for chosen in facts["selection"]),
        "## Rows of each batch\n",
        _online(recipe.get("online"), facts["tokens"]),
        "## Training\n",
        _table(_training_lines(facts)),
        "The whole recipe:\n",
        f"```yaml\n{facts['yaml']}```\n",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + ".\n",
    ]
    return "\n".join(parts)


def _front(base: str, *, adapter: bool) -> str:
    import yaml

    front_matter: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if not Path(base).expanduser().exists():  # a hub id, which the hub can link
        front_matter["base_model"] = base
    return f"---\n{yaml.safe_dump({**front_matter, 'tags': ['siftune', 'sft']}, sort_keys=False)}---\n"


def _table(lines: Sequence[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {_cell(text)} |\n" for name, text in lines)


def _cell(text: str) -> str:
    """Text that cannot end a cell, a line or a table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _row_lines(recipe: Mapping[str, Any], rows: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("files", ", ".join(recipe["train"])),
        ("read", f"{rows['read']:,}"),
        (
            "trained on",
            f"{rows['used']:,} rows, {rows['tokens']:,} tokens, {rows['label_tokens']:,} of them label tokens",
        ),
        ("cut to max_length", f"{rows['cut']:,}"),
    ]
    if rows["beyond"]:
        lines.append(("beyond max_rows", f"{rows['beyond']:,}"))
    if rows["reasons"]:
        lines.append(("left out", ", ".join(f"{count:,} {reason}" for reason, count in rows["reasons"].items())))
    return lines


def _selection(chosen: Mapping[str, Any]) -> str:
    """The selection that wrote a training file, as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in chosen["settings"].items() if name != "pool")
    lines = [
        ("method", str(chosen["method"])),
        (
            "kept",
            f"{chosen['kept']} of {chosen['read']} rows of {', '.join(map(str, chosen['settings'].get('pool', [])))}",
        ),
        ("settings", settings),
    ]
    if chosen["domains"]:
        kept = ", ".join(
            f"{counts['kept']:,} of {counts['pool']:,} {name}" for name, counts in chosen["domains"].items()
        )
        lines.append(("by pseudo-domain", kept))
    return f"Chosen before training, in the run that wrote `{chosen['file']}`:\n\n" + _table(lines)


def _online(online: Mapping[str, Any] | None, tokens: Mapping[str, int]) -> str:
    if online is None:
        return "Every row that was read was trained on.\n"
    settings = ", ".join(f"{name} {value}" for name, value in online.items() if name != "method")
    return _table(
        [
            ("method", f"{online.get('method', 'uds')} ({settings})"),
            ("candidates", f"{tokens['candidates']:,}"),
            ("trained on", f"{tokens['trained_rows']:,}"),
            ("every candidate's score", "siftune/selection.parquet of the run"),
        ]
    )


def _training_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    tokens = facts["tokens"]
    loss = facts["train_loss"]
    lines = [
        ("optimiser steps", f"{facts['steps']:,}"),
        ("trained rows", f"{tokens['trained_rows']:,}"),
        ("trained tokens", f"{tokens['trained_tokens']:,}, {tokens['trained_label_tokens']:,} of them label tokens"),
        ("forward tokens, scoring included", f"{tokens['forward_tokens']:,}"),
        ("mean training loss", "-" if loss is None else f"{loss:.4f}"),
        ("seconds", f"{facts['seconds']:.1f}"),
    ]
    return lines if facts["preset"] is None else [("preset", str(facts["preset"])), *lines]
