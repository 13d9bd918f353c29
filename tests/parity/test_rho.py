"""RHO-Loss against two models' own losses, live and through the table; the table made once, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset

from siftune import UserError, attach, reference_losses
from siftune.online.maxloss import MaxLoss
from siftune.online.rho_loss import RhoLoss, read_table
from siftune.online.token_id import token_ids
from siftune.sft import reference_losses as reference_module
from tests.reference_uds import tiny_batch
from tests.tiny import save_tiny, tiny_model
from tests.trainers import ledger, rows, trainer

BATCH = tiny_batch([40, 8, 23, 12])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", layers=2)


@pytest.fixture(scope="module")
def held_out() -> Any:
    return tiny_model("llama", layers=1, seed=5)


def naive(model: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Position t predicts token t + 1, label tokens only, padding masked: each row alone, in numpy, float64."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()].numpy()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double().numpy()
        logits = logits - logits.max(axis=1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        picked = [-logp[t, labels[t + 1]] for t in range(len(labels) - 1) if labels[t + 1] != -100]
        found.append(np.mean(picked))
    return np.array(found)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_live_reference(model: Any, held_out: Any, side: str) -> None:
    batch = tiny_batch([40, 8, 23, 12], side=side, extra=3)
    held_out.train()
    scores = RhoLoss(keep=2, reference=held_out, score_tokens=50).score(model, batch)
    assert held_out.training
    held_out.eval()
    ours, theirs = naive(model, batch), naive(held_out, batch)
    np.testing.assert_allclose(scores.total, ours - theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores.irreducible, theirs, rtol=1e-5)
    np.testing.assert_allclose(scores.loss, ours, rtol=1e-5)


def test_a_reference_by_its_folder(model: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "reference", layers=1, seed=5)
    wanted = RhoLoss(keep=2, reference=tiny_model("llama", layers=1, seed=5)).score(model, BATCH)
    found = RhoLoss(keep=2, reference=str(folder)).score(model, BATCH)
    np.testing.assert_allclose(found.total, wanted.total, rtol=1e-6)


def test_a_mapping_and_what_it_lacks(model: Any) -> None:
    names = token_ids(BATCH)
    table: dict[Any, float] = {names[0]: 1.0, names[1].hex(): 2.0, names[3]: float("nan")}
    scores = RhoLoss(keep=2, reference=table).score(model, BATCH)
    own = MaxLoss(keep=1).score(model, BATCH).total
    assert scores.total[:2].tolist() == [float(own[0]) - 1.0, float(own[1]) - 2.0]
    assert scores.reasons == {2: "the reference table has no row for it", 3: "the reference table holds no loss for it"}
    assert torch.isnan(scores.parts["loss"]).tolist() == [False, False, True, True]
    with pytest.raises(UserError, match="none of 4 candidates"):
        RhoLoss(keep=2, reference={b"x" * 16: 1.0}).score(model, BATCH)
    with pytest.raises(UserError, match="token_id"):
        RhoLoss(keep=2, reference={"abcd": 1.0}).score(model, BATCH)
    with pytest.raises(UserError, match="reference=3"):
        RhoLoss(keep=2, reference=3).check_keep(8)
    with pytest.raises(UserError, match="there is no reference table"):
        RhoLoss(keep=2, reference="gone.parquet").score(model, BATCH)


@pytest.mark.parametrize("ending", ["parquet", "safetensors"])
def test_the_table_gives_what_the_live_model_gives(tmp_path: Path, ending: str) -> None:
    data = Dataset.from_list(rows(40, answers=False))
    held_out = tiny_model("llama", layers=1, width=16, seed=5)
    table = reference_losses(
        trainer(tmp_path / "a", data=data), held_out, out=tmp_path / f"il.{ending}", score_tokens=90
    )
    runs = []
    for name, source in (("table", table), ("live", held_out)):
        live = trainer(tmp_path / name, data=data, gradient_accumulation_steps=2)
        attach(live, RhoLoss(keep="1/4", reference=source, window="step"), quiet=True)
        live.train()
        runs.append(ledger(tmp_path / name))
    assert [line["kept"] for line in runs[0]] == [line["kept"] for line in runs[1]]
    values = [[line["irreducible"] for line in run if line["irreducible"] is not None] for run in runs]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    assert len(values[0]) == 32, "eight rows of forty have nothing to learn"


def test_the_table_in_full(tmp_path: Path) -> None:
    data, held_out = Dataset.from_list(rows(20, answers=False)), tiny_model("llama", layers=1, width=16)
    live = trainer(tmp_path, data=data)
    torch.manual_seed(3)
    path = reference_losses(live, held_out)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)
    assert path == tmp_path / "siftune" / "reference.parquet"
    lines = pq.read_table(path).to_pylist()
    assert [line["row"] for line in lines] == list(range(20))
    for line, row in zip(lines, data, strict=True):
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        assert line["token_id"] == token_ids(batch)[0].hex()
        if line["row"] % 5 == 0:
            assert (line["loss"], line["reason"], line["tokens"]) == (None, "no label tokens to score", 0)
        else:
            np.testing.assert_allclose(line["loss"], naive(held_out, batch)[0], rtol=1e-5)
    table = read_table(path)
    assert len(table) == 20
    assert sum(loss != loss for loss in table.values()) == 4


class Counted:
    """Counts forward passes, and stops the process at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.stop_at = 0, -1
        original = MaxLoss.measure

        def measure(method: MaxLoss, model: Any, batch: Any) -> Any:
            if self.calls == self.stop_at:
                raise KeyboardInterrupt
            self.calls += 1
            return original(method, model, batch)

        monkeypatch.setattr(MaxLoss, "measure", measure)


