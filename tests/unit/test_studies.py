"""The studies' own arithmetic: rank correlations, gradients and first-order gains against plain definitions."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import study_daar  # noqa: E402
import study_rows  # noqa: E402
import study_uds  # noqa: E402

from tests.tiny import tiny_model  # noqa: E402


def example(length: int, *, seed: int, domain: int = 0) -> Any:
    ids = torch.randint(5, 250, (1, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return study_uds.Example(ids, labels, domain)


ROWS = [example(length, seed=length, domain=length % 4) for length in (9, 14, 6, 20)]
HELD_OUT = [example(length, seed=length) for length in (11, 7, 16)]


@pytest.mark.parametrize("name", ["daar-ablations", "uds-claim"])
def test_a_shipped_study_reads_and_an_unknown_key_does_not(name: str, tmp_path: Path) -> None:
    kind = {"daar-ablations": study_daar.Ablations, "uds-claim": study_uds.Claim}[name]
    text = (ROOT / "docs" / "results" / f"{name}.yaml").read_text()
    said = study_rows.read_study(kind, ROOT / "docs" / "results" / f"{name}.yaml")
    assert len(getattr(said, "seeds", None) or said.draws) == 3
    (tmp_path / "more.yaml").write_text(text + "\nlayers: 3\n")
    with pytest.raises(SystemExit, match="unknown key layers"):
        study_rows.read_study(kind, tmp_path / "more.yaml")
    (tmp_path / "less.yaml").write_text("rows: 3\n")
    with pytest.raises(SystemExit, match="lacks"):
        study_rows.read_study(kind, tmp_path / "less.yaml")


def test_rank_correlations() -> None:
    from scipy.stats import spearmanr

    drawn = np.random.default_rng(0).integers(0, 12, size=(3, 80)).astype(float)  # many ties
    a, b, g = drawn[0] + drawn[2], drawn[1] - drawn[2], drawn[2]
    ab, ag, bg = (spearmanr(x, y).statistic for x, y in ((a, b), (a, g), (b, g)))
    assert study_rows.spearman(a, b) == pytest.approx(ab, abs=1e-12)
    expected = (ab - ag * bg) / np.sqrt((1 - ag**2) * (1 - bg**2))
    assert study_rows.partial_spearman(a, b, g) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(study_rows.spearman(a, np.ones(80)))
    assert np.isnan(study_rows.partial_spearman(a, g, g))


def test_gains_are_what_a_small_step_does() -> None:
    """A step of rate r on a row's own gradient lowers the held-out rows' mean loss by r times its gain."""
    model = tiny_model("gpt2", layers=2, width=16).double()  # no layer of it falls back to float32

    def losses(rows: list[Any]) -> list[float]:
        with torch.no_grad():
            return [float(study_uds.answer_loss(live(input_ids=row.ids).logits[0], row)) for row in rows]

    measured = study_uds.measure(model, ROWS, HELD_OUT)
    live = model
    before, rate = np.mean(losses(HELD_OUT)), 1e-8
    for number, row in enumerate(ROWS):
        live = copy.deepcopy(model)
        own = losses([row])[0]
        study_uds.answer_loss(live(input_ids=row.ids).logits[0], row).backward()
        with torch.no_grad():
            for weight in live.parameters():
                weight -= rate * weight.grad
        assert (before - np.mean(losses(HELD_OUT))) / rate == pytest.approx(measured["held_mean"][number], rel=2e-3)
        assert (own - losses([row])[0]) / rate == pytest.approx(measured["own_mean"][number], rel=2e-3)
        assert measured["held_sum"][number] == pytest.approx(measured["held_mean"][number] * row.learnt)
    assert measured["apart"].max() < 1e-6


def test_norms_and_rank_are_those_of_a_full_decomposition() -> None:
    model = tiny_model("llama", layers=2, width=16)
    measured = study_uds.measure(model, ROWS, HELD_OUT)
    for number, row in enumerate(ROWS):
        with torch.no_grad():
            logits = model(input_ids=row.ids).logits[0].double().numpy()
        sigma = np.linalg.svd(logits, compute_uv=False)
        share = sigma / sigma.sum()
        assert measured["nuclear"][number] == pytest.approx(sigma.sum(), rel=1e-6)
        assert measured["frobenius"][number] == pytest.approx(np.sqrt((logits**2).sum()), rel=1e-6)
        assert measured["rank"][number] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
        learnt = logits[row.ids.shape[1] // 3 - 1 : -1]
        answer = np.linalg.svd(learnt, compute_uv=False).sum()
        assert measured["nuclear_answer"][number] == pytest.approx(answer, rel=1e-6)


def test_what_two_runs_share() -> None:
    labels = np.array([0, 1, 2, 3])
    one, other = (study_daar.Run(frozenset(kept), labels, {"validation_accuracy": 0.5}) for kept in ({1, 2}, {2, 3}))
    assert study_daar.shared(one, other) == 50
    cells = study_daar.line("x", [one, other], [one, one], np.array([0, 1, 2, 0]))
    shares, agreements = "50.0 (50.0 to 50.0)", "75.0 (75.0 to 75.0)"
    assert cells[1:] == [shares, "75.0 (50.0 to 100.0)", agreements, "100.0 (100.0 to 100.0)", shares]
