"""The page of `siftune demo`: its selection, then its short fine-tuning with UDS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..files import read_json
from . import words
from .blocks import Block, Page, Section, Table
from .rows_file import SELECTED
from .selection import PageSettings, selection_page
from .training import training_sections
from .training_run import is_training, read_training


def demo_page(folder: Path, settings: PageSettings) -> Page:
    """The page of a demo's run folder. Raises `UserError` when its selection is not finished."""
    page = selection_page(folder / "select", settings)
    *sections, making = page.sections
    if (folder / "demo.json").is_file():
        sections += _outcome(read_json(folder / "demo.json"))
    tuning = folder / "tune" / "uds"
    if is_training(tuning):
        run = read_training(tuning, rows=str(folder / "select" / SELECTED), cache=settings.cache)
        sections += training_sections(run, seed=settings.seed, prefix="tune-")
    subtitle = (
        f"The demo: {page.subtitle[0].lower()}{page.subtitle[1:]} Then a short fine-tuning with UDS in every batch."
    )
    return replace(page, title="siftune demo", subtitle=subtitle, sections=[*sections, making])


def _outcome(facts: object) -> list[Section]:
    """The results of the two fine-tunings, as the demo measured them."""
    online = facts.get("online") if isinstance(facts, dict) else None
    if not isinstance(online, dict) or "runs" not in online:
        return []
    before = ("before", "–", "–", words.decimal(online["loss_before"]), "–")
    rows = [
        (
            {"plain": "every row", "uds": "selected by UDS"}.get(name, name),
            words.count(run["candidates"]),
            words.count(online["trained_rows"]),
            words.decimal(run["loss"]),
            words.duration(run["seconds"]),
        )
        for name, run in online["runs"].items()
    ]
    caption = f"Loss per answer token on {words.count(online['held_out_rows'])} held-out rows, in nats"
    columns = ("run", "rows seen", "rows trained", "held-out loss", "time")
    blocks: list[Block] = [Table(caption=caption, columns=columns, rows=[before, *rows], numbers=(1, 2, 3, 4))]
    lede = "So few steps with so small a model show that the parts work together; they do not rank methods."
    return [Section(name="tuning", title="Fine-tuning", lede=lede, blocks=blocks)]
