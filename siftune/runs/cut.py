"""The cut of a selection: its budget as the user said it, and the file that the chosen rows go to.

Cost: the sort of one score per row; the rows are not read but for those that are written.
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
    """A budget as the user said it, checked: what `Scores.keep` takes."""

    rule: Mapping[str, Any]
    order: Literal["original", "score"] = "original"

    @classmethod
    def read(cls, options: Any) -> Budget:
        """From `--keep`, `--tokens`, `--quota` and `--target-mix`. Raises `UserError` when they do not go together."""
        said = {name: getattr(options, name) for name in ("keep", "tokens", "quota")}
        given = [name for name, value in said.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} are two budgets; give one of them")
        rule: dict[str, Any] = {}
        if "tokens" in given:
            if options.tokens < 1:
                raise UserError(f"--tokens {options.tokens} keeps nothing; give at least 1")
            rule["tokens"] = options.tokens
        elif "quota" in given:
            for amount in options.quota.values():
                parse_keep(amount)
            if options.target_mix is not None:
                raise UserError("--quota and --target-mix are two budgets; give one of them")
            rule["quota"] = dict(options.quota)
        else:
            keep = DEFAULT_KEEP if said["keep"] is None else said["keep"]
            amount = parse_keep(keep)
            rule |= {"count": amount.count} if amount.fraction is None else {"fraction": amount.fraction}
        if options.target_mix is not None:
            rule["target_mix"] = dict(options.target_mix)
        return cls(rule, options.order)

    def check(self, pool: Pool, domains: tuple[str, ...], *, labels: bool = False) -> None:
        """Refuse what the pool or the domains (`()` for none) cannot meet; `labels` are domains without p(domain | row)."""
        usable = len(pool) - len(pool.reasons)
        if self.rule.get("count", 0) > usable:
            raise UserError(f"--keep {self.rule['count']} exceeds the {usable} usable rows of the pool; lower it")
        if "fraction" in self.rule and share(float(self.rule["fraction"])).rows(usable) < 1:
            raise UserError(
                f"--keep {self.rule['fraction']:g} of {usable} usable rows is less than one row; raise it or give a "
                "number of rows"
            )
        for name in ("quota", "target_mix"):
            for domain in self.rule.get(name, {}):
                flag = "--" + name.replace("_", "-")
                if not domains:
                    raise UserError(f"{flag} needs domains, and this method has none; use daar, or give --keep alone")
                if labels and name == "target_mix":
                    raise UserError(f"{flag} needs p(domain | row), and this method has labels; use daar, or --quota")
                if domain not in domains and not (name == "quota" and domain == "*"):
                    raise UserError(f"{flag} names the domain {domain!r}, which is not one of {', '.join(domains)}")

    def cut(self, scores: Scores) -> Subset:
        """The rows kept. Raises `UserError` when none is."""
        subset = scores.keep(**self.rule)
        if not len(subset):
            raise UserError(f"the budget {dict(self.rule)} keeps no row of this pool; raise it")
        return subset


def check_out(out: str | None, *, copied: bool = False) -> None:
    """Refuse a result file of an unknown kind, or a folder, before any work is done; a copy is JSONL only."""
    if out is None:
        return
    if Path(out).is_dir():
        raise UserError(f"--out {out} is a folder; give the path of a file")
    known = (".jsonl",) if copied else (".jsonl", ".jsonl.gz", ".json", ".parquet")
    if not out.endswith(known):
        raise UserError(f"--out {out} has no known suffix; give one of {', '.join(known)}")


def refuse_inside(out: str | None, run: Path, *, but: str | None = None) -> None:
    """Refuse a result among a run folder's own files, save the one that is called `but`. Raises `UserError`."""
    if out is None:
        return
    path, folder = Path(out).resolve(), run.resolve()
    if folder in path.parents and path != folder / (but or "."):
        raise UserError(
            f"--out {out} lies inside the run folder {run}, whose files stay as they are; choose another path"
        )


def copy_out(
    subset: Subset, written: Path, out: str | None, *, order: Literal["original", "score"] = "original"
) -> Path:
    """The chosen rows at `--out` too, where it is given."""
    if out is None or Path(out).resolve() == written.resolve():
        return written
    if out.endswith(".jsonl"):
        return copy_file(written, Path(out))
    return subset.write(out, order=order)


def copy_file(written: Path, out: Path) -> Path:
    """A copy that is whole or absent."""
    with atomic_path(out) as temporary:
        shutil.copyfile(written, temporary)
    return out
