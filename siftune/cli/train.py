"""`siftune train RECIPE`: fine-tune by a recipe, sifting every batch where it says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..budget import Keep
from ..errors import UserError
from ..output import say
from ..runs.options import options_of
from ..runs.train import TuneOptions
from .common import page_line, print_json, read, split_set
from .parser import Command


@dataclass(kw_only=True)
class Recipes:
    """What the recipe says, and what the command line says over it."""

    recipe: str | None = None
    """YAML file of the recipe."""
    set: dict[str, str] | None = None
    """Keys of the recipe with other values, dotted and as often as wanted: --set sft.learning_rate=1e-4."""
    seed: int | None = None
    """Seed of every random draw; left out, the recipe's own (else 0)."""
    config: str | None = None
    """YAML file with any of these options; the command line wins. The recipe is not one of these files."""


@dataclass(kw_only=True)
class Sifting:
    """Choosing inside every batch."""

    online: str | None = None
    """Online method, in place of the recipe's: any name of `siftune methods`; `none` for no selection."""
    keep: Keep | None = None
    """Rows trained on per micro-batch of candidates (8), or a share of them (1/8)."""


EXAMPLES = (
    "siftune train recipe.yaml",
    "siftune train recipe.yaml --online uds --keep 1/8",
    "siftune train recipe.yaml --set sft.learning_rate=1e-4 --set peft.r=16 --run runs/wider",
)


def run(words: list[str]) -> int:
    words, said = settings(words)
    command = Command(
        "train",
        "siftune train RECIPE [options]",
        "Fine-tune by a recipe (trl and peft), sifting every batch where it says so. A killed run goes on where it was.",
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

    recipe = Recipe.read(named(values, "train"), overrides(values, said))
    refuse_overlap(
        {"--out": options.out, "--run": options.run}, {"the recipe": values["recipe"], "--config": values["config"]}
    )
    speaks = not (options.quiet or options.json)
    shown = console()
    done = tune(
        recipe,
        options,
        progress=progress(wanted=speaks),
        told=shown.line if speaks else lambda line: None,
    )
    if options.dry_run:
        return _would_do(options, done)
    if options.json:
        print_json({"run": str(done.folder), "model": str(options.out or done.model), **done.manifest})
    elif options.quiet:
        say(options.out or done.model)
    else:
        _summary(shown, done, options)
    return 0


def settings(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The words without `--set KEY=VALUE`, and what they set; values are YAML."""
    from ..yaml_io import set_value

    rest, said = split_set(words, example="sft.learning_rate=1e-4")
    return rest, {key: set_value(key, value) for key, value in said.items()}


def named(values: Mapping[str, Any], command: str) -> str:
    """The recipe's path. Raises `UserError` where none was given."""
    if values["recipe"] is None:
        raise UserError(
            f"siftune {command} needs a recipe: siftune {command} recipe.yaml; see siftune {command} --help"
        )
    return str(values["recipe"])


def overrides(values: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line sets in the recipe: its own options last."""
    from ..yaml_io import set_value

    found: dict[str, Any] = {}
    if values.get("online") is not None:  # first, so that --set can give the new method its own fields
        found["online"] = None if values["online"] == "none" else values["online"]
    found |= {key: set_value(key, value) for key, value in (values.get("set") or {}).items()}
    found |= said
    if values.get("keep") is not None:
        if values.get("online") == "none":
            raise UserError("--keep chooses rows and --online none does not; give one of them")
        found["online.keep"] = values["keep"]
    if values["seed"] is not None:
        found["seed"] = values["seed"]
    return found


def _would_do(options: TuneOptions, done: Any) -> int:
    if options.json:
        print_json({"dry_run": True, "run": str(done.folder), **done.manifest})
    elif not options.quiet:
        from ..runs.options import write_yaml

        say("dry run: recipe, rows, model folder and budget are sound; nothing was trained")
        say(f"  {_rows(done.manifest['rows'])}")
        say(f"  run folder: {done.folder}")
        say()
        recipe = {key: value for key, value in done.manifest["config"].items() if key != "command"}
        say(write_yaml(recipe), multiline=True, end="")
    return 0


def _rows(rows: Mapping[str, Any]) -> str:
    left = "".join(f", {count:,} {reason}" for reason, count in rows["reasons"].items())
    return (
        f"{rows['used']:,} of {rows['read']:,} rows, {rows['label_tokens']:,} of {rows['tokens']:,} tokens learnt{left}"
    )


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
    if held := manifest.get("held_out"):
        found = [
            (
                name,
                f"{facts['loss']:.4f}",
                f"{facts['token_accuracy']:.4f}",
                f"{facts['rows']:,}",
                f"{facts['tokens']:,}",
            )
            for name, facts in held.items()
        ]
        shown.print()
        shown.print(table("", ("held out", "loss", "token accuracy", "rows", "tokens"), found, numbers=(1, 2, 3, 4)))
    shown.print()
    show_stages(shown, manifest)
    page = page_line(done.folder, cache=options.cache)
    shown.print("\nnext:")
    shown.line(f"  {page}")
    shown.line(f"  {done.model}/README.md   the model card: which rows, chosen how")
    shown.line(f"  siftune evaluate {done.model}   the papers' task sets, or held-out loss")
