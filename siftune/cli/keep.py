"""`siftune keep RUN`: cut a run's stored scores at another budget."""

from __future__ import annotations

from ..errors import UserError
from ..output import say
from ..runs.options import Cutting, Everywhere, KeepOptions, options_of
from .common import print_json, read
from .parser import Command


def run(words: list[str]) -> int:
    command = Command(
        "keep",
        "siftune keep RUN [options]",
        "Cut a run's stored scores at another budget, without the model.",
        [option for cls in (Cutting, Everywhere) for option in options_of(cls)],
        positional="run",
        examples=(
            "siftune keep siftune-runs/daar-0a1b2c --keep 10% --out ten-percent.jsonl",
            "siftune keep siftune-runs/daar-0a1b2c --quota 'mathematics=50%,*=10%' --out mathematics.jsonl",
        ),
    )
    values = read(command, words)
    if values is None:
        return 0
    options = KeepOptions(**values)
    if options.run is None:
        raise UserError("siftune keep needs a run folder: siftune keep RUN --keep 10% --out FILE")
    from ..runs.select import recut

    done = recut(options.run, options)
    if options.json:
        print_json({"run": options.run, "out": str(done.out), "rows": done.manifest["rows"]})
    elif options.quiet:
        say(done.out)
    else:
        from .terminal import show_selection

        show_selection(
            {**done.manifest, "stages": [], "info": {}}, out=str(done.out), following=[f"train on {done.out}"]
        )
    return 0
