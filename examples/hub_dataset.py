"""A data set of the hub, chosen from and handed on as a `datasets.Dataset`.

A machine that is offline has no hub: without --dataset the embedded corpus is saved as a data set's folder and read back,
which is what a downloaded one looks like.

python examples/hub_dataset.py --dataset tatsu-lab/alpaca --model gpt2 --keep 10%    # downloads both
python examples/hub_dataset.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

import siftune
from siftune.demo import corpus
from siftune.demo.embedded import model_folder
from siftune.offline.ifd import IFD

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", default=None, help="hub id (split train)")
parser.add_argument("--model", default=None, help="model folder or hub id (default: the embedded tiny model)")
parser.add_argument("--keep", default="20%")
parser.add_argument("--out", default="runs/hub-dataset", help="folder of the chosen rows, as a data set")
arguments = parser.parse_args()

out = Path(arguments.out)
if arguments.dataset:
    dataset = load_dataset(arguments.dataset, split="train")
else:
    Dataset.from_list(corpus.rows(600, seed=0)).save_to_disk(out / "all")
    dataset = load_from_disk(out / "all")

pool = siftune.load_pool(dataset, on_bad_row="skip")  # a hub id works here, too; the Dataset is wanted again below
scores = IFD(model=arguments.model or str(model_folder())).fit(pool).score(pool)
chosen = scores.keep(fraction=arguments.keep)

dataset.select(chosen.rows).save_to_disk(out / "chosen")  # rows keep their columns, types and order
left_out = len(pool) - len(chosen)
print(f"kept {len(chosen)} of {len(pool)} rows; {left_out} left out, {len(scores.reasons)} of them without a score")
print(f"wrote {out / 'chosen'}: {', '.join(dataset.column_names)}")
