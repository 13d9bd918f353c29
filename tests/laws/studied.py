"""`siftune compare` in a process of its own that can be killed, with stand-ins that take a moment each."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tests.studies import Fakes


class Slow(Fakes):
    """The stand-ins, each a moment long, noting when a piece ends too."""

    def train(self, *args: Any) -> Any:
        time.sleep(0.05)
        found = super().train(*args)
        time.sleep(0.05)
        return found

    def measure(self, *args: Any) -> Any:
        time.sleep(0.05)
        return super().measure(*args)


if __name__ == "__main__":
    study, run, log = sys.argv[1:]
    Slow(Path(log)).install(figures=True)
    from siftune.cli.main import main

    sys.exit(main(["compare", study, "--run", run, "--quiet"]))
