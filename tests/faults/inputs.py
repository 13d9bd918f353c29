"""A small pool, seeds and a tiny model for the fault suite, and the words of two selections over them.

Most faults are put to `inter-diversity`, which has every stage (a fit and a score through the model's layers, each in
shards, what it learnt saved) and no probes to train; `daar` has the rest.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.tiny import save_tiny

WORDS = {"sums": ["add", "seven", "twelve", "minus"], "birds": ["wren", "nest", "egg", "wing"]}
RESULTS = ("selected.jsonl", "rows.parquet", "scores.safetensors")
LEARNT = ("label_centroids.safetensors",)


def write_pool(path: Path, rows: int, *, seed: int = 5) -> Path:
    """Distinct short rows of two kinds."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as pool:
        for index in range(rows):
            pool.write(json.dumps(row(draw, index, draw.choice(list(WORDS)))) + "\n")
    return path


def row(draw: random.Random, index: int, domain: str) -> dict[str, str]:
    said = " ".join(draw.choice(WORDS[domain]) for _ in range(draw.randint(1, 4)))
    return {"instruction": f"{index} {said}", "input": "", "output": draw.choice(WORDS[domain]), "kind": domain}


def write_inputs(folder: Path, rows: int = 400) -> Path:
    """`pool.jsonl`, `seeds.jsonl` and `model/` in a folder."""
    write_pool(folder / "pool.jsonl", rows)
    draw = random.Random(6)
    with (folder / "seeds.jsonl").open("w", encoding="utf-8") as seeds:
        for domain in WORDS:
            for index in range(4):
                seeds.write(json.dumps({"domain": domain, **row(draw, rows + index, domain)}) + "\n")
    save_tiny(folder / "model", layers=3)
    return folder


def inter(folder: Path, run: Path, cache: Path, *more: str) -> list[str]:
    """`select inter-diversity` over them."""
    return [
        *("select", "inter-diversity", f"{folder}/pool.jsonl", "--model", f"{folder}/model", "--label-column", "kind"),
        *("--layer", "2", "--keep", "20%", "--quiet", "--run", str(run), "--cache", str(cache), *more),
    ]


def daar(folder: Path, run: Path, cache: Path, *more: str) -> list[str]:
    """`select daar` over them."""
    return [
        *("select", "daar", f"{folder}/pool.jsonl", "--model", f"{folder}/model", "--seeds", f"{folder}/seeds.jsonl"),
        *("--keep", "20%", "--probe-rows", "100", "--max-length", "24", "--quiet"),
        *("--run", str(run), "--cache", str(cache), *more),
    ]
