"""The claim under UDS: do rows whose logits have a large nuclear norm lower the loss more? -> docs/results/uds-claim.md.

To first order, a gradient step on row i alone, of rate r, lowers another loss by r <g_i, g>. Explicit gradients in all
weights of the model as it is give two such numbers per row: <g_i, mean gradient of held-out rows>, and |g_i|^2, the row's
own loss. Each is taken for a row's mean loss over its answer (rows weigh the same) and for its sum (tokens weigh the same,
as in a trainer's batch). They are rank-correlated with the nuclear norm and its relatives, over all rows, given the row's
length, and inside the domains.

    python scripts/study_uds.py docs/results/uds-claim.yaml --data ../shared/data/pools --model ../shared/models/tiny-base

Cost: a forward and a backward pass per row: about a minute a draw on one free core for a model of 7 M weights.

Shapes: `n` candidates, `N` tokens of a row, `V` vocabulary, `P` weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study_rows import DOMAINS, FIELDS, ROOT, draw, partial_spearman, read_study, spearman, spread, table

from siftune.data.formats import BadRow
from siftune.models.tokenize_rows import answer_tokens
from siftune.online.uds import UDS
from siftune.records import Row

SCORES = {
    "nuclear": "nuclear norm (UDS's s_intra)",
    "frobenius": "Frobenius norm",
    "nuclear_sqrt": "nuclear norm / √N",
    "nuclear_mean": "nuclear norm / N",
    "nuclear_answer": "nuclear norm, answer tokens only",
    "loss": "mean loss (MaxLoss)",
    "length": "length N",
}
GAINS = {
    "held_mean": "held-out, row's mean loss",
    "held_sum": "held-out, row's summed loss",
    "own_mean": "own loss, mean",
    "own_sum": "own loss, sum",
}
SHAPES = {"rank": "effective rank", "length": "length N"}
CHECKED = 8
"""Candidates of a draw whose nuclear norms are held against siftune's own."""
Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Claim:
    """The YAML's keys."""

    rows: int
    held_out_rows: int
    max_length: int
    text: str
    keep: float
    draws: list[int]


@dataclass(frozen=True)
class Example:
    """A row as the model reads it."""

    ids: torch.Tensor
    """`(1, N)`."""
    labels: torch.Tensor
    """`(1, N)`, -100 on what is not learnt."""
    domain: int

    @property
    def learnt(self) -> int:
        return int((self.labels != -100).sum())


# --- rows and gradients -----------------------------------------------------------------------------------------------


def examples(rows: Iterable[dict[str, Any]], tokenizer: Any, study: Claim) -> tuple[list[Example], int]:
    """The rows that have answer tokens left, and how many have none."""
    made, lost = [], 0
    for number, row in enumerate(rows):
        said = Row(number, str(number), *(row[field] for field in FIELDS))
        try:
            ids, labels = answer_tokens(said, tokenizer, text=study.text, max_length=study.max_length)
        except BadRow:
            lost += 1
        else:
            made.append(Example(torch.tensor([ids]), torch.tensor([labels]), DOMAINS.index(row["true_domain"])))
    return made, lost


def answer_loss(logits: torch.Tensor, row: Example) -> torch.Tensor:
    """A row's mean loss over its answer, from its logits `(N, V)`."""
    return torch.nn.functional.cross_entropy(logits[:-1], row.labels[0, 1:], ignore_index=-100)


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """In all weights, float32 `(P,)`."""
    parts = torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad])
    return torch.cat([part.flatten() for part in parts])


def mean_gradient(model: torch.nn.Module, rows: list[Example], at_once: int = 8) -> torch.Tensor:
    """The mean over rows of their gradients, each row's mean loss weighing the same, `(P,)`."""
    total = torch.zeros(1)
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        ids = torch.nn.utils.rnn.pad_sequence([row.ids[0] for row in some], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row.ids[0]) for row in some], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        losses = [answer_loss(logits[at, : row.ids.shape[1]], row) for at, row in enumerate(some)]
        total = total + gradient(model, torch.stack(losses).sum())
    return total / len(rows)


