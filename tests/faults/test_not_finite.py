"""A model whose states are NaN or infinite for some rows: those rows have a reason, the others their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.inputs import WORDS, write_inputs
from tests.faults.said import add_up, count, refused, siftune
from tests.tiny import tiny_tokenizer

MARK = "Z"
"""The letter whose embedding is spoilt; no other word of the inputs holds it."""


def spoil(model: Path, value: float, token: int | None) -> None:
    """One row of the embedding, or all of the last layer, set to a value."""
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    if token is None:
        name = sorted(name for name in weights if "layers.1." in name and name.endswith("down_proj.weight"))[-1]
        weights[name] = torch.full_like(weights[name], value)
    else:
        weights[name][token, 0] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def scores_of(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(run / "rows.parquet", columns=["row", "score", "reason"]).to_pylist()
    return found


def words(method: str, folder: Path, run: str) -> list[str]:
    said = [
        *("select", method, f"{folder}/pool.jsonl", "--model", f"{folder}/model", "--keep", "10%", "--quiet"),
        *("--max-length", "64", "--run", f"{folder}/{run}", "--cache", f"{folder}/{run}-cache"),
    ]
    if method == "daar":
        said += ["--seeds", f"{folder}/seeds.jsonl", "--probe-rows", "20", "--layer", "2"]
    if method == "inter-diversity":
        said += ["--label-column", "kind", "--layer", "2"]
    return said


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("inter-diversity", NAN),
        ("inter-diversity", INF),
        ("ifd", NAN),
        ("ifd", INF),
        pytest.param("daar", NAN, marks=pytest.mark.slow),
        pytest.param("daar", INF, marks=pytest.mark.soak),
    ],
)
def test_rows_whose_states_are_not_finite_have_a_reason(tmp_path: Path, method: str, value: float) -> None:
    folder = write_inputs(tmp_path, 60)
    lines = (folder / "pool.jsonl").read_text().splitlines()
    spoilt = [7, 8, 31, 59]
    for index in spoilt:
        row = json.loads(lines[index])
        lines[index] = json.dumps(row | {"instruction": row["instruction"] + MARK, "output": row["output"] + MARK})
    (folder / "pool.jsonl").write_text("\n".join(lines) + "\n")
    assert siftune(words(method, folder, "sound")).code == 0
    spoil(folder / "model", value, tiny_tokenizer().convert_tokens_to_ids(MARK))
    assert siftune(words(method, folder, "spoilt")).code == 0
    add_up(folder / "spoilt")
    before, after = scores_of(folder / "sound"), scores_of(folder / "spoilt")
    for one, two in zip(before, after, strict=True):
        if two["row"] in spoilt:
            assert two["score"] is None
            assert "NaN" in two["reason"]
        elif method == "ifd":  # scored without a fit: the same number as before
            assert (one["score"] is None) == (two["score"] is None)
            if one["score"] is not None:
                np.testing.assert_allclose(two["score"], one["score"], rtol=1e-5)
        else:
            assert two["reason"] is None
    count("rows with NaN or infinite states", len(spoilt))


@pytest.mark.parametrize("method", ["daar", "inter-diversity", "ifd"])
def test_a_model_that_gives_nothing_finite_is_one_sentence(tmp_path: Path, method: str) -> None:
    folder = write_inputs(tmp_path, 60)
    spoil(folder / "model", float("nan"), None)
    refused(siftune(words(method, folder, "run")))
    count("models that give nothing finite")


def test_the_mark_is_in_no_other_word() -> None:
    assert not any(MARK in word for words in WORDS.values() for word in words)
