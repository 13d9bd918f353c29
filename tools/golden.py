"""Digests of what siftune computes, to hold a refactoring against: no number may change.

    python tools/golden.py --out before.json        on the commit before
    python tools/golden.py --compare before.json    on the commit after, same machine and versions: exit code 1 if any differs

The embedded corpus and model are put through the command line alone (`siftune select`, `train`, `compare`), into a
temporary folder, with one thread and fixed seeds; what is digested are the files that users read: chosen rows, every
column of rows.parquet and of the ledger, the weights, the study's table. Each result has two digests: `exact`, of every bit,
and `rounded`, of numbers at 6 significant digits. Where only `exact` differs, the order of a floating sum has changed;
where both differ, the result has. Times, folders and host names are in none of them. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch and numpy are imported
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

from siftune.cli.main import main as siftune
from siftune.demo import corpus
from siftune.demo.embedded import model_folder

ROWS = 240
DIGITS = 6
LEFT_OUT = ("file", "seconds", "memory")
"""Columns whose names hold one of these differ between two runs of the same code."""
MODEL = str(model_folder())
OFFLINE: dict[str, list[str]] = {
    "random": [],
    "length": [],
    "ifd": ["--model", MODEL],
    "daar": ["--model", MODEL, "--seeds", "data/seeds.jsonl", "--max-length", "64"],
    "inter-diversity": ["--model", MODEL, "--label-column", "source", "--layer", "2"],
    "deita-d": ["--complexity-scorer", MODEL, "--quality-scorer", MODEL],
}
ONLINE = ("uds", "maxloss")
SFT = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "max_length": 128,
    "save_strategy": "no",
    "logging_steps": 1,
}
STUDY = {
    "name": "golden",
    "model": "demo",
    "pool": "demo",
    "held_out": "demo",
    "rows": 120,
    "held_out_rows": 8,
    "recipe": {"text": "prompt", "sft": {**SFT, "max_steps": -1, "num_train_epochs": 1}},
    "offline": ["random", "output-length"],
    "online": ["regular"],
    "budgets": ["20%"],
    "equal": "rows",
    "seeds": [0, 1],
    "baseline": "random",
    "jobs": 1,
    "threads": 1,
}
Digests = dict[str, dict[str, str]]


# --- what is run ----------------------------------------------------------------------------------------------------


def digests() -> Digests:
    """Every result's digests, by its name."""
    torch.set_num_threads(1)
    before = os.getcwd()
    computed: Digests = {}
    with tempfile.TemporaryDirectory(prefix="siftune-golden-") as folder:
        os.chdir(folder)
        try:
            corpus.write("data", count=ROWS, seed=0)
            for name, values in results():
                computed[name] = {"exact": digest(values, exact=True), "rounded": digest(values, exact=False)}
                print(f"{computed[name]['exact']}  {computed[name]['rounded']}  {name}", flush=True)
        finally:
            os.chdir(before)
    return computed