def singular_values(logits: torch.Tensor) -> NDArray[np.float64]:
    """Of logits `(N, V)`, ascending, `(N,)`, from their N x N Gram matrix in float64."""
    wide = logits.detach().double()
    return np.sqrt(np.clip(torch.linalg.eigvalsh(wide @ wide.T).numpy(), 0, None))


def effective_rank(sigma: NDArray[np.float64]) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007): between 1 and N."""
    share = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


# --- one draw ---------------------------------------------------------------------------------------------------------


def measure(model: torch.nn.Module, rows: list[Example], held_out: list[Example]) -> Columns:
    """Every score and every first-order gain of the candidates, each `(n,)`."""
    wanted = mean_gradient(model, held_out)
    columns: dict[str, list[float]] = {name: [] for name in (*SCORES, *GAINS, "rank", "domain", "apart")}
    for number, row in enumerate(rows):
        logits = model(input_ids=row.ids, use_cache=False).logits[0]
        loss = answer_loss(logits, row)
        own, learnt, length = gradient(model, loss), row.learnt, len(logits)
        held, square = float(own @ wanted), float(own @ own)
        sigma = singular_values(logits)
        answer = singular_values(logits[:-1][row.labels[0, 1:] != -100])
        found = {
            "nuclear": sigma.sum(),
            "frobenius": np.linalg.norm(sigma),
            "nuclear_sqrt": sigma.sum() / length**0.5,
            "nuclear_mean": sigma.sum() / length,
            "nuclear_answer": answer.sum(),
            "loss": loss.item(),
            "length": length,
            "held_mean": held,
            "held_sum": held * learnt,
            "own_mean": square,
            "own_sum": square * learnt**2,
            "rank": effective_rank(sigma),
            "domain": row.domain,
            "apart": apart(model, row, sigma, answer) if number < CHECKED else 0.0,
        }
        for name, value in found.items():
            columns[name].append(float(value))
    return {name: np.array(values) for name, values in columns.items()}


def apart(model: torch.nn.Module, row: Example, *spectra: NDArray[np.float64]) -> float:
    """How far siftune's own nuclear norms, over all and over answer tokens, are from the explicit ones, relative."""
    batch = {"input_ids": row.ids, "labels": row.labels}
    ours = [UDS(keep=1, alpha=0.0, tokens=which).score(model, batch).intra[0].item() for which in ("all", "answer")]
    return max(abs(said - sigma.sum()) / sigma.sum() for said, sigma in zip(ours, spectra, strict=True))


# --- the report -------------------------------------------------------------------------------------------------------

Relation = Callable[[Columns, str, str], float]


def over_all(drawn: Columns, score: str, aim: str) -> float:
    return spearman(drawn[score], drawn[aim])


def given_length(drawn: Columns, score: str, aim: str) -> float:
    return float("nan") if "length" in (score, aim) else partial_spearman(drawn[score], drawn[aim], drawn["length"])


def inside_domains(drawn: Columns, score: str, aim: str) -> float:
    """Mean of the correlations inside the four domains."""
    found = []
    for index in range(len(DOMAINS)):
        inside = drawn["domain"] == index
        found.append(spearman(drawn[score][inside], drawn[aim][inside]))
    return float(np.mean(found))


def correlations(draws: list[Columns], relation: Relation) -> str:
    """A line per score, a column per gain and shape."""
    aims = {**GAINS, **SHAPES}
    lines = []
    for score, name in SCORES.items():
        cells = ["-" if score == aim else spread([relation(drawn, score, aim) for drawn in draws]) for aim in aims]
        if any(cell != "-" for cell in cells):
            lines.append([name, *cells])
    return table(["", *aims.values()], lines)


