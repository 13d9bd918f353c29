"""What chosen rows do to held-out loss after 1, 4, 16, 64 steps -> docs/results/horizon.md.

From one start (the model as it is, or after some steps on random rows), every score chooses its rows of the same
candidates, step after step with the model as it then is, and trains on them; random rows of the same number are the
baseline. After h steps the decrease of the held-out loss is measured, in all and per domain, and the score's minus that
of random rows is taken draw by draw, with a bootstrap interval over the draws. "In strata": as many rows of each domain
as its candidates allow, so that a score cannot change the mix of domains.

    python scripts/horizon.py --data ../shared/data/pools --model ../shared/models/tiny-base --minutes 20

Cost: for each draw, start and score as many steps as the longest horizon; no draw is begun after `--minutes`.

Axes: `B` candidates of a step, `T` columns.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study_rows import DOMAINS, FIELDS, ROOT, draw, table

from siftune.data.formats import BadRow
from siftune.models.tokenize_rows import answer_tokens
from siftune.online.base import OnlineMethod
from siftune.online.maxloss import MaxLoss
from siftune.online.simple import Random
from siftune.online.uds import UDS
from siftune.records import Row

BOOTSTRAPS = 2000
LEARNING_RATE = 5e-4
BASELINE = "random"


def scores(keep: int, seed: int) -> dict[str, OnlineMethod]:
    """A new selector of every arm."""
    residual: dict[str, Any] = {"keep": keep, "alpha": 0.0, "matrix": "residual", "length_norm": "tokens"}
    return {
        BASELINE: Random(keep=keep, seed=seed),
        "random, in strata": Random(keep=keep, seed=seed, strata="domain"),
        "logits, nuclear norm (UDS's intra)": UDS(keep=keep, alpha=0.0),
        "mean loss (MaxLoss)": MaxLoss(keep=keep),
        "mean loss, in strata": MaxLoss(keep=keep, strata="domain"),
        "residual / tokens": UDS(**residual),
        "residual / tokens, in strata": UDS(**residual, strata="domain"),
        "head gradient / tokens": UDS(**residual, norm="head-gradient"),
    }


@dataclass(frozen=True)
class Example:
    """A row as the model reads it."""

    ids: list[int]
    labels: list[int]
    domain: str


@dataclass(frozen=True)
class Run:
    """What one arm did from one start in one draw."""

    draw: int
    start: int
    arm: str
    decrease: dict[int, dict[str, float]]
    """Horizon -> domain (and `all`) -> decrease of the held-out loss since the start."""
    shares: dict[str, float]
    """Domain -> share of the trained rows."""
    tokens: float
    """Label tokens trained per step."""
    gradient: float
    """Mean norm of the gradient of a step."""
    read: int
    """Different candidates that were trained."""


# --- rows -------------------------------------------------------------------------------------------------------------


def examples(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[Example]:
    """The rows that have answer tokens left."""
    result = []
    for number, row in enumerate(rows):
        record = Row(number, str(number), *(row[field] for field in FIELDS))
        try:
            ids, labels = answer_tokens(record, tokenizer, text="auto", max_length=max_length)
        except BadRow:
            continue
        if any(label != -100 for label in labels[1:]):
            result.append(Example(list(ids), list(labels), row["true_domain"]))
    return result


def collate(rows: list[Example]) -> dict[str, Any]:
    """Padded on the right, with the column `domain`."""
    width = max(len(row.ids) for row in rows)
    return {
        "input_ids": torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        "labels": torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows]),
        "domain": [row.domain for row in rows],
    }


def stream(rows: list[Example], count: int, seed: object) -> Iterator[list[Example]]:
    """Candidates of step after step: `count` rows in a shuffled order that begins anew when it is used up."""
    generator = random.Random(f"{seed}")
    waiting: list[Example] = []
    while True:
        if len(waiting) < count:
            fresh = list(rows)
            generator.shuffle(fresh)
            waiting += fresh
        yield waiting[:count]
        waiting = waiting[count:]


# --- training ---------------------------------------------------------------------------------------------------------


def held_out_losses(model: torch.nn.Module, held_out: dict[str, list[Example]]) -> dict[str, float]:
    """Mean loss per row of each domain, and of all."""
    losses: dict[str, list[float]] = {}
    for domain, rows in held_out.items():
        batch = collate(rows)
        batch.pop("domain")
        losses[domain] = MaxLoss(keep=1, score_tokens=2048).score(model, batch).total.tolist()
    means = {domain: float(np.mean(values)) for domain, values in losses.items()}
    return {"all": float(np.mean(list(means.values()))), **means}


def optimiser_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)


def step(model: torch.nn.Module, optimiser: torch.optim.Optimizer, batch: dict[str, Any]) -> float:
    """One step on the batch's mean loss over label tokens; the gradient's norm, clipped at 1 as trainers do."""
    model.train()
    model(**batch, use_cache=False).loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimiser.step()
    optimiser.zero_grad()
    model.eval()
    return norm


def started(
    model: torch.nn.Module, rows: list[Example], keep: int, steps: list[int], seed: int
) -> Iterator[tuple[int, torch.nn.Module, dict[str, Any]]]:
    """The model and its optimiser's state after each number of steps on random rows."""
    model = copy.deepcopy(model)
    optimiser, batches = optimiser_of(model), stream(rows, keep, f"warm-up {seed}")
    done = 0
    for target in sorted(steps):
        while done < target:
            batch = collate(next(batches))
            batch.pop("domain")
            step(model, optimiser, batch)
            done += 1
        yield target, model, copy.deepcopy(optimiser.state_dict())


