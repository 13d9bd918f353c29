"""Run the fault suite and write docs/reliability.md from its counts: what was killed, filled up, cut, fuzzed, attacked.

    python scripts/soak_reliability.py                 the short suite, as in make test
    python scripts/soak_reliability.py --soak          the long one too (hours; SIFTUNE_SOAK_ROWS lowers its rows)
    python scripts/soak_reliability.py --into FOLDER   keep the counts of every file of tests there: run again, a file
                                                       that passed is not repeated
    python scripts/soak_reliability.py --write FILE    another page than docs/reliability.md
    python scripts/soak_reliability.py --only EXPR     a part of it, by pytest's -k; nothing is written without --write

A page is written only when every test passed. Every figure is a count that a test made, or a number that it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SERVERS = ("unit/test_server", "unit/test_judged", "unit/test_daar_stage_one")
COMMANDS = ("integration/test_cli_judged", "integration/test_cli_generator")
SUITE = ("tests/faults", "tests/laws/test_kill.py", *(f"tests/{name}.py" for name in (*SERVERS, *COMMANDS)))
SECONDS = "seconds of the file"
NOTHING_RAN = 5  # pytest's exit code
CHANGED = ("changed inputs", "second commands")
GROUPS = (
    ("Killed at random moments, run again: the same bytes, nothing finished done twice, no torn file", ("SIGKILL",)),
    (
        "Disks and files",
        (
            "full",
            "files that may not",
            "read-only",
            "deleted",
            "cache",
            "stored",
            "results",
            "damaged",
            "cut",
            "commands pointed",
            *CHANGED,
        ),
    ),
    (
        "Generators and judges behind a server that misbehaves: temporary errors are retried, no reply is paid twice",
        ("server",),
    ),
    ("Fuzzed input: never a traceback, no row lost, counts add up", ("fuzzed",)),
    ("Models that give NaN or infinities", ("rows with NaN", "models that give")),
    ("Size", ("rows scored", "megabytes", "seconds of")),
    ("Attacks", ("",)),
)
"""The page's tables, each with how the names of its counts begin; the last takes the rest."""

HEAD = """# Reliability

The faults that siftune is tested against. The counts are those of the tests that ran (`tests/faults`, `tests/laws/test_kill.py`,
and those of `tests/unit` and `tests/integration` with a server); this page is written only when all of these tests pass.

"""
MEANING = """
## Guarantees

- A command that is killed, at any moment, and run again ends with the bytes of an uninterrupted run. Finished stages are not
  repeated; inside a scoring stage, finished shards (4,096 rows) are not.
- A file has its final name only when it is complete. Temporaries of dead processes are removed by the next run.
- The cache may be deleted, and files in it cut, emptied or flipped: stored rows, tokenised rows, scores, features and
  remembered hashes are checked by content when they are read, and damaged entries are computed again. A text row that is
  damaged after its pool was loaded ends the command with an error; the same command, run again, stores it again. A
  journaled reply that is damaged is requested again.
- Files of a run that cannot be recomputed (the parts of a ledger, a checkpoint's selection state and counts,
  `rows.parquet` under `siftune report`, the scores under `siftune keep`) are checked by content when they are read, and a
  damaged one is reported with a way to continue.
- Weights that are rewritten in place are detected, also where their size and time of modification are as before: a
  remembered hash holds for a file's size, inode, time of modification and time of change.
- A server's reply has at most 8 MiB after unpacking, and a try ends after its timeout however slowly bytes arrive. A
  redirect is refused, and neither a row nor the key is sent to its target.
- A reply that is nested too deeply, with invalid numbers or wrong types is refused with a reason and
  retried; it is not journaled, so that the next run requests it again, and the other rows are judged.
- A worker process or Ray actor that dies is replaced and its shard retried. Where a shard fails repeatedly, the failing
  rows are located and left out with a reason; the scores of all other rows are not affected.
- An input is never an output: `--out`, `--run` and the figures beside a page are refused where they are the same file as (by any
  link), are inside, or contain a pool, seeds, target, prompt, domains, recipe, study, model, adapter, an adapter's base or
  another file that the command reads; `Subset.write` refuses the files that its pool was read from.
- Files of the user are never deleted. A folder is replaced only where siftune wrote it and it is unchanged:
  `.siftune-export.json` in it lists its files with size and hash. One with another file or a changed one, the working folder, and
  those above it are refused; the old export is renamed aside and removed once the new one has its name.
- A run folder is new, empty, or has siftune's marker (`manifest.json`, `study.json`, `.siftune-folder.json`, each checked by
  its content). Inside it, and in the cache, siftune writes its own files again where they are damaged, and does not change others.
- A file named by `--out` replaces an ordinary file of that name, as in other command lines, and the figures of a page replace
  earlier ones; a table of `score-reference` and the `report.html` of a run replace only what siftune wrote.
- A chat template that raises anything or does not end, a tokenizer that raises or panics, and memory that is exhausted by one
  row affect only that row, which gets a reason, in `plan`, `select` (with any number of workers), `train`, `score-reference` and
  held-out evaluation (the limits of a template: [data](data.md#formats)). An incomplete file of a model is refused.
- An error in user input gives one sentence and exit code 2. Every row that is left out has a reason, and the counts add up.
- Files that siftune reads cannot run code: no pickle is opened, YAML is read safely, arrays hold no objects. A recipe,
  study, suite, configuration or `--set` that names code (`trust_remote_code`, a class, a callback, a kernel of the hub, a
  command for `--tune`) is refused, however deep it is nested and also in a JSON file that the recipe names. Code of a
  model's or an adapter's own folder never runs unless Python passes `trust_remote_code=True`. The one exception is
  `allow_code`, which runs programs that a model writes: [their limits](evaluate.md#code-that-a-model-writes).
- No secret is written. A file or an option that holds one (`hub_token`, `api_key`, a header, a password or a key in an
  address) is refused, and the error names the environment variable to use. What Python passes under such a key, and the
  values of the environment's variables for keys, tokens, secrets and passwords (6 characters or more), are masked in
  configurations, manifests, model cards, results, replies of servers and messages, before a message is cut. Rows are the
  user's own data and are written unchanged, as is the log of a `--tune` command.

## Limits

- Checksums of stored rows, tables and checkpoints are CRC-32: they detect damage, not manipulation.
- A single operation inside a chat template on very large values (a product of numbers of millions of digits) is not
  interrupted, and one that asks for more memory than the machine has may end the process.
- A row that crashes the process itself (an error in a native library) stops `--workers 1`; with 2 workers or more it is
  located and left out.
- A file system that loses what was flushed to it, or whose `rename` is not atomic, is not tested.
"""


