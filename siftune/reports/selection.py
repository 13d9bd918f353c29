"""The page of `siftune select`: headline, map, composition, distributions, the probe, other methods on the same pool,
rows to read, and the run's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import words
from .blocks import Block, Fact, Facts, Map, Note, Page, Section, Table
from .composition import Labels, composition, in_order_of, label_columns
from .distributions import histogram
from .maps import Positions, positions
from .overlap import overlap, runs_beside
from .probe import ProbeSet, probe_blocks, read_probe_set
from .reading import explorer, reasons_counted
from .rows_file import Selection, Texts, read_selection, texts_of
from .target import target_section
from .untrusted import one_line, visible

MAP_BYTES = 4_000_000
"""Maximum bytes of row text on the map, for all rows together."""
HOVER_BYTES = 320
"""Maximum bytes of one row's text on the map."""


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """Settings of the page."""

    map_rows: int
    """Maximum number of rows of the map; 0 omits the map."""
    cache: str | Path | None = None
    seed: int = 0


def selection_page(folder: Path, settings: PageSettings) -> Page:
    """The page of a selection's run folder. Raises `UserError` when it is not finished."""
    selection = read_selection(folder)
    config = selection.config
    method, pool = selection.method, ", ".join(Path(str(path)).name for path in config.get("pool", []))
    return Page(
        title=f"{method} on {visible(pool)}",
        subtitle=f"{words.count(selection.kept.sum())} of {words.count(len(selection))} rows chosen by {budget(config)}.",
        facts=headline(selection),
        sections=selection_sections(selection, settings),
        foot=f"siftune {selection.manifest.get('siftune', '')}, run folder {selection.name}. "
        "This page holds all of its data and needs no network.",
    )


def selection_sections(selection: Selection, settings: PageSettings) -> list[Section]:
    """Every section of a selection that is not empty."""
    texts = texts_of(selection, cache=settings.cache)
    pool = texts.pool
    probe_set = None
    if selection.method == "daar" and pool is not None:
        probe_set = read_probe_set(selection, pool, cache=settings.cache)
    labels = in_order_of(selection.domains, label_columns(pool, seed=settings.seed)) if pool is not None else []
    sections = [
        _map(selection, texts, probe_set, labels, settings),
        _composition(selection, labels),
        target_section(selection, texts, cache=settings.cache),
        _distributions(selection),
        _probe(selection, probe_set),
        _overlap(selection),
        _rows(selection, texts, labels, settings.seed),
        made(selection),
    ]
    return [section for section in sections if section is not None and section.blocks]


def budget(config: Mapping[str, Any]) -> str:
    """The run's budget in words."""
    if config.get("tokens") is not None:
        text = f"a budget of {words.count(config['tokens'])} tokens"
    elif config.get("quota"):
        text = "a quota per domain: " + ", ".join(f"{name} {amount}" for name, amount in config["quota"].items())
    else:
        keep = config.get("keep", "")
        text = f"a budget of {words.share(keep, 1) if isinstance(keep, float) else keep}"
    if config.get("target_mix"):
        text += " and a target mix: " + ", ".join(f"{name} {share}" for name, share in config["target_mix"].items())
    return visible(text)


def headline(selection: Selection) -> Facts:
    """Rows, tokens, time, memory."""
    rows: Mapping[str, Any] = selection.manifest.get("rows", {})
    read, kept = len(selection), int(selection.kept.sum())
    usable = int(rows.get("usable", read))
    items = [
        Fact(label="Rows read", value=words.count(read), note=f"{words.count(usable)} usable"),
        Fact(label="Rows chosen", value=words.count(kept), note=f"{words.share(kept, usable)} of the usable ones"),
    ]
    if "tokens" in rows:
        share = f"{words.share(rows['tokens_kept'], rows['tokens'])} of {words.count(rows['tokens'])}"
        items.append(Fact(label="Tokens chosen", value=words.count(rows["tokens_kept"]), note=share))
    out = len(selection.reasons)
    twice = f"{words.count(rows.get('duplicates', 0))} duplicates"
    items.append(Fact(label="Rows left out", value=words.count(out), note=twice))
    stages = selection.manifest.get("stages", [])
    seconds = sum(float(stage.get("computed_seconds", 0)) for stage in stages)
    reused = any(stage.get("counts", {}).get("shards_reused") for stage in stages)
    items.append(Fact(label="Time", value=words.duration(seconds), note="partly from the cache" if reused else ""))
    memory = selection.manifest.get("peak_memory_mb")
    if memory:
        items.append(Fact(label="Peak memory", value=words.megabytes(float(memory))))
    return Facts(items=items)


# --- sections -------------------------------------------------------------------------------------------------------


def _map(
    selection: Selection, texts: Texts, probe_set: ProbeSet | None, labels: list[Labels], settings: PageSettings
) -> Section | None:
    placed = positions(selection, texts, probe_set, most=settings.map_rows, seed=settings.seed, cache=settings.cache)
    if placed is None:
        return None
    lede = f"{placed.of} Dots near each other are similar; distances between groups and their sizes are not meaningful."
    data = map_data(selection, texts, placed, labels)
    label = f"Map of {len(placed.rows):,} rows of the pool; the tables below hold the counts"
    return Section(name="map", title="Map", lede=lede, blocks=[Map(name="pool-map", label=label, data=data)])


