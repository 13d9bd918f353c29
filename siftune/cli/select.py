"""`siftune select METHOD POOL...`: score a pool and keep the best rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import registry
from ..output import say
from ..runs.options import Cutting, Everywhere, Filtering, Option, Reading, Running, SelectOptions, options_of
from .common import own_options, page_line, print_json, read, which_method
from .parser import Command

EXAMPLES = {
    "model": "./model",
    "seeds": "seeds.jsonl",
    "judge_url": "http://127.0.0.1:8000/v1",
    "scorer": "./scorer",
    "complexity_scorer": "./complexity-scorer",
    "quality_scorer": "./quality-scorer",
    "label_column": "source",
}
"""Example values of a method's options, for its help."""


def select_command(method: str, method_options: Sequence[Option]) -> Command:
    """The options of `siftune select METHOD`."""
    entry = registry.find("offline", method)
    groups = [options_of(cls) for cls in (Reading, Cutting, Filtering, Running, Everywhere)]
    arguments = "".join(
        f" {option.flag} {EXAMPLES[option.name]}" for option in method_options if option.name in EXAMPLES
    )
    return Command(
        f"select {method}",
        f"siftune select {method} POOL... [options]",
        f"{method}: {entry.summary}\npaper: {entry.paper}; needs: {entry.needs}",
        [*method_options, *(option for group in groups for option in group)],
        positional="pool",
        examples=(
            f"siftune select {method} pool.jsonl{arguments} --keep 20% --out selected.jsonl",
            f"siftune select {method} first.jsonl second.parquet{arguments} --keep 8000 --on-bad-row skip",
            f"siftune select {method} pool.jsonl{arguments} --dry-run",
        ),
    )


def run(words: list[str]) -> int:
    method, words = which_method(words)
    if method is None:
        _select_overview()
        return 0
    method_options = own_options(method)
    values = read(select_command(method, method_options), words)
    if values is None:
        return 0
    settings = {option.name: values.pop(option.name) for option in method_options}
    options = SelectOptions(**values)
    from ..runs.select import select
    from .terminal import progress

    quiet = options.quiet or options.json
    done = select(method, options, settings, progress=progress(enabled=not quiet))
    if options.dry_run:
        return _show_dry_run(method, options, done)
    if options.shards is not None:
        return _part_done(method, options, done)
    return _selected(options, done)


def _select_overview() -> None:
    """`siftune select --help`: the methods, then the shared options."""
    shared = [option for cls in (Reading, Cutting, Filtering, Running, Everywhere) for option in options_of(cls)]
    lines = [f"  {entry.name:<12}{entry.summary}" for entry in registry.methods("offline")]
    about = ["Score a pool of rows and keep the best. The methods:", "", *lines, ""]
    about.append("A method's own options (--model, --seeds, ...): siftune select METHOD --help")
    examples = (
        "siftune select daar pool.jsonl --model ./model --seeds seeds.jsonl --keep 20% --out selected.jsonl",
        "siftune select random pool.jsonl --keep 8000",
        "siftune select --config siftune-runs/daar-0a1b2c/config.yaml",
    )
    command = Command(
        "select", "siftune select METHOD POOL... [options]", "\n".join(about), shared, "pool", examples=examples
    )
    say(command.help(), multiline=True, end="")


def _show_dry_run(method: str, options: SelectOptions, done: Any) -> int:
    facts = {"dry_run": True, "method": method, **done.manifest}
    if options.json:
        print_json(facts)
    elif not options.quiet:
        from .terminal import row_lines

        say(f"dry run: rows, options and budget of siftune select {method} are valid; nothing was computed")
        for name, text in row_lines(done.manifest["rows"]):
            say(f"  {name:<10}{text}")
        for name, value in done.manifest["config"].items():
            if value is not None:
                say(f"  {name + ' ':<14}{value}")
        if "preview" in facts:
            from .terminal import show_preview

            show_preview(facts["preview"])
    return 0


def _part_done(method: str, options: SelectOptions, done: Any) -> int:
    if options.json:
        print_json({"run": str(done.folder), **done.manifest})
    elif options.quiet:
        say(done.folder)
    else:
        from ..screen import console
        from .terminal import show_stages

        show_stages(console(), done.manifest)
        say(
            f"part {options.shards} is in the cache; when all parts are, run the same siftune select {method} command "
            "without --shards on the same cache to merge them"
        )
    return 0


def _selected(options: SelectOptions, done: Any) -> int:
    if options.json:
        print_json({"run": str(done.folder), "out": str(done.out), **done.manifest})
    elif options.quiet:
        say(done.out)
    else:
        from .terminal import show_selection

        following = [
            page_line(done.folder, cache=options.cache, seed=options.seed),
            f"siftune keep {done.folder} --keep 10% --out ten-percent.jsonl   another budget, without the model",
            f"{done.folder}/rows.parquet   every row's score, reason and pseudo-domain",
            f"{done.folder}/manifest.json   stages, versions and inputs of the run",
        ]
        if done.manifest.get("info", {}).get("written"):
            following.append(
                f"{done.folder}/domains/   the rows that the generator wrote; edit them and pass the folder as --seeds"
            )
        show_selection(done.manifest, out=str(done.out), following=following)
    return 0
