"""`siftune train RECIPE`: fine-tune by a recipe, with or without an online method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..budget import Keep
from ..errors import UserError
from ..output import say
from ..runs.options import options_of
from ..runs.train import TuneOptions
from .common import page_line, print_json, read
from .parser import Command


@dataclass(kw_only=True)
class Recipes:
    """The recipe and its overrides."""

    recipe: str | None = None
    """YAML file of the recipe."""
    set: dict[str, str] | None = None
    """Override a key of the recipe by its dotted name; repeatable: --set sft.learning_rate=1e-4."""
    seed: int | None = None
    """Seed of every random draw; default: the recipe's (else 0)."""
    config: str | None = None
    """YAML file with any of these options; the command line takes precedence. This is not the recipe."""


@dataclass(kw_only=True)
class Sifting:
    """Selection inside every batch."""

    online: str | None = None
    """Online method, overrides the recipe's: any name of `siftune methods`; `none` for no selection."""
    keep: Keep | None = None
    """Rows to train on per micro-batch of candidates (8), or a share of them (1/8)."""


EXAMPLES = (
    "siftune train recipe.yaml",
    "siftune train recipe.yaml --online uds --keep 1/8",
    "siftune train recipe.yaml --set sft.learning_rate=1e-4 --set peft.r=16 --run runs/wider",
)


def run(words: list[str]) -> int:
    command = Command(
        "train",
        "siftune train RECIPE [options]",
        "Fine-tune by a recipe (trl and peft), with an online method where the recipe has one. A killed run resumes.",
        [option for cls in (Recipes, Sifting, TuneOptions) for option in options_of(cls)],
        positional="recipe",
        examples=EXAMPLES,
    )
    values = read(command, words)
    if values is None:
        return 0
    options = TuneOptions(**{item.name: values[item.name] for item in fields(TuneOptions)})
    from ..data.protect import refuse_overlap
    from ..runs.train import tune
    from ..screen import console
    from ..sft.recipe import Recipe
    from .terminal import progress

    recipe = Recipe.read(named(values, "train"), overrides(values))
    refuse_overlap(
        {"--out": options.out, "--run": options.run}, {"the recipe": values["recipe"], "--config": values["config"]}
    )
    verbose = not (options.quiet or options.json)
    shown = console()
    done = tune(
        recipe,
        options,
        progress=progress(enabled=verbose),
        on_event=shown.line if verbose else lambda line: None,
    )
    if options.dry_run:
        return _show_dry_run(options, done)
    if options.json:
        print_json({"run": str(done.folder), "model": str(options.out or done.model), **done.manifest})
    elif options.quiet:
        say(options.out or done.model)
    else:
        _summary(shown, done, options)
    return 0


def named(values: Mapping[str, Any], command: str) -> str:
    """The recipe's path. Raises `UserError` where there is none."""
    if values["recipe"] is None:
        raise UserError(
            f"siftune {command} needs a recipe: siftune {command} recipe.yaml; see siftune {command} --help"
        )
    return str(values["recipe"])


def overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's overrides from the command line; its own options come last."""
    from ..yaml_io import set_value

    result: dict[str, Any] = {}
    if values.get("online") is not None:  # first, so that --set can set fields of the new method
        result["online"] = None if values["online"] == "none" else values["online"]
    result |= {key: set_value(key, value) for key, value in (values.get("set") or {}).items()}
    if values.get("keep") is not None:
        if values.get("online") == "none":
            raise UserError("--keep chooses rows and --online none does not; pass one of them")
        result["online.keep"] = values["keep"]
    if values["seed"] is not None:
        result["seed"] = values["seed"]
    return result


def _show_dry_run(options: TuneOptions, done: Any) -> int:
    if options.json:
        print_json({"dry_run": True, "run": str(done.folder), **done.manifest})
    elif not options.quiet:
        from ..runs.options import write_yaml

        say("dry run: recipe, rows, model folder and budget are valid; nothing was trained")
        say(f"  {_rows(done.manifest['rows'])}")
        say(f"  run folder: {done.folder}")
        say()
        recipe = {key: value for key, value in done.manifest["config"].items() if key != "command"}
        say(write_yaml(recipe), multiline=True, end="")
    return 0


def _rows(rows: Mapping[str, Any]) -> str:
    left_out = "".join(f", {count:,} {reason}" for reason, count in rows["reasons"].items())
    return f"{rows['used']:,} of {rows['read']:,} rows, {rows['label_tokens']:,} of {rows['tokens']:,} tokens are label tokens{left_out}"


def _summary(shown: Any, done: Any, options: TuneOptions) -> None:
    from .terminal import show_stages, table

    manifest = done.manifest
    tokens = manifest["tokens"]
    shown.print()
    shown.line(f"tuned model -> {options.out or done.model}")
    shown.print()
    lines = [
        ("rows", _rows(manifest["rows"])),
        (
            "trained",
            f"{tokens['trained_rows']:,} rows in {manifest['steps']:,} steps, {tokens['trained_tokens']:,} tokens",
        ),
        ("read", f"{tokens['candidates']:,} candidates, {tokens['forward_tokens']:,} tokens forward"),
        ("loss", "-" if manifest["train_loss"] is None else f"{manifest['train_loss']:.4f} (mean over steps)"),
    ]
    for name, text in lines:
        shown.line(f"  {name:<10}{text}")
    if held_out := manifest.get("held_out"):
        held_out_lines = [
            (
                name,
                f"{facts['loss']:.4f}",
                f"{facts['token_accuracy']:.4f}",
                f"{facts['rows']:,}",
                f"{facts['tokens']:,}",
            )
            for name, facts in held_out.items()
        ]
        shown.print()
        shown.print(
            table("", ("held out", "loss", "token accuracy", "rows", "tokens"), held_out_lines, numbers=(1, 2, 3, 4))
        )
    shown.print()
    show_stages(shown, manifest)
    page = page_line(done.folder, cache=options.cache)
    shown.print("\nnext:")
    shown.line(f"  {page}")
    shown.line(f"  {done.model}/README.md   the model card: its rows and their selection")
    shown.line(f"  siftune evaluate {done.model}   the papers' task sets, or held-out loss")
