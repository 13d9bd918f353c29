"""The command line: `siftune COMMAND ...`, the same as `python -m siftune`.

Exit codes: 0 done, 2 bad input or usage (one sentence on standard error), 1 internal error (with a hint). Results go to
standard output. Nothing here imports torch before a command needs it, so help and `siftune methods` are quick.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError, is_failure, one_line
from ..output import say
from ..progress import end
from ..redaction import redact_text
from ..runs.options import unknown

OVERVIEW = """siftune: sift, then tune. Choose which rows a language model is fine-tuned on.

  siftune demo                          selection and fine-tuning on embedded data, offline, on a CPU
  siftune plan [METHOD] POOL...         before a selection runs: rows, bad rows, tokens, time, memory
  siftune select METHOD POOL...         score a pool and keep the best rows
  siftune keep RUN --keep 10% --out F   cut a run's stored scores at another budget, without the model
  siftune train RECIPE.yaml             fine-tune (trl, peft), selecting in every batch with an online method
  siftune run --online METHOD -- CMD    run any training command (torchrun, accelerate, a framework's), selecting in every batch
  siftune score-reference RECIPE.yaml   every row's loss under a reference model, for rho-loss
  siftune evaluate MODEL --suite NAME   the papers' tasks, any of lm-evaluation-harness's, held-out loss
  siftune loop METHOD POOL...           choose, tune by a recipe or command, choose again with the tuned model
  siftune compare STUDY.yaml            methods x seeds at equal budget: table, intervals, figures
  siftune report RUN                    one HTML page of a run: chosen rows, other rows, and texts to read
  siftune ledger RUN                    what a run was trained on: rows of a step, loss over time, rows never chosen
  siftune methods                       every method: one line, its paper, what it needs
  siftune version                       versions of siftune and of its dependencies

Every command but run: --run DIR --out FILE --seed INT --quiet --json --config FILE --cache DIR
Help: siftune COMMAND --help, and siftune select METHOD --help for a method's options.
Exit codes: 0 done, 2 bad input or usage, 1 an internal error."""


COMMANDS = (
    "demo",
    "plan",
    "select",
    "keep",
    "train",
    "run",
    "score-reference",
    "evaluate",
    "loop",
    "compare",
    "report",
    "ledger",
    "methods",
    "version",
)
"""Every command; it is defined in `cli/NAME.py`, with underscores for dashes."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never raises."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        with warnings.catch_warnings():
            _print_warnings()
            return _dispatch(words)
    except UserError as error:
        say(f"siftune: {' '.join(str(error).split())}", error=True)
        return 2
    except KeyboardInterrupt:
        say("siftune: stopped; the same command resumes", error=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        say(
            f"siftune: out of memory ({one_line(error)}); use a machine with more memory, or smaller inputs", error=True
        )
        return 2
    except BaseException as error:
        if not is_failure(error):
            raise
        return _internal_error(error)
    finally:
        end()


def _print_warnings() -> None:
    """Print siftune's warnings as one line each on standard error; warnings of other packages are not shown."""

    def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"siftune: note: {' '.join(redact_text(str(message)).split())}", error=True)

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"siftune\b")
    warnings.showwarning = print_warning  # type: ignore[assignment]


def _internal_error(error: BaseException) -> int:
    if os.environ.get("SIFTUNE_TRACEBACK"):
        say(redact_text(traceback.format_exc()), multiline=True, error=True, end="")
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    message = " ".join(redact_text(str(error)).split())
    say(f"siftune: internal error: {type(error).__name__}{where}: {message}", error=True)
    say("hint: run again with SIFTUNE_TRACEBACK=1 in the environment and report the output", error=True)
    return 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        say(OVERVIEW, multiline=True)
        return 0
    if words[0] in ("-V", "--version"):
        words[0] = "version"
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise unknown(name, list(COMMANDS), what="command", where="siftune")
    run: Callable[[list[str]], int] = import_module(f"{__package__}.{name.replace('-', '_')}").run
    return run(rest)
