"""Which exact route computes UDS's norms: chosen by a clock, recorded, and without effect on the scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import siftune
from siftune.errors import UserError
from siftune.hook.ledger import Ledger, facts_of
from siftune.models.head import read_head
from siftune.models.hidden_states import iter_hidden_states, real_tokens, unwrap_model
from siftune.online import nuclear
from siftune.online.nuclear import gram_of_rows
from siftune.online.route import EXACT_ROUTES, ExactRoute, ExactRouteName, device_clock
from siftune.online.uds import UDS
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model
from tests.trainers import trainer as live_trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakeClock:
    """A clock that a trial moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, device: torch.device) -> float:
        return self.now


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for an accelerator: rows in groups, routes timed."""
    monkeypatch.setattr(nuclear, "is_accelerator", lambda device: True)


def batches() -> list[dict[str, torch.Tensor]]:
    several = [tiny_batch([5, 40, 17, 1, 60, 33, 34], seed=seed, extra=3) for seed in range(3)]
    several[1]["input_ids"][1] = 7
    return several


class TestChoice:
    @pytest.mark.parametrize(("slow", "expected"), [("eigenvalues", "polar"), ("polar", "eigenvalues")])
    def test_the_faster_route_of_the_first_batch_runs(
        self, slow: ExactRouteName, expected: ExactRouteName, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        clock, calls = FakeClock(), list[ExactRouteName]()
        route = ExactRoute("auto", clock=clock)
        assert route.describe() == ""

        def trial(name: ExactRouteName) -> None:
            calls.append(name)
            clock.now += 0.5 if name == slow else 0.0125

        assert route.choose(GPU, trial) == expected
        assert sorted(calls) == sorted([*EXACT_ROUTES, *EXACT_ROUTES]), "each once to warm up and once for the clock"
        assert route.seconds[slow] == pytest.approx(0.5)
        assert route.choose(GPU, trial) == expected
        assert len(calls) == 4, "decided once"
        assert f"{expected} on Some GPU" in route.describe()
        assert "500.0 ms" in route.describe()
        assert "12.5 ms" in route.describe()

    def test_the_first_call_is_not_timed(self, accelerated: None) -> None:
        clock, called = FakeClock(), set[ExactRouteName]()

        def trial(name: ExactRouteName) -> None:
            clock.now += (1.0 if name == "eigenvalues" else 2.0) if name in called else 100.0
            called.add(name)

        route = ExactRoute("auto", clock=clock)
        assert route.choose(CPU, trial) == "eigenvalues"
        assert route.seconds == {"eigenvalues": 1.0, "polar": 2.0}

    def test_a_cpu_is_not_timed(self) -> None:
        def trial(name: ExactRouteName) -> None:
            raise AssertionError("timed")

        route = ExactRoute("auto")
        assert route.choose(CPU, trial) == "eigenvalues"
        assert route.describe() == "eigenvalues on cpu"
        assert ExactRoute("polar").choose(CPU, trial) == "polar"

    def test_another_device_is_another_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        clock, route = FakeClock(), ExactRoute("auto")
        route.clock = clock

        def trial(name: ExactRouteName) -> None:
            clock.now += 1.0 if name == "polar" else 2.0

        assert route.choose(CPU, trial) == "eigenvalues"
        assert route.choose(GPU, trial) == "polar"
        assert "Some GPU" in route.describe()
        assert route.choose(CPU, trial) == "eigenvalues"
        assert route.describe() == "eigenvalues on cpu"

    def test_the_clock_runs(self) -> None:
        start = device_clock(CPU)
        assert device_clock(CPU) >= start

    def test_options_that_cannot_work(self) -> None:
        with pytest.raises(UserError, match="route='svd'"):
            UDS(keep=1, route="svd").check()  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"route='polar'.*precision"):
            UDS(keep=1, route="polar", precision="fast").check()


class TestScores:
    def test_on_a_cpu_they_are_those_of_each_rows_own_eigenvalues_bit_for_bit(self) -> None:
        for family in ("llama", "gpt2"):
            model = tiny_model(family)
            for batch in batches():
                uds = UDS(keep=1)
                scores = uds.score(model, batch)
                assert uds.provenance() == {"exact_route": "eigenvalues on cpu"}
                head = read_head(unwrap_model(model))
                assert head is not None
                factor = uds._logit_access.factor(head)
                (chunk,) = iter_hidden_states(unwrap_model(model), batch, real_tokens(batch))
                with torch.no_grad():
                    for row, states in zip(chunk.rows, chunk.states, strict=True):
                        roots = (
                            torch.linalg.eigvalsh(gram_of_rows(head.inputs(states)[None], factor)).clamp_min(0).sqrt()
                        )
                        assert float(scores.intra[row]) == float(roots[0].sum())

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
    @pytest.mark.parametrize("options", [{"route": "polar"}, {"route": "auto"}, {"precision": "fast"}])
    def test_in_groups_they_are_those_of_the_cpu(
        self, family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, plain = tiny_model(family), UDS(keep=2, alpha=0.5)
        expected = [plain.select(model, batch) for batch in batches()]
        monkeypatch.setattr(nuclear, "is_accelerator", lambda device: True)
        bar = 1e-4 if "precision" in options else 2e-7
        grouped = UDS(keep=2, alpha=0.5, score_tokens=150, **options)
        for batch, kept in zip(batches(), expected, strict=True):
            scores = grouped.select(model, batch).scores
            for part in ("intra", "inter"):
                np.testing.assert_allclose(scores.parts[part], kept.scores.parts[part], rtol=max(bar, 1e-6))
            np.testing.assert_allclose(scores.total, kept.scores.total, rtol=max(bar, 1e-6))

    def test_rows_that_repeat_exactly_are_computed_by_eigenvalues(self) -> None:
        model, batch = tiny_model("llama"), tiny_batch([64, 20])
        batch["input_ids"][0] = 7
        model.model.layers = torch.nn.ModuleList()  # states without positions: one token 64 times
        polar, plain = UDS(keep=1, route="polar"), UDS(keep=1)
        intra, expected = polar.score(model, batch).intra, plain.score(model, batch).intra
        assert intra[0] == expected[0]
        np.testing.assert_allclose(intra[1], expected[1], rtol=1e-7)

    def test_rows_that_cannot_be_scored(self, accelerated: None) -> None:
        model, batch = tiny_model("llama"), tiny_batch([12, 30, 7])
        batch["attention_mask"][1] = 0
        with torch.no_grad():
            model.model.embed_tokens.weight[7] = torch.nan
        batch["input_ids"][batch["input_ids"] == 7] = 8
        batch["input_ids"][2, 2] = 7
        for route in EXACT_ROUTES:
            scores = UDS(keep=1, route=route).score(model, batch)
            assert torch.isnan(scores.total).tolist() == [False, True, True]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("options", [{"route": "polar"}, {"route": "eigenvalues"}, {"precision": "fast"}])
def test_nothing_is_read_before_the_micro_batch_is_complete(
    family: str, options: dict[str, Any], accelerated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, uds = tiny_model(family).requires_grad_(False), UDS(keep=2, score_tokens=100, **options)
    uds.select(model, batches()[0])  # the head is read and factorised once
    reads: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any) -> Any:
            if inside:
                reads.append(name)
            return original(self, *args)

        return read

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    inside: list[int] = []
    original = UDS._measure_rows

    def measured(self: UDS, *args: Any) -> Any:
        inside.append(1)
        losses = original(self, *args)
        inside.pop()
        return losses

    monkeypatch.setattr(UDS, "_measure_rows", measured)
    uds.select(model, batches()[2])
    assert reads == []


def test_the_choice_is_in_the_log_and_in_the_ledgers_metadata(
    tmp_path: Path, accelerated: None, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = live_trainer(tmp_path, max_steps=2)
    siftune.attach(trainer, UDS(keep=2))
    trainer.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if "exact route" in line]
    assert len(lines) == 1
    facts = facts_of(pq.read_schema(tmp_path / "siftune" / "selection.parquet"))
    assert lines[0] == f"siftune: exact route: {facts['exact_route']}"
    assert "the faster one on the first batch" in facts["exact_route"]


def test_on_a_cpu_the_log_is_silent_and_the_metadata_names_the_route(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = live_trainer(tmp_path, max_steps=2)
    siftune.attach(trainer, UDS(keep=2))
    trainer.train()
    assert "exact route" not in capsys.readouterr().err
    facts = facts_of(pq.read_schema(tmp_path / "siftune" / "selection.parquet"))
    assert facts == {"exact_route": "eigenvalues on cpu"}


def test_parts_that_differ_leave_every_value_in_the_merged_ledger(tmp_path: Path) -> None:
    line: dict[str, Any] = {
        "token_ids": [b"\0" * 16],
        "rows": [0],
        "total": [1.0],
        "parts": {},
        "kept": [True],
        "reasons": {},
    }
    for step, rank, route in ((1, 0, "polar"), (1, 1, "eigenvalues"), (2, 0, "polar")):
        ledger = Ledger(tmp_path, rank=rank, world=2)
        ledger.facts = {"exact_route": route}
        ledger.add(step, [0], **line)
        ledger.flush(step)
    merged = Ledger(tmp_path, world=2).merge()
    assert merged is not None
    assert facts_of(pq.read_schema(merged)) == {"exact_route": "polar | eigenvalues"}
