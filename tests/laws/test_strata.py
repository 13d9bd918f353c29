"""Laws of choice inside strata: the mix of the strata is that of the candidates, and within one the best are kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from siftune import MaxLoss, UserError, attach, detach
from siftune.online.base import OnlineMethod
from siftune.online.simple import Random
from siftune.online.strata import quotas
from siftune.online.uds import UDS
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import arguments, ledger, rows

DOMAINS = ["code", "code", "math", "code", "math", "code", "code", "prose"]
LENGTHS = [12, 30, 7, 21, 3, 16, 9, 25]


def batch_with_domains() -> dict[str, Any]:
    return {**tiny_batch(LENGTHS), "domain": list(DOMAINS)}


def test_quotas_are_in_proportion_and_by_the_largest_remainder() -> None:
    assert quotas([6, 3, 1], 4) == [3, 1, 0]  # 2.4, 1.2, 0.4: the larger of the equal remainders' strata
    assert quotas([5, 2, 1], 4) == [3, 1, 0]  # 2.5, 1, 0.5
    assert quotas([2, 2], 3) == [2, 1]
    assert quotas([1, 1, 1], 1) == [1, 0, 0]
    assert quotas([4], 9) == [4]
    assert quotas([], 2) == []
    for sizes in ([3, 1, 4, 1, 5], [7, 7, 2], [1] * 9):
        for count in range(sum(sizes) + 1):
            shares = quotas(sizes, count)
            assert sum(shares) == count
            assert all(abs(k - count * n / sum(sizes)) < 1 for k, n in zip(shares, sizes, strict=True))
            assert all(k <= n for k, n in zip(shares, sizes, strict=True))


@pytest.mark.parametrize("make", [lambda **o: Random(**o), lambda **o: MaxLoss(**o), lambda **o: UDS(apart=0.1, **o)])
def test_the_best_of_every_domain_are_kept_in_proportion(make: Any) -> None:
    model, batch = tiny_model("llama", layers=2), batch_with_domains()
    kept = make(keep=4, strata="domain").select(model, batch)
    assert Counter(DOMAINS[row] for row in kept.indices.tolist()) == {"code": 3, "math": 1}
    for domain in ("code", "math"):
        members = [row for row, name in enumerate(DOMAINS) if name == domain]
        left_out = [row for row in members if row not in kept.indices.tolist()]
        taken = [row for row in members if row in kept.indices.tolist()]
        assert float(kept.scores.total[taken].min()) >= float(kept.scores.total[left_out].max())
    assert kept.indices.tolist() == sorted(kept.indices.tolist())
    assert "domain" not in kept.batch, "a model accepts no such column"
    model(**kept.batch)


def test_scores_do_not_depend_on_strata() -> None:
    model, batch = tiny_model("llama", layers=2), batch_with_domains()
    plain = MaxLoss(keep=4).score(model, tiny_batch(LENGTHS)).total
    assert torch.equal(MaxLoss(keep=4, strata="domain").score(model, batch).total, plain)


def test_one_stratum_is_the_choice_without_strata() -> None:
    model, batch = tiny_model("llama", layers=2), tiny_batch(LENGTHS)
    plain = MaxLoss(keep=3).select(model, batch).indices
    assert torch.equal(MaxLoss(keep=3, strata="length:1000").select(model, batch).indices, plain)
    assert torch.equal(MaxLoss(keep=3, strata="one").select(model, {**batch, "one": torch.ones(8)}).indices, plain)


def test_permuted_rows_are_the_same_choice() -> None:
    model, batch = tiny_model("llama", layers=2), batch_with_domains()
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    moved = {name: value[order] for name, value in batch.items() if name != "domain"}
    moved["domain"] = [DOMAINS[row] for row in order.tolist()]
    kept = MaxLoss(keep=4, strata="domain").select(model, batch).indices.tolist()
    again = MaxLoss(keep=4, strata="domain").select(model, moved).indices.tolist()
    assert sorted(order[again].tolist()) == kept


def test_bands_of_length() -> None:
    model, batch = tiny_model("llama", layers=2), tiny_batch(LENGTHS)
    kept = MaxLoss(keep=4, strata="length:10").select(model, batch).indices.tolist()
    bands = Counter(length // 10 for length in LENGTHS)
    assert bands == {1: 2, 3: 1, 0: 3, 2: 2}
    assert Counter(LENGTHS[row] // 10 for row in kept) == {0: 2, 1: 1, 2: 1}


def test_a_row_without_a_score_is_taken_last_in_its_own_stratum() -> None:
    model, batch = tiny_model("llama", layers=2), batch_with_domains()
    batch["labels"][2] = -100
    kept = MaxLoss(keep=4, strata="domain").select(model, batch).indices.tolist()
    assert 2 not in kept
    assert 4 in kept


def trainer(folder: Path, collator: Any = None, *, without: tuple[str, ...] = (), **more: Any) -> Trainer:
    data = [{**row, "domain": "code" if index % 4 else "math"} for index, row in enumerate(rows(32))]
    tokenizer = tiny_tokenizer()
    return Trainer(
        model=tiny_model("llama", layers=2, width=16),
        args=TrainingArguments(**arguments(folder, **{"max_steps": 2, "per_device_train_batch_size": 8, **more})),
        train_dataset=Dataset.from_list(data).remove_columns(list(without)),
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("window", ["micro", "step"])
def test_a_trainers_column_is_read_from_its_training_set(tmp_path: Path, window: Any) -> None:
    live = trainer(tmp_path)
    attach(live, MaxLoss(keep=4, strata="domain", window=window), quiet=True)
    live.train()
    lines = ledger(tmp_path)
    assert lines
    for step in sorted({line["step"] for line in lines}):
        here = [line for line in lines if line["step"] == step]
        math = [line for line in here if line["row"] % 4 == 0]
        kept = sum(line["kept"] for line in here)
        assert 0 < kept < len(here)
        assert sum(line["kept"] for line in math) == quotas([len(here) - len(math), len(math)], kept)[1]
    detach(live)


def test_strata_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    model, batch = tiny_model("llama", layers=2), tiny_batch(LENGTHS)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"strata": "length:0"}, "length:0"),
        ({"strata": "length:few"}, "length:few"),
        ({"strata": ""}, "strata=''"),
        ({"strata": 3}, "strata=3"),
        ({"strata": "domain", "keep_tokens": 9}, "keep_tokens=9"),
        ({"strata": "domain"}, "no column of the batch"),
    ]
    for options, message in refused:
        with pytest.raises(UserError, match=message):
            MaxLoss(keep=2, **options).select(model, batch)
    with pytest.raises(UserError, match="3 values for 8 candidates"):
        MaxLoss(keep=2, strata="domain").select(model, {**batch, "domain": ["a", "b", "c"]})
    with pytest.raises(UserError, match=r"no column of the training set \(input_ids"):
        attach(trainer(tmp_path / "one", without=("domain",)), MaxLoss(keep=2, strata="domain"))
    attach(trainer(tmp_path / "two", without=("domain",)), MaxLoss(keep=2, strata="length:8"), quiet=True)


def test_every_method_has_the_option() -> None:
    from siftune import registry

    for entry in registry.methods("online"):
        method: type[OnlineMethod] = entry.load()
        assert "strata" in method.__dataclass_fields__, entry.name
