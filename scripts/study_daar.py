"""DaaR's settings, one changed at a time, without training: does the choice stay the same? -> docs/results/daar-ablations.md.

Settings: the decoder layer, the probe set's size, the number of seed rows per domain, the reward. Every setting gets full
runs with other seeds: other seed rows (from held-out files), another probe set, other weights; the pool is the same. Reported:
how many of the chosen rows two seeds share, how many a setting shares with the base setting at the same seed, and how many
pseudo-labels are the row's true domain, which no method sees, or the same at two seeds.

    python scripts/study_daar.py docs/results/daar-ablations.yaml --data ../shared/data/pools --model ../shared/models/tiny-base

Cost: per layer one pass of the pool through so many layers, and a fit of a few seconds per run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from study_rows import DOMAINS, FIELDS, ROOT, draw, read_study, spread, table, write_rows

from siftune.models.store import Store
from siftune.offline.base import SerialEngine, gather
from siftune.offline.daar.selector import DaaR
from siftune.records import Pool, Shard, ShardResult, ShardTask

NAMES = {
    "layer": "decoder layer of h(x)",
    "probe_rows": "rows of the probe set",
    "seed_rows": "seed rows per domain",
    "reward": "reward",
}
Setting = tuple[Any, ...]
"""One value per name of `NAMES`."""


@dataclass(frozen=True)
class Ablations:
    """The YAML's keys."""

    rows: int
    draw: int
    max_length: int
    keep: str
    seeds: list[int]
    base: dict[str, Any]
    sweeps: dict[str, list[Any]]

    def setting(self, **changed: Any) -> Setting:
        return tuple({**self.base, **changed}[name] for name in NAMES)


@dataclass(frozen=True)
class Run:
    """What one full run gave."""

    kept: frozenset[int]
    labels: np.ndarray[Any, Any]
    """Pseudo-label of every row, `(n,)`, an index into the domains."""
    info: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Ready:
    """Features of rows of the pool, taken from a table; of other rows (seeds), computed."""

    task: ShardTask
    columns: dict[str, np.ndarray[Any, Any]]
    """Of every row of the pool."""
    place: dict[str, int]
    """Position in the pool by row id."""

    @property
    def key(self) -> str:
        return f"ready-{self.task.key}"

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        ids = pool.source.ids(range(shard.start, shard.stop))
        if any(name not in self.place for name in ids):
            return self.task(pool, shard)
        rows = [self.place[name] for name in ids]
        return ShardResult({name: values[rows] for name, values in self.columns.items()}, {})


class Tabled(DaaR):
    """DaaR whose pool and probe sets share one pass of the pool per layer, which the runs share, too."""

    tables: ClassVar[dict[int, Ready]] = {}

    def feature_task(self, *, for_fit: bool) -> ShardTask:
        return self.tables.get(self.layer) or super().feature_task(for_fit=for_fit)

    def table(self, pool: Pool) -> None:
        """Make this layer's table."""
        if self.layer not in self.tables:
            task = super().feature_task(for_fit=True)
            columns, reasons = gather(pool, SerialEngine().run(task, pool, pool.shards(), label="features"))
            assert not reasons, "rows of these pools have features"
            place = {name: row for row, name in enumerate(pool.source.ids(range(len(pool))))}
            self.tables[self.layer] = Ready(task, columns, place)


class Runs:
    """Full runs on one pool, each made once; features of a layer are computed once, too."""

    def __init__(self, study: Ablations, pool: Pool, data: Path, model: Path, work: Path) -> None:
        self.study, self.pool, self.model = study, pool, model
        self.store = Store(work / "fits")
        self.held_out = {name: [] for name in DOMAINS}  # type: dict[str, list[dict[str, str]]]
        for row in draw(data, 10**9, "all", held_out=True):
            self.held_out[row["true_domain"]].append({field: row[field] for field in FIELDS})
        self.done: dict[tuple[Setting, int], Run] = {}

    def of(self, setting: Setting) -> list[Run]:
        """The runs of a setting, one per seed."""
        return [self._run(setting, seed) for seed in self.study.seeds]

    def _run(self, setting: Setting, seed: int) -> Run:
        if (setting, seed) not in self.done:
            said = dict(zip(NAMES, setting, strict=True))
            count = said.pop("seed_rows")
            # a longer list begins with the shorter one, so that more seed rows are more of the same
            seeds = {name: random.Random(f"{seed} {name}").sample(rows, 60) for name, rows in self.held_out.items()}
            method = Tabled(
                model=str(self.model),
                seeds={name: rows[:count] for name, rows in seeds.items()},
                seed=seed,
                max_length=self.study.max_length,
                **said,
            )
            started = time.perf_counter()
            method.table(self.pool)
            method.store = self.store  # the two rewards are two cuts of one fit
            scores = method.fit(self.pool).score(self.pool)
            assert scores.pseudo_labels is not None
            kept = frozenset(scores.keep(fraction=self.study.keep).rows.tolist())
            order = [scores.domains.index(name) for name in DOMAINS]
            self.done[setting, seed] = Run(kept, np.argsort(order)[scores.pseudo_labels], dict(scores.info))
            sys.stderr.write(f"{setting}, seed {seed}: {time.perf_counter() - started:.1f} s\n")
        return self.done[setting, seed]


