"""The contract of a method as functions: the tests of siftune's own methods, for a method of any package.

    from siftune.testing import check_offline_method
    def test_my_method(): check_offline_method(MyMethod())

Each raises an AssertionError that names the broken rule. No pytest is needed. Cost: seconds, on a pool of 120 short rows and
a model of a few thousand weights, both created in the call.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .data.load import load_pool
from .engines.local import LocalEngine
from .errors import UserError
from .models.store import Store
from .offline.base import OfflineMethod
from .online.base import IGNORED, Measured, OnlineMethod
from .records import Pool, Shard
from .runs.options import field_docs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORDS = {
    "mathematics": "add multiply integral number fraction equation solve sum digits prime",
    "coding": "def return python loop list function class print import compile",
    "history": "king empire war treaty century revolution queen battle crown city",
}
LENGTHS = (12, 30, 7, 21, 3, 16)
"""Tokens of the rows of an example batch."""


# --- offline ----------------------------------------------------------------------------------------------------------


def check_offline_method(method: OfflineMethod, pool: Pool | None = None) -> None:
    """Check an offline method against the contract; `method` is an unfitted instance and is left unfitted.

    `pool` is for a method that needs special rows; the default has 120 rows with a column `source`.
    Raises AssertionError.

    >>> check_offline_method(DistinctWords(least=2))
    """
    with tempfile.TemporaryDirectory() as folder:
        pool = example_pool(Path(folder)) if pool is None else pool
        _is_keyword_only(method)

        def fresh() -> OfflineMethod:
            return replace(method)  # type: ignore[type-var]

        states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
        fitted = fresh()
        assert fitted.fit(pool) is fitted, "fit does not return self"
        scores = fitted.score(pool)
        assert random.getstate() == states[0], "fit or score draws from Python's global random state"
        assert np.random.get_state()[1].tobytes() == states[1], "fit or score draws from numpy's global random state"  # type: ignore[index]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2]), "fit or score draws from torch's global random state"

        values = scores.values
        assert values.shape == (len(pool),), f"scores have shape {values.shape} and the pool {len(pool)} rows"
        assert values.dtype == np.float32, f"scores are {values.dtype}, not float32"
        unscored = set(np.flatnonzero(np.isnan(values)).tolist())
        assert unscored == set(scores.reasons), "a row has a score or a reason, never both and never neither"
        assert dict(pool.reasons).items() <= dict(scores.reasons).items(), "the pool's own reasons are lost"

        again = fresh().fit(pool).score(pool)
        assert again.values.tobytes() == values.tobytes(), "a second run gives other scores"
        _budgets_are_nested(scores, pool)
        _task_survives_pickling(fitted, pool)
        for expected in ("computed", "reused"):
            with_engine = fresh()
            engine = with_engine.engine = LocalEngine(Store(Path(folder) / "shards"))
            with_engine.store = Store(Path(folder) / "fits")
            through = with_engine.fit(pool).score(pool)
            assert through.values.tobytes() == values.tobytes(), "an engine with a cache gives other scores"
            assert through.reasons == scores.reasons, "an engine with a cache gives other reasons"
            assert getattr(engine, expected) > 0, f"the engine {expected} no shard: is the task's key stable?"
        if method.saves():
            fitted.save(folder)
            settings = {item.name: getattr(method, item.name) for item in dataclasses.fields(method) if item.init}  # type: ignore[arg-type]
            loaded = type(method).load(folder, **settings).score(pool)
            assert loaded.values.tobytes() == values.tobytes(), "a saved and loaded fit gives other scores"


def example_pool(folder: Path) -> Pool:
    """120 rows of three domains, shuffled, two of them copies, as a pool read from a file in `folder`."""
    rows = []
    for domain, words in WORDS.items():
        drawn = random.Random(domain)
        for number in range(40):
            question = " ".join(drawn.choices(words.split(), k=4)) + "?"
            answer = " ".join(drawn.choices(words.split(), k=drawn.randint(3, 9))) + f" {number}"
            rows.append({"instruction": question, "input": "", "output": answer, "source": domain})
    random.Random(0).shuffle(rows)
    rows[50] = rows[51] = dict(rows[7])
    path = folder / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_pool(str(path), cache=str(folder / "cache"))


def _is_keyword_only(method: OfflineMethod | OnlineMethod) -> None:
    """A keyword-only dataclass with a docstring under each option."""
    name = type(method).__name__
    assert dataclasses.is_dataclass(method), (
        f"{name} is no dataclass; decorate it with @dataclass(kw_only=True, eq=False)"
    )
    notes = field_docs(type(method))
    for item in dataclasses.fields(method):
        if item.init:
            assert item.kw_only, f"{name}.{item.name} is not keyword-only; use @dataclass(kw_only=True, eq=False)"
            assert notes.get(item.name), f"{name}.{item.name} has no docstring, which is its help on the command line"


def _budgets_are_nested(scores: Any, pool: Pool) -> None:
    inside: set[int] = set()
    for fraction in (0.05, 0.2, 0.5, 1.0):
        rows = scores.keep(fraction=fraction).rows
        budget = min(int((~np.isnan(scores.values)).sum()), int(fraction * len(pool.eligible) + 0.5))
        assert len(rows) == budget, f"{len(rows)} rows are kept at {fraction:.0%}, not {budget}"
        assert (np.diff(rows) > 0).all(), "the kept rows are not in the pool's order"
        kept = set(rows.tolist())
        assert inside <= kept, f"the rows kept at {fraction:.0%} do not contain those of a smaller budget"
        assert not kept & set(pool.reasons), "a bad row is kept"
        inside = kept


def _task_survives_pickling(fitted: OfflineMethod, pool: Pool) -> None:
    task = fitted.shard_task(pool)
    unpickled = pickle.loads(pickle.dumps(task))
    assert unpickled.key == task.key, "the pickled shard task has another key"
    shard = Shard(0, 0, len(pool))
    first, second = task(pool, shard), unpickled(pool, shard)
    assert first.reasons == second.reasons, "the pickled shard task gives other reasons"
    for name, values in first.columns.items():
        assert len(values) == len(shard), f"column {name} has {len(values)} of {len(shard)} rows"
        assert np.array_equal(values, second.columns[name], equal_nan=values.dtype.kind == "f"), (
            f"the pickled shard task gives another column {name}"
        )


# --- online -----------------------------------------------------------------------------------------------------------


def check_online_method(method: OnlineMethod, model: PreTrainedModel | None = None) -> None:
    """Check an online method against the contract; `method` is an instance that has selected nothing, with `keep` of 2 rows.

    `model` defaults to a Llama of a few thousand weights. Raises AssertionError.

    >>> check_online_method(MyLoss(keep=2))
    """
    network: Any = example_model() if model is None else model
    batches = [example_batch(seed) for seed in range(3)]
    _is_keyword_only(method)

    def fresh(**changed: Any) -> OnlineMethod:
        created: OnlineMethod = replace(method, **changed)
        return created

    _scores_change_nothing(fresh(), network, batches[0])
    _selections_follow(fresh, network, batches)
    _model_is_left_alone(fresh(), copy.deepcopy(network).train(), batches[0])
    _state_travels(fresh, network, batches)
    kept = fresh(keep="all").select(network, batches[0])
    assert kept.indices.tolist() == list(range(len(LENGTHS))), "keep='all' leaves rows out"
    early = fresh(start_step=1).select(network, batches[0])
    assert len(early.indices) == len(LENGTHS), "rows are left out before start_step"
    if method.needs_forward:
        _rows_are_scored_by_themselves(fresh(), network, batches)


def example_model() -> PreTrainedModel:
    """A Llama of two layers and width 32, on the CPU, with the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def example_batch(
    seed: int = 0, *, extra: int = 0, side: Literal["right", "left"] = "right"
) -> dict[str, torch.Tensor]:
    """Six rows of random tokens, padded on one side (`extra` more columns than needed), a third of each masked."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(LENGTHS) + extra
    ids = torch.zeros(len(LENGTHS), columns, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(LENGTHS):
        tokens = torch.randint(5, 261, (length,), generator=generator)
        start = 0 if side == "right" else columns - length
        ids[row, start : start + length], mask[row, start : start + length] = tokens, 1
        labels[row, start + length // 3 : start + length] = tokens[length // 3 :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _plain(state: Mapping[str, Any]) -> str:
    """A selector's state as text, which only tensors and JSON values allow."""
    values = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    return json.dumps(values, sort_keys=True)


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-5, atol=1e-6, equal_nan=True)


