"""`siftune demo`: selection and fine-tuning on embedded data with an embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..output import say
from ..runs.options import DemoOptions, SelectOptions, options_of
from .common import page_line, read
from .parser import Command


def run(words: list[str]) -> int:
    command = Command(
        "demo",
        "siftune demo [options]",
        "Selection and fine-tuning on embedded data with an embedded tiny model: offline, on a CPU, in under three minutes.",
        options_of(DemoOptions),
        examples=("siftune demo", "siftune demo --run my-demo --quiet", "siftune demo --rows 1000 --steps 0"),
    )
    values = read(command, words)
    if values is None:
        return 0
    options = DemoOptions(**values)
    for flag, least in (("rows", 100), ("steps", 0)):
        if getattr(options, flag) < least:
            raise UserError(f"--{flag} must be >= {least}, got {getattr(options, flag)}")
    from ..data.protect import refuse_overlap
    from ..demo import corpus, story
    from ..runs.cut import check_out, copy_file, refuse_inside
    from ..runs.job import RUNS
    from ..runs.select import select
    from .terminal import progress

    check_out(options.out, copied=True)
    folder = Path(options.run or RUNS / f"demo-{options.rows}-{options.seed}")
    refuse_inside(options.out, folder)
    refuse_overlap({"--out": options.out, "--run": options.run}, {"--config": options.config})
    corpus.rows(options.rows, options.seed)  # more rows than there are is an error before a folder is created
    bars = progress(enabled=not (options.quiet or options.json))

    def select_daar(pool: Path, *, run: Path, keep: str, seed: int, cache: str | None, settings: Any) -> Any:
        chosen = SelectOptions(pool=[str(pool)], run=str(run), keep=keep, seed=seed, cache=cache)
        return select("daar", chosen, settings, progress=bars)

    facts = story.run(
        folder,
        select=select_daar,
        quiet=options.quiet,
        json=options.json,
        cache=options.cache,
        seed=options.seed,
        count=options.rows,
        steps=options.steps,
    )
    if options.out is not None:
        copy_file(Path(facts["selected"]), Path(options.out))
    if not (options.quiet or options.json):
        say(f"  {page_line(facts['run'], cache=options.cache, seed=options.seed)}")
    return 0
