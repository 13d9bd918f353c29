"""The command line: `siftune COMMAND ...`, the same as `python -m siftune`.

Exit codes: 0 done, 2 bad input or usage (one sentence on standard error), 1 our fault (with a hint). Results go to
standard output. Nothing here imports torch before a command needs it, so help and `siftune methods` are quick.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, registry
from .arguments import Command, HelpWanted
from .config import (
    PARTS,
    Cutting,
    DemoOptions,
    Everywhere,
    KeepOptions,
    Option,
    PlanOptions,
    Reading,
    Running,
    SelectOptions,
    options_of,
    read_yaml,
    unknown,
)
from .errors import UserError

OVERVIEW = """siftune: sift, then tune. Choose which rows a language model is fine-tuned on.

  siftune demo                          the whole story on embedded data and a tiny model, offline, on a CPU
  siftune plan POOL... --model MODEL    before anything runs: rows, bad rows, tokens, time, memory
  siftune select METHOD POOL...         score a pool and keep the best rows
  siftune keep RUN --keep 10% --out F   cut a run's stored scores at another budget, without the model
  siftune loop METHOD POOL...           choose, tune by a command of yours, choose again with the tuned model
  siftune methods                       every method: one line, its paper, what it needs
  siftune version                       versions of siftune and of what it stands on

