"""IFD over a pool: ours, from text, against two bare forwards and against one row at a time.

    floor    two forwards of the decoder over the same token ids in the same batches: question and answer, answer alone;
             no head, nothing else
    heads    floor, plus the model's head on the answers' tokens and their cross-entropy: what any IFD must compute
    ours     `siftune.offline.ifd.IFDTask`: text form, tokenisation, offsets, both forwards, losses of answer tokens
    rows     one row at a time, text tokenised for each of three pieces, whole logits and the model's own loss, as the
             published code works; on a sample of rows, per row

The bar: ours <= 2 x floor where the head is small beside the decoder. The ways are interleaved, figures are medians
over the rounds. Rows are made of common words with lengths spread as instruction data spreads them, or read by --pool.

Run: python benchmarks/ifd.py [--model DIR] [--pool pool.jsonl.gz ...] [--rows N] [--rounds N] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

from siftune.data.load import load_pool
from siftune.models.causal_lm import CausalLM, head_logits
from siftune.models.features import TOKEN_BUDGET, batches
from siftune.models.hidden_states import evaluating
from siftune.offline import ifd
from siftune.records import Pool

MODEL = Path(__file__).resolve().parents[1] / "siftune" / "demo" / "assets" / "model"
WORDS = "the a of to and in is you that it he was for on are as with his they at be this have from or one had by"


def made_rows(count: int) -> list[dict[str, str]]:
    """Instruction rows of common words: questions of about 20, answers of about 60, with a long tail."""
    draw, words = np.random.default_rng(0), WORDS.split(" ")

    def text(mean: float) -> str:
        return " ".join(draw.choice(words, size=1 + min(400, int(draw.lognormal(np.log(mean), 0.8)))))

    return [{"instruction": text(20), "input": "", "output": text(60)} for _ in range(count)]


def pairs_of(task: ifd.IFDTask, pool: Pool) -> list[ifd._Pair]:
    """The sequences that the task scores, taken on the way."""
    taken: list[ifd._Pair] = []
    original = ifd.IFDTask._pair

    def spy(self: ifd.IFDTask, *said: Any) -> Any:
        found = original(self, *said)
        if not isinstance(found, str):
            taken.append(found)
        return found

    ifd.IFDTask._pair = spy  # type: ignore[method-assign]
    try:
        for shard in pool.shards():
            task(pool, shard)
    finally:
        ifd.IFDTask._pair = original  # type: ignore[method-assign]
    return taken


@torch.no_grad()
def bare(lm: CausalLM, pairs: list[ifd._Pair], *, heads: bool) -> None:
    """Both forwards of the decoder; with `heads`, the cross-entropy of the answers' tokens too."""
    device = lm.files.torch_device
    budget = TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"])
    for side in ("asked", "alone"):
        ids = [getattr(pair, side) for pair in pairs]
        spans = [getattr(pair, f"{side}_span") for pair in pairs]
        for batch in batches(np.array([len(row) for row in ids], np.int32), budget):
            longest = max(len(ids[index]) for index in batch)
            padded = np.stack([np.pad(ids[i], (0, longest - len(ids[i])), mode="edge") for i in batch])
            input_ids = torch.from_numpy(padded.astype(np.int64)).to(device)
            with evaluating(lm.parts.decoder):
                states = lm.parts.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
            if heads:
                for row, index in enumerate(batch):
                    first, last = spans[index]
                    logits = head_logits(lm.parts, states[row, first - 1 : last - 1])
                    torch.nn.functional.cross_entropy(logits, input_ids[row, first:last])
    synchronise(device)


@torch.no_grad()
def row_by_row(lm: CausalLM, rows: list[tuple[str, str]]) -> None:
    """One row at a time: the prompt tokenised to count it, the whole text and the answer through the whole model."""
    tokenizer, device = lm.tokenizer, lm.files.torch_device
    for question, answer in rows:
        prompt = len(tokenizer(question)["input_ids"])
        for text, skip in ((question + answer, prompt), (answer, 0)):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=lm.length)["input_ids"].to(device)
            labels = ids.clone()
            labels[:, :skip] = -100
            float(lm.parts.causal(input_ids=ids, labels=labels).loss)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(lm: CausalLM, pool: Pool, *, rounds: int, sample: int) -> dict[str, Any]:
    """Seconds of every way, medians over the rounds, for the whole pool (of `rows`, per row of the sample times rows)."""
    task = ifd.IFDTask(lm, "perplexity", None, start_token=True)
    pairs = pairs_of(task, pool)  # warms everything up, too
    some = pool.read(pool.eligible[:sample].tolist())
    texts = [(row.question + "\n", row.output) for row in some]
    row_by_row(lm, texts[:4])
    ways: dict[str, Callable[[], object]] = {
        "floor": lambda: bare(lm, pairs, heads=False),
        "heads": lambda: bare(lm, pairs, heads=True),
        "ours": lambda: [task(pool, shard) for shard in pool.shards()],
        "rows": lambda: row_by_row(lm, texts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    found = {name: statistics.median(taken) for name, taken in seconds.items()}
    found["rows"] *= len(pool.eligible) / len(some)
    tokens = sum(len(pair.asked) + len(pair.alone) for pair in pairs)
    return {"seconds": found, "rows": len(pool.eligible), "tokens": tokens, "sample": len(some)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--pool", nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=1000, help="made-up rows, where no pool is given")
    parser.add_argument("--sample", type=int, default=200, help="rows of the row-by-row way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source: Any = asked.pool
        if not source:
            source = Path(folder) / "made.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in made_rows(asked.rows)), encoding="utf-8")
        pool = load_pool(source, on_bad_row="skip", cache=folder)
        lm = CausalLM(asked.model, device=asked.device)
        found = measure(lm, pool, rounds=asked.rounds, sample=asked.sample)
    seconds = found["seconds"]
    weights = sum(parameter.numel() for parameter in lm.parts.causal.parameters())
    print(describe())
    print(
        f"\n{found['rows']:,} rows, {found['tokens']:,} tokens in both passes, a model of {weights / 1e6:.1f} M weights, "
        f"vocabulary {int(lm.files.config.vocab_size):,}, {lm.files.torch_dtype}; row by row on {found['sample']:,} rows\n"
    )
    print("| way | seconds | rows/s | ours / it | it / ours |")
    print("|---|---:|---:|---:|---:|")
    for name, taken in seconds.items():
        ours = seconds["ours"]
        print(f"| {name} | {taken:.2f} | {found['rows'] / taken:,.0f} | {ours / taken:.2f} | {taken / ours:.2f} |")
    print(f"\n```json\n{json.dumps(found)}\n```")


if __name__ == "__main__":
    main()
