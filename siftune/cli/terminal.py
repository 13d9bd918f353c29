"""Terminal output: progress bars on standard error, tables and summaries on standard output."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..output import single_line
from ..progress import ProgressLines, current
from ..screen import Screen, console, error_console

FACTS = {
    "validation_accuracy": "probe accuracy on held-out rows",
    "temperature": "temperature",
    "calibration_error_before": "calibration error before",
    "calibration_error_after": "calibration error after",
    "spearman_diversity_entropy": "rank correlation of both rewards",
    "reward_r2": "reward variance explained on held-out rows",
    "probe_rows": "rows of the probe set",
    "rows_truncated": "rows longer than max_length",
}
"""Facts of a fit that the summary shows, in this order, with these labels."""


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = ()) -> Table:
    """A plain table; `numbers` are the right-aligned columns."""
    result = Table(title=single_line(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        result.add_column(single_line(name), justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        result.add_row(*(single_line(str(cell)) for cell in row))
    return result


class _Speed(ProgressColumn):
    """Rows per second since the bar was started."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "")


class Bars:
    """Progress as the engines report it (`start`, `advance`, `close`), as a bar on a terminal's standard error."""

    def __init__(self) -> None:
        self._console = error_console()
        self._shown: Progress | None = None
        self._task: Any = None

    def start(self, label: str, total: int, unit: str = "rows") -> None:
        """Show a new bar."""
        self.close()
        self._shown = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._shown.add_task(single_line(label), total=total)
        self._shown.start()

    def advance(self, rows: int) -> None:
        """Advance the bar."""
        if self._shown is not None:
            self._shown.advance(self._task, rows)

    def close(self) -> None:
        """Remove the bar."""
        if self._shown is not None:
            self._shown.stop()
            self._shown = None


def progress(*, enabled: bool) -> Bars | ProgressLines | None:
    """Bars on a terminal, lines elsewhere; None without progress."""
    if not enabled:
        return None
    return Bars() if sys.stderr.isatty() else current()


# --- the summary of a selection -------------------------------------------------------------------------------------


def share(part: float, total: float) -> str:
    """A share in percent."""
    return f"{100 * part / total:.1f} %" if total else "-"


def show_selection(manifest: Mapping[str, Any], *, out: str, following: Sequence[str]) -> None:
    """Print rows, tokens, facts of the fit, domains, stages, files and next commands."""
    shown = console()
    rows = manifest["rows"]
    shown.line(f"kept {rows['kept']:,} of {rows['read']:,} rows ({share(rows['kept'], rows['read'])}) -> {out}")
    shown.print()
    info = manifest.get("info", {})
    for name, text in [*row_lines(rows), *written_lines(info), *judge_lines(info), *fact_lines(info)]:
        shown.line(f"  {name:<10}{text}")
    if domains := rows.get("domains"):
        read, kept = (sum(domain[name] for domain in domains.values()) for name in ("pool", "kept"))
        lines = [
            (name, f"{n['pool']:,}", share(n["pool"], read), f"{n['kept']:,}", share(n["kept"], kept))
            for name, n in domains.items()
        ]
        shown.print()
        shown.print(table("", ("pseudo-domain", "pool", "share", "kept", "share"), lines, numbers=(1, 2, 3, 4)))
    else:
        shown.print()
    if manifest["stages"]:
        show_stages(shown, manifest)
    shown.print("\nnext:")
    for line in following:
        shown.line(f"  {line}")