def test_an_interrupted_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "PART", 6)
    monkeypatch.setattr(reference_module, "CHUNK", 3)
    data, held_out = Dataset.from_list(rows(20)), tiny_model("llama", layers=1, width=16)
    live, out = trainer(tmp_path, data=data), tmp_path / "il.parquet"
    counted = Counted(monkeypatch)
    whole = pq.read_table(reference_losses(live, held_out, out=tmp_path / "whole.parquet"))
    assert counted.calls == 7
    counted.calls, counted.stop_at = 0, 5
    with pytest.raises(KeyboardInterrupt):
        reference_losses(live, held_out, out=out)
    assert not out.exists()
    counted.calls, counted.stop_at = 0, -1
    assert pq.read_table(reference_losses(live, held_out, out=out)).equals(whole)
    assert counted.calls == 3, "two of four parts were finished"
    assert [path.name for path in tmp_path.glob("il*")] == ["il.parquet"]

    for changed in ("model", "data"):
        counted.calls, counted.stop_at = 0, 5
        with pytest.raises(KeyboardInterrupt):
            reference_losses(live, held_out, out=out)
        counted.calls, counted.stop_at = 0, -1
        if changed == "model":
            reference_losses(live, tiny_model("llama", layers=1, width=16, seed=9), out=out)
        else:
            reference_losses(trainer(tmp_path, data=Dataset.from_list(rows(20, seed=1))), held_out, out=out)
        assert counted.calls == 7, changed


def test_what_no_table_can_be_made_of(tmp_path: Path) -> None:
    held_out = tiny_model("llama", layers=1, width=16)
    with pytest.raises(UserError, match="must end in"):
        reference_losses(trainer(tmp_path), held_out, out=tmp_path / "il.csv")
    iterable = IterableDataset.from_generator(lambda: iter(rows(8)))
    with pytest.raises(UserError, match="iterable"):
        reference_losses(trainer(tmp_path, data=iterable, max_steps=1), held_out)
    rows_alone = pq.read_table(reference_losses(trainer(tmp_path), held_out)).select(["row"])
    pq.write_table(rows_alone.replace_schema_metadata(None), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="token_id and loss"):
        read_table(tmp_path / "x.parquet")
