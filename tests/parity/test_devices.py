"""The same scores and the same hook on every device: a few tests that a machine with a GPU runs by `pytest -m cuda`.

Each runs on the CPU in the ordinary suite, too; the `cuda` parameter skips where there is none. The imports are those of
an installation without datasets, trl and jsonargparse, so that the file runs on a bare training machine.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import siftune
from siftune.models.backbone import Backbone
from siftune.models.features import extract
from siftune.models.hidden_states import iter_hidden_states, real_tokens, unwrap_model
from siftune.online.maxgrad import MaxGrad
from siftune.online.maxloss import MaxLoss
from siftune.online.uds import UDS
from tests.reference_gradients import naive_norms
from tests.reference_uds import NaiveUDS, naive_logits, naive_nuclear, naive_sketch, tiny_batch, true_hidden
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cuda
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "auto": ({}, 1e-5),
    "eigenvalues": ({"route": "eigenvalues"}, 1e-5),
    "polar": ({"route": "polar"}, 1e-5),
    "fast": ({"precision": "fast"}, 1e-4),
}
LENGTHS = [5, 40, 17, 1, 60, 33, 34]


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    name: str = request.param
    return name


def on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def states_of(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [states.cpu() for states in true_hidden(model, batch)]


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_uds_against_its_definition(family: str, way: str, device: str) -> None:
    options, bar = WAYS[way]
    model = tiny_model(family, **({"final_logit_softcapping": 5.0} if family == "gemma2" else {})).to(device)
    uds, naive = UDS(keep=2, alpha=0.5, score_tokens=150, **options), NaiveUDS(alpha=0.5)
    for seed in range(2):
        batch = on(device, tiny_batch(LENGTHS, side=("right", "left")[seed], seed=seed, extra=3))
        kept = uds.select(model, batch)
        cap = {"cap": 5.0} if family == "gemma2" else {}
        weight = model.get_output_embeddings().weight.cpu()
        rows = [naive_logits(states, weight, **cap) for states in states_of(model, batch)]
        total, intra, inter, sketches = naive.score(rows, uds.sketch)
        np.testing.assert_allclose(kept.scores.intra, intra, rtol=bar)
        np.testing.assert_allclose(kept.scores.inter, inter, rtol=bar, atol=1e-12)
        assert kept.indices.tolist() == sorted(np.argsort(-total, kind="stable")[:2].tolist())
        assert kept.batch["input_ids"].device.type == device
        naive.push([sketches[row] for row in kept.indices.tolist()])


def test_repeated_tokens_and_rows_longer_than_wide(device: str) -> None:
    model = tiny_model("llama")
    model.model.layers = torch.nn.ModuleList()
    batch = tiny_batch([64, 20, 100, 31])
    batch["input_ids"][0] = 7
    model, batch = model.to(device), on(device, batch)
    weight = model.get_output_embeddings().weight.cpu()
    (chunk,) = iter_hidden_states(unwrap_model(model), batch, real_tokens(batch))
    expected = [naive_nuclear(naive_logits(states.cpu(), weight)) for states in chunk.states]
    for options, bar in WAYS.values():
        np.testing.assert_allclose(UDS(keep=1, **options).score(model, batch).intra, expected, rtol=bar)


def test_the_sketch_against_literal_transforms(device: str) -> None:
    model = tiny_model("llama", layers=1, max_position_embeddings=700).to(device)
    batch, uds = on(device, tiny_batch([600, 9])), UDS(keep=1)
    sketches = uds.measure(model, batch).columns["sketch"]
    assert sketches.device.type == "cpu"
    weight = model.get_output_embeddings().weight.cpu()
    for row, states in enumerate(states_of(model, batch)):
        expected = naive_sketch(naive_logits(states, weight), uds.sketch)
        np.testing.assert_allclose(sketches[row], expected, atol=1e-5 * np.abs(expected).max())


def test_features_do_not_depend_on_the_device(device: str, tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "model"))
    texts = ["one short text", "another text that is a little longer than that", "x"]
    ours = extract(Backbone(folder, layer=2, device=device, dtype="float32"), texts)
    cpu = extract(Backbone(folder, layer=2, device="cpu", dtype="float32"), texts)
    np.testing.assert_allclose(ours.hidden, cpu.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.embedding, cpu.embedding, rtol=1e-5, atol=1e-6)


def test_maxloss_is_the_models_own_loss(device: str) -> None:
    model, batch = tiny_model("qwen2").to(device), on(device, tiny_batch([40, 8, 23], extra=2))
    with torch.no_grad():
        rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
        losses = [float(model(**row).loss) for row in rows]
    np.testing.assert_allclose(MaxLoss(keep=1).score(model, batch).total, losses, rtol=1e-5)


def test_maxgrad_is_the_norm_of_each_rows_gradient(device: str) -> None:
    model, batch = tiny_model("llama").to(device), on(device, tiny_batch([12, 30, 7], extra=2))
    np.testing.assert_allclose(MaxGrad(keep=1).score(model, batch).total, naive_norms(model, batch), rtol=1e-4)


def test_under_autocast_scores_are_those_of_the_states_it_gives(device: str) -> None:
    model, batch = tiny_model("llama").to(device), on(device, tiny_batch([30, 8, 45]))
    with torch.autocast(device, dtype=torch.bfloat16):
        scores = UDS(keep=1).score(model, batch)
        states = states_of(model, batch)
    weight = model.get_output_embeddings().weight.cpu()
    expected = [naive_nuclear(naive_logits(own, weight)) for own in states]
    np.testing.assert_allclose(scores.intra, expected, rtol=1e-5)


def test_one_sifted_step_with_lora(device: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    import pyarrow.parquet as pq
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = [
        {"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}
        for batch in (tiny_batch([length], seed=seed) for seed, length in enumerate([9, 30, 12, 21, 5, 17, 26, 40]))
    ]
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=device == "cpu",
        report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tiny_tokenizer(), padding=True)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    if trainer.args.n_gpu > 1:
        pytest.skip("several GPUs in one process")
    reference = copy.deepcopy(model).to(device)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    siftune.attach(trainer, UDS(keep=2), quiet=True)
    trainer.train()

    lines = pq.read_table(tmp_path / "siftune" / "selection.parquet").to_pylist()
    order = [line["row"] for line in lines]
    assert sorted(order) == list(range(8))
    batch = on(device, dict(collator([rows[index] for index in order])))
    kept = UDS(keep=2).select(reference, batch)
    assert [index for index, line in enumerate(lines) if line["kept"]] == kept.indices.tolist()
    np.testing.assert_allclose([line["total"] for line in lines], kept.scores.total, rtol=1e-5)
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items()), "nothing was trained"
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
