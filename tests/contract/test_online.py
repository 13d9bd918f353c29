"""`siftune.testing.check_online_method` over every online method of the registry, and the laws that it leaves out.

Methods are made with `keep=2` and what `tests.online_methods.needs` says they need.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from siftune import registry
from siftune.errors import UserError
from siftune.hook import checkpoint as checkpoints
from siftune.online.base import Measured, OnlineMethod
from siftune.testing import check_online_method
from tests.online_methods import needs
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model

METHODS = [entry.name for entry in registry.methods("online")]
LENGTHS = [12, 30, 7, 21, 3, 16]
BATCHES = [tiny_batch(LENGTHS, seed=seed) for seed in range(4)]
MASKS_TOKENS = {"token-rho", "token-self"}
KEEPS_ALL = {"regular", *MASKS_TOKENS}
BLIND = {"regular", "random"}
"""Methods whose scores do not come from the rows, so laws about rows do not bind them."""
GIVEN: dict[str, dict[str, Any]] = {"greats": {"learning_rate": 0.05}}
"""Options that the trainer hook would hand over."""
ONE_BATCH = {"greats"}
"""Methods that compare the candidates of one micro-batch with each other and refuse a window of several."""


def make(name: str, **options: Any) -> OnlineMethod:
    method: type[OnlineMethod] = registry.find("online", name).load()
    if "keep" not in options and name not in KEEPS_ALL:
        options["keep"] = 2
    return method(**{**needs(name), **GIVEN.get(name, {}), **options})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", layers=2)


def same(a: torch.Tensor, b: torch.Tensor, *, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=rtol, atol=rtol / 10)  # rho-loss is a difference near 0


def frozen_state(method: OnlineMethod) -> str:
    return json.dumps(
        {
            name: value.tolist() if isinstance(value, torch.Tensor) else value
            for name, value in method.state_dict().items()
        },
        sort_keys=True,
    )


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_it_is_a_keyword_only_dataclass_that_only_stores(self, name: str) -> None:
        method = make(name)
        assert method.name == name
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            assert field.kw_only
            if field.default is not dataclasses.MISSING and field.name not in {
                "keep",
                *needs(name),
                *GIVEN.get(name, {}),
            }:
                assert getattr(method, field.name) == field.default
        with pytest.raises(TypeError):
            make(name, no_such_option=1)

    def test_it_holds_the_contract(self, name: str) -> None:
        check_online_method(make(name))

    def test_the_highest_scores_are_kept(self, name: str, model: Any) -> None:
        kept = make(name).select(model, BATCHES[0])
        assert len(kept.indices) == (len(LENGTHS) if name in KEEPS_ALL else 2)
        left_out = [row for row in range(len(LENGTHS)) if row not in kept.indices.tolist()]
        if left_out:
            assert float(kept.scores.total[left_out].max()) <= float(kept.scores.total[kept.indices].min())

    def test_keep_all_returns_the_batch_itself(self, name: str, model: Any) -> None:
        for keep in ("all", "100%", "1/1"):
            kept = make(name, keep=keep).select(model, BATCHES[0])
            assert kept.indices.tolist() == list(range(len(LENGTHS)))
            fields = set(BATCHES[0]) - ({"labels"} if name in MASKS_TOKENS else set())
            assert all(kept.batch[field] is BATCHES[0][field] for field in fields)

    def test_how_many(self, name: str, model: Any) -> None:
        if name in KEEPS_ALL:
            with pytest.raises(UserError, match="keep"):
                make(name, keep=0.5).check_keep(8)
            return
        for keep, candidates, rows in ((2, 8, 2), (99, 8, 8), ("1/8", 8, 1), (0.3, 8, 2), ("20%", 4, 1), (0.5, 5, 3)):
            assert make(name, keep=keep).count(candidates) == rows, (keep, candidates)
        assert make(name, keep="1/8").count(2) == 1, "a short last batch keeps one"
        assert make(name, keep=2).count(0) == 0
        with pytest.raises(UserError, match=r"keep=0\.05.*per_device_train_batch_size"):
            make(name, keep=0.05).check_keep(8)
        make(name, keep=0.07).check_keep(8)
        for wrong in (0, -1, 1.5, "none", True):
            with pytest.raises(UserError, match="keep"):
                make(name, keep=wrong).select(model, BATCHES[0])

    def test_options_are_refused_by_name_before_a_model_runs(self, name: str) -> None:
        for option in ({"window": "epoch"}, {"scope": "world"}, {"start_step": -1}):
            with pytest.raises(UserError, match=next(iter(option))):
                make(name, **option).check_keep(8)
            with pytest.raises(UserError, match=next(iter(option))):
                make(name, **option).score(torch.nn.Linear(1, 1), BATCHES[0])
        with pytest.raises(UserError, match="input_ids"):
            make(name).select(torch.nn.Linear(1, 1), {"labels": torch.zeros(1)}) if name in BLIND else make(
                name, start_step=1
            ).select(torch.nn.Linear(1, 1), {"labels": torch.zeros(1)})

    def test_dropout_does_not_enter(self, name: str) -> None:
        noisy = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
        same(make(name).score(noisy, BATCHES[0]).total, make(name).score(noisy.eval(), BATCHES[0]).total)

    def test_chunks_change_nothing(self, name: str, model: Any) -> None:
        method = make(name)
        if "score_tokens" not in {field.name for field in dataclasses.fields(method) if field.init}:  # type: ignore[arg-type]
            return
        same(
            make(name, score_tokens=33).score(model, BATCHES[0]).total, method.score(model, BATCHES[0]).total, rtol=1e-5
        )

    def test_rows_that_cannot_be_scored(self, name: str, model: Any) -> None:
        if name in BLIND:
            return
        batch = {field: value.clone() for field, value in BATCHES[0].items()}
        batch["attention_mask"][1] = 0
        batch["labels"][1] = -100
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.model.embed_tokens.weight[7] = torch.nan
        batch["input_ids"][batch["input_ids"] == 7] = 8
        batch["input_ids"][3, 2] = 7
        keeps_all = name in KEEPS_ALL
        method = make(name, keep="all" if keeps_all else 4)
        good = [0, 2, 4, 5]
        kept = method.select(broken, batch)
        scores = kept.scores
        assert torch.isnan(scores.total).nonzero().flatten().tolist() == [1, 3] == sorted(scores.reasons)
        assert all(torch.isnan(part).nonzero().flatten().tolist() == [1, 3] for part in scores.parts.values())
        assert kept.indices.tolist() == (list(range(6)) if keeps_all else good)
        alone = make(name, keep="all" if keeps_all else 4).score(
            broken, {field: value[good] for field, value in batch.items()}
        )
        same(scores.total[good], alone.total, rtol=1e-5)
        assert torch.isfinite(method.score(model, BATCHES[1]).total).all(), "a broken row poisoned the state"
        if keeps_all:
            return
        assert make(name, keep=5).select(broken, batch).indices.tolist() == [0, 1, 2, 4, 5], "taken last, in order"
        make(name, keep=6).select(broken, batch)

    def test_state_travels_through_safetensors_and_json(self, name: str, model: Any, tmp_path: Path) -> None:
        uninterrupted, resumed = make(name), make(name)
        for batch in BATCHES[:2]:
            uninterrupted.select(model, batch)
        state = uninterrupted.state_dict()
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        save_file(tensors, tmp_path / "state.safetensors")
        plain = json.loads(json.dumps({key: value for key, value in state.items() if key not in tensors}))
        resumed.load_state_dict({**plain, **load_file(tmp_path / "state.safetensors")})
        for batch in BATCHES[2:]:
            a, b = uninterrupted.select(model, batch), resumed.select(model, batch)
            assert torch.equal(a.indices, b.indices)
            same(a.scores.total, b.scores.total)
        assert frozen_state(uninterrupted) == frozen_state(resumed)

    def test_a_state_is_a_snapshot(self, name: str, model: Any) -> None:
        method = make(name)
        method.select(model, BATCHES[0])
        state = method.state_dict()
        kept = copy.deepcopy(state)
        method.select(model, BATCHES[1])
        for key, value in state.items():
            equal = torch.equal(value, kept[key]) if isinstance(value, torch.Tensor) else value == kept[key]
            assert equal, key

    def test_a_checkpoint_written_by_an_earlier_version_loads(self, name: str, tmp_path: Path) -> None:
        """The file format, spelled out: checkpoints live longer than code."""
        if name == "uds":
            pytest.skip("its state has tensors; tests/laws/test_online_laws.py holds it")
        values: dict[str, Any] = {"seed": 0, "selections": 7} if name == "random" else {"selections": 7}
        record = {"format": 1, "selector": name, "step": 7, "values": values, "totals": {}}
        folder = tmp_path / "checkpoint-7" / "siftune"
        folder.mkdir(parents=True)
        (folder / "selector.json").write_text(json.dumps(record))
        save_file({}, folder / "selector.safetensors")
        method = make(name)
        method.load_state_dict(checkpoints.read(folder.parent, method).selector)
        assert method.state_dict() == {**values, "steps": 7}
        with pytest.raises(UserError, match=f"{name} keeps"):
            method.load_state_dict({"selections": 7, "sketches": 0})

    def test_no_selection_before_start_step(self, name: str, model: Any) -> None:
        method = make(name, start_step=2)
        for batch in BATCHES[:2]:
            kept = method.select(model, batch)
            assert kept.indices.tolist() == list(range(len(LENGTHS)))
            assert torch.isnan(kept.scores.total).all()
            assert "start_step=2" in kept.scores.reasons[0]
        kept = method.select(model, BATCHES[2])
        assert torch.isfinite(kept.scores.total).all()
        assert len(kept.indices) == (len(LENGTHS) if name in KEEPS_ALL else 2)
        assert torch.equal(kept.indices, make(name).select(model, BATCHES[2]).indices), "an early step is no selection"

    def test_start_step_counts_optimiser_steps_where_a_loop_accumulates(self, name: str, model: Any) -> None:
        method = make(name, start_step=1)
        scored = []
        for step in range(2):
            method.new_step()
            for batch in BATCHES[2 * step : 2 * step + 2]:
                scored.append(bool(torch.isfinite(method.select(model, batch).scores.total).all()))
        assert scored == [False, False, True, True]
        again = make(name, start_step=1)
        again.load_state_dict(method.state_dict())
        assert torch.isfinite(again.select(model, BATCHES[0]).scores.total).all(), "a resumed loop starts over"

    def test_several_micro_batches_are_one_choice(self, name: str, model: Any) -> None:
        if name in ONE_BATCH:
            with pytest.raises(UserError, match="window='step'"):
                make(name, window="step").check_keep(8)
            return
        method = make(name)
        method.select(model, BATCHES[3])
        parts = [method.measure(model, batch) for batch in BATCHES[:2]]
        joined = Measured.join(parts)
        assert joined.rows == 2 * len(LENGTHS)
        scores = method.combine(joined)
        chosen = method.choose(scores, joined, 5)
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == 5
        if name not in BLIND:
            together = torch.cat([method.combine(part).total for part in parts])
            if "alpha" not in scores.parts:
                same(scores.total, together)