def test_files() -> list[Path]:
    """The files of the suite, relative to the repository."""
    return [path.relative_to(ROOT) for one in SUITE for path in sorted((ROOT / one).glob("test_*.py")) or [ROOT / one]]


def run(tests: Path, only: str | None, *, soak: bool, into: Path) -> Path:
    """One file of the suite: its counts and its seconds, kept in `into`. Exits with pytest's code when a test fails."""
    kept = into / f"{tests.stem}{'-soak' if soak else ''}.jsonl"
    if kept.exists():
        return kept
    counts = into / f"{tests.stem}.part"
    counts.write_text("", encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    words += [] if soak else ["-m", "not soak"]
    words += ["-k", only] if only else []
    started = time.perf_counter()
    environment = {**os.environ, "SIFTUNE_FAULT_COUNTS": str(counts)}
    code = subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode
    if code and not (only and code == NOTHING_RAN):
        sys.exit(code)
    with open(counts, "a", encoding="utf-8") as handle:
        handle.write(json.dumps([SECONDS, time.perf_counter() - started]) + "\n")
    return counts.rename(kept)


def gathered(kept: list[Path]) -> Counter[str]:
    """Every count, summed over the tests."""
    found: Counter[str] = Counter()
    for path in kept:
        for line in path.read_text(encoding="utf-8").splitlines():
            what, number = json.loads(line)
            found[what] += number
    return found


def table(found: Counter[str]) -> str:
    """The counts in groups."""
    left = sorted(found)
    lines: list[str] = []
    for title, beginnings in GROUPS:
        own = [what for what in left if what.startswith(beginnings)]
        left = [what for what in left if what not in own]
        if own:
            lines += ["", f"## {title}", "", "| what | how often |", "|---|---:|"]
            lines += [f"| {what} | {found[what]:,} |" for what in own]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--write", type=Path)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        into = said.into or Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        found = gathered([run(tests, said.only, soak=said.soak, into=into) for tests in test_files()])
    seconds = found.pop(SECONDS)
    page = said.write or (None if said.only else ROOT / "docs" / "reliability.md")
    from benchmarks.machine import describe

    command = "python scripts/soak_reliability.py" + (" --soak" if said.soak else "")
    command += f" --only {said.only!r}" if said.only else ""
    command += " --into FOLDER" if said.into else ""
    parts = ", file by file; one that had passed was not run again" if said.into else ""
    text = HEAD + f"`{command}` ({seconds / 60:.1f} minutes{parts})\n\n{describe()}\n" + table(found) + MEANING
    if page is not None:
        page.write_text(text, encoding="utf-8")
    print(text if page is None else page)  # noqa: T201


if __name__ == "__main__":
    main()
