"""The sections of a training run: loss, scores of kept and skipped candidates, cost of scoring, composition of the
kept rows, rows never kept, and the effect of length.

Values over time are means over at most `POINTS` equal intervals of steps; shares, which need more rows, over intervals
of `ROWS_A_SHARE` kept rows or more. Shapes: `L` lines of the ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import words
from .blocks import Block, Chart, Fact, Facts, Note, Page, Section, Table
from .composition import Labels, composition
from .never_kept import rows_section
from .overlap import rank_correlation
from .spikes import spikes_section
from .training_run import Ledger, TrainingRun, read_training
from .untrusted import visible

POINTS = 60
ROWS_A_SHARE = 32
MOST_STACKED = 8
"""Maximum number of values in a stacked chart; with more only the table is shown."""


def training_page(folder: Path, *, rows: str | None, cache: str | Path | None, seed: int) -> Page:
    """The page of a training run. Raises `UserError` for damaged files."""
    run = read_training(folder, rows=rows, cache=cache)
    subtitle = "A training run without selection."
    if (ledger := run.ledger) is not None and len(ledger):
        subtitle = f"{words.count(ledger.kept.sum())} of {words.count(len(ledger))} candidates were trained on."
        subtitle += "" if ledger.complete else " Training is not finished."
    return Page(
        title=f"{selector(run)}: {run.name}",
        subtitle=subtitle,
        facts=headline(run),
        sections=training_sections(run, seed=seed),
        foot=f"siftune, {run.name}. This page holds all of its data and needs no network.",
    )


def selector(run: TrainingRun) -> str:
    """The online method's name, where the run records it."""
    online = run.manifest.get("config", {}).get("online")
    name = online.get("method") if isinstance(online, dict) else online
    if name:
        return visible(str(name))
    return "training" if run.ledger is None else "training with selection"


def training_sections(run: TrainingRun, *, seed: int = 0, prefix: str = "") -> list[Section]:
    """Every section that the run has data for; `prefix` keeps the anchors of several runs distinct."""
    sections = [_loss(run, prefix), spikes_section(run, prefix)]
    if run.ledger is not None and len(run.ledger):
        sections += [
            _scores(run.ledger, prefix),
            _cost(run, prefix),
            _kept(run, run.ledger, prefix),
            _length(run, run.ledger, prefix),
            rows_section(run, run.ledger, prefix, seed=seed),
        ]
    sections.append(_made(run, prefix))
    return [section for section in sections if section is not None and section.blocks]


def headline(run: TrainingRun) -> Facts:
    """Steps, candidates, trained rows, tokens, loss, scoring share."""
    items = []
    steps = [int(line["step"]) for line in run.log if "step" in line]
    ledger = run.ledger if run.ledger is not None and len(run.ledger) else None
    if steps or ledger is not None:
        last = max([*steps, int(ledger.step.max()) if ledger is not None else 0])
        items.append(Fact(label="Optimiser steps", value=words.count(last)))
    if ledger is not None:
        kept, distinct = int(ledger.kept.sum()), len(ledger.keys[1])
        items.append(
            Fact(label="Candidates", value=words.count(len(ledger)), note=f"{words.count(distinct)} distinct rows")
        )
        items.append(
            Fact(label="Trained on", value=words.count(kept), note=f"{words.share(kept, len(ledger))} of them")
        )
    trained, skipped = run.logged("sift/tokens_trained")[1], run.logged("sift/tokens_skipped")[1]
    tokens = run.manifest.get("tokens", {})
    if tokens.get("trained_tokens"):
        items.append(Fact(label="Tokens trained", value=words.count(tokens["trained_tokens"])))
    elif trained:
        note = f"{words.share(trained[-1], trained[-1] + skipped[-1])} of those read" if skipped else ""
        items.append(Fact(label="Tokens trained", value=words.count(trained[-1]), note=note))
    losses = run.logged("loss")[1]
    if losses:
        note = f"at the start {words.decimal(losses[0])}" if len(losses) > 1 else ""
        items.append(Fact(label="Last loss", value=words.decimal(losses[-1]), note=note))
    if share := run.logged("sift/scoring_share")[1]:
        items.append(Fact(label="Time spent scoring", value=words.share(float(np.mean(share)), 1)))
    seconds = run.manifest.get("seconds") or next(iter(run.logged("train_runtime")[1]), None)
    if isinstance(seconds, (int, float)):
        items.append(Fact(label="Time", value=words.duration(float(seconds))))
    if memory := run.manifest.get("peak_memory_mb"):
        items.append(Fact(label="Peak memory", value=words.megabytes(float(memory))))
    return Facts(items=items)


# --- curves ---------------------------------------------------------------------------------------------------------


