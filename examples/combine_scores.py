"""Two scores in one ranking: DaaR's diversity and IFD's difficulty, by the mean of their ranks.

Ranks, because the two scores have no common unit. A row without one of them has none, and its reason stays. Everything
that DaaR knows (pseudo-domains, tokens) is carried along, so quotas and token budgets work on the combined score, too.

python examples/combine_scores.py
python examples/combine_scores.py --pool pool.jsonl --seeds seeds.jsonl --model ./model --weight 0.7
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, spearmanr

import siftune
from siftune.demo import corpus
from siftune.demo.embedded import model_folder
from siftune.offline.ifd import IFD

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pool", default=None, help="rows to choose from (default: the embedded corpus)")
parser.add_argument("--seeds", default=None, help="example rows per domain")
parser.add_argument("--model", default=None, help="model folder or hub id (default: the embedded tiny model)")
parser.add_argument("--weight", type=float, default=0.5, help="of DaaR; the rest is IFD's")
parser.add_argument("--keep", default="20%")
parser.add_argument("--out", default="runs/combined/selected.jsonl")
arguments = parser.parse_args()

out = Path(arguments.out)
folder = out.parent if arguments.pool else corpus.write(out.parent, count=600)
pool = siftune.load_pool(arguments.pool or folder / "pool.jsonl")
model = arguments.model or str(model_folder())

daar = siftune.DaaR(model=model, seeds=arguments.seeds or str(folder / "seeds.jsonl")).fit(pool).score(pool)
ifd = IFD(model=model).fit(pool).score(pool)


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in [0, 1], 1 the best; NaN stays NaN, and does not count."""
    return rankdata(values, nan_policy="omit") / np.isfinite(values).sum()


values = arguments.weight * ranks(daar.values) + (1 - arguments.weight) * ranks(ifd.values)
combined = replace(
    daar,
    method="daar + ifd",
    values=values.astype(np.float32),
    reasons={**ifd.reasons, **daar.reasons},
    info={"weight": arguments.weight},
)

chosen = combined.keep(fraction=arguments.keep)
chosen.write(out)
scored = np.isfinite(values)
rho = spearmanr(daar.values[scored], ifd.values[scored]).statistic
print(f"{scored.sum()} of {len(pool)} rows have both scores; their rank correlation is {rho:.2f}")
for scores in (daar, ifd):
    shared = len(np.intersect1d(chosen.rows, scores.keep(count=len(chosen)).rows))
    print(f"{shared} of the {len(chosen)} chosen rows would be chosen by {scores.method} alone, too")
print(f"wrote {out}")