# --- what is reported -------------------------------------------------------------------------------------------------


def shared(one: Run, other: Run) -> float:
    """Chosen rows that two runs have in common, in percent."""
    return 100 * len(one.kept & other.kept) / max(len(one.kept), len(other.kept))


def line(name: str, runs: list[Run], base: list[Run], true: np.ndarray[Any, Any]) -> list[str]:
    """One setting of a table."""
    pairs = list(itertools.combinations(runs, 2))
    return [
        name,
        spread([shared(*pair) for pair in pairs], 1),
        "-" if runs == base else spread([shared(*pair) for pair in zip(runs, base, strict=True)], 1),
        spread([100 * float((run.labels == true).mean()) for run in runs], 1),
        spread([100 * float((one.labels == other.labels).mean()) for one, other in pairs], 1),
        spread([100 * run.info["validation_accuracy"] for run in runs], 1),
    ]


HEAD = ["chosen rows shared by two seeds", "shared with the base setting", "pseudo-label is the true domain"]
HEAD += ["pseudo-label is the same at two seeds", "probe accuracy"]


def tables(study: Ablations, runs: Runs, true: np.ndarray[Any, Any]) -> str:
    """A table per setting that is swept."""
    base, parts = runs.of(study.setting()), []
    for name, values in study.sweeps.items():
        lines = []
        for value in values:
            shown = f"**{value}**" if value == study.base[name] else str(value)
            lines.append(line(shown, runs.of(study.setting(**{name: value})), base, true))
        parts.append(f"## {NAMES[name].capitalize()}\n\n{table([NAMES[name], *HEAD], lines)}")
    return "\n\n".join(parts)


def composition(runs: list[Run], true: np.ndarray[Any, Any]) -> str:
    """Share of the chosen rows per true domain, base setting, one column per seed."""
    lines = []
    for index, name in enumerate(DOMAINS):
        found = [Counter(true[list(run.kept)].tolist())[index] / len(run.kept) for run in runs]
        lines.append([name, *(f"{100 * share:.1f} %" for share in found)])
    return table(["true domain", *(f"run {number}" for number in range(len(runs)))], lines)


def page(study: Ablations, runs: Runs, pool: Pool, true: np.ndarray[Any, Any], command: str) -> str:
    """The whole page."""
    from benchmarks import machine

    config = json.loads((runs.model / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    chance = 100 * len(runs.of(study.setting())[0].kept) / len(pool)
    base = ", ".join(f"{NAMES[name]} {value}" for name, value in study.base.items())
    return f"""# DaaR: what the choice hangs on

Written by `{command}`; nothing here is typed by hand. The discussion is in [README.md](README.md).

{machine.describe()}

Pool: {len(pool):,} rows, a quarter of each of {", ".join(DOMAINS)}; at most {study.max_length} tokens of a row are read. Model:
`{runs.model.name}`, {layers} layers of width {width}. Kept: {study.keep}. Each line: {len(study.seeds)} full runs (own seed rows,
own probe set, own weights), compared in pairs; mean, and in brackets smallest and largest, in percent. Random draws share
{chance:.0f} %. Base setting, in bold below: {base}. No model was trained: these
figures say how stable a choice is and how well pseudo-labels find the domains, not how good the chosen rows are.

{tables(study, runs, true)}

## What the base setting chooses

{composition(runs.of(study.setting()), true)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", type=Path, help="YAML of the study")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four pools and their held-out files")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument(
        "--work", type=Path, default=Path("siftune-runs/daar-ablations"), help="folder for the pool and the fits"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "daar-ablations.md")
    said = parser.parse_args()
    from siftune.data.load import load_pool

    study = read_study(Ablations, said.study)
    for name in (*study.base, *study.sweeps):
        if name not in NAMES:
            raise SystemExit(f"{said.study} sweeps {name}, which is none of {', '.join(NAMES)}")
    said.work.mkdir(parents=True, exist_ok=True)
    rows = draw(said.data, study.rows // len(DOMAINS), study.draw)
    random.Random(study.draw).shuffle(rows)
    pool = load_pool(str(write_rows(said.work / "pool.jsonl", rows)))
    true = np.array([DOMAINS.index(row["true_domain"]) for row in rows])
    runs = Runs(study, pool, said.data, said.model.resolve(), said.work)
    command = f"python scripts/study_daar.py docs/results/{said.study.name} --data POOLS --model {said.model.name}"
    text = page(study, runs, pool, true, command)
    said.out.parent.mkdir(parents=True, exist_ok=True)
    said.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