def results() -> Iterator[tuple[str, Any]]:
    """(name, values) of every result, computed one after the other."""
    for method, options in OFFLINE.items():
        run("select", method, "data/pool.jsonl", *options, "--keep", "20%", "--run", f"select-{method}")
        chosen = Path(f"select-{method}/selected.jsonl").read_text(encoding="utf-8").splitlines()
        yield f"select {method}: chosen rows", chosen
        yield from columns_of(f"select {method}", Path(f"select-{method}/rows.parquet"))
    for method in ONLINE:
        recipe = {"model": MODEL, "train": "data/pool.jsonl", "text": "prompt", "sft": SFT}
        Path("recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        run("train", "recipe.yaml", "--online", method, "--keep", "1/4", "--seed", "0", "--run", f"train-{method}")
        yield from columns_of(f"train {method}, ledger", Path(f"train-{method}/siftune/selection.parquet"))
        yield f"train {method}: weights", load_file(f"train-{method}/model/model.safetensors")
    Path("study.yaml").write_text(json.dumps(STUDY), encoding="utf-8")
    run("compare", "study.yaml", "--run", "study")
    for table in ("cells", "differences"):
        yield from columns_of(f"study, {table}", Path(f"study/{table}.parquet"))


def run(*words: str) -> None:
    """One command of siftune, in this process: its imports are paid for once."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = siftune([*words, "--cache", "cache", "--quiet"])
    if code != 0:
        raise SystemExit(f"siftune {' '.join(words)} ended with exit code {code}:\n{err.getvalue()}")


def columns_of(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Every column of a Parquet file whose values the inputs alone decide."""
    table = pq.read_table(path)
    for column in table.column_names:
        if not any(word in column for word in LEFT_OUT):
            yield f"{name}: {column}", table[column]


# --- digests --------------------------------------------------------------------------------------------------------


def digest(values: Any, *, exact: bool) -> str:
    """Hash of a column, an array or a list; with `exact=False` of its floating numbers at 6 significant digits."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts(values, exact=exact):
        hashed.update(part)
    return hashed.hexdigest()


def parts(values: Any, *, exact: bool) -> Iterator[bytes]:
    """The bytes that are hashed: kind and shape first."""
    if isinstance(values, dict):
        for name in sorted(values):
            yield name.encode()
            yield from parts(values[name], exact=exact)
        return
    if isinstance(values, pa.ChunkedArray) and pa.types.is_floating(values.type):
        yield json.dumps(values.is_null().to_pylist()).encode()
        values = values.to_numpy(zero_copy_only=False)
    if isinstance(values, np.ndarray):
        yield f"{values.dtype} {values.shape}".encode()
        if exact or values.dtype.kind != "f":
            yield np.ascontiguousarray(values).tobytes()
        else:
            yield from (array.tobytes() for array in rounded(values))
        return
    plain = values.to_pylist() if isinstance(values, pa.ChunkedArray) else values
    yield json.dumps(plain, ensure_ascii=True, default=str).encode()


def rounded(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Digits and decimal exponent of every number at 6 significant digits; numbers that are not finite keep their kind.

    >>> rounded(np.array([1234567.0, -0.1]))
    (array([ 123457, -100000]), array([6, -1]))
    """
    wide = values.astype(np.float64)
    finite = np.isfinite(wide) & (wide != 0)
    safe = np.where(finite, wide, 1.0)
    exponent = np.floor(np.log10(np.abs(safe))).astype(np.int64)
    digits = np.rint(safe / 10.0 ** (exponent - (DIGITS - 1))).astype(np.int64)
    carried = np.abs(digits) >= 10**DIGITS
    digits, exponent = np.where(carried, digits // 10, digits), exponent + carried
    kinds = np.select([np.isnan(wide), wide == np.inf, wide == -np.inf], [1, 2, 3], 0)
    return np.where(finite, digits, kinds), np.where(finite, exponent, 0)


# --- two runs -------------------------------------------------------------------------------------------------------


def differences(before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One sentence for every result that is not the same."""
    lines = []
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            lines.append(f"{name}: is not computed any more")
        elif name not in before:
            lines.append(f"{name}: is new")
        elif before[name]["rounded"] != after[name]["rounded"]:
            lines.append(f"{name}: differs within {DIGITS} significant digits")
        elif before[name]["exact"] != after[name]["exact"]:
            lines.append(f"{name}: differs beyond {DIGITS} significant digits alone")
    return lines


def main(words: Sequence[str] | None = None) -> int:
    """Compute, then write or compare; the exit code."""
    parser = argparse.ArgumentParser(description="Digests of what siftune computes: see the head of this file.")
    parser.add_argument("--out", type=Path, help="write the digests to this file")
    parser.add_argument("--compare", type=Path, help="exit with 1 where the digests of this file are others")
    options = parser.parse_args(words)
    before = None if options.compare is None else json.loads(options.compare.read_text(encoding="utf-8"))
    after = digests()
    if options.out is not None:
        options.out.write_text(json.dumps(after, indent=1) + "\n", encoding="utf-8")
    if before is None:
        return 0
    changed = differences(before, after)
    print("\n".join(changed) if changed else f"all {len(after)} results are the same, bit for bit")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
