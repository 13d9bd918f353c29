"""Padded against packed batches, plain against sifted, on the rows of real pools.

A padded micro-batch holds R rows as wide as its longest; a packed one holds the same rows in one line, whose position_ids
restart. Both are trained on all rows, and sifted by UDS with keep = 1/8, in turns in one run, on the batch whose share of
real tokens is the median of 101 drawn ones. Candidates/s counts rows read, label tokens/s the tokens that the loss is taken
from. Scoring a packed batch is set against one forward pass over the same line, and against scoring the same rows one at a time,
without any padding. Where sdpa would compute all pairs of tokens in a line, the trainer hook scores its segments as rows;
the last column is the other way, as flash attention has it: the complete line.

Bar: scoring a packed batch costs at most 1.05 x the forward pass over the same real tokens.
Run: python benchmarks/packing.py [--pool FILE ...] [--model FOLDER]      (without --pool the demo's corpus)
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import describe
from steps import build, in_turns, make_trainable

import siftune
from siftune.data.formats import BadRow
from siftune.data.load import load_pool
from siftune.demo import corpus
from siftune.hook.batching import Padding
from siftune.hook.selection_step import measure_in_chunks, select_step
from siftune.models.hidden_states import iter_hidden_states, real_tokens, unwrap_model
from siftune.models.layout import layout_of, with_layout
from siftune.models.tokenize_rows import Encoder, Tokens
from siftune.records import Row

LONGEST = 512
"""Tokens of a row at most."""
POOL_ROWS = 2_000
"""Rows drawn from a pool, from which batches are drawn."""
BATCHES = 101
Batch = dict[str, torch.Tensor]


def tokens_of_pool(path: Path, encode: Encoder) -> list[Tokens]:
    """Drawn rows of a pool as they are trained on; those without an answer after truncation are left out."""
    pool = load_pool(path)
    order = torch.randperm(len(pool.eligible), generator=torch.Generator().manual_seed(0))[:POOL_ROWS]
    return _encoded(pool.read([int(pool.eligible[index]) for index in order.tolist()]), encode)


def tokens_of_demo(encode: Encoder) -> list[Tokens]:
    """The same of the demo's corpus."""
    rows = corpus.rows(POOL_ROWS, 0)
    return _encoded(
        [Row(at, "", row["instruction"], row.get("input", ""), row["output"]) for at, row in enumerate(rows)], encode
    )


def _encoded(rows: Sequence[Row], encode: Encoder) -> list[Tokens]:
    result = []
    for row in rows:
        try:
            result.append(encode(row))
        except BadRow:
            continue
    return result


def share_of(rows: Sequence[Tokens]) -> float:
    """Real tokens of a padded batch of these rows, as a share of its size."""
    lengths = [len(row.input_ids) for row in rows]
    return sum(lengths) / (len(lengths) * max(lengths))