def map_data(selection: Selection, texts: Texts, placed: Positions, labels: list[Labels]) -> dict[str, Any]:
    """One entry per dot: position, row, chosen or not, score, rank, a line of text, and the columns for colours."""
    rows = placed.rows
    most = max(40, min(HOVER_BYTES, MAP_BYTES // max(1, len(rows))))
    read = texts.read(rows.tolist())
    text = [one_line("\n".join(part for part in pair if part), most) if pair else "" for pair in read]
    ranks = np.full(len(selection), np.nan)
    ranks[selection.ranked[::-1]] = np.linspace(0, 1, len(selection.ranked)) if len(selection.ranked) > 1 else 1.0
    colours = []
    if selection.domains and (selection.labels[rows] >= 0).any():
        of = selection.labels[rows].tolist()
        colours.append({"key": "domain", "name": "pseudo-domain", "names": list(selection.domains), "of": of})
    for number, one in enumerate(labels):
        colours.append(
            {"key": f"label-{number}", "name": one.name, "names": list(one.values), "of": one.of[rows].tolist()}
        )
    return {
        "x": placed.at[:, 0].tolist(),
        "y": placed.at[:, 1].tolist(),
        "row": rows.tolist(),
        "kept": selection.kept[rows].astype(int).tolist(),
        "score": [None if np.isnan(value) else float(f"{value:.4g}") for value in selection.score[rows]],
        "rank": [None if np.isnan(value) else round(float(value), 3) for value in ranks[rows]],
        "text": text,
        "colours": colours,
        "has": {"score": len(selection.scored) > 0},
    }


def _composition(selection: Selection, labels: list[Labels]) -> Section | None:
    tables: list[Block] = []
    if selection.domains:
        caption = "By pseudo-domain: the method's own label of each row"
        tables.append(composition("pseudo-domain", selection.domains, selection.labels, selection.kept, caption))
    for one in labels:
        caption = f"By the pool's own column {one.name}"
        tables.append(composition(one.name, one.values, one.of, selection.kept, caption))
    lede = "How the chosen rows are distributed over the parts of the pool. Bars: share of the pool, share of the chosen rows."
    return Section(name="composition", title="What was chosen", lede=lede, blocks=tables) if tables else None


def _distributions(selection: Selection) -> Section | None:
    lengths = np.where(selection.tokens > 0, selection.tokens, 0).astype(np.float64)
    charts = [
        histogram("scores", f"Score of {selection.method}", "score", selection.score, selection.kept),
        histogram("lengths", "Length of a row", "tokens", lengths, selection.kept, log=True),
    ]
    blocks = [chart for chart in charts if chart is not None]
    lede = "Grey: the pool. Blue: the chosen rows."
    return Section(name="distributions", title="Score and length", lede=lede, blocks=blocks) if blocks else None


def _probe(selection: Selection, probe_set: ProbeSet | None) -> Section | None:
    if selection.method != "daar":
        return None
    lede = "DaaR's reward is computed from a small probe that predicts each row's domain. This is its accuracy on held-out rows."
    return Section(name="probe", title="The probe", lede=lede, blocks=probe_blocks(selection, probe_set))


def _overlap(selection: Selection) -> Section | None:
    blocks = overlap(runs_beside(selection))
    lede = "Every finished run in the same folder that scored the same pool."
    return Section(name="overlap", title="Other methods", lede=lede, blocks=blocks) if blocks else None


def _rows(selection: Selection, texts: Texts, labels: list[Labels], seed: int) -> Section:
    blocks: list[Block] = []
    if texts.why:
        blocks.append(Note(text=texts.why))
    blocks.append(explorer(selection, texts, labels, seed=seed))
    kinds = reasons_counted(selection.reasons)
    if kinds:
        rows = [(visible(kind), words.count(count)) for kind, count in kinds]
        caption = f"Every row left out, by reason: {words.count(len(selection.reasons))} rows"
        blocks.append(Table(caption=caption, columns=("reason", "rows"), rows=rows, numbers=(1,)))
    lede = "Read rows before you rely on the selection. Long texts are cut to fit this page; each row names its file and line."
    return Section(name="rows", title="Rows to read", lede=lede, blocks=blocks)


def made(selection: Selection) -> Section:
    """Options, stages, versions and inputs: everything needed to reproduce the run."""
    manifest, info = selection.manifest, selection.info
    options = [(str(name), visible(_as_text(value))) for name, value in selection.config.items()]
    stages = [
        (
            str(stage.get("name")),
            words.duration(float(stage.get("computed_seconds", 0))),
            ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in stage.get("counts", {}).items()),
        )
        for stage in manifest.get("stages", [])
    ]
    versions = [(str(name), str(value)) for name, value in manifest.get("versions", {}).items()]
    inputs = [(str(name), visible(str(value))) for name, value in manifest.get("inputs", {}).items()]
    blocks: list[Block] = [
        Table(caption="Stages", columns=("stage", "time", "counts"), rows=stages, numbers=(1,)),
        Table(caption="Options", columns=("option", "value"), rows=options, folded=True),
        Table(caption="Versions", columns=("package", "version"), rows=versions, folded=True),
        Table(caption="Content hashes of the inputs", columns=("input", "hash"), rows=inputs, folded=True),
    ]
    judge = [(name.replace("_", " "), visible(_as_text(value))) for name, value in _judge(info).items()]
    if judge:
        blocks.insert(1, Table(caption="The judge", columns=("", ""), rows=judge))
    facts = [(str(name).replace("_", " "), visible(_as_text(value))) for name, value in sorted(info.items())]
    if facts:
        blocks.append(Table(caption="Facts of the fit", columns=("fact", "value"), rows=facts, folded=True))
    return Section(name="made", title="How it was made", blocks=blocks)


def _judge(info: Mapping[str, Any]) -> Mapping[str, Any]:
    usage = info.get("judge")
    return {name: value for name, value in usage.items() if value is not None} if isinstance(usage, Mapping) else {}


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return words.decimal(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return words.count(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_as_text(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_as_text(inner) for inner in value)
    return str(value)
