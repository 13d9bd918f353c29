"""rds against its definition: one row at a time, all hidden states of the model, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.errors import UserError
from siftune.models.store import Store
from siftune.offline.rds import RDS
from siftune.records import Shard
from tests.pools import make_pool
from tests.tiny import save_tiny

ROWS: list[dict[str, Any]] = [
    {
        "instruction": f"Question {number} " + "about numbers " * (number % 5),
        "input": "",
        "output": f"answer {number * 7}",
    }
    for number in range(24)
]
TARGET = [
    {"instruction": "What is a prime?", "input": "", "output": "A number."},
    {"instruction": "Say hi", "input": "", "output": "Hi."},
]


def naive(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """The definition: each row alone, no padding, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = []
    for row in rows:
        turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        weights = torch.arange(1, len(states) + 1, dtype=torch.float64)
        vector = (weights[:, None] * states).sum(dim=0) / weights.sum()
        vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", width=16)


@pytest.mark.parametrize("token_budget", [None, 40])
def test_similarities_are_those_of_the_definition(model: Path, token_budget: int | None) -> None:
    pool = make_pool(ROWS)
    method = RDS(model=str(model), target=TARGET, device="cpu", token_budget=token_budget).fit(pool)
    found = method.shard_task(pool)(pool, Shard(0, 0, len(pool))).columns["similarity"]
    np.testing.assert_allclose(found, naive(model, ROWS) @ naive(model, TARGET).T, atol=1e-5)


def test_kept_representations_serve_another_target_without_the_model(model: Path, tmp_path: Path) -> None:
    pool = make_pool(ROWS)
    settings: dict[str, Any] = {"model": str(model), "device": "cpu", "keep_representations": True, "pick": "mean"}
    first = RDS(target=TARGET, **settings)
    first.store = Store(tmp_path)
    first.fit(pool).score(pool)
    second = RDS(target=TARGET[:1] + ROWS[:1], **settings)
    second.store = Store(tmp_path)
    second.fit(pool)
    second.backbone()._loaded["network"] = None  # a forward of the pool would fail
    scores = second.score(pool)
    expected = RDS(target=TARGET[:1] + ROWS[:1], model=str(model), device="cpu", pick="mean").fit(pool).score(pool)
    np.testing.assert_array_equal(scores.values, expected.values)


def test_a_target_row_without_tokens_is_refused_by_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_pool([{"text": "good"}, {"text": "bad"}])
    monkeypatch.setattr(
        "siftune.models.representations.chat_texts",
        lambda rows, tokenizer: ["" if row.output == "bad" else row.output for row in rows],
    )
    with pytest.raises(UserError, match="target memory line 2: no tokens in the text; fix or remove the row"):
        RDS(model=str(model), target=target, device="cpu").fit(make_pool(ROWS))