def _scores_change_nothing(method: OnlineMethod, model: Any, batch: Mapping[str, Any]) -> None:
    before = _plain(method.state_dict())
    scores = method.score(model, batch)
    assert _plain(method.state_dict()) == before, "score changes the state; only select may"
    for name, values in {"total": scores.total, **scores.parts}.items():
        assert values.dtype == torch.float64, f"{name} is {values.dtype}, not float64"
        assert values.shape == (len(LENGTHS),), f"{name} has shape {tuple(values.shape)} for {len(LENGTHS)} rows"
        assert values.device.type == "cpu", f"{name} is on {values.device}, not on the CPU"
    unscored = torch.isnan(scores.total).nonzero().flatten().tolist()
    assert unscored == sorted(scores.reasons), "a row has a score or a reason, never both and never neither"
    assert torch.equal(method.score(model, batch).total, scores.total), (
        "scoring the same batch again gives other scores"
    )


def _selections_follow(fresh: Callable[..., OnlineMethod], model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """`select` is measure, combine, choose, commit; it keeps `count` rows, ascending, and changes the state."""
    method, steps = fresh(), fresh()
    for batch in batches:
        before = _plain(method.state_dict())
        kept = method.select(model, batch)
        assert _plain(method.state_dict()) != before, "select does not change state_dict()"
        chosen = kept.indices.tolist()
        assert chosen == sorted(set(chosen)), "indices are not ascending and distinct"
        assert len(chosen) == method.count(len(LENGTHS)), f"{len(chosen)} rows kept, not {method.count(len(LENGTHS))}"
        steps.new_step()
        measured = Measured.join([steps.measure(model, batch)])
        for name, values in batch.items():
            trained = kept.batch[name]
            if name == "labels" and measured.label_masks:
                values = torch.where(trained == IGNORED, trained, values)
                counts = [int(mask.sum()) for mask in measured.label_masks]
                assert (trained[:, 1:] != IGNORED).sum(dim=1).tolist() == counts, (
                    "other labels are masked than measured"
                )
            assert torch.equal(trained, values[kept.indices]), f"{name} of the kept rows is not the batch's"
        scores = steps.combine(measured)
        indices = steps.choose(scores, measured, steps.count(measured.rows))
        steps.commit(measured, scores, indices)
        assert torch.equal(indices, kept.indices), "select keeps other rows than measure, combine, choose, commit"


def _model_is_left_alone(method: OnlineMethod, model: Any, batch: dict[str, torch.Tensor]) -> None:
    parameters = list(model.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 3.0)
    parameters[len(parameters) // 2].requires_grad_(False)
    list(model.modules())[-1].eval()

    def facts() -> Any:
        weights = [(float(p.detach().sum()), p.requires_grad, p.grad is None) for p in model.parameters()]
        flags = [(module.training, len(module._forward_hooks)) for module in model.modules()]
        states = torch.get_rng_state().tolist(), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[index]  # noqa: NPY002
        modes = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
        return weights, flags, float(next(model.parameters()).grad.sum()), states, modes

    before, copied = facts(), {name: value.clone() for name, value in batch.items()}
    method.select(model, batch)
    assert facts() == before, (
        "select changes weights, gradients, training flags, hooks, torch's modes or a global random state"
    )
    assert all(torch.equal(batch[name], value) for name, value in copied.items()), "select changes the batch"


def _state_travels(fresh: Callable[..., OnlineMethod], model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    uninterrupted, resumed = fresh(), fresh()
    uninterrupted.select(model, batches[0])
    resumed.load_state_dict(copy.deepcopy(uninterrupted.state_dict()))
    for batch in batches[1:]:
        first, second = uninterrupted.select(model, batch), resumed.select(model, batch)
        assert torch.equal(first.indices, second.indices), "a saved and loaded selector keeps other rows"
    try:
        fresh().load_state_dict({"something": 1})
    except UserError:
        return
    raise AssertionError("load_state_dict accepts the state of another method; raise siftune.UserError")


def _rows_are_scored_by_themselves(method: OnlineMethod, model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """Neither padding nor the order of the rows enters a score."""
    method.select(model, batches[1])
    expected = method.score(model, batches[0])
    for side in ("right", "left"):
        padded = method.score(model, example_batch(0, extra=9, side=side)).total
        assert _close(padded, expected.total), f"padding on the {side} enters the scores"
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = method.score(model, {name: value[order] for name, value in batches[0].items()})
    for name, values in {"total": expected.total, **expected.parts}.items():
        other = permuted.total if name == "total" else permuted.parts[name]
        assert _close(other, values[order]), f"permuted rows have other scores ({name})"
