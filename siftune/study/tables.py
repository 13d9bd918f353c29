"""The study's tables in Markdown: means by domain, paired differences with intervals, the cost of each arm.

`table.md` holds no time, so that the same cells give the same bytes; times are in the cost table of `study.md`.
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


def interval(difference: Difference, digits: int = 3) -> str:
    """`-0.021 [-0.035, -0.007]`, bold where 0 is outside."""
    if math.isnan(difference.low):
        return f"{difference.mean:+.{digits}f}"
    text = f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    return f"**{text}**" if difference.clear else text


def measures(names: Sequence[str]) -> dict[str, list[str]]:
    """Tables to show: title -> the names of its values, the mean last."""
    tables = {
        "Held-out loss, nats per answer token (lower is better)": _of("loss", names),
        "Held-out token accuracy (higher is better)": _of("accuracy", names),
        "Suite (higher is better)": [name for name in names if name.split("/")[0] not in ("loss", "accuracy")],
    }
    return {title: value_names for title, value_names in tables.items() if value_names}


def _of(measure: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{measure}/")]


def heading(value: str) -> str:
    """The heading of a column: the domain, or the task with its metric."""
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


def differences_table(comparisons: Sequence[Compared], values: Sequence[str]) -> str:
    """One line per arm: the paired difference of every value."""
    arms = list(dict.fromkeys(comparison.arm for comparison in comparisons))
    differences = {(comparison.arm, comparison.value): comparison.difference for comparison in comparisons}
    lines = []
    for arm in arms:
        of_arm = [differences.get((arm, value)) for value in values]
        n = max((difference.n for difference in of_arm if difference is not None), default=0)
        lines.append(
            [arm.label, str(n), *("-" if difference is None else interval(difference) for difference in of_arm)]
        )
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
            comparisons = [comparison for comparison in compared if comparison.value in values]
            if comparisons:
                better = "below" if lower_is_better(values[-1]) else "above"
                parts += [
                    f"Difference to {comparisons[0].baseline.label}, paired by seed: mean and 95 % interval; {better} 0 is better, "
                    "bold where the interval excludes 0.",
                    differences_table(comparisons, values),
                ]
    return "\n\n".join(parts) + "\n"


def cost_table(frame: Frame) -> str:
    """Rows, tokens, judge cost and seconds of every arm, means over the seeds."""
    lines = []
    for arm in frame.arms:
        finished = [done for done in frame.done if done.cell.arm == arm]
        if not finished:
            continue
        counts = [f"{frame.tokens(arm, name).mean:,.0f}" for name in
                  ("trained_rows", "trained_tokens", "trained_label_tokens", "forward_tokens")]  # fmt: skip
        judges = [judge for done in finished if (judge := (done.facts.get("selection") or {}).get("judge"))]
        costs = [judge["cost"] for judge in judges if judge.get("cost") is not None]
        judged = "-" if not judges else f"{max(costs):.2f}" if costs else "no price given"
        choose = frame.time(arm, "choose")
        seconds = ["-" if not choose.n else f"{choose.mean:,.1f}", f"{frame.time(arm, 'train').mean:,.1f}",
                   f"{frame.time(arm, 'measure').mean:,.1f}", f"{frame.time(arm, 'peak_memory_mb').mean:,.0f}"]  # fmt: skip
        lines.append([arm.label, *counts, judged, *seconds])
    head = ["method", "trained rows", "trained tokens", "of them answers", "tokens forward", "judge cost", "choose, s",
            "train, s", "measure, s", "peak MB"]  # fmt: skip
    return markdown(head, lines)
