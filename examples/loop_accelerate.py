"""An Accelerate loop: `selector.select` is given the prepared model, with its autocast and wrappers.

python examples/loop_accelerate.py
accelerate launch examples/loop_accelerate.py --keep 1/8      # each process selects among its own candidates
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import siftune
from siftune.demo import corpus
from siftune.demo.embedded import model_folder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None, help="model folder or hub id (default: the embedded tiny model)")
parser.add_argument("--keep", default="1/8", help="rows to train on, of every micro-batch of candidates")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--candidates", type=int, default=32, help="per process and micro-batch")
parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
arguments = parser.parse_args()

accelerator = Accelerator(mixed_precision=arguments.mixed_precision, gradient_accumulation_steps=2)
name = arguments.model or str(model_folder())
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
selector = siftune.UDS(keep=arguments.keep, scope="local")


def tokenised(row: dict[str, str]) -> dict[str, list[int]]:
    ids = tokenizer(f"{row['instruction']}\n{row['input']}\n{row['output']}", truncation=True, max_length=256).input_ids
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}


rows = [tokenised(row) for row in corpus.rows(2000, seed=0)]
loader = DataLoader(rows, batch_size=arguments.candidates, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-4), loader)

model.train()
for step, batch in zip(range(arguments.steps), loader, strict=False):
    kept = selector.select(model, batch)  # chosen before any loss, so the loss is that of the kept rows
    with accelerator.accumulate(model):
        loss = model(**kept.batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"step {step + 1}: loss {loss.item():.3f} on {len(kept.indices)} of {len(kept.scores)} rows")