def _loss(run: TrainingRun, prefix: str) -> Section | None:
    series: list[dict[str, Any]] = []
    names = sorted({key for line in run.log for key in line if key.startswith("eval") and key.endswith("loss")})
    for number, key in enumerate(["loss", *names]):
        steps, values = run.logged(key)
        if len(steps) > 1 or (steps and key != "loss"):
            name = "training" if key == "loss" else visible(key.removesuffix("_loss").replace("_", " "))
            role = {"loss": "kept"}.get(key, number)
            line_data = {"name": name, "x": steps, "y": [round(value, 5) for value in values], "role": role}
            series.append({"as": "line"} | line_data if key == "loss" else {"as": "points", "line": True} | line_data)
    if not series:
        return None
    first, last = series[0]["y"][0], series[0]["y"][-1]
    label = f"Loss over optimiser steps, from {words.decimal(first)} to {words.decimal(last)}"
    chart = Chart(
        name=f"{prefix}loss", title="Loss", label=label, data={"x": "step", "y": "nats per token", "series": series}
    )
    lede = "As the trainer logged it. With a selector this is the loss of the kept rows, not of all rows."
    return Section(name=f"{prefix}loss-section", title="Loss", lede=lede, blocks=[chart])


def intervals(step: NDArray[np.int64], most: int = POINTS) -> tuple[NDArray[np.int64], list[int]]:
    """The interval `(L,)` of each line, and the last step of each interval."""
    low, high = int(step.min()), int(step.max())
    count = max(1, min(most, high - low + 1))
    edges = np.linspace(low, high + 1, count + 1)
    of = np.clip(np.searchsorted(edges, step, side="right") - 1, 0, count - 1)
    return of, [int(np.ceil(edge)) - 1 for edge in edges[1:]]


def mean_of(
    values: NDArray[np.float64], of: NDArray[np.int64], where: NDArray[np.bool_], count: int
) -> list[float | None]:
    """The mean of each interval over the lines of `where` that have a value; None where there is none."""
    known = where & ~np.isnan(values)
    sums = np.bincount(of[known], values[known], minlength=count)
    lines = np.bincount(of[known], minlength=count)
    return [float(f"{total / n:.6g}") if n else None for total, n in zip(sums, lines, strict=True)]


def _scores(ledger: Ledger, prefix: str) -> Section:
    of, steps = intervals(ledger.step)
    charts = [_score_chart(ledger.total, "Score", f"{prefix}total", ledger, of, steps, half=bool(ledger.parts))]
    for number, (name, values) in enumerate(ledger.parts.items()):
        if np.isfinite(values).any():
            charts.append(_score_chart(values, name, f"{prefix}part-{number}", ledger, of, steps, half=True))
    lede = "Mean of the kept and of the skipped rows; the band holds the middle 80 % of all candidates."
    return Section(name=f"{prefix}scores", title="Scores of kept and skipped rows", lede=lede, blocks=charts)


def _score_chart(
    values: NDArray[np.float64],
    name: str,
    key: str,
    ledger: Ledger,
    of: NDArray[np.int64],
    steps: list[int],
    *,
    half: bool,
) -> Chart:
    count = len(steps)
    low, high = _middle(values, of, count)
    kept, rest = mean_of(values, of, ledger.kept, count), mean_of(values, of, ~ledger.kept, count)
    if _one_a_step(values, ledger.step):  # a quantity of the step, such as the weight of a part
        label = f"{name} over steps: at the start {words.decimal(kept[0])}, at the end {words.decimal(kept[-1])}"
        line = {"as": "line", "name": name, "role": "kept", "x": steps, "y": kept}
        return Chart(name=key, title=name, label=label, data={"x": "step", "y": "", "series": [line]}, half=half)
    series = [
        {"as": "band", "role": "rest", "x": steps, "low": low, "high": high, "hidden": True},
        {"as": "line", "name": "skipped", "role": "rest", "x": steps, "y": rest},
        {"as": "line", "name": "kept", "role": "kept", "x": steps, "y": kept},
    ]
    ends = [words.decimal(value) for value in (kept[0], rest[0], kept[-1], rest[-1])]
    label = f"{name} over steps: at the start {ends[0]} kept and {ends[1]} skipped, at the end {ends[2]} and {ends[3]}"
    return Chart(name=key, title=name, label=label, data={"x": "step", "y": "", "series": series}, half=half)


def _one_a_step(values: NDArray[np.float64], step: NDArray[np.int64]) -> bool:
    """Whether all candidates of each step have the same value."""
    known = ~np.isnan(values)
    order = np.argsort(step[known], kind="stable")
    sorted_values, sorted_steps = values[known][order], step[known][order]
    same_step = sorted_steps[1:] == sorted_steps[:-1]
    return bool((sorted_values[1:] == sorted_values[:-1])[same_step].all()) and bool(same_step.any())


def _middle(
    values: NDArray[np.float64], of: NDArray[np.int64], count: int
) -> tuple[list[float | None], list[float | None]]:
    low: list[float | None] = []
    high: list[float | None] = []
    for index in range(count):
        inside = values[(of == index) & ~np.isnan(values)]
        ends = np.quantile(inside, (0.1, 0.9)) if len(inside) else None
        low.append(None if ends is None else float(f"{ends[0]:.6g}"))
        high.append(None if ends is None else float(f"{ends[1]:.6g}"))
    return low, high


