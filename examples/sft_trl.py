"""An ordinary TRL + PEFT fine-tuning script, with one line added: `siftune.attach`.

Run it as it is (the embedded tiny model and corpus, CPU, under a minute), or on your own:

    python examples/sft_trl.py
    python examples/sft_trl.py --pool pool.jsonl --model ./model --keep 1/8 --steps 200
    python examples/sft_trl.py --keep all          # the same script without the line
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import siftune
from siftune.demo import corpus
from siftune.demo.embedded import model_folder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None, help="model folder or hub id (default: the embedded tiny model)")
parser.add_argument(
    "--pool", default=None, help="JSONL of instruction/input/output rows (default: the embedded corpus)"
)
parser.add_argument(
    "--keep", default="1/8", help="rows to train on, of every micro-batch of candidates; all = no selection"
)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--candidates", type=int, default=64, help="per_device_train_batch_size")
parser.add_argument("--out", default="runs/sft-trl")
arguments = parser.parse_args()

model_name = arguments.model or str(model_folder())
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)

if arguments.pool:
    pool = load_dataset("json", data_files=arguments.pool, split="train")
else:
    pool = Dataset.from_list(corpus.rows(2000, seed=0))


def prompt_completion(row: dict[str, str]) -> dict[str, str]:
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return {"prompt": question + "\n", "completion": row["output"]}


trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=arguments.out,
        per_device_train_batch_size=arguments.candidates,
        max_steps=arguments.steps,
        max_length=256,
        learning_rate=2e-4,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=pool.map(prompt_completion, remove_columns=pool.column_names),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)

if arguments.keep != "all":
    siftune.attach(trainer, siftune.UDS(keep=arguments.keep))  # the one added line

trainer.train()
