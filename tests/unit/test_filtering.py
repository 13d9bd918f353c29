"""Near-copies and benchmark texts are left out of every selection, each with a reason."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftune.data.formats import text_of
from siftune.errors import UserError
from siftune.offline import near_copies as module
from siftune.offline.benchmark_overlap import read_benchmarks
from siftune.offline.near_copies import near_copies, shingles, similarity
from siftune.records import Pool
from siftune.runs.filtering import LEFT_OUT, benchmark_files, read_threshold
from siftune.runs.options import KeepOptions, SelectOptions
from siftune.runs.select import recut, select
from tests.pools import make_pool

WORDS = [f"word{number}" for number in range(3000)]


def sentences(count: int, seed: int, words: int = 30) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=words)) for _ in range(count)]


def naive(pool: Pool, threshold: float) -> dict[int, int]:
    """The definition: every row against every row kept before it, sets of words and pairs of words."""
    kept: list[tuple[int, set[Any]]] = []
    copies = {}
    for row in pool.read(pool.eligible.tolist()):
        words = text_of(row).split()
        both = set(words) | set(itertools.pairwise(words))
        alike = [other for other, theirs in kept if len(both & theirs) / len(both | theirs) >= threshold]
        if alike:
            copies[row.row] = alike[0]
        else:
            kept.append((row.row, both))
    return copies


def one_word_changed(text: str, seed: int) -> str:
    words = text.split()
    words[random.Random(seed).randrange(len(words))] = "changed"
    return " ".join(words)


# --- near-copies ------------------------------------------------------------------------------------------------------


def test_near_copies_are_those_of_the_definition() -> None:
    originals = sentences(150, 0)
    changed = [one_word_changed(text, number) for number, text in enumerate(originals[:60])]
    halves = [" ".join(text.split()[:18] + other.split()[:12]) for text, other in itertools.pairwise(originals[:60])]
    texts = [*originals, *changed, *halves]
    random.Random(1).shuffle(texts)
    pool = make_pool([{"text": text} for text in texts], {4: "empty answer: output"})
    found = near_copies(pool, 0.8)
    assert set(found) == set(naive(pool, 0.8))
    assert len(found) >= 55


def test_a_reason_names_the_row_that_is_kept() -> None:
    text = sentences(1, 0)[0]
    pool = make_pool([{"text": "something else"}, {"text": text}, {"text": one_word_changed(text, 3)}, {"text": text}])
    assert near_copies(pool, 0.8) == {
        2: "near-duplicate: of row 1 (similarity 0.90)",
        3: "near-duplicate: of row 1 (similarity 1.00)",
    }


def test_a_chain_of_copies_is_dropped_only_where_a_kept_row_is_near() -> None:
    words = sentences(1, 5, words=40)[0].split()
    first, second, third = words[:34], words[3:37], words[6:40]  # neighbours are near, the ends are not
    pool = make_pool([{"text": " ".join(part)} for part in (first, second, third)])
    threshold = similarity(shingles(" ".join(first)), shingles(" ".join(second)))
    assert list(near_copies(pool, threshold)) == [1]


def test_planted_copies_are_found_and_clean_rows_are_not() -> None:
    originals = sentences(2000, 7)
    moved = [" ".join([*text.split()[15:], *text.split()[:15]]) for text in originals[100:200]]
    copies = [one_word_changed(text, number) for number, text in enumerate(originals[:100])]
    found = near_copies(make_pool([{"text": text} for text in [*originals, *copies, *moved]]), 0.8)
    assert len([row for row in found if row >= 2000]) >= 198
    assert not [row for row in found if row < 2000]


def test_rows_without_words_are_no_copies_of_each_other() -> None:
    assert near_copies(make_pool([{"text": "?"}, {"text": "!"}, {"text": "…"}]), 0.5) == {}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_bands_miss_a_pair_at_the_threshold_rarely(threshold: float) -> None:
    rows = module._band_rows(threshold)
    assert (1 - threshold**rows) ** (module.PERMUTATIONS // rows) <= module.MISSED


def test_the_signatures_estimate_the_similarity() -> None:
    text = sentences(1, 9)[0]
    texts = [text, " ".join(text.split()[:24] + sentences(1, 10)[0].split()[:6])]
    pool = make_pool([{"text": one} for one in texts])
    signatures = module._signatures(pool, pool.eligible)
    exact = similarity(shingles(texts[0]), shingles(texts[1]))
    assert abs((signatures[0] == signatures[1]).mean() - exact) < 4 * np.sqrt(exact * (1 - exact) / 128)


# --- benchmarks -------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def test_thirteen_words_in_a_row_or_an_equal_text_are_found(tmp_path: Path) -> None:
    question = sentences(1, 20, words=20)[0]
    path = write(
        tmp_path / "bench.jsonl.gz",
        [
            {"id": 1, "q": "unrelated"},
            {"question": question, "choices": ["what is the capital of France"], "answer": 42},
        ],
    )
    thirteen, twelve = (" ".join(["before", *question.split()[3 : 3 + count], "after"]) for count in (13, 12))
    chat = [{"role": "user", "content": "What is the CAPITAL of France?"}, {"role": "assistant", "content": "Paris"}]
    benchmarks = read_benchmarks([path])

    def reason(row: dict[str, Any]) -> str | None:
        return benchmarks.reason(make_pool([row]).read([0])[0])

    assert reason({"text": thirteen}) == "in a benchmark: 13 words in a row of bench.jsonl.gz line 2"
    assert reason({"text": twelve}) is None
    assert reason({"messages": chat}) == "in a benchmark: a text of bench.jsonl.gz line 2"
    assert reason({"instruction": "unrelated", "output": "42"}) is None, "short texts are in any pool"


def test_a_suite_names_the_files_of_its_tasks(tmp_path: Path) -> None:
    for name in ("mmlu_test", "scienceqa_text_test", "gsm8k_test", "humaneval"):
        write(tmp_path / f"{name}.jsonl", [{"question": name}])
    files = benchmark_files(f"uds:{tmp_path}")
    assert sorted(path.name for path in files) == sorted(
        ["mmlu_test.jsonl", "scienceqa_text_test.jsonl", "gsm8k_test.jsonl", "humaneval.jsonl"]
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no-such-file.jsonl", "--decontaminate no-such-file.jsonl is neither a file nor SUITE:FOLDER"),
        ("a.jsonl,,b.jsonl", "neither a file|has an empty part"),
        ("udss:.", "suite udss is not known"),
    ],
)
def test_what_is_no_benchmark_is_refused(value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark_files(value)


def test_a_line_that_is_no_json_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text('{"a": "b"}\n{broken\n')
    with pytest.raises(UserError, match=r"bench\.jsonl line 2 is no JSON"):
        read_benchmarks([path])


@pytest.mark.parametrize("value", ["many", "0", 1.5, True, "-1", "nan", "semantic:0.9"])
def test_a_threshold_that_is_no_similarity_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=f"--near-duplicates {value} must be a similarity above 0 and at most 1"):
        read_threshold(value)


# --- in a selection ---------------------------------------------------------------------------------------------------


def test_a_selection_leaves_them_out_and_is_cut_again_without_the_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    texts = sentences(30, 30)
    rows = [{"text": text} for text in [*texts, one_word_changed(texts[0], 1), texts[1]]]
    pool = str(write(tmp_path / "pool.jsonl", rows))
    bench = write(tmp_path / "bench.jsonl", [{"question": texts[5]}])
    options = {"pool": [pool], "near_duplicates": "0.8", "decontaminate": str(bench), "run": str(tmp_path / "run")}
    done = select("random", SelectOptions(keep="all", **options))
    assert done.subset is not None
    assert set(done.subset.rows) == set(range(30)) - {5}
    assert done.manifest["rows"]["reasons"] == {"in a benchmark": 1, "near-duplicate": 2}
    stage = next(stage for stage in done.manifest["stages"] if stage["name"] == "filter")
    assert stage["counts"] == {"in_a_benchmark": 1, "near_duplicates": 2}
    assert json.loads((tmp_path / "run" / LEFT_OUT).read_text())["31"] == "near-duplicate: of row 1 (similarity 1.00)"
    bench.write_text('{"question": "other"}\n')
    again = recut(str(tmp_path / "run"), KeepOptions(keep=10, out=str(tmp_path / "ten.jsonl")))
    assert again.subset is not None
    assert not {5, 30, 31} & set(again.subset.rows)
    with pytest.raises(UserError, match="its input decontaminate was"):
        select("random", SelectOptions(keep="all", **options))


def test_a_selection_that_leaves_out_all_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    rows = [{"text": text} for text in sentences(3, 40)]
    pool, bench = write(tmp_path / "pool.jsonl", rows), write(tmp_path / "bench.jsonl", rows)
    options = SelectOptions(pool=[str(pool)], keep="all", decontaminate=str(bench), run=str(tmp_path / "run"))
    with pytest.raises(UserError, match="leave out all 3 usable rows of the pool"):
        select("random", options)
