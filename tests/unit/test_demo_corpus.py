"""The shipped corpus: what the grammars write, drawn by a seed, in disjoint parts, and bounded."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from siftune.cli.main import main
from siftune.demo import corpus
from siftune.errors import UserError


def test_the_shipped_file_is_what_the_script_writes() -> None:
    make_corpus = pytest.importorskip("tools.demo.make_corpus", reason="the grammars are in the repository alone")
    assert gzip.decompress(corpus.FILE.read_bytes()).decode() == make_corpus.text()


@pytest.mark.parametrize("count", [97, 600, 6000])
def test_seed_0_draws_the_rows_that_the_grammars_write(count: int) -> None:
    grammars = pytest.importorskip("tools.demo.grammars", reason="the grammars are in the repository alone")
    assert corpus.rows(count, 0) == grammars.rows(count, 0)
    assert corpus.held_out(min(count, 800), 0) == grammars.held_out(min(count, 800), 0)
    assert corpus.seed_rows(15, 0) == grammars.seed_rows(15, 0)


def test_a_seed_fixes_the_rows_and_another_seed_changes_them() -> None:
    assert corpus.rows(300, 3) == corpus.rows(300, 3)
    assert corpus.rows(300, 3) != corpus.rows(300, 4)
    assert corpus.seed_rows(5, 3) == corpus.seed_rows(5, 3) != corpus.seed_rows(5, 4)
    sources = [Counter(row["source"] for row in corpus.rows(300, seed)) for seed in (0, 3)]
    assert sources[0] == sources[1] == corpus.mix(300)


def test_the_parts_share_no_question_and_no_row_twice() -> None:
    parts = [corpus.rows(10_000, 1), corpus.held_out(1000, 1), corpus.seed_rows(20, 1)]
    questions = [(row["instruction"], row["input"]) for rows in parts for row in rows]
    assert len(set(questions)) == len(questions) == 11_080


def test_a_changed_row_does_not_change_the_corpus() -> None:
    row = corpus.rows(1, 0)[0]
    row["output"] = "changed"
    assert corpus.rows(1, 0)[0]["output"] != "changed"


def test_write_creates_three_files(tmp_path: Path) -> None:
    folder = corpus.write(tmp_path / "data", count=40, per_domain=3, held=8, seed=2)
    pool = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    assert pool == corpus.rows(40, 2)
    assert len((folder / "seeds.jsonl").read_text().splitlines()) == 12
    assert len((folder / "held_out.jsonl").read_text().splitlines()) == 8


def test_more_rows_than_the_corpus_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"84 rows exceed the 80 of the embedded corpus \(seeds\)"):
        corpus.seed_rows(21, 0)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--rows", "10001"]) == 2
    message = capsys.readouterr().err
    assert "10,001 rows exceed the 10,000 of the embedded corpus (pool); ask for at most 10,000" in message
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "FILE", tmp_path / "corpus.jsonl.gz")
    monkeypatch.setattr(corpus, "_stored", corpus._stored.__wrapped__)
    with pytest.raises(UserError, match=r"corpus.jsonl.gz is missing; reinstall siftune"):
        corpus.rows(1, 0)