def run(
    start: tuple[int, torch.nn.Module, dict[str, Any]],
    arm: str,
    selector: OnlineMethod,
    candidates: Iterator[list[Example]],
    held_out: dict[str, list[Example]],
    horizons: list[int],
    number: int,
) -> Run:
    """Train from a start on what the selector keeps, and measure at every horizon."""
    steps_before, model, state = start
    model = copy.deepcopy(model)
    optimiser = optimiser_of(model)
    optimiser.load_state_dict(copy.deepcopy(state))
    before = held_out_losses(model, held_out)
    decrease, trained, norms, tokens = {}, [], [], 0
    for index in range(1, max(horizons) + 1):
        rows = next(candidates)
        kept = selector.select(model, collate(rows))
        batch = {name: value for name, value in kept.batch.items() if name != "domain"}
        trained += [rows[place] for place in kept.indices.tolist()]
        tokens += int((batch["labels"][:, 1:] != -100).sum())
        norms.append(step(model, optimiser, batch))
        if index in horizons:
            after = held_out_losses(model, held_out)
            decrease[index] = {name: before[name] - value for name, value in after.items()}
    shares = {domain: sum(row.domain == domain for row in trained) / len(trained) for domain in DOMAINS}
    different = len({id(row) for row in trained})
    return Run(number, steps_before, arm, decrease, shares, tokens / max(horizons), float(np.mean(norms)), different)


