"""`siftune ledger RUN`: questions to what a run was trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..output import say
from ..runs.options import Everywhere, options_of
from .common import print_json, read
from .parser import Command

if TYPE_CHECKING:
    import pyarrow as pa

    from ..reports.run_ledger import RunLedger

TEXT_BYTES = 120
TITLES = {
    "trained": "rows trained on",
    "spikes": "steps whose loss jumped",
    "loss": "loss over time",
    "never": "rows never trained on",
    "often": "rows by how often they were trained on",
    "forgotten": "loss when last trained on against now",
}


@dataclass(kw_only=True)
class LedgerOptions(Everywhere):
    """`siftune ledger RUN`"""

    run: str | None = None
    """Run folder of siftune train, or the OUTPUT_DIR of a trainer with siftune.attach."""
    show: Literal["trained", "spikes", "loss", "never", "often", "forgotten"] | None = None
    """The question; default: a summary, or `trained` with --steps."""
    steps: str | None = None
    """Steps of `trained`, both ends included: 120..130, or one step: 120."""
    by: str | None = None
    """Label column of the training rows for `loss`, such as source or domain."""
    now: str | None = None
    """For `forgotten`: every row's loss under the trained model, a table of siftune score-reference."""
    limit: int = 20
    """Rows of the answer that are printed; files hold all of them."""
    rows: str | None = None
    """For a trainer's OUTPUT_DIR: the file of its training rows, for texts, labels and --write."""
    write: str | None = None
    """Write the answer's rows as a pool (.jsonl, .jsonl.gz, .json, .parquet); of the summary, every row trained on."""
    out: str | None = None
    """Export the complete answer, texts included (.parquet or .csv); of the summary, every row trained on, step by step."""


def run(words: list[str]) -> int:
    command = Command(
        "ledger",
        "siftune ledger RUN [options]",
        "What a run was trained on: rows of a step, loss over time, rows never or often chosen, rows forgotten.",
        options_of(LedgerOptions),
        positional="run",
        examples=(
            "siftune ledger runs/sifted",
            "siftune ledger runs/sifted --steps 120..130",
            "siftune ledger runs/sifted --show loss --by source --out loss.csv",
            "siftune ledger runs/sifted --show never --write never.jsonl",
        ),
    )
    values = read(command, words)
    if values is None:
        return 0
    options = LedgerOptions(**values)
    _check(options)
    from ..reports.run_ledger import open_ledger

    assert options.run is not None
    ledger = open_ledger(options.run, rows=options.rows, cache=options.cache)
    question = options.show or ("trained" if options.steps else None)
    table = _answer(ledger, question, options)
    files = _write_files(ledger, table, options)
    if options.json:
        shown = _with_texts(ledger, table.slice(0, options.limit)).to_pylist()
        print_json({"run": options.run, "show": question or "summary", "rows": len(table), "answer": shown, **files})
    elif options.quiet:
        for path in files.values():
            say(path)
    else:
        _show(ledger, question, table, options)
        for name, path in files.items():
            say(f"{name}: {path}")
    return 0


def _check(options: LedgerOptions) -> None:
    """Refuse options that do not go together, before any file is read. Raises `UserError`."""
    if options.run is None:
        raise UserError("siftune ledger needs a run folder: siftune ledger RUN")
    if options.limit < 1:
        raise UserError(f"--limit must be >= 1, got {options.limit}")
    if options.steps is not None and options.show not in (None, "trained"):
        raise UserError(
            f"--steps {options.steps} is for --show trained, and --show is {options.show}; remove one of them"
        )
    if options.by is not None and options.show != "loss":
        raise UserError(f"--by {options.by} is for --show loss; add --show loss, or remove --by")
    if (options.now is None) == (options.show == "forgotten"):
        if options.now is not None:
            raise UserError(f"--now {options.now} is for --show forgotten; add --show forgotten, or remove --now")
        raise UserError(
            "--show forgotten needs --now: every row's loss under the trained model; make it with siftune score-reference "
            f"RECIPE --reference {options.run}/model --out now.parquet"
        )
    if options.write is not None and options.show in ("loss", "spikes"):
        raise UserError(
            f"--write {options.write}: --show {options.show} has no rows to write; pass --steps for the rows of a step, or "
            "export the table with --out"
        )


def steps_of(text: str | None) -> tuple[int | None, int | None]:
    """The first and the last step of `120..130` or `120`. Raises `UserError`."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,18})(?:\.\.(\d{1,18}))?", text.strip(), re.ASCII)
    if match is None:
        raise UserError(f"--steps {text} is not a step or a range of steps; write 120 or 120..130")
    return int(match[1]), int(match[2] or match[1])


def _answer(ledger: RunLedger, question: str | None, options: LedgerOptions) -> pa.Table:
    match question:
        case "spikes":
            return ledger.spikes()
        case "loss":
            return ledger.losses(options.by)
        case "never":
            return ledger.never()
        case "often":
            return ledger.often()
        case "forgotten":
            assert options.now is not None
            return ledger.forgotten(options.now)
        case _:
            return ledger.trained(*steps_of(options.steps))


def _write_files(ledger: RunLedger, table: pa.Table, options: LedgerOptions) -> dict[str, str]:
    files: dict[str, str] = {}
    if options.out is not None:
        files["out"] = str(ledger.export(_with_texts(ledger, table), options.out))
    if options.write is not None:
        ledger.write(table, options.write)
        files["write"] = options.write
    return files


def _with_texts(ledger: RunLedger, table: pa.Table) -> pa.Table:
    return ledger.texts(table) if "row" in table.column_names and ledger.run.training_rows is not None else table


def _show(ledger: RunLedger, question: str | None, table: pa.Table, options: LedgerOptions) -> None:
    from ..screen import console

    if question is None:
        for line in _summary(ledger):
            say(line)
        question, table = "spikes", ledger.spikes()
    if ledger.run.training_rows is not None and ledger.run.training_rows.how:
        say(f"note: {ledger.run.training_rows.how}", error=True)
    shown = _with_texts(ledger, table.slice(0, options.limit))
    title = f"{TITLES[question]}: {len(table):,}"
    title += f", of which {len(shown):,} are shown (--limit)" if len(shown) < len(table) else ""
    lines = [[_cell(value) for value in row.values()] for row in shown.to_pylist()]
    from .terminal import table as drawn

    console().print(drawn(title, shown.column_names, lines))


def _summary(ledger: RunLedger) -> list[str]:
    """Counts of a run, one line each."""
    from ..reports import words

    lines = ledger.lines
    often = ledger.often()
    never = len(ledger.never())
    losses = "recorded in the training forward" if (lines.loss == lines.loss).any() else "not recorded"
    return [
        f"{words.count(lines.step.max())} steps, {words.count(len(lines))} candidates, {words.count(lines.kept.sum())} trained on"
        + ("" if lines.complete else "; training is not finished"),
        f"{words.count(len(often))} different rows trained on, at most {words.times(max(often['trained'].to_pylist(), default=0))}; "
        f"{words.count(never)} never",
        f"loss of each trained row: {losses}",
    ]


def _cell(value: Any) -> str:
    from ..reports import words
    from ..reports.untrusted import one_line

    if value is None:
        return "–"
    if isinstance(value, float):
        return words.decimal(value)
    return one_line(value, TEXT_BYTES) if isinstance(value, str) else f"{value:,}"
