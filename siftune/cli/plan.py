"""`siftune plan POOL...`: what a selection will take, before it runs."""

from __future__ import annotations

from ..runs.options import PlanOptions, options_of
from .common import own_options, print_json, read
from .parser import Command


def run(words: list[str]) -> int:
    own = own_options("daar")
    command = Command(
        "plan",
        "siftune plan POOL... --model MODEL [options]",
        "Before anything runs: rows, bad rows, tokens, time, memory, speed on this machine, what is cached.",
        [*own, *options_of(PlanOptions)],
        positional="pool",
        examples=("siftune plan pool.jsonl --model ./model",),
    )
    values = read(command, words)
    if values is None:
        return 0
    settings = {option.name: values.pop(option.name) for option in own}
    options = PlanOptions(**values)
    from ..runs.plan import plan, show

    facts = plan(options, settings)
    if options.json:
        print_json(facts)
    elif not options.quiet:
        show(facts)
    if options.out is not None:
        from ..files import write_json

        write_json(options.out, facts)
    return 0