def row_lines(rows: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows and tokens, one line each."""
    lines = [("rows", f"{rows['read']:,} read, {rows['usable']:,} usable, {rows['duplicates']:,} duplicates")]
    if rows["reasons"]:
        lines.append(("left out", ", ".join(f"{count:,} {reason}" for reason, count in rows["reasons"].items())))
    if "tokens" in rows:
        kept = f"{rows['tokens_kept']:,} kept of {rows['tokens']:,} ({share(rows['tokens_kept'], rows['tokens'])})"
        lines.append(("tokens", kept))
    return lines


def written_lines(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows that a generator wrote per domain, and how many were not used."""
    written = info.get("written")
    if not written:
        return []
    rows = ", ".join(f"{facts['rows']} {name}" for name, facts in written["domains"].items())
    requests = sum(facts["requests"] for facts in written["domains"].values())
    replies = written.get("replies", {})
    tokens = f"{replies.get('prompt_tokens', 0):,} + {replies.get('completion_tokens', 0):,} tokens"
    sent = f"{requests:,} requests, {replies.get('retries', 0):,} retries, {tokens}"
    lines = [("written", f"{rows} rows by the generator, {sent}")]
    if written["rejected"]:
        lines.append(("", "not used: " + ", ".join(f"{n:,} {kind}" for kind, n in written["rejected"].items())))
    return lines + [("", event) for event in written.get("told", ())]


def judge_lines(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Replies, tokens and cost of a judge: of all runs together, and of this run."""
    usage = info.get("judge")
    if not isinstance(usage, Mapping):
        return []
    tokens = f"{usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens"
    lines = [("judge", f"{usage['requests']:,} replies, {tokens}" + _cost(usage["cost"]))]
    read, wrote = (usage.get(name, 0) for name in ("prompt_tokens_now", "completion_tokens_now"))
    sent = f"{usage['asked_now']:,} requests and {usage.get('retries_now', 0):,} retries"
    lines.append(("", f"in this run {sent}, {read:,} + {wrote:,} tokens" + _cost(usage["cost_now"])))
    left_out = usage.get("parameters_left_out", {})
    lines += [("", f"the server refuses {name}, left out: {why}") for name, why in left_out.items()]
    lost = [f"{usage[kind]:,} {kind}" for kind in ("unreadable", "refused", "unanswered") if usage[kind]]
    if lost:
        lines.append(("", "without a score: " + ", ".join(lost) + "; the replies are in rows.parquet"))
    if usage["refused"]:
        lines.append(("", "--ask-again refused sends the refused requests again"))
    return [*lines, ("", f"every reply: {usage['replies']}")]


def show_preview(facts: Mapping[str, Any]) -> None:
    """Print the requests of a dry run to a judge: the estimate, and the prompts as they would be sent."""
    shown = console()
    most = facts["completion_tokens_at_most"]
    lines = [
        ("requests", f"{facts['requests']:,}, one per row"),
        (
            "tokens",
            f"about {facts['prompt_tokens']:,} read, {facts['completion_tokens']:,} written (at most {most:,})",
        ),
        ("estimate", f"at {facts['estimate']}"),
    ]
    if facts["cost"] is None:
        lines.append(("cost", "pass --price prompt=X,completion=Y (per million tokens) to estimate it"))
    else:
        lines.append(("cost", f"about {facts['cost']:,.4g}, at most {facts['cost_at_most']:,.4g}"))
    for name, text in lines:
        shown.line(f"  {name:<14}{text}")
    for number, prompt in enumerate(facts["prompts"], 1):
        shown.print(f"\n--- prompt {number} " + "-" * 60)
        shown.print(prompt, soft_wrap=True)
    if facts["prompts"]:
        shown.print("-" * 73)


def _cost(amount: float | None) -> str:
    return "" if amount is None else f", cost {amount:,.4g}"


def fact_lines(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of a fit, one line each."""
    facts = [(FACTS[name], info[name]) for name in FACTS if isinstance(info.get(name), (int, float))]
    return [
        ("fit" if index == 0 else "", f"{words} {value:.4g}" if isinstance(value, float) else f"{words} {value:,}")
        for index, (words, value) in enumerate(facts)
    ]


def show_rounds(shown: Screen, rounds: Sequence[Mapping[str, Any]]) -> None:
    """The rounds of a loop, one line each."""
    lines = []
    for facts in rounds:
        accuracy = "-" if facts["probe_accuracy"] is None else f"{facts['probe_accuracy']:.3f}"
        kept = ", ".join(f"{count:,} {name}" for name, count in facts["domains"].items())
        rows = f"{facts['rows']['kept']:,} of {facts['rows']['usable']:,}"
        lines.append((facts["round"], rows, kept or "-", accuracy, f"{facts['tune_seconds']:.0f} s", facts["tuned"]))
    columns = ("round", "kept", "by pseudo-domain", "probe accuracy", "tuning", "tuned model")
    shown.print(table("", columns, lines, numbers=(0, 3, 4)))


def show_stages(shown: Screen, manifest: Mapping[str, Any]) -> None:
    """Time per stage and peak memory."""
    lines = []
    for stage in manifest["stages"]:
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in stage["counts"].items())
        lines.append((stage["name"], stage["status"], f"{stage['seconds']:.1f} s", counts))
    shown.print(table("", ("stage", "", "time", "counts"), lines, numbers=(2,)))
    shown.print(f"peak memory {manifest['peak_memory_mb']:,} MB")