def one_draw(model: torch.nn.Module, tokenizer: Any, options: argparse.Namespace, number: int) -> list[Run]:
    """All starts and arms on one draw of rows."""
    rows = examples(draw(options.data, options.pool // len(DOMAINS), number), tokenizer, options.max_length)
    held = examples(
        draw(options.data, options.held_out // len(DOMAINS), number, held_out=True), tokenizer, options.max_length
    )
    held_out = {domain: [row for row in held if row.domain == domain] for domain in DOMAINS}
    runs = []
    for start in started(model, rows, options.keep, options.starts, number):
        for arm, selector in scores(options.keep, number).items():
            candidates = stream(rows, options.candidates, f"{number} {start[0]}")
            runs.append(run(start, arm, selector, candidates, held_out, options.horizons, number))
    return runs


# --- the report -------------------------------------------------------------------------------------------------------


def interval(values: NDArray[np.float64]) -> str:
    """Mean, and the 95 % bootstrap interval of the mean over draws; the mean alone where there are fewer than three."""
    if len(values) < 3:
        return f"{values.mean():+.3f}"
    generator = np.random.default_rng(0)
    means = generator.choice(values, (BOOTSTRAPS, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def differences(runs: list[Run], start: int, arm: str, horizon: int, domain: str) -> NDArray[np.float64]:
    """An arm's decrease minus that of random rows, one value a draw."""
    of = {(one.draw, one.arm): one.decrease[horizon][domain] for one in runs if one.start == start}
    return np.array([of[number, arm] - of[number, BASELINE] for number in sorted({one.draw for one in runs})])


def section(runs: list[Run], start: int, horizons: list[int]) -> str:
    """The tables of one start."""
    at_start = [one for one in runs if one.start == start]
    arms = list(dict.fromkeys(one.arm for one in at_start))

    def mean(arm: str, value: Any) -> float:
        return float(np.mean([value(one) for one in at_start if one.arm == arm]))

    gains = [[arm, *(f"{mean(arm, lambda one, h=h: one.decrease[h]['all']):+.3f}" for h in horizons)] for arm in arms]
    against = [
        [arm, *(interval(differences(runs, start, arm, h, "all")) for h in horizons)] for arm in arms if arm != BASELINE
    ]
    last = max(horizons)
    domains = [
        [arm, *(interval(differences(runs, start, arm, last, domain)) for domain in DOMAINS)]
        for arm in arms
        if arm != BASELINE
    ]
    trained = [
        [
            arm,
            *(f"{mean(arm, lambda one, d=domain: one.shares[d]):.0%}" for domain in DOMAINS),
            f"{mean(arm, lambda one: one.tokens):.0f}",
            f"{mean(arm, lambda one: one.gradient):.2f}",
            f"{mean(arm, lambda one: one.read):.0f}",
        ]
        for arm in arms
    ]
    heads = [f"h = {h}" for h in horizons]
    return f"""## From {"the model as it is" if start == 0 else f"the model after {start} steps on random rows"}

Decrease of the held-out loss after h steps, mean over the draws.

{table(["rows chosen by", *heads], gains)}

The same minus that of random rows; above 0 is better than random.

{table(["rows chosen by", *heads], against)}

Per domain, minus random rows, after {last} steps.

{table(["rows chosen by", *DOMAINS], domains)}

What was trained: share of each domain, label tokens a step, norm of a step's gradient, different rows.

{table(["rows chosen by", *DOMAINS, "tokens", "gradient", "rows"], trained)}
"""


def page(runs: list[Run], options: argparse.Namespace, weights: int, seconds: float) -> str:
    from benchmarks import machine

    numbers = sorted({one.draw for one in runs})
    horizons = " ".join(map(str, options.horizons))
    starts = " ".join(map(str, options.starts))
    sections = "\n".join(section(runs, start, options.horizons) for start in sorted(options.starts))
    return f"""# Held-out loss after h steps on chosen rows

Written by `python scripts/horizon.py --data POOLS --model {options.model.name} --minutes {options.minutes:g} --horizons {horizons}
--starts {starts} --candidates {options.candidates} --keep {options.keep} --pool {options.pool} --held-out {options.held_out} --max-length {options.max_length}`; nothing here is
typed by hand.

{machine.describe()}; {seconds / 60:.0f} minutes, {options.beside}

Model: `{options.model.name}`, {weights / 1e6:.1f} M weights. {len(numbers)} draws of {options.pool} rows and {options.held_out} held-out rows
({", ".join(DOMAINS)}, a quarter of each), at most {options.max_length} tokens each. Every step reads {options.candidates} candidates, the same ones for
every score, and trains on {options.keep} of them: AdamW, learning rate {LEARNING_RATE:g}, gradient clipped at 1; the optimiser's state is that of
the start. Rows, not tokens, are equal between scores: the last table of each section has the label tokens of a step. The held-out loss is the mean over rows
of their mean loss, domains weighing the same. In brackets: 95 % bootstrap interval over the draws (at least three); an interval from few draws is narrow by
chance, and one that holds 0 shows no difference. A score within a stratum is compared with random rows of all candidates here, and
"random, in strata" is its own baseline.

{sections}"""


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four pools and their held-out files")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=60, help="no draw is begun after so many")
    parser.add_argument("--draws", type=int, default=20, help="at most so many")
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--starts", type=int, nargs="+", default=[0, 50, 200], help="steps on random rows before")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--pool", type=int, default=1200, help="rows of a draw")
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--beside", default="beside other jobs", help="what else the machine did, for the page")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "horizon.md")
    options = parser.parse_args()
    begun = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    runs: list[Run] = []
    for number in range(options.draws):
        if runs and time.perf_counter() - begun > 60 * options.minutes:
            break
        runs += one_draw(model, tokenizer, options, number)
        seconds = time.perf_counter() - begun
        weights = sum(weight.numel() for weight in model.parameters())
        options.out.write_text(page(runs, options, weights, seconds), encoding="utf-8")
        sys.stderr.write(f"draw {number}: {seconds:.0f} s so far\n")


if __name__ == "__main__":
    main()
