"""`siftune score-reference RECIPE`: the table of losses that RHO-Loss subtracts."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..output import say
from ..runs.options import options_of
from .common import print_json, read
from .parser import Command
from .train import named, overrides


@dataclass(kw_only=True)
class ScoreReferenceOptions:
    """`siftune score-reference RECIPE`"""

    recipe: str | None = None
    """YAML file of the recipe whose training rows are scored."""
    reference: str | None = None
    """Reference model: a folder, a hub id, or an adapter's folder; preferably trained on held-out rows."""
    score_tokens: int = 8192
    """Maximum number of padded tokens of one forward pass."""
    per_token: bool = False
    """Add the loss of every label token, for token-rho and token-self (.parquet)."""
    set: dict[str, str] | None = None
    """Override a key of the recipe by its dotted name; repeatable: --set sft.max_length=256."""
    run: str | None = None
    """Folder for the table when --out is not set: RUN/reference.parquet."""
    out: str | None = None
    """The table (.parquet or .safetensors); default reference.parquet."""
    seed: int | None = None
    """As in `siftune train`; no loss depends on it."""
    quiet: bool = False
    """Print only the table's path."""
    json: bool = False
    """Print only one JSON object."""
    config: str | None = None
    """YAML file with any of these options; the command line takes precedence. This is not the recipe."""
    cache: str | None = None
    """Cache folder; default $SIFTUNE_CACHE, else ~/.cache/siftune."""


def run(words: list[str]) -> int:
    command = Command(
        "score-reference",
        "siftune score-reference RECIPE --reference MODEL [options]",
        "The loss of every training row under a reference model, computed once; rho-loss reads the table as `reference`.",
        options_of(ScoreReferenceOptions),
        positional="recipe",
        examples=(
            "siftune score-reference recipe.yaml --reference ./held-out-model --out reference.parquet",
            "siftune train recipe.yaml --online rho-loss --keep 1/8 --set online.reference=reference.parquet",
        ),
    )
    values = read(command, words)
    if values is None:
        return 0
    options = ScoreReferenceOptions(**values)
    if options.reference is None:
        raise UserError("siftune score-reference needs --reference: the model whose losses are subtracted")
    from ..data.protect import refuse_overlap
    from ..runs.score_reference import score_reference
    from ..sft.recipe import Recipe

    recipe = Recipe.read(named(values, "score-reference"), overrides(values))
    out = options.out or (f"{options.run}/reference.parquet" if options.run else "reference.parquet")
    refuse_overlap({"--out": out}, {"the recipe": options.recipe, "--config": options.config})
    verbose = not (options.quiet or options.json)
    done = score_reference(
        recipe,
        options.reference,
        out=out,
        score_tokens=options.score_tokens,
        per_token=options.per_token,
        cache=options.cache,
        on_event=say if verbose else lambda line: None,
    )
    if options.json:
        print_json({"table": str(done.table), "rows": done.rows, "reused": done.reused})
    elif options.quiet:
        say(done.table)
    else:
        say(f"{done.rows:,} rows{', reused' if done.reused else ''} -> {done.table}")
        method = "token-rho" if options.per_token else "rho-loss --keep 1/8"
        say(f"next: siftune train RECIPE --online {method} --set online.reference={done.table}")
    return 0
