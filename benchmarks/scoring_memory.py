"""Peak memory of scoring a pool of distinct made-up rows with a tiny model, above what the process holds with the model
loaded and used once. The rows go to a file, are loaded as any pool, and pass through the feature task shard by shard.

Run: python benchmarks/scoring_memory.py --rows 100000 --folder DIR      (prints one line of JSON)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import siftune
from siftune.engines.local import LocalEngine
from siftune.models.backbone import Backbone
from siftune.models.features import FeatureTask, extract
from siftune.runs.folder import peak_memory_mb
from tests.tiny import save_tiny


def write_rows(path: Path, rows: int) -> None:
    """Distinct rows, written a line at a time."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            line = {"instruction": f"Question {row}", "input": "", "output": f"{row * row} " + "w" * (row % 13)}
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=16, help="of the tiny model's hidden states")
    parser.add_argument("--folder", type=Path, required=True)
    said = parser.parse_args()
    os.environ["SIFTUNE_CACHE"] = str(said.folder / "cache")
    model = save_tiny(said.folder / "model", "llama", layers=1, width=said.width)
    write_rows(said.folder / "pool.jsonl", said.rows)
    backbone = Backbone(str(model), layer=1, device="cpu")
    extract(backbone, ["w" * 40] * 4096)
    before = peak_memory_mb()
    start = time.perf_counter()
    pool = siftune.load_pool(said.folder / "pool.jsonl")
    probe_D = torch.linspace(-1, 1, backbone.width).numpy()
    scores = np.full(len(pool), np.nan, dtype=np.float32)
    engine = LocalEngine()
    for shard, result in engine.run(FeatureTask(backbone, embedding=False), pool, pool.shards(), label="memory"):
        scores[shard.start : shard.stop] = result.columns["hidden"] @ probe_D
    assert np.isfinite(scores).all()
    figures = {"rows": said.rows, "above_model_mb": peak_memory_mb() - before, "seconds": time.perf_counter() - start}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
