"""`siftune select daar --generator`: rows written by a server or a local model, shown, editable, never paid twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import siftune
from siftune.cli.main import main
from siftune.demo import corpus
from siftune.offline.daar.seeds import read_seeds
from tests.hostile import Hostile, hostile
from tests.tiny import save_tiny

DOMAINS = """
domains:
  reasoning: Draw the conclusion that follows.
  coding: Write or read a program.
settings: {rows: 8, attempts: 20, space: embedding}
"""


def answer(body: dict[str, Any]) -> str:
    """Rows of the corpus, drawn by the request's seed: of the domain that the request names first."""
    request = body["messages"][-1]["content"]
    domain = min(("reasoning", "coding"), key=lambda name: request.index(f'"{name}"'))
    count = 5 if "Write 5" in request else 1
    rows = [row for row in corpus.rows(400, body["seed"] % 1000) if row["source"] == domain][:count]
    return "\n\n".join(
        f"{n}. **Instruction:** {row['instruction']}\n**Input:** {row['input'] or 'None'}\n**Output:** {row['output']}"
        for n, row in enumerate(rows, 1)
    )


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    corpus.write(tmp_path, count=300, per_domain=3, held=10)
    save_tiny(tmp_path / "model")
    (tmp_path / "domains.yaml").write_text(DOMAINS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(server: Hostile, *more: str) -> list[str]:
    said = [
        "select",
        "daar",
        "pool.jsonl",
        "--model",
        "./model",
        "--generator",
        server.url,
        "--domains",
        "domains.yaml",
    ]
    return [*said, "--keep", "20%", "--probe-rows", "100", *more]


@pytest.mark.slow
def test_from_a_sentence_per_domain_to_chosen_rows(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hostile({}, answer) as server:
        assert main(words(server, "--dry-run")) == 0
        assert not server.tries, "a dry run asks nothing"
        assert main(words(server, "--run", "first", "--out", "one.jsonl")) == 0
        told = capsys.readouterr().out
        assert "8 reasoning, 8 coding rows by the generator" in told
        assert "first/domains/" in told
        asked = sum(server.tries.values())
        assert main(words(server, "--run", "first", "--out", "two.jsonl")) == 0
        shutil.rmtree("first")
        assert main(words(server, "--run", "again", "--keep", "30", "--out", "three.jsonl")) == 0
        assert sum(server.tries.values()) == asked, "what was paid for was asked again"
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
    assert len(Path("one.jsonl").read_text().splitlines()) == 60
    manifest = json.loads(Path("again/manifest.json").read_text())
    assert manifest["info"]["written"]["domains"]["coding"]["rows"] == 8
    assert manifest["info"]["domains"] == ["reasoning", "coding"]
    assert set(manifest["inputs"]) >= {"pool", "model", "domains"}


def test_written_rows_can_be_edited_and_given_as_seeds(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hostile({}, answer) as server:
        assert main(words(server, "--run", "first", "--out", "one.jsonl")) == 0
    said = ["select", "daar", "pool.jsonl", "--model", "./model", "--seeds", "first/seeds.jsonl", "--probe-rows", "100"]
    assert main([*said, "--keep", "20%", "--out", "two.jsonl"]) == 0
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
    capsys.readouterr()
    said = ["select", "daar", "pool.jsonl", "--model", "./model", "--seeds", "first/domains", "--probe-rows", "100"]
    assert main([*said, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    path = Path("first/domains/coding.jsonl")
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:3]))
    assert main([*said, "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["run"] != before["run"], "an edited folder of seeds is another run"
    assert after["info"]["seed_rows"] == {"coding": 3, "reasoning": 8}


def test_a_fitted_run_is_loaded_with_what_was_written(prepared: Path) -> None:
    with hostile({}, answer) as server:
        method = siftune.DaaR(model="./model", generator=server.url, domains="domains.yaml", probe_rows=100)
        pool = siftune.load_pool("pool.jsonl")
        scores = method.fit(pool).score(pool)
        asked = sum(server.tries.values())
        again = siftune.DaaR(model="./model", generator=server.url, domains="domains.yaml", probe_rows=100).fit(pool)
        assert sum(server.tries.values()) == asked
    assert again.learned is not None
    assert method.learned is not None
    assert again.learned.key == method.learned.key
    method.save("run")
    assert read_seeds("run/domains").counts == {"coding": 8, "reasoning": 8}
    loaded = siftune.DaaR.load("run").score(pool)
    assert loaded.info["written"] == scores.info["written"]
    assert loaded.values.tobytes() == scores.values.tobytes()


def test_a_real_few_rows_join_the_written_ones(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = [json.loads(line) for line in Path("seeds.jsonl").read_text().splitlines()]
    Path("real.jsonl").write_text("".join(json.dumps(row) + "\n" for row in real if row["domain"] == "coding"))
    with hostile({}, answer) as server:
        assert main(words(server, "--seeds", "real.jsonl", "--json")) == 0
    facts = json.loads(capsys.readouterr().out)["info"]["written"]["domains"]
    assert (facts["coding"]["real"], facts["coding"]["rows"]) == (3, 8)
    assert (facts["reasoning"]["real"], facts["reasoning"]["rows"]) == (0, 8)


def test_a_server_that_fails_for_now_is_one_sentence_and_the_rerun_goes_on(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siftune.models.server.OpenAIGenerator.first_wait", 0.01)
    original = __import__("siftune.models.server", fromlist=["OpenAIGenerator"]).OpenAIGenerator.__init__

    def quick(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "first_wait": 0.01})

    monkeypatch.setattr("siftune.models.server.OpenAIGenerator.__init__", quick)
    with hostile({}, answer) as server:
        broken = {"count": 0}

        def sometimes(body: dict[str, Any]) -> str:
            broken["count"] += 1
            if broken["count"] > 4:
                raise RuntimeError("gone")
            return answer(body)

        server.answer = sometimes
        assert main(words(server, "--run", "run", "--out", "one.jsonl")) == 2
        said = capsys.readouterr().err
        assert "run the same command again" in said
        assert len(said.strip().splitlines()) == 1
        server.answer = answer
        assert main(words(server, "--run", "run", "--out", "one.jsonl")) == 0
    assert len(Path("one.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--generator", "./nowhere"], "generator='./nowhere' is not a folder here"),
        (["--generator", "https://me:pw@host/v1"], "OPENAI_API_KEY"),
        (["--generator", "./model", "--domains", "none.yaml"], "domains none.yaml cannot be read"),
        (["--domains", "domains.yaml"], "set generator=MODEL"),
        (["--generator", "./model", "--quota", "cooking=50%"], "names the domain 'cooking'"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(
    prepared: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(["select", "daar", "pool.jsonl", "--model", "./model", *more]) == 2
    assert said in capsys.readouterr().err
    assert not Path("siftune-runs").exists()
