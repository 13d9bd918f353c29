"""`siftune plan POOL...`: estimates the cost of a selection before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import registry
from ..runs.options import PlanOptions, options_of
from .common import own_options, print_json, read
from .parser import Command


def run(words: list[str]) -> int:
    method, words = _method(words)
    method_options = own_options(method)
    command = Command(
        "plan",
        "siftune plan [METHOD] POOL... [options]",
        "Before a selection runs: rows, bad rows, tokens, time, memory, speed on this machine, cached results. METHOD is "
        "daar where it is left out; its options: siftune plan METHOD --help",
        [*method_options, *options_of(PlanOptions)],
        positional="pool",
        examples=("siftune plan pool.jsonl --model ./model", "siftune plan ifd pool.jsonl --model ./model"),
    )
    values = read(command, words)
    if values is None:
        return 0
    settings = {option.name: values.pop(option.name) for option in method_options}
    options = PlanOptions(**values)
    from ..runs.plan import METHOD, plan

    facts = plan(options, settings, method=method)
    if options.json:
        print_json(facts)
    elif not options.quiet:
        (show if method == METHOD else show_method)(facts)
    if options.out is not None:
        from ..files import write_json

        write_json(options.out, facts)
    return 0


def _method(words: list[str]) -> tuple[str, list[str]]:
    """The method that the first word names, daar where it names none, and the remaining words."""
    if words and words[0] in {entry.name for entry in registry.methods("offline")}:
        return words[0], words[1:]
    return "daar", words


def show_method(facts: Mapping[str, Any]) -> None:
    """Print the plan of any other method for a person."""
    from ..screen import console
    from .terminal import row_lines, show_preview

    lines = list(row_lines(facts["rows"]))
    if "estimate" in facts:
        measured, expected = facts["measured"], facts["estimate"]
        tokens = measured["tokens_per_row"]
        grows = "grows with the pool" if measured["fit_grows_with_the_pool"] else "does not grow with the pool"
        lines += [
            ("sample", f"{measured['sample_rows']:,} rows, {measured['sample_rows_left_out']:,} of them without a score"
             + (f"; {tokens:.1f} tokens a row" if tokens is not None else "")),
            ("speed", f"{measured['rows_per_second']:,.0f} rows/s"),
            ("fit", f"{measured['fit_seconds']:.1f} seconds on the sample; {grows}"),
            ("time", f"about {expected['minutes']:.1f} minutes (estimate)"),
            ("memory", f"about {expected['memory_gb']:.1f} GB (estimate)"),
            ("disk", f"about {expected['disk_gb']:.2f} GB of cache besides the chosen rows (estimate)"),
        ]  # fmt: skip
    shown = console()
    shown.line(f"plan of siftune select {facts['method']}: no row of the pool was chosen")
    shown.print()
    for name, text in lines:
        shown.line(f"  {name:<10}{text}")
    if "preview" in facts:
        show_preview(facts["preview"])


def show(facts: Mapping[str, Any]) -> None:
    """Print a plan for a person."""
    from ..screen import console
    from .terminal import row_lines, share

    rows, measured, expected, cache = facts["rows"], facts["measured"], facts["estimate"], facts["cache"]
    error = measured["tokens_per_row_error"]
    about = f" ± {1.96 * error:.1f}" if error is not None else ""
    lines = [
        *row_lines(rows),
        ("tokens", f"about {expected['tokens']:,} (estimate: {measured['tokens_per_row']:.1f}{about} a row, from a "
         f"sample of {measured['sample_rows']:,}; {share(measured['truncated_share'], 1)} of rows are truncated)"),
        ("speed", f"{measured['rows_per_second']:,.0f} rows/s, {measured['tokens_per_second']:,.0f} tokens/s, measured "
         f"on {measured['device']}"),
        ("time", f"about {expected['minutes']:.1f} minutes (estimate: {expected['probe_rows']:,} rows for the fit, "
         f"{rows['usable']:,} for the scores; fitting the probes is not included: seconds on a GPU or at small widths)"),
        ("memory", f"about {expected['memory_gb']:.1f} GB, independent of the pool's size"
         + (f"; {measured['device_memory_mb']:,} MB on the device" if measured["device_memory_mb"] else "")),
        ("disk", f"about {expected['disk_gb']:.2f} GB besides the chosen rows"),
        ("cache", f"{cache['folder']}: the pool's index was {cache['pool_index']}, {cache['finished_shards']:,} "
         "finished shards of all runs"),
    ]  # fmt: skip
    if writing := facts["writing"]:
        lines.append(
            ("writing", f"{writing['requests_at_least']:,} to {writing['requests_at_most']:,} requests to {writing['generator']} "
             f"for {writing['rows_wanted']:,} rows of {writing['domains']} domains, at most "
             f"{writing['reply_tokens_at_most']:,} tokens of replies; a rerun repeats no request")
        )  # fmt: skip
    shown = console()
    shown.line(f"plan of siftune select {facts['method']} with {facts['model']}: no row was scored or chosen")
    shown.print()
    for name, text in lines:
        shown.line(f"  {name:<10}{text}")