Every command: --run DIR --out FILE --seed INT --quiet --json --config FILE --cache DIR
Help on one: siftune COMMAND --help, and siftune select METHOD --help for a method's own options.
Exit codes: 0 done, 2 bad input or usage, 1 a fault of siftune."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never raises."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        with warnings.catch_warnings():
            _tell_warnings()
            return _dispatch(words)
    except UserError as error:
        print(f"siftune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("siftune: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _our_fault(error)


def _tell_warnings() -> None:
    """Our own warnings as one line on standard error; other packages' are for their developers."""

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"siftune: note: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"siftune\b")
    warnings.showwarning = tell  # type: ignore[assignment]


def _our_fault(error: Exception) -> int:
    if os.environ.get("SIFTUNE_TRACEBACK"):
        traceback.print_exc()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = " ".join(str(error).split())
    print(
        f"siftune: a fault of siftune, not of your input: {type(error).__name__}{where}: {said}\n"
        "hint: run again with SIFTUNE_TRACEBACK=1 in the environment and report what it prints",
        file=sys.stderr,
    )
    return 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(OVERVIEW)
        return 0
    if words[0] in ("-V", "--version"):
        words[0] = "version"
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise unknown(name, list(COMMANDS), what="command", where="siftune")
    return COMMANDS[name](rest)


def _read(command: Command, words: Sequence[str]) -> dict[str, Any] | None:
    """The options' values; None when help was asked for and printed."""
    try:
        values = command.read(words)
    except HelpWanted:
        print(command.help(), end="")
        return None
    if values.get("cache"):  # also for what has no argument of its own
        os.environ["SIFTUNE_CACHE"] = str(Path(values["cache"]).expanduser().absolute())
    return values


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


# --- select ---------------------------------------------------------------------------------------------------------


EXAMPLES = {
    "model": "./model",
    "seeds": "seeds.jsonl",
    "judge_url": "http://127.0.0.1:8000/v1",
    "scorer": "./scorer",
    "complexity_scorer": "./complexity-scorer",
    "quality_scorer": "./quality-scorer",
    "label_column": "source",
}
"""What a method's own options may say, for the examples of its help."""


def select_command(method: str, own: Sequence[Option]) -> Command:
    """The options of `siftune select METHOD`."""
    entry = registry.find("offline", method)
    groups = [options_of(cls) for cls in (Reading, Cutting, Running, Everywhere)]
    given = "".join(f" {option.flag} {EXAMPLES[option.name]}" for option in own if option.name in EXAMPLES)
    return Command(
        f"select {method}",
        f"siftune select {method} POOL... [options]",
        f"{method}: {entry.summary}\npaper: {entry.paper}; needs: {entry.needs}",
        [*own, *(option for group in groups for option in group)],
        positional="pool",
        examples=(
            f"siftune select {method} pool.jsonl{given} --keep 20% --out selected.jsonl",
            f"siftune select {method} first.jsonl second.parquet{given} --keep 8000 --on-bad-row skip",
            f"siftune select {method} pool.jsonl{given} --dry-run",
        ),
    )


def own_options(method: str) -> list[Option]:
    """The options of a method's own: the fields of its dataclass."""
    cls = registry.find("offline", method).load()
    return options_of(cls, group=f"The method {method}", skip=(*PARTS, "seed"))


def _select(words: list[str]) -> int:
    method, words = _which_method(words)
    if method is None:
        _select_overview()
        return 0
    own = own_options(method)
    values = _read(select_command(method, own), words)
    if values is None:
        return 0
    settings = {option.name: values.pop(option.name) for option in own}
    options = SelectOptions(**values)
    from .pipeline import select
    from .terminal import progress

    quiet = options.quiet or options.json
    done = select(method, options, settings, progress=progress(wanted=not quiet))
    if options.dry_run:
        return _would_do(method, options, done)
    if options.shards is not None:
        return _part_done(method, options, done)
    return _selected(options, done)


def _which_method(words: list[str], command: str = "select") -> tuple[str | None, list[str]]:
    """The method's name, first of the words or in the configuration file, and the words without it."""
    if words and not words[0].startswith("-"):
        return registry.find("offline", words[0]).name, words[1:]
    if any(word in ("-h", "--help") for word in words):
        return None, words
    paths = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    paths += [after for word, after in itertools.pairwise(words) if word == "--config"]
    named = read_yaml(paths[-1]).get("method") if paths else None
    if named is None:
        known = ", ".join(entry.name for entry in registry.methods("offline"))
        raise UserError(
            f"siftune {command} needs a method before its options: one of {known}; see siftune {command} --help"
        )
    return registry.find("offline", str(named)).name, words


def _select_overview() -> None:
    """`siftune select --help`: methods first, then what they share."""
    shared = [option for cls in (Reading, Cutting, Running, Everywhere) for option in options_of(cls)]
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
    print(command.help(), end="")


def _would_do(method: str, options: SelectOptions, done: Any) -> int:
    facts = {"dry_run": True, "method": method, **done.manifest}
    if options.json:
        _print_json(facts)
    elif not options.quiet:
        from .terminal import row_lines

        print(f"dry run: rows, options and budget of siftune select {method} are sound; nothing was computed")
        for name, text in row_lines(done.manifest["rows"]):
            print(f"  {name:<10}{text}")
        for name, value in done.manifest["config"].items():
            if value is not None:
                print(f"  {name + ' ':<14}{value}")
        if "preview" in facts:
            from .terminal import show_preview

            show_preview(facts["preview"])
    return 0


def _part_done(method: str, options: SelectOptions, done: Any) -> int:
    if options.json:
        _print_json({"run": str(done.folder), **done.manifest})
    elif options.quiet:
        print(done.folder)
    else:
        from .terminal import console, show_stages

        show_stages(console(), done.manifest)
        print(
            f"part {options.shards} is in the cache; when all parts are, the same siftune select {method} command "
            "without --shards, on the same cache, merges them"
        )
    return 0


def _selected(options: SelectOptions, done: Any) -> int:
    if options.json:
        _print_json({"run": str(done.folder), "out": str(done.out), **done.manifest})
    elif options.quiet:
        print(done.out)
    else:
        from .terminal import show_selection

        following = [
            f"siftune keep {done.folder} --keep 10% --out ten-percent.jsonl   another budget, without the model",
            f"{done.folder}/rows.parquet   every row's score, reason and pseudo-domain",
            f"{done.folder}/manifest.json   what was done, with which versions and inputs",
        ]
        if done.manifest.get("info", {}).get("written"):
            following.append(
                f"{done.folder}/domains/   the rows the generator wrote; edit them, give the folder as --seeds"
            )
        show_selection(done.manifest, out=str(done.out), following=following)
    return 0


# --- loop -----------------------------------------------------------------------------------------------------------


def _loop(words: list[str]) -> int:
    from .loop import LoopOptions, loop

    method, words = _which_method(words, command="loop") if words[:1] not in (["-h"], ["--help"]) else ("daar", words)
    own = own_options(str(method))
    command = Command(
        f"loop {method}",
        f"siftune loop {method} POOL... --model MODEL --tune COMMAND [options]",
        f"Choose rows with {method}, tune the model on them by a command of yours, choose the next with the tuned model.",
        [*own, *options_of(LoopOptions)],
        positional="pool",
        examples=(
            f"siftune loop {method} pool.jsonl --model ./model --seeds seeds.jsonl --keep 10% --rounds 2 \\\n"
            "    --tune 'python tune.py --model {model} --data {train_file} --out {out_model}'",
        ),
    )
    values = _read(command, words)
    if values is None:
        return 0
    settings = {option.name: values.pop(option.name) for option in own}
    options = LoopOptions(**values)
    from .terminal import console, progress, show_rounds

    speaks = not (options.quiet or options.json)
    shown = console()
    done = loop(
        str(method),
        options,
        settings,
        progress=progress(wanted=speaks),
        told=shown.print if speaks else lambda line: None,
    )
    facts = [item.facts for item in done]
    if options.json:
        _print_json({"rounds": facts})
    elif options.dry_run and speaks:
        print("dry run: rows, options, budget and the tuning command are sound; nothing was computed")
    elif options.quiet:
        print(*(item["tuned"] for item in facts[-1:]))
    else:
        show_rounds(shown, facts)
    return 0


# --- keep -----------------------------------------------------------------------------------------------------------


def _keep(words: list[str]) -> int:
    command = Command(
        "keep",
        "siftune keep RUN [options]",
        "Cut the scores that a run stored at another budget, without the model.",
        [option for cls in (Cutting, Everywhere) for option in options_of(cls)],
        positional="run",
        examples=(
            "siftune keep siftune-runs/daar-0a1b2c --keep 10% --out ten-percent.jsonl",
            "siftune keep siftune-runs/daar-0a1b2c --quota 'mathematics=50%,*=10%' --out mathematics.jsonl",
        ),
    )
    values = _read(command, words)
    if values is None:
        return 0
    options = KeepOptions(**values)
    if options.run is None:
        raise UserError("siftune keep needs a run folder: siftune keep RUN --keep 10% --out FILE")
    from .pipeline import recut

    done = recut(options.run, options)
    if options.json:
        _print_json({"run": options.run, "out": str(done.out), "rows": done.manifest["rows"]})
    elif options.quiet:
        print(done.out)
    else:
        from .terminal import show_selection

        show_selection(
            {**done.manifest, "stages": [], "info": {}}, out=str(done.out), following=[f"train on {done.out}"]
        )
    return 0


# --- plan, demo -----------------------------------------------------------------------------------------------------


def _plan(words: list[str]) -> int:
    own = own_options("daar")
    command = Command(
        "plan",
        "siftune plan POOL... --model MODEL [options]",
        "Before anything runs: rows, bad rows, tokens, time, memory, speed on this machine, what is cached.",
        [*own, *options_of(PlanOptions)],
        positional="pool",
        examples=("siftune plan pool.jsonl --model ./model",),
    )
    values = _read(command, words)
    if values is None:
        return 0
    settings = {option.name: values.pop(option.name) for option in own}
    options = PlanOptions(**values)
    from .plan import plan, show

    facts = plan(options, settings)
    if options.json:
        _print_json(facts)
    elif not options.quiet:
        show(facts)
    if options.out is not None:
        from .data.files import write_json

        write_json(options.out, facts)
    return 0


def _demo(words: list[str]) -> int:
    command = Command(
        "demo",
        "siftune demo [options]",
        "The whole story on embedded data and an embedded tiny model: offline, on a CPU, in under three minutes.",
        options_of(DemoOptions),
        examples=("siftune demo", "siftune demo --run my-demo --quiet", "siftune demo --rows 1000 --steps 0"),
    )
    values = _read(command, words)
    if values is None:
        return 0
    options = DemoOptions(**values)
    for flag, least in (("rows", 100), ("steps", 0)):
        if getattr(options, flag) < least:
            raise UserError(f"--{flag} {getattr(options, flag)} is too few; give at least {least}")
    from .demo import story
    from .pipeline import RUNS, check_out, copy_file, select
    from .terminal import progress

    check_out(options.out, copied=True)
    bars = progress(wanted=not (options.quiet or options.json))

    def select_daar(pool: Path, *, run: Path, keep: str, seed: int, cache: str | None, settings: Any) -> Any:
        chosen = SelectOptions(pool=[str(pool)], run=str(run), keep=keep, seed=seed, cache=cache)
        return select("daar", chosen, settings, progress=bars)

    facts = story.run(
        options.run or RUNS / f"demo-{options.rows}-{options.seed}",
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
    return 0


# --- methods, version -----------------------------------------------------------------------------------------------


def _methods(words: list[str]) -> int:
    command = Command(
        "methods",
        "siftune methods [options]",
        "Every method: one line, its paper, what it needs.",
        options_of(Everywhere),
        examples=("siftune methods", "siftune methods --json"),
    )
    values = _read(command, words)
    if values is None:
        return 0
    if values["json"]:
        fields = ("side", "name", "summary", "paper", "needs")
        _print_json([{field: getattr(entry, field) for field in fields} for entry in registry.methods()])
        return 0
    if values["quiet"]:
        for entry in registry.methods():
            print(f"{entry.side} {entry.name}")
        return 0
    from .terminal import console, table

    titles = {
        "offline": "offline: scores a pool once, before training (siftune select METHOD)",
        "online": "online: scores every batch during training (siftune.attach)",
    }
    for side, title in titles.items():
        entries = [entry for entry in registry.methods() if entry.side == side]
        lines = [(entry.name, entry.summary, entry.paper, entry.needs) for entry in entries]
        console().print(table(title, ("method", "what it ranks by", "paper", "needs"), lines))
    return 0


def _version(words: list[str]) -> int:
    command = Command(
        "version", "siftune version [options]", "Versions of siftune and of what it stands on.", options_of(Everywhere)
    )
    values = _read(command, words)
    if values is None:
        return 0
    from .run import versions

    found = {"siftune": __version__, **versions()}
    if values["json"]:
        _print_json(found)
    elif values["quiet"]:
        print(__version__)
    else:
        for name, number in found.items():
            print(f"{name} {number}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "plan": _plan,
    "select": _select,
    "keep": _keep,
    "loop": _loop,
    "methods": _methods,
    "version": _version,
}