def median_batch(rows: Sequence[Tokens], size: int) -> list[Tokens]:
    """Of the drawn batches, the one whose share of real tokens is the median."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        [rows[index] for index in torch.randperm(len(rows), generator=generator)[:size].tolist()]
        for _ in range(BATCHES)
    ]
    return sorted(drawn, key=share_of)[BATCHES // 2]


def padded(rows: Sequence[Tokens]) -> Batch:
    ids = [torch.tensor(row.input_ids) for row in rows]
    columns = {
        "input_ids": (ids, 0),
        "attention_mask": ([torch.ones_like(one) for one in ids], 0),
        "labels": ([torch.tensor(row.labels) for row in rows], -100),
    }
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad(values, batch_first=True, padding_value=fill) for name, (values, fill) in columns.items()}


def packed(rows: Sequence[Tokens]) -> Batch:
    def line(values: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.cat([torch.tensor(list(one)) for one in values])[None]

    positions = line([range(len(row.input_ids)) for row in rows])
    labels = line([row.labels for row in rows]).masked_fill(positions == 0, -100)
    return {"input_ids": line([row.input_ids for row in rows]), "position_ids": positions, "labels": labels}


@dataclass(frozen=True)
class Result:
    """What was measured on one pool's batch."""

    name: str
    share: float
    """Real tokens of the padded batch."""
    tokens: int
    """Of the packed line."""
    rows: int
    rounds: Mapping[str, Sequence[float]]
    """Seconds of each way, round by round."""
    labels: Mapping[str, int]
    """Label tokens that a step of each way trains on."""

    def seconds(self, way: str) -> float:
        return statistics.median(self.rounds[way])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the rounds, so that a load which comes and goes slows both."""
        return statistics.median(a / b for a, b in zip(self.rounds[slow], self.rounds[fast], strict=True))


def train(model: Any, batch: Mapping[str, Any]) -> None:
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad()


def measure(name: str, rows: list[Tokens], *, vocabulary: int, repeats: int) -> Result:
    """Every way on one batch, in turns."""
    torch.manual_seed(0)
    model = build("small", device="cpu", dtype=torch.float32)
    assert vocabulary <= model.config.vocab_size
    make_trainable(model, "lora")
    batches: dict[str, Batch] = {"padded": padded(rows), "packed": packed(rows)}
    alone = [padded([row]) for row in rows]
    line = with_layout(batches["packed"])
    assert len(layout_of(line)) == len(rows)
    selectors = {kind: siftune.UDS(keep="1/8") for kind in (*batches, "alone")}
    labels = {f"{kind}, all": int((batch["labels"][:, 1:] != -100).sum()) for kind, batch in batches.items()}

    def sifted(kind: str) -> None:
        step = select_step(selectors[kind], model, [batches[kind]], padding=Padding(), score_segments_alone=True)
        train(model, step.batches[0])
        labels[f"{kind}, sifted"] = int((step.batches[0]["labels"][:, 1:] != -100).sum())

    ways: dict[str, Callable[[], Any]] = {}
    for kind, batch in batches.items():
        ways[f"{kind}, all"] = lambda batch=batch: train(model, batch)
        ways[f"{kind}, sifted"] = lambda kind=kind: sifted(kind)
    ways["scoring"] = lambda: measure_in_chunks(selectors["packed"], model, line, alone=True)
    ways["complete"] = lambda: measure_in_chunks(selectors["packed"], model, line)
    ways["forward"] = lambda: [None for _ in iter_hidden_states(unwrap_model(model), line, real_tokens(line))]
    ways["alone"] = lambda: [selectors["alone"].score(model, one) for one in alone]
    rounds = in_turns(ways, repeats=repeats, device="cpu")
    return Result(name, share_of(rows), line["input_ids"].shape[1], len(rows), rounds, labels)


def report(results: Sequence[Result]) -> None:
    print("| rows of | real tokens of the padded batch | batch | trained on | candidates/s | label tokens/s |")
    print("|---|---:|---|---|---:|---:|")
    for result in results:
        for way in ("padded, all", "padded, sifted", "packed, all", "packed, sifted"):
            kind, step = way.split(", ")
            speeds = f"{result.rows / result.seconds(way):.1f} | {result.labels[way] / result.seconds(way):,.0f}"
            print(f"| {result.name} | {result.share:.0%} | {kind} | {step} | {speeds} |")
    print("\n| rows of | packed / padded, trained on all | packed / padded, sifted | sifted / all, packed |")
    print("|---|---:|---:|---:|")
    for result in results:
        ratios = [
            result.ratio("padded, all", "packed, all"),
            result.ratio("padded, sifted", "packed, sifted"),
            result.ratio("packed, all", "packed, sifted"),
        ]
        print(f"| {result.name} | " + " | ".join(f"{ratio:.2f} x" for ratio in ratios) + " |")
    print(
        "\n| rows of | tokens of the line | scoring s | / forward of the line (bar 1.05) | / the same rows one at a time "
        "| as a complete line / its forward |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for result in results:
        ratios = [
            result.ratio("scoring", "forward"),
            result.ratio("scoring", "alone"),
            result.ratio("complete", "forward"),
        ]
        shown = " | ".join(f"{ratio:.2f} x" for ratio in ratios)
        print(f"| {result.name} | {result.tokens:,} | {result.seconds('scoring'):.2f} | {shown} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", nargs="*", default=[], type=Path, help="files of rows; the demo's corpus without")
    parser.add_argument(
        "--model",
        default=str(Path(siftune.__file__).parent / "demo" / "assets" / "model"),
        help="folder whose tokenizer makes the rows' tokens; the weights are not read",
    )
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encode = Encoder(tokenizer, "prompt", LONGEST)
    pools = {path.name.split(".")[0]: tokens_of_pool(path, encode) for path in options.pool}
    pools = pools or {"demo corpus": tokens_of_demo(encode)}
    print(describe())
    print(
        f"\n{options.rows} rows a micro-batch, keep 1/8 by UDS, small shape, LoRA, float32, attention by sdpa; medians of "
        f"{options.repeats} rounds. The second table compares candidates/s.\n"
    )
    report(
        [
            measure(name, median_batch(rows, options.rows), vocabulary=len(tokenizer), repeats=options.repeats)
            for name, rows in pools.items()
        ]
    )


if __name__ == "__main__":
    main()