def kept(draws: list[Columns], share: float) -> str:
    """What the best `share` of the candidates by each score would do, as a multiple of the mean over all of them."""
    aims = {**GAINS, **SHAPES}
    lines = []
    for score, name in {**SCORES, "held_sum": "held-out gain itself, sum (best possible)"}.items():
        cells = []
        for aim in aims:
            ratios = []
            for drawn in draws:
                best = np.argsort(-drawn[score], kind="stable")[: max(1, round(share * len(drawn[score])))]
                ratios.append(float(drawn[aim][best].mean() / drawn[aim].mean()))
            cells.append(spread(ratios))
        lines.append([name, *cells])
    return table([f"best {share:.0%} by", *aims.values()], lines)


def page(study: Claim, draws: list[Columns], lost: list[int], weights: int, said: Any, seconds: float) -> str:
    """The whole page."""
    from benchmarks import machine

    count = len(draws[0]["nuclear"])
    largest = max(float(drawn["apart"].max()) for drawn in draws)
    negative = spread([100 * float((drawn["held_mean"] < 0).mean()) for drawn in draws], 1)
    return f"""# The claim under UDS: nuclear norm and loss decrease

Written by `python scripts/study_uds.py docs/results/{said.study.name} --data POOLS --model {said.model.name}`; nothing here is
typed by hand. The discussion is in [README.md](README.md).

{machine.describe()}; {seconds / 60:.0f} minutes, beside other jobs

Model: `{said.model.name}`, {weights / 1e6:.1f} M weights, as it is, not fine-tuned. {len(draws)} draws of about {count} candidates
({", ".join(DOMAINS)}, a quarter of each) and {study.held_out_rows} held-out rows, at most {study.max_length} tokens each, text form
`{study.text}`. Candidates left out because no answer token is left: {", ".join(map(str, lost))}. In every cell: mean over the
draws, in brackets smallest and largest. With {count} rows a rank correlation below {1.96 / (count - 1) ** 0.5:.2f} is within chance (5 %).

First-order gain of a row: the inner product of its gradient, in all weights, with the mean gradient of the held-out rows, or
with itself (its own squared norm). "Mean" takes the row's mean loss over its answer tokens; "sum" its summed loss, that is, the
mean's gain times the answer's tokens (for its own loss their square). The held-out gain is negative for
{negative} % of the candidates. siftune's own nuclear norms were compared for {CHECKED} rows of each draw; the largest relative
difference from the singular values of the explicit logits is {largest:.0e}. Effective rank: exp of the entropy of the singular
values' shares.

## Rank correlation over all candidates

{correlations(draws, over_all)}

## The same, given the length

Partial rank correlation: the ranks of N regressed out of both sides.

{correlations(draws, given_length)}

## The same, inside the domains

Mean of the correlations inside the four domains.

{correlations(draws, inside_domains)}

## What would be kept

Mean over the best {study.keep:.0%} by each score, divided by the mean over all candidates: 1 is what a random draw gives.

{kept(draws, study.keep)}
"""


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", type=Path, help="YAML of the study")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four pools and their held-out files")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "uds-claim.md")
    said = parser.parse_args()
    study, started = read_study(Claim, said.study), time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(said.model)
    model = AutoModelForCausalLM.from_pretrained(said.model, dtype=torch.float32).eval()
    weights = sum(weight.numel() for weight in model.parameters())
    draws, lost = [], []
    for number in study.draws:
        rows, bad = examples(draw(said.data, study.rows // len(DOMAINS), number), tokenizer, study)
        wanted = draw(said.data, study.held_out_rows // len(DOMAINS), number, held_out=True)
        random.Random(number).shuffle(rows)
        draws.append(measure(model, rows, examples(wanted, tokenizer, study)[0]))
        lost.append(bad)
        sys.stderr.write(f"draw {number}: {len(rows)} candidates, {time.perf_counter() - started:.0f} s so far\n")
    said.out.parent.mkdir(parents=True, exist_ok=True)
    said.out.write_text(page(study, draws, lost, weights, said, time.perf_counter() - started), encoding="utf-8")


if __name__ == "__main__":
    main()
