"""compat="paper": features over padded positions and labelled text, against the full model run row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from siftune.models.backbone import Backbone
from siftune.offline.daar.paper import PaperFeatures, labelled_text
from siftune.offline.daar.selector import DaaR
from siftune.records import Row, Shard
from tests.pools import make_pool
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

ROWS = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Say something long about kings.", "input": "", "output": "There was a king, and he had a crown."},
    {"instruction": "Name a colour.", "input": "", "output": "Red"},
]
LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", layers=2)


@pytest.mark.parametrize("labelled", [False, True])
def test_padded_means_count_every_position(folder: Path, labelled: bool) -> None:
    backbone = Backbone(str(folder), layer=2, max_length=LENGTH, device="cpu")
    task = PaperFeatures(backbone, padded=True, labelled=labelled, token_budget=2 * LENGTH)
    pool = make_pool([*ROWS, {"instruction": 3}], {3: "wrong type"})
    columns = task(pool, Shard(0, 0, 4)).columns
    model, tokenizer = tiny_model("llama", layers=2), tiny_tokenizer()
    for number, said in enumerate(ROWS):
        names = [("Instruction: ", said["instruction"]), ("Input: ", said["input"]), ("Output: ", said["output"])]
        text = "\n".join((name if labelled else "") + value for name, value in names if value)
        ids = tokenizer(text)["input_ids"][:LENGTH]
        padded = torch.tensor([ids + [0] * (LENGTH - len(ids))])
        mask = (torch.arange(LENGTH) < len(ids)).long()[None]
        with torch.no_grad():
            states = model(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states
        for name, layer in (("embedding", 0), ("hidden", -1)):
            naive = states[layer][0].double().mean(dim=0).numpy()
            np.testing.assert_allclose(columns[name][number], naive, rtol=1e-4, atol=1e-5)
        assert columns["tokens"][number] == len(ids)
    assert np.isnan(columns["hidden"][3]).all()


def test_compat_decides_the_features_and_a_named_option_overrides_it() -> None:
    paper = DaaR(model="m", compat="paper", device="cpu")
    fit, score = paper.feature_task(for_fit=True), paper.feature_task(for_fit=False)
    assert isinstance(fit, PaperFeatures)
    assert isinstance(score, PaperFeatures)
    assert (fit.padded, fit.labelled, score.padded, score.labelled) == (True, True, True, False)
    real = DaaR(model="m", compat="paper", pooling="real", device="cpu")
    assert isinstance(real.feature_task(for_fit=True), PaperFeatures)
    assert not isinstance(real.feature_task(for_fit=False), PaperFeatures)
    assert not isinstance(DaaR(model="m", device="cpu").feature_task(for_fit=True), PaperFeatures)


def test_labelled_text_over_real_tokens_runs(folder: Path) -> None:
    backbone = Backbone(str(folder), layer=2, device="cpu")
    shard, pool = Shard(0, 0, 3), make_pool(ROWS)
    labelled = PaperFeatures(backbone, padded=False, labelled=True)(pool, shard).columns
    plain = PaperFeatures(backbone, padded=False, labelled=False)(pool, shard).columns
    assert labelled_text(Row(0, "", "a", "", "b")) == "Instruction: a\nOutput: b"
    assert (labelled["tokens"] > plain["tokens"]).all()
    assert not np.allclose(labelled["hidden"], plain["hidden"])
