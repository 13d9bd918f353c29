"""`siftune plan`: exact counts, estimates from a measured sample, and what a generator will be asked for."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from siftune.cli.main import main
from siftune.demo import corpus
from siftune.demo.embedded import model_folder
from siftune.demo.story import DOMAINS
from siftune.errors import UserError
from siftune.offline.daar.stage_one import StageOne
from siftune.runs.options import PlanOptions
from siftune.runs.plan import plan, writing


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = corpus.write(tmp_path_factory.mktemp("plan"), count=300) / "pool.jsonl"
    path.write_text(path.read_text() + '{"instruction": "no answer"}\nnot json\n')
    return path


def facts(pool: Path, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    options = PlanOptions(pool=[str(pool)], cache=str(tmp_path / "cache"), sample=40)
    return plan(options, {"model": str(model_folder()), **settings})


def test_rows_are_counted_and_tokens_estimated(pool: Path, tmp_path: Path) -> None:
    found = facts(pool, tmp_path)
    assert found["rows"]["usable"] == 300
    assert sum(found["rows"]["reasons"].values()) == 2
    assert found["measured"]["sample_rows"] == 40
    assert found["estimate"]["tokens"] == round(300 * found["measured"]["tokens_per_row"])
    assert found["estimate"]["probe_rows"] == 150
    assert found["writing"] is None


@pytest.mark.slow
def test_a_generators_requests_are_bounded_and_the_real_ones_lie_within(tmp_path: Path) -> None:
    told = {"a": "Sums.", "b": "Capitals."}
    said = tmp_path / "domains.yaml"
    settings = {"seeds": 2, "rows": 4, "attempts": 3, "max_new_tokens": 40}
    prompts = (DOMAINS.read_text().split("prompts:")[1]).split("settings:")[0]
    said.write_text(f"domains: {json.dumps(told)}\nprompts:{prompts}settings: {json.dumps(settings)}\n")
    found = writing({"generator": str(model_folder()), "domains": str(said)})
    assert found is not None
    assert found["requests_at_least"] == 2 * (1 + 2)
    assert found["requests_at_most"] == 2 * (5 + 3)
    assert found["reply_tokens_at_most"] == 16 * 40
    model = str(model_folder())
    with suppress(UserError):  # replies of 40 tokens may hold no row; the requests are counted all the same
        StageOne(generator=model, domains=str(said), seeds=None, model=model, seed=0, cache=tmp_path).run()
    asked = sum(len(path.read_text().splitlines()) for path in (tmp_path / "replies").glob("*.jsonl"))
    assert 1 <= asked <= found["requests_at_most"]


def test_the_command_says_it_to_a_person_and_as_json(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(model_folder())
    words = ["plan", str(pool), "--model", model, "--generator", model, "--sample", "20", "--cache", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "writing" in printed
    assert "a rerun repeats no request" in " ".join(printed.split())
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["writing"]["domains"] == 4


def test_a_sample_of_nothing_is_refused(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sample must be >= 1, got 0"):
        plan(PlanOptions(pool=[str(pool)], cache=str(tmp_path), sample=0), {"model": str(model_folder())})
