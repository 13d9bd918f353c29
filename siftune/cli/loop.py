"""`siftune loop METHOD POOL...`: choose, tune by a recipe or by the user's command, choose again."""

from __future__ import annotations

from ..output import say
from ..runs.options import options_of
from .common import own_options, print_json, read, which_method
from .parser import Command


def run(words: list[str]) -> int:
    from ..runs.loop import LoopOptions, loop

    method, words = which_method(words, command="loop")
    method = method or "daar"  # for the help
    method_options = own_options(method)
    command = Command(
        f"loop {method}",
        f"siftune loop {method} POOL... --model MODEL --recipe FILE | --tune COMMAND [options]",
        f"Choose rows with {method}, tune the model on them (by a recipe or your command), choose again with the tuned model.",
        [*method_options, *options_of(LoopOptions)],
        positional="pool",
        examples=(
            f"siftune loop {method} pool.jsonl --model ./model --seeds seeds.jsonl --keep 10% --recipe recipe.yaml",
            f"siftune loop {method} pool.jsonl --model ./model --seeds seeds.jsonl --keep 10% --rounds 2 \\\n"
            "    --tune 'python tune.py --model {model} --data {train_file} --out {out_model}'",
        ),
    )
    values = read(command, words)
    if values is None:
        return 0
    settings = {option.name: values.pop(option.name) for option in method_options}
    options = LoopOptions(**values)
    from ..screen import console
    from .terminal import progress, show_rounds

    verbose = not (options.quiet or options.json)
    shown = console()
    done = loop(
        method,
        options,
        settings,
        progress=progress(enabled=verbose),
        on_event=shown.line if verbose else lambda line: None,
    )
    facts = [item.facts for item in done]
    if options.json:
        print_json({"rounds": facts})
    elif options.dry_run and verbose:
        say("dry run: rows, options, budget and tuning are valid; nothing was computed")
    elif options.quiet:
        say("".join(item["tuned"] for item in facts[-1:]))
    else:
        show_rounds(shown, facts)
    return 0
