"""A small study on made-up rows, and stand-ins for choosing, training and measuring that take no time and count."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from siftune.budget import parse_keep
from siftune.data.exports import seal
from siftune.files import hash_json, write_json
from siftune.study import cell as cells
from siftune.study import compare as comparing
from siftune.study.cell import Work
from siftune.study.cells import Cell
from tests.tiny import save_tiny

WORDS = {"sums": ["add", "minus", "seven", "nine"], "words": ["noun", "verb", "poem", "rhyme"]}
STUDY: dict[str, Any] = {
    "name": "small",
    "rows": 60,
    "held_out_rows": 6,
    "seed_rows": 3,
    "validation_rows": 4,
    "reference_rows": 10,
    "recipe": {"text": "prompt", "sft": {"max_length": 64, "per_device_train_batch_size": 4, "num_train_epochs": 1}},
    "offline": ["full", "random", {"name": "long", "method": "output-length"}],
    "online": ["regular"],
    "budgets": ["20%"],
    "seeds": [0, 1, 2],
    "baseline": "random",
}


@functools.cache
def tiny_folder() -> Path:
    """One tiny model for all studies of a test run."""
    return save_tiny(Path(tempfile.mkdtemp(prefix="siftune-study-")), layers=2, width=16)


def write_study(folder: Path, *, with_model: bool = True, **changes: Any) -> Path:
    """The study's YAML with its model and rows beside it; `changes` replace keys, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("pool", 50), ("held", 30)):
        for name, words in WORDS.items():
            draw = random.Random(f"{part} {name}")
            rows = [
                {
                    "instruction": f"{part} {index} {' '.join(draw.choices(words, k=draw.randint(1, 3)))}",
                    "input": "",
                    "output": " ".join(draw.choices(words, k=draw.randint(1, 6))),
                }
                for index in range(count)
            ]
            (folder / f"{part}-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if with_model and not (folder / "model").exists():
        (folder / "model").symlink_to(tiny_folder())
    said = STUDY | {
        "model": str(folder / "model"),
        "pool": {name: str(folder / f"pool-{name}.jsonl") for name in WORDS},
        "held_out": {name: str(folder / f"held-{name}.jsonl") for name in WORDS},
    }
    said = {key: value for key, value in (said | changes).items() if value is not None}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path


class Fakes:
    """`choose`, `train`, `measure` as functions of their inputs alone, each call noted as a line of a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def note(self, what: str) -> None:
        with self.log.open("a") as handle:
            handle.write(what + "\n")

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.is_file() else []

    def choose(self, work: Work, cell: Cell, run: Path) -> Mapping[str, Any]:
        self.note(f"choose {run.name}")
        rows = work.data.pool.read_text().splitlines()
        assert cell.arm.budget is not None
        kept = random.Random(f"{cell.arm.offline.name} {cell.seed}").sample(
            rows, parse_keep(cell.arm.budget).rows(len(rows))
        )
        run.mkdir(parents=True, exist_ok=True)
        (run / "selected.jsonl").write_text("".join(row + "\n" for row in kept))
        manifest = {"status": "finished", "rows": {"kept": len(kept)}, "stages": [], "info": {}}
        write_json(run / "manifest.json", manifest)
        return manifest

    def train(self, work: Work, recipe: Mapping[str, Any], run: Path) -> tuple[Path, Mapping[str, Any]]:
        self.note(f"train {run.parent.name}")
        rows = Path(recipe["train"]).read_text().splitlines()
        batch = recipe["sft"].get("per_device_train_batch_size", 8)
        keep = parse_keep(recipe["online"]["keep"]) if "online" in recipe else None
        sizes = [batch] * (len(rows) // batch) + ([len(rows) % batch] if len(rows) % batch else [])
        trained = sum(size if keep is None else min(size, max(1, keep.rows(size))) for size in sizes)
        if "stop_at" in recipe:
            trained = recipe["stop_at"]["trained_tokens"] // 10 + 1
        (run / "model").mkdir(parents=True, exist_ok=True)
        said = {key: value for key, value in recipe.items() if key not in ("train", "model")}
        (run / "model" / "told.json").write_text(json.dumps([said, sorted(rows)], default=str))
        seal(run / "model")  # as siftune train leaves it
        tokens = {"trained_rows": trained, "trained_tokens": 10 * trained, "trained_label_tokens": 4 * trained,
                  "forward_tokens": 10 * trained, "candidates": len(rows)}  # fmt: skip
        return run / "model", {"tokens": tokens, "seconds": 1.5, "train_loss": 2.0, "peak_memory_mb": 100}

    def measure(self, work: Work, model: Path, run: Path) -> dict[str, float]:
        self.note(f"measure {model.parent.parent.name}")
        told = model / "told.json"
        draw = random.Random(hash_json(json.loads(told.read_text())) if told.is_file() else "base")
        names = work.data.held_out
        return {f"loss/{name}": 2 + draw.random() for name in names} | {
            f"accuracy/{name}": draw.random() for name in names
        }

    def tabulate(self, work: Any, recipe: Mapping[str, Any], model: Path, table: Path) -> None:
        self.note("tabulate")
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("a table")

    def install(self, patch: Any = setattr, *, figures: bool = False) -> None:
        """Put the stand-ins in place of the real ones; `patch` is `monkeypatch.setattr` in a test."""
        if not figures:
            patch(comparing, "draw", lambda frame, folder: [])
        for name in ("choose", "train", "measure", "tabulate"):
            patch(cells, name, getattr(self, name))
        patch(cells, "check_recipe", lambda recipe, cache: None)
