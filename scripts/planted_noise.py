"""Which scores rank rows with a wrong answer first? Planted faults -> docs/results/uds-noise.md.

In a share of the rows of each domain the answers are exchanged among themselves, so that a fault is fluent text of the right
domain that answers another question. Every score ranks all rows, by itself and inside the domains; what counts is the share of
faults among the best quarter. A score that does not see faults has the planted share there.

    python scripts/planted_noise.py --data ../shared/data/pools --model ../shared/models/tiny-base

Cost: three forward passes a row, draw and share of faults.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from horizon import collate, examples
from numpy.typing import NDArray
from study_rows import DOMAINS, ROOT, draw, spread, table

from siftune.online.strata import quotas
from siftune.online.uds import UDS

BEST = 0.25
Scores = dict[str, NDArray[np.float64]]


def planted(rows: list[dict[str, Any]], share: float, seed: object) -> list[dict[str, Any]]:
    """The rows with the answers of `share` of each domain moved to the next of them, and `fault` beside their own fields."""
    generator = random.Random(f"{seed}")
    result = [{**row, "fault": False} for row in rows]
    for domain in DOMAINS:
        members = [index for index, row in enumerate(rows) if row["true_domain"] == domain]
        chosen = generator.sample(members, max(2, round(share * len(members))))
        for place, index in enumerate(chosen):
            answer = rows[chosen[(place + 1) % len(chosen)]]["output"]
            result[index] |= {"output": answer, "fault": answer != rows[index]["output"]}
    return result


def score(model: torch.nn.Module, rows: list[Any]) -> Scores:
    """Every score of every row; more is ranked first."""
    residual: dict[str, Any] = {"keep": 1, "alpha": 0.0, "matrix": "residual", "length_norm": "tokens"}
    of_logits, of_residual, of_gradient = [], [], []
    losses = []
    for start in range(0, len(rows), 8):
        batch = collate(rows[start : start + 8])
        batch.pop("domain")
        of_logits += UDS(keep=1, alpha=0.0).score(model, batch).intra.tolist()
        scored = UDS(**residual).score(model, batch)
        of_residual += scored.intra.tolist()
        losses += scored.loss.tolist()
        of_gradient += UDS(**residual, norm="head-gradient").score(model, batch).intra.tolist()
    return {
        "logits, nuclear norm (UDS's intra)": np.array(of_logits),
        "residual / tokens": np.array(of_residual),
        "head gradient / tokens": np.array(of_gradient),
        "mean loss (MaxLoss)": np.array(losses),
    }


def best(values: NDArray[np.float64], groups: list[list[int]]) -> list[int]:
    """The best quarter, in proportion to the groups."""
    sizes = [len(group) for group in groups]
    kept: list[int] = []
    for group, quota in zip(groups, quotas(sizes, round(BEST * len(values))), strict=True):
        kept += sorted(group, key=lambda row: -values[row])[:quota]
    return kept


def one_draw(model: torch.nn.Module, tokenizer: Any, options: argparse.Namespace, share: float, number: int) -> Any:
    """The share of faults among all rows, and per score (among all rows, inside domains) among the best quarter."""
    pool = planted(draw(options.data, options.rows // len(DOMAINS), number), share, f"{number} {share}")
    rows, faults = [], []
    for row in pool:
        kept = examples([row], tokenizer, options.max_length)
        rows += kept
        faults += [row["fault"]] * len(kept)
    flags = np.array(faults)
    domains = [[at for at, row in enumerate(rows) if row.domain == domain] for domain in DOMAINS]
    shares = {
        name: (flags[best(values, [list(range(len(rows)))])].mean(), flags[best(values, domains)].mean())
        for name, values in score(model, rows).items()
    }
    return flags.mean(), shares


def page(results: dict[float, list[Any]], options: argparse.Namespace, seconds: float) -> str:
    from benchmarks import machine

    sections = []
    for share, draws in results.items():
        names = draws[0][1]
        lines = [[name, *(spread([100 * one[1][name][way] for one in draws], 1) for way in (0, 1))] for name in names]
        sections.append(
            f"## {share:.0%} of the answers exchanged inside their domain\n\nFaults among all rows: "
            f"{spread([100 * one[0] for one in draws], 1)} %.\n\n"
            + table(["best quarter by", "faults, %", "faults, %, in strata of domains"], lines)
        )
    count = len(next(iter(results.values())))
    return f"""# Planted faults among the best quarter

Written by `python scripts/planted_noise.py --data POOLS --model {options.model.name} --rows {options.rows} --draws {options.draws} --max-length
{options.max_length}`; nothing here is typed by hand.

{machine.describe()}; {seconds / 60:.0f} minutes, {options.beside}

Model: `{options.model.name}`, as it is, not fine-tuned. {count} draws of {options.rows} rows ({", ".join(DOMAINS)}, a quarter of each), at most
{options.max_length} tokens each; rows without an answer token left are out. In every cell: mean over the draws, in brackets smallest and largest.
A score that does not see faults has their share of all rows in its best quarter.

{chr(10).join(sections)}
"""


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four pools")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--beside", default="beside other jobs", help="what else the machine did, for the page")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "uds-noise.md")
    options = parser.parse_args()
    begun = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    results: dict[float, list[Any]] = {share: [] for share in options.shares}
    for number in range(options.draws):
        for share in options.shares:
            results[share].append(one_draw(model, tokenizer, options, share, number))
        seconds = time.perf_counter() - begun
        options.out.write_text(page(results, options, seconds), encoding="utf-8")
        sys.stderr.write(f"draw {number}: {seconds:.0f} s so far\n")


if __name__ == "__main__":
    main()
