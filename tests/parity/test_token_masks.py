"""Token masks: the definition token by token, what the trainer's own loss sees, LoRA, packing, and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import siftune
from siftune.errors import UserError
from siftune.models.layout import layout_of
from siftune.online.base import mask_labels
from tests.packed import pack, padded, rows_of
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model
from tests.trainers import ledger, losses, trainer

LENGTHS = [12, 30, 7, 21]


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each token from its own row alone, float64 `(B, T)`, 0 at the first column."""
    result = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    with torch.no_grad():
        for row, mask in enumerate(batch["attention_mask"]):
            ids = batch["input_ids"][row][mask.bool()]
            log = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            result[row, 1 : len(ids)] = -log[:-1].gather(1, ids[1:, None])[:, 0]
    return result


def expected_labels(excess: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    """The naive definition: sort all label tokens of the micro-batch by excess, keep the first ones."""
    places = [(row, at) for row in range(len(labels)) for at in range(1, labels.shape[1]) if labels[row, at] != -100]
    ranked = sorted(places, key=lambda place: (-float(excess[place]), place))
    result = torch.full_like(labels, -100)
    for place in ranked[: int(share * len(places) + 0.5)]:
        result[place] = labels[place]
    return result


@pytest.mark.parametrize("order", ["reference-now", "now-reference"])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_labels_are_those_of_the_definition(order: Any, share: float) -> None:
    model, reference, batch = tiny_model(layers=2), tiny_model(layers=1, seed=7), tiny_batch(LENGTHS)
    kept = siftune.TokenRho(share=share, reference=reference, order=order).select(model, batch)
    excess = (token_losses(reference, batch) - token_losses(model, batch)) * (1 if order == "reference-now" else -1)
    expected = expected_labels(excess, batch["labels"], share)
    assert torch.equal(kept.batch["labels"], expected)
    label_tokens = (batch["labels"][:, 1:] != -100).sum(1)
    assert torch.equal(kept.scores.parts["share"], (expected != -100).sum(1).double() / label_tokens)
    rows = [excess[row, 1:][batch["labels"][row, 1:] != -100].mean() for row in range(len(LENGTHS))]
    torch.testing.assert_close(kept.scores.total, torch.stack(rows), rtol=1e-4, atol=1e-6)
    assert (batch["labels"] == tiny_batch(LENGTHS)["labels"]).all(), "the candidates themselves are changed"


def test_all_tokens_is_the_plain_trainer_and_fewer_are_what_its_loss_and_count_see(tmp_path: Path) -> None:
    reference = tiny_model(layers=1, width=16, seed=7)
    runs = {}
    for name, share in (("plain", None), ("all", "100%"), ("half", "50%")):
        live = trainer(tmp_path / name, max_steps=3, gradient_accumulation_steps=2)
        if share is not None:
            siftune.attach(live, siftune.TokenRho(share=share, reference=reference), quiet=True)
        live.train()
        runs[name] = losses(live)
    assert runs["all"] == runs["plain"]
    assert runs["half"] != runs["plain"]
    first = [line for line in ledger(tmp_path / "half") if line["step"] == 1]
    data = trainer(tmp_path / "data").train_dataset
    tokens = [sum(label != -100 for label in data[line["row"]]["labels"][1:]) for line in first]
    kept = [round(line["share"] * count) for line, count in zip(first, tokens, strict=True)]
    for micro in (0, 1):
        at = [index for index, line in enumerate(first) if line["micro"] == micro]
        assert sum(kept[index] for index in at) == int(0.5 * sum(tokens[index] for index in at) + 0.5)
    mean = sum(line["train_loss"] * n for line, n in zip(first, kept, strict=True) if n) / sum(kept)
    assert runs["half"][0] == pytest.approx(mean, abs=1e-4), "the loss is not the mean over the tokens that are kept"


def test_a_packed_batch_masks_the_tokens_of_the_padded_one() -> None:
    rows = rows_of([9, 14, 6, 11])
    model, reference = tiny_model(layers=2), tiny_model(layers=1, seed=7)
    alone = siftune.TokenRho(share="50%", reference=reference).measure(model, padded(rows))
    batch = pack(rows, "trl")
    labels = mask_labels(batch, alone.label_masks)["labels"]
    for span, row, mask in zip(layout_of(batch).spans, rows, alone.label_masks, strict=True):
        original = torch.as_tensor(row["labels"])[1:]
        expected = original.clone()
        expected[(original != -100).nonzero().flatten()[~mask]] = -100
        assert torch.equal(labels[span.line, span.start + 1 : span.stop], expected)
        assert labels[span.line, span.start] == -100


def test_token_self_compares_with_the_model_without_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    base, batch = tiny_model(layers=2), tiny_batch(LENGTHS)
    expected_reference = token_losses(base, batch)
    tuned: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    tuned.eval()
    kept = siftune.TokenSelf(share="40%").select(tuned, batch)
    excess = expected_reference - token_losses(tuned, batch)
    assert torch.equal(kept.batch["labels"], expected_labels(excess, batch["labels"], 0.4))
    assert not torch.allclose(token_losses(tuned, batch), expected_reference), "the adapter is not switched on again"


def test_a_table_gives_the_masks_of_its_model(tmp_path: Path) -> None:
    reference = tiny_model(layers=1, width=16, seed=7)
    live = trainer(tmp_path / "table")
    table = siftune.reference_losses(live, reference, out=tmp_path / "losses.parquet", per_token=True)
    lines = pq.read_table(table).to_pylist()
    assert all(sum(line["losses"]) / line["tokens"] == pytest.approx(line["loss"], rel=1e-5) for line in lines)
    runs = []
    for name, source in (("model", reference), ("by-table", str(table))):
        sifted = trainer(tmp_path / name, max_steps=2)
        siftune.attach(sifted, siftune.TokenRho(share="50%", reference=source), quiet=True)
        sifted.train()
        runs.append([(line["row"], line["share"]) for line in ledger(tmp_path / name)])
    assert runs[0] == runs[1]
    by_row = siftune.reference_losses(live, reference, out=tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"a table of token losses has token_id and losses; make the table again"):
        siftune.TokenRho(reference=str(by_row)).score(tiny_model(layers=2), tiny_batch(LENGTHS))
    with pytest.raises(UserError, match=r"must end in \.parquet: a table of token losses has no other form"):
        siftune.reference_losses(live, reference, out=tmp_path / "x.safetensors", per_token=True)


def test_rows_without_a_reference_are_trained_as_they_are_and_a_foreign_table_is_refused() -> None:
    model, batch = tiny_model(layers=2), tiny_batch(LENGTHS)
    from siftune.online.token_id import token_ids

    counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    table = {digest: [1.0] * n for digest, n in zip(token_ids(batch)[1:], counts[1:], strict=True)}
    kept = siftune.TokenRho(share="20%", reference=table).select(model, batch)
    assert kept.scores.reasons == {0: "the reference table has no row for it"}
    assert torch.equal(kept.batch["labels"][0, 1:], batch["labels"][0, 1:])
    assert int((kept.batch["labels"][1:, 1:] != -100).sum()) == int(0.2 * sum(counts[1:]) + 0.5)
    with pytest.raises(UserError, match="none of 4 candidates is among the 1 rows of the reference table"):
        siftune.TokenRho(reference={"00" * 16: [1.0]}).select(model, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 2}, "keep=2 is not all rows, and token-rho chooses tokens of all of them; set share instead"),
        ({"share": 5}, "share=5 is a number of rows; set a share of the label tokens, such as 60%"),
        ({"share": 1.5}, "1.5"),
        ({"order": "up"}, "order='up' is not one of 'reference-now', 'now-reference'"),
        ({"reference": 3}, "reference=3 is no causal LM, folder, hub id, table or mapping"),
        ({"keep_tokens": 9}, "keep_tokens=9 cuts rows"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    method = siftune.TokenRho(**{"reference": {}, **options})
    with pytest.raises(UserError, match=message):
        method.check_keep(8)


def test_token_self_needs_an_adapter_or_a_reference() -> None:
    with pytest.raises(UserError, match=r"has no adapter of peft to switch off; set reference to the base model"):
        siftune.TokenSelf().select(tiny_model(layers=2), tiny_batch(LENGTHS))
