"""The cut of a selection: the budget that the user set, and the file that the chosen rows are written to.

Cost: one sort of the scores; of the rows, only those that are written are read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..budget import parse_keep, share
from ..errors import UserError
from ..files import atomic_path
from ..records import Pool, Scores, Subset

DEFAULT_KEEP = "20%"
"""DaaR's budget: 8,000 of 40,000 rows."""


@dataclass(frozen=True)
class Budget:
    """The user's budget, checked: the arguments of `Scores.keep`."""

    rule: Mapping[str, Any]
    order: Literal["original", "score"] = "original"

    @classmethod
    def read(cls, options: Any) -> Budget:
        """From `--keep`, `--tokens`, `--quota` and `--target-mix`. Raises `UserError` when they do not go together."""
        values = {name: getattr(options, name) for name in ("keep", "tokens", "quota")}
        budgets = [name for name, value in values.items() if value is not None]
        if len(budgets) > 1:
            raise UserError(f"--{budgets[0]} and --{budgets[1]} are two budgets; pass one of them")
        rule: dict[str, Any] = {}
        if "tokens" in budgets:
            if options.tokens < 1:
                raise UserError(f"--tokens must be >= 1, got {options.tokens}")
            rule["tokens"] = options.tokens
        elif "quota" in budgets:
            for amount in options.quota.values():
                parse_keep(amount)
            if options.target_mix is not None:
                raise UserError("--quota and --target-mix are two budgets; pass one of them")
            rule["quota"] = dict(options.quota)
        else:
            keep = DEFAULT_KEEP if values["keep"] is None else values["keep"]
            amount = parse_keep(keep)
            rule |= {"count": amount.count} if amount.fraction is None else {"fraction": amount.fraction}
        if options.target_mix is not None:
            rule["target_mix"] = dict(options.target_mix)
        return cls(rule, options.order)

    def check(self, pool: Pool, domains: tuple[str, ...], *, labels: bool = False) -> None:
        """Refuse a budget that the pool or the domains (`()` for none) cannot meet; `labels` are domains without p(domain | row)."""
        usable = len(pool) - len(pool.reasons)
        if self.rule.get("count", 0) > usable:
            raise UserError(f"--keep {self.rule['count']} exceeds the {usable} usable rows of the pool; lower it")
        if "fraction" in self.rule and share(float(self.rule["fraction"])).rows(usable) < 1:
            raise UserError(
                f"--keep {self.rule['fraction']:g} of {usable} usable rows is less than one row; raise it or set a "
                "number of rows"
            )
        for name in ("quota", "target_mix"):
            for domain in self.rule.get(name, {}):
                flag = "--" + name.replace("_", "-")
                if not domains:
                    raise UserError(f"{flag} needs domains, and this method has none; use daar, or pass --keep alone")
                if labels and name == "target_mix":
                    raise UserError(f"{flag} needs p(domain | row), and this method has labels; use daar, or --quota")
                if domain not in domains and not (name == "quota" and domain == "*"):
                    raise UserError(f"{flag} names the domain {domain!r}, which is not one of {', '.join(domains)}")

    def cut(self, scores: Scores) -> Subset:
        """The kept rows. Raises `UserError` when there is none."""
        subset = scores.keep(**self.rule)
        if not len(subset):
            raise UserError(f"the budget {dict(self.rule)} keeps no row of this pool; raise it")
        return subset


def check_out(out: str | None, *, copied: bool = False) -> None:
    """Refuse a result file of an unknown kind, or a folder, before any work is done; a copy is JSONL only."""
    if out is None:
        return
    if Path(out).is_dir():
        raise UserError(f"--out {out} is a folder; pass the path of a file")
    known = (".jsonl",) if copied else (".jsonl", ".jsonl.gz", ".json", ".parquet")
    if not out.endswith(known):
        raise UserError(f"--out {out} has no known suffix; use one of {', '.join(known)}")


def refuse_inside(out: str | None, run: Path, *, but: str | None = None) -> None:
    """Refuse a result path inside a run folder, except the file that is called `but`. Raises `UserError`."""
    if out is None:
        return
    path, folder = Path(out).resolve(), run.resolve()
    if folder in path.parents and path != folder / (but or "."):
        raise UserError(
            f"--out {out} is inside the run folder {run}, whose files are not overwritten; choose another path"
        )


def copy_out(
    subset: Subset, selected: Path, out: str | None, *, order: Literal["original", "score"] = "original"
) -> Path:
    """Write the chosen rows to `--out` as well, where it is set."""
    if out is None or Path(out).resolve() == selected.resolve():
        return selected
    if out.endswith(".jsonl"):
        return copy_file(selected, Path(out))
    return subset.write(out, order=order)


def copy_file(source: Path, out: Path) -> Path:
    """Copy a file; the copy is complete or absent."""
    with atomic_path(out) as temporary:
        shutil.copyfile(source, temporary)
    return out
