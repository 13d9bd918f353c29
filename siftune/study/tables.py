"""The study's tables in Markdown: means by domain, paired differences with intervals, what each arm cost.

`table.md` holds no time, so that the same cells give the same bytes; times stand in the cost table of `study.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .cells import groups_of
from .frame import Compared, Frame, lower_is_better
from .statistics import Difference, Mean


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rows = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def shown(mean: Mean, digits: int = 3) -> str:
    """`3.597 ± 0.004`, without a spread for one seed, a dash for none."""
    if not mean.n or math.isnan(mean.mean):
        return "-"
    spread = "" if math.isnan(mean.sd) else f" ± {mean.sd:.{digits}f}"
    return f"{mean.mean:.{digits}f}{spread}"


def interval(found: Difference, digits: int = 3) -> str:
    """`-0.021 [-0.035, -0.007]`, bold where 0 is outside."""
    if math.isnan(found.low):
        return f"{found.mean:+.{digits}f}"
    text = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.clear else text


def measures(names: Sequence[str]) -> dict[str, list[str]]:
    """Tables to show: title -> the names of its values, the mean last."""
    tables = {
        "Held-out loss, nats per answer token (lower is better)": _of("loss", names),
        "Held-out token accuracy (higher is better)": _of("accuracy", names),
        "Suite (higher is better)": [name for name in names if name.split("/")[0] not in ("loss", "accuracy")],
    }
    return {title: own for title, own in tables.items() if own}


def _of(measure: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{measure}/")]


def heading(value: str) -> str:
    """What a column is called: the domain, or the task with its metric."""
    measure, _, part = value.partition("/")
    if part == "mean":
        return "mean"
    return part if measure in ("loss", "accuracy") else value


def means_table(frame: Frame, values: Sequence[str], group: str) -> str:
    """One line per arm of a group: mean ± sd over the seeds, and the untouched model first."""
    arms = [arm for arm in frame.arms if arm.group in (group, None)]
    lines = []
    if all(value in frame.base for value in values):
        lines.append(["(before tuning)", "", "", *(f"{frame.base[value]:.3f}" for value in values)])
    for arm in arms:
        seeds = len(frame.of(arm, values[-1]))
        rows, tokens = frame.tokens(arm, "trained_rows"), frame.tokens(arm, "trained_tokens")
        if not seeds:
            lines.append([arm.label, "0", "-", *("-" for _ in values)])
            continue
        budget = f"{rows.mean:,.0f} / {tokens.mean:,.0f}"
        lines.append([arm.label, str(seeds), budget, *(shown(frame.mean(arm, value)) for value in values)])
    return markdown(["method", "seeds", "rows / tokens trained", *map(heading, values)], lines)


def differences_table(found: Sequence[Compared], values: Sequence[str]) -> str:
    """One line per arm: the paired difference of every value."""
    arms = list(dict.fromkeys(one.arm for one in found))
    by = {(one.arm, one.value): one.found for one in found}
    lines = []
    for arm in arms:
        own = [by.get((arm, value)) for value in values]
        n = max((one.n for one in own if one is not None), default=0)
        lines.append([arm.label, str(n), *("-" if one is None else interval(one) for one in own)])
    return markdown(["method", "n", *map(heading, values)], lines)


def tables(frame: Frame) -> str:
    """table.md: per group and measure the means, then the differences."""
    parts = []
    groups = groups_of(frame.arms)
    for group in groups:
        if len(groups) > 1:
            parts.append(f"## Budget {group}")
        compared = frame.compared(group)
        for title, values in measures(frame.names).items():
            parts += [f"### {title}", means_table(frame, values, group)]
            own = [one for one in compared if one.value in values]
            if own:
                better = "below" if lower_is_better(values[-1]) else "above"
                parts += [
                    f"Difference to {own[0].baseline.label}, paired by seed: mean and 95 % interval; {better} 0 is better, "
                    "bold where the interval excludes 0.",
                    differences_table(own, values),
                ]
    return "\n\n".join(parts) + "\n"


def cost_table(frame: Frame) -> str:
    """Rows, tokens, judge cost and seconds of every arm, means over the seeds."""
    lines = []
    for arm in frame.arms:
        own = [one for one in frame.done if one.cell.arm == arm]
        if not own:
            continue
        counts = [f"{frame.tokens(arm, name).mean:,.0f}" for name in
                  ("trained_rows", "trained_tokens", "trained_label_tokens", "forward_tokens")]  # fmt: skip
        judges = [judge for one in own if (judge := (one.facts.get("selection") or {}).get("judge"))]
        costs = [judge["cost"] for judge in judges if judge.get("cost") is not None]
        judged = "-" if not judges else f"{max(costs):.2f}" if costs else "no price given"
        choose = frame.time(arm, "choose")
        seconds = ["-" if not choose.n else f"{choose.mean:,.1f}", f"{frame.time(arm, 'train').mean:,.1f}",
                   f"{frame.time(arm, 'measure').mean:,.1f}", f"{frame.time(arm, 'peak_memory_mb').mean:,.0f}"]  # fmt: skip
        lines.append([arm.label, *counts, judged, *seconds])
    head = ["method", "trained rows", "trained tokens", "of them answers", "tokens forward", "judge cost", "choose, s",
            "train, s", "measure, s", "peak MB"]  # fmt: skip
    return markdown(head, lines)