def _cost(run: TrainingRun, prefix: str) -> Section | None:
    charts = []
    for key, title, axis, more in (
        ("sift/scoring_share", "Share of the time spent scoring", "of the time", {"yshare": True, "zero": True}),
        ("sift/candidates_per_second", "Candidates per second", "rows/s", {"zero": True}),
    ):
        steps, values = run.logged(key)
        if len(steps) < 2:
            continue
        series = [{"as": "line", "name": title, "role": "kept", "x": steps, "y": [float(f"{v:.4g}") for v in values]}]
        label = f"{title} over steps, {words.decimal(float(np.mean(values)), 3)} on average"
        data = {"x": "step", "y": axis, "series": series, **more}
        charts.append(Chart(name=f"{prefix}{key.split('/')[1]}", title=title, label=label, data=data, half=True))
    lede = "Measured during the run, on its machine."
    return Section(name=f"{prefix}cost", title="Cost of scoring", lede=lede, blocks=charts) if charts else None


# --- what was kept --------------------------------------------------------------------------------------------------


def _kept(run: TrainingRun, ledger: Ledger, prefix: str) -> Section | None:
    if run.training_rows is None:
        return None
    blocks: list[Block] = []
    for number, labels in enumerate(run.training_rows.labels):
        of = np.where(ledger.row >= 0, labels.of[np.maximum(ledger.row, 0)], -1)
        if len(labels.values) <= MOST_STACKED:
            blocks.append(_over_time(labels, of, ledger, f"{prefix}kept-{number}"))
        sides = ("candidates", "kept")
        blocks.append(
            composition(labels.name, labels.values, of, ledger.kept, f"All steps, by {labels.name}", sides=sides)
        )
    lede = "The rows that were trained on, by label."
    return Section(name=f"{prefix}kept", title="What was kept", lede=lede, blocks=blocks) if blocks else None


def _over_time(labels: Labels, of_label: NDArray[Any], ledger: Ledger, key: str) -> Chart:
    known = ledger.kept & (of_label >= 0)
    of, steps = intervals(ledger.step, min(POINTS, int(known.sum()) // ROWS_A_SHARE))
    totals = np.maximum(1, np.bincount(of[known], minlength=len(steps)))
    series = []
    for index, value in enumerate(labels.values):
        share = np.bincount(of[known & (of_label == index)], minlength=len(steps)) / totals
        line_data = {"as": "line", "name": value, "role": index, "stackgroup": "one", "x": steps}
        series.append(line_data | {"y": np.round(share, 4).tolist()})
    title = f"Kept rows by {labels.name}, over steps"
    label = f"{title}: shares of {', '.join(labels.values)}; the table below has the totals"
    return Chart(name=key, title=title, label=label, data={"x": "step", "y": "", "yshare": True, "series": series})


def _length(run: TrainingRun, ledger: Ledger, prefix: str) -> Section | None:
    """Mean length of kept and skipped rows over time, and the correlation of score and length."""
    if run.training_rows is None:
        return None
    lengths, unit = run.training_rows.lengths, run.training_rows.unit
    known = ledger.row >= 0
    length = np.where(known, lengths[np.maximum(ledger.row, 0)], np.nan).astype(np.float64)
    of, steps = intervals(ledger.step)
    chart = _score_chart(length, f"{unit.capitalize()} of a row", f"{prefix}length", ledger, of, steps, half=False)
    kept, rest = (
        float(np.nanmean(length[side & known])) if (side & known).any() else None
        for side in (ledger.kept, ~ledger.kept)
    )
    rho = rank_correlation(ledger.total.astype(np.float32), length.astype(np.float32))
    facts = Facts(
        items=[
            Fact(label=f"{unit.capitalize()} of a kept row", value=words.decimal(kept, 3), note="on average"),
            Fact(label="Of a skipped row", value=words.decimal(rest, 3), note="on average"),
            Fact(
                label="Correlation of score and length",
                value=words.decimal(rho, 3),
                note="rank correlation over all candidates",
            ),
        ]
    )
    lede = "A score that grows with length keeps long rows; the same number of rows then means more trained tokens."
    return Section(name=f"{prefix}length-section", title="Length", lede=lede, blocks=[facts, chart])


def _made(run: TrainingRun, prefix: str) -> Section | None:
    config = run.manifest.get("config", {})
    options = [(str(name), visible(str(value))) for name, value in config.items()]
    versions = [(str(name), str(value)) for name, value in run.manifest.get("versions", {}).items()]
    blocks: list[Block] = [
        Table(caption=caption, columns=columns, rows=rows, folded=True)
        for caption, columns, rows in (
            ("Recipe", ("key", "value"), options),
            ("Versions", ("package", "version"), versions),
        )
        if rows
    ]
    if run.training_rows is not None and run.training_rows.how:
        blocks.insert(0, Note(text=run.training_rows.how))
    return Section(name=f"{prefix}made", title="How it was made", blocks=blocks) if blocks else None
