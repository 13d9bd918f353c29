"""`siftune report RUN`: the page of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..output import say
from ..runs.options import Everywhere, options_of
from .common import print_json, read
from .parser import Command


@dataclass(kw_only=True)
class ReportOptions(Everywhere):
    """`siftune report RUN`"""

    run: str | None = None
    """Run folder of siftune select, train, compare or demo, or the OUTPUT_DIR of a trainer with siftune.attach."""
    out: str | None = None
    """File for the page (.html); default: report.html in the run folder."""
    map_rows: int = 10_000
    """Maximum number of rows of the map (up to 20,000), drawn by --seed; 0 omits the map."""
    rows: str | None = None
    """For a trainer's OUTPUT_DIR: the file of its training rows, so that the page can show their texts."""
    figures: bool = False
    """Write the page's charts as PNG and SVG as well, into a folder beside the page: report.html, report-figures/."""


def run(words: list[str]) -> int:
    command = Command(
        "report",
        "siftune report RUN [options]",
        "One self-contained HTML page of a run: chosen and other rows. It needs no network.",
        options_of(ReportOptions),
        positional="run",
        examples=(
            "siftune report siftune-runs/daar-0a1b2c",
            "siftune report siftune-runs/daar-0a1b2c --out daar.html --figures",
            "siftune report trainer-output --rows selected.jsonl",
        ),
    )
    values = read(command, words)
    if values is None:
        return 0
    options = ReportOptions(**values)
    if options.run is None:
        raise UserError("siftune report needs a run folder: siftune report RUN")
    from ..reports import report

    done = report.write(
        options.run,
        options.out,
        map_rows=options.map_rows,
        rows=options.rows,
        figures=options.figures,
        cache=options.cache,
        seed=options.seed,
    )
    show(options, done)
    return 0


def show(options: ReportOptions, done: Path) -> None:
    """Print the path of the page and of its figures."""
    from ..reports.report import figures_beside

    size = done.stat().st_size
    figures = str(figures_beside(done)) if options.figures else None
    if options.json:
        print_json({"run": options.run, "report": str(done), "bytes": size, "figures": figures})
    elif options.quiet:
        say(done)
    else:
        say(f"{done}   one page, {size / 1e6:.1f} MB; open it in a browser, offline")
        if figures is not None:
            say(f"{figures}   its charts as PNG and SVG")
