"""A plain PyTorch loop: `selector.select(model, batch)` returns the cut batch, and the loop trains on it.

python examples/loop_torch.py
python examples/loop_torch.py --model ./model --keep 1/8 --steps 100
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import siftune
from siftune.demo import corpus
from siftune.demo.embedded import model_folder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None, help="model folder or hub id (default: the embedded tiny model)")
parser.add_argument("--keep", default="1/8", help="rows to train on, of every batch of candidates")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--candidates", type=int, default=64)
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
name = arguments.model or str(model_folder())
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name).to(device).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
selector = siftune.UDS(keep=arguments.keep)


def tokenised(row: dict[str, str]) -> dict[str, list[int]]:
    question = tokenizer("\n".join(part for part in (row["instruction"], row["input"]) if part) + "\n").input_ids
    answer = [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = (question + answer)[:256]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ([-100] * len(question) + answer)[:256]}


rows = [tokenised(row) for row in corpus.rows(2000, seed=0)]
loader = DataLoader(rows, batch_size=arguments.candidates, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

for step, batch in zip(range(arguments.steps), loader, strict=False):
    kept = selector.select(model, batch.to(device))
    loss = model(**kept.batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scores = kept.scores.total
    print(
        f"step {step + 1}: loss {loss.item():.3f} on rows {kept.indices.tolist()} of {len(scores)}, "
        f"mean score {scores[kept.indices].mean():.1f} kept, {scores.nanmean():.1f} all"
    )
