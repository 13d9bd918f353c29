"""The demo's output: sentences, tables and a histogram; plain text in a pipe, nothing when silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..output import single_line
from ..screen import console

PIPED_WIDTH = 120
BAR = 36
SHOWN = 64
"""Characters of a row that a table shows."""


def shorten(text: str) -> str:
    """The beginning of a text, on one line."""
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


class Screen:
    """The demo's output on standard output, one method per part."""

    def __init__(self, *, silent: bool) -> None:
        self._console = console(piped_width=PIPED_WIDTH, silent=silent)

    def say(self, text: str = "", style: str | None = None) -> None:
        """Print one paragraph; paths and commands are not wrapped."""
        self._console.print(text, style=style, soft_wrap=True)

    def pool(self, path: Path, count: int) -> None:
        """Describe the pool and the method's input."""
        self.say("1. A pool of mixed rows", "bold")
        self.say(f"{count} generated rows of four domains in {path}. The domain labels are hidden from the method.\n")
        self.say("2. The model writes example rows, and DaaR chooses 20 % of the pool", "bold")
        self.say(
            "The input is one sentence per domain. An embedded 1.8 M model writes a few rows of each; DaaR then uses the same\n"
            "model's first 3 layers. That model was trained on the corpus that this pool is drawn from, so this shows how the\n"
            "parts work together, not what your chat model will write."
        )

    def written(self, facts: Mapping[str, Any]) -> None:
        """Rows and requests per domain, with the first row of each."""
        rows = []
        for name, domain in facts["domains"].items():
            first = domain["first"]
            words = " ".join(f"{first['instruction']} {first['input']} -> {first['output']}".split())
            rows.append([name, str(domain["rows"]), str(domain["requests"]), shorten(words)])
        self._table(["domain", "rows written", "requests", "first row"], rows, left=(3,))
        self.say(f"All rows: {facts['folder']}/ (edit them and pass the folder as --seeds)\n")

    def offline(self, facts: Mapping[str, Any]) -> None:
        """Print DaaR's selection by hidden label; agreement; accuracy; rewards."""
        rows = [
            [
                name,
                f"{row['pool']} ({row['pool'] / facts['rows']:.1%})",
                f"{row['kept']} ({row['kept'] / facts['kept']:.1%})",
                f"{row['agreement']:.1%}",
            ]
            for name, row in facts["composition"].items()
        ]
        self._table(["hidden label", "pool", "chosen", "pseudo-label agrees"], rows)
        self.say(f"Pseudo-labels agree with the hidden labels on {facts['agreement']:.1%} of {facts['rows']} rows.")
        if facts["probe_accuracy"] is not None:
            self.say(f"The domain probe's accuracy on rows it was not trained on is {facts['probe_accuracy']:.1%}.")
        self.say("\nPredicted reward (higher = more ambiguous between domains; # chosen, . not chosen):")
        self._histogram(facts["reward"])

    def online(self, facts: Mapping[str, Any]) -> None:
        """Print the held-out loss with and without UDS."""
        self.say("\n3. Selecting in every batch during training (UDS)", "bold")
        if "left_out" in facts:
            self.say(f"Skipped: {facts['left_out']}.")
            return
        self.say(
            f"The embedded model learns to answer in a prompt format that is new to it: {facts['steps']} steps on the "
            f"chosen rows, {facts['trained_rows']} rows trained in each run.\nLoss per answer token on "
            f"{facts['held_out_rows']} held-out rows:"
        )
        rows = [["before", "-", "-", f"{facts['loss_before']:.3f}", "-"]]
        words = {"plain": "plain trainer", "uds": "with siftune.attach(trainer, UDS(...))"}
        for name, result in facts["runs"].items():
            cells = [str(result["candidates"]), str(facts["trained_rows"]), f"{result['loss']:.3f}"]
            rows.append([words[name], *cells, f"{result['seconds']:.1f}"])
        self._table(["run", "rows seen", "rows trained", "held-out loss", "seconds"], rows)
        self.say("So few steps with so small a model show that the parts work together; they do not rank methods.")

    def end(self, facts: Mapping[str, Any]) -> None:
        """Print the time per stage, the files, and commands to try next."""
        self.say("\nTime", "bold")
        self._table(["stage", "seconds"], [[name, f"{spent:.1f}"] for name, spent in facts["seconds"].items()])
        data, run = Path(facts["run"]) / "data", Path(facts["run"]) / "select"
        self.say(f"Run folder: {facts['run']}   chosen rows: {facts['selected']}\n")
        self.say("Next", "bold")
        self.say(f"  siftune keep {run} --keep 10% --out ten.jsonl       another budget, without the model")
        self.say(f"  siftune plan {data / 'pool.jsonl'} --model YOUR_MODEL     the cost with your own model")
        self.say("  siftune select daar YOUR_POOL.jsonl --model YOUR_MODEL --generator YOUR_CHAT_MODEL --keep 20%")
        self.say("  siftune methods                                      every method and its requirements")

    def _table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index and index not in left else "left")
        for row in rows:
            table.add_row(*(single_line(cell) for cell in row))
        self._console.print(table)

    def _histogram(self, reward: Mapping[str, Any]) -> None:
        most = max(reward["pool"])
        for index, (pool, kept) in enumerate(zip(reward["pool"], reward["kept"], strict=True)):
            chosen = round(BAR * kept / most)
            bar = "#" * chosen + "." * max(0, round(BAR * pool / most) - chosen)
            self.say(f"  {reward['edges'][index]:6.3f} to {reward['edges'][index + 1]:6.3f}  {bar:<{BAR}}  {pool}")
