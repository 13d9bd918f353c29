"""What every method with a target shares: reading it, leaving its rows out, picking, budgets."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftune.errors import UserError
from siftune.offline import picking
from siftune.offline.bm25 import BM25
from siftune.offline.picking import matrix, round_robin, subtask_means
from siftune.offline.target import normalised_text, read_target
from siftune.records import Row
from siftune.runs.options import KeepOptions, SelectOptions
from siftune.runs.select import recut, select
from tests.pools import make_pool

POOL = [
    {"instruction": f"topic{number % 4} item{number}", "input": "", "output": f"text{number}"} for number in range(40)
]
TARGET_ROWS = [{"instruction": f"topic{number}", "input": "", "output": "answer"} for number in range(4)]
TARGET = [{"text": f"topic{number}"} for number in range(3)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_target_may_have_any_form_of_a_pool(tmp_path: Path) -> None:
    chat = [{"messages": [{"role": "user", "content": "topic1?"}, {"role": "assistant", "content": "yes"}]}] * 2
    assert len(read_target(write(tmp_path / "chat.jsonl", chat), cache=tmp_path)) == 2
    assert len(read_target(TARGET)) == 3
    assert len(read_target(make_pool(TARGET))) == 3


def test_a_target_of_one_row_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="the target has one row"):
        read_target(TARGET[:1])


def test_subtasks_are_numbered_in_the_order_of_the_rows() -> None:
    target = read_target([{"text": "a", "subtask": "y"}, {"text": "b", "subtask": "x"}, {"text": "c", "subtask": "y"}])
    assert target.subtasks == ("y", "x")
    assert [group.tolist() for group in target.groups] == [[0, 2], [1]]
    assert target.facts() == {"rows": 3, "subtasks": {"y": 2, "x": 1}}


@pytest.mark.parametrize("subtask", [None, "", 3])
def test_a_row_without_the_subtask_that_others_have_is_refused_by_line(tmp_path: Path, subtask: Any) -> None:
    path = write(tmp_path / "target.jsonl", [{"text": "a", "subtask": "y"}, {"text": "b", "subtask": subtask}])
    with pytest.raises(UserError, match=r"target\.jsonl line 2 has subtask=.*name the subtask of every row"):
        read_target(path, cache=tmp_path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no-such-file.jsonl", "^target: .*no-such-file.jsonl"),
        ([], "target: it has no row"),
        (["text"], "target: it is not a list of rows"),
    ],
)
def test_what_is_no_target_is_refused(target: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BM25(target=target).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pick": "best"}, "pick='best' is not known; use round-robin, mean, max"),
        ({"k1": -1.0}, "k1=-1.0 must be 0 or more"),
        ({"b": 1.5}, "b=1.5 must be from 0 to 1"),
        ({"target": [{"text": "?"}, {"text": "!"}]}, "no row holds a word"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BM25(**{"target": TARGET, **settings}).check()


# --- rows of the target in the pool -----------------------------------------------------------------------------------


def test_rows_of_the_pool_that_are_in_the_target_are_never_chosen_and_counted() -> None:
    same_text = {"messages": [{"role": "user", "content": "TOPIC3  item3"}, {"role": "assistant", "content": "text3"}]}
    rows = [*POOL, {"instruction": "ｔopic7", "input": "", "output": "Text\n7"}]
    target = make_pool([{"instruction": "topic7", "input": "", "output": "text 7"}, dict(POOL[5])])
    scores = BM25(target=target).fit(make_pool(rows)).score(make_pool(rows))
    assert scores.reasons == {
        5: "in the target: the same row as line 2 of the target",
        40: "in the target: the same text as line 1 of the target",
    }
    assert scores.info["target"]["rows_in_pool"] == 2
    assert not {5, 40} & set(scores.keep(fraction=1.0).rows.tolist())
    chat = BM25(target=make_pool([same_text, same_text])).fit(make_pool(rows)).score(make_pool(rows))
    assert list(chat.reasons) == [3]


def test_the_normalised_text_of_chat_and_alpaca_rows_is_the_same() -> None:
    chat = Row(0, "", "Add 1", "", "2", ({"role": "user", "content": "Add\t1"}, {"role": "assistant", "content": "2"}))
    assert normalised_text(chat) == normalised_text(Row(0, "", "add", "1", "2")) == "add 1 2"


# --- picking ----------------------------------------------------------------------------------------------------------


def naive_round_robin(similarity: np.ndarray[Any, Any], groups: list[list[int]]) -> tuple[list[int], list[int]]:
    """The definition: at every turn, look at every free row."""
    free, order, takers = set(range(similarity.shape[1])), [], []
    turns = [0] * len(groups)
    while free:
        group = len(order) % len(groups)
        target = groups[group][turns[group] % len(groups[group])]
        turns[group] += 1
        row = max(free, key=lambda row: (similarity[target, row], -row))
        free.remove(row)
        order.append(row)
        takers.append(target)
    return order, takers


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3, 4]], [[0, 2], [1, 3, 4]], [[4], [0], [1, 2, 3]]])
@pytest.mark.parametrize("window", [1, 7, 1024])
def test_the_round_robin_is_the_definitions(
    groups: list[list[int]], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picking, "WINDOW", window)
    similarity = np.random.default_rng(0).integers(0, 9, (5, 60)).astype(np.float32)  # many equal ones
    expected = naive_round_robin(similarity, groups)
    order, taker = round_robin(similarity.copy(), np.arange(60), [np.array(group) for group in groups])
    assert (order.tolist(), taker.tolist()) == expected


def test_a_matrix_that_is_large_is_in_a_file_and_gives_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(1).random((3, 50), dtype=np.float32)
    values[:, 7] = np.nan
    expected = round_robin(values.copy(), np.arange(50), [np.arange(3)])[0]
    monkeypatch.setattr(picking, "IN_MEMORY", 0)
    with matrix(3, 50, tmp_path) as stored:
        assert isinstance(stored, np.memmap)
        stored[:] = values
        np.testing.assert_array_equal(round_robin(stored, np.arange(50), [np.arange(3)])[0], expected)
    assert 7 not in expected
    assert list(tmp_path.iterdir()) == []


def test_mean_and_max_are_of_the_target_rows_or_of_the_subtasks_means() -> None:
    similarity = np.array([[0.0, 1.0, 5.0]])
    groups = [np.array([0, 1]), np.array([2])]
    assert subtask_means(similarity, groups, by_subtask=False).tolist() == [[0, 1, 5]]
    assert subtask_means(similarity, groups, by_subtask=True).tolist() == [[0.5, 5]]


@pytest.mark.parametrize("pick", ["round-robin", "mean", "max"])
def test_the_score_of_every_pick(pick: Any) -> None:
    pool = make_pool(POOL)
    method = BM25(target=TARGET, pick=pick).fit(pool)
    similarity = method.shard_task(pool)(pool, pool.shards()[0]).columns["similarity"].astype(np.float64)
    scores = method.score(pool)
    if pick == "round-robin":
        assert sorted(scores.values.tolist()) == [-float(place) for place in reversed(range(40))]
        chosen = scores.keep(count=9).rows
        assert sorted(chosen % 4) == [0, 0, 0, 1, 1, 1, 2, 2, 2], "each target row brings in three"
        assert scores.target_rows is not None
        assert (scores.target_rows[chosen] == chosen % 4).all()
    else:
        expected = similarity.mean(axis=1) if pick == "mean" else similarity.max(axis=1)
        np.testing.assert_allclose(scores.values, expected, rtol=1e-6)


def test_subtasks_take_turns() -> None:
    target = [
        {"text": "topic0", "subtask": "a"},
        {"text": "topic1", "subtask": "b"},
        {"text": "topic2", "subtask": "b"},
    ]
    scores = BM25(target=target).fit(make_pool(POOL)).score(make_pool(POOL))
    assert np.bincount(scores.keep(count=8).rows % 4).tolist() == [4, 2, 2]


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_targets_rows_is_warned_of() -> None:
    scores = BM25(target=TARGET).fit(make_pool(POOL)).score(make_pool(POOL))
    with pytest.warns(UserWarning, match="the target has 3 rows and the budget keeps 2"):
        scores.keep(count=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores.keep(count=3)


def test_a_run_is_cut_again_at_another_budget_without_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    pool = write(tmp_path / "pool.jsonl", [*POOL, TARGET_ROWS[0]])
    target = write(tmp_path / "target.jsonl", TARGET_ROWS)
    done = select(
        "bm25",
        SelectOptions(pool=[pool], keep=12, run=str(tmp_path / "run")),
        {"target": target, "pick": "round-robin"},
    )
    assert done.subset is not None
    assert done.manifest["rows"]["reasons"] == {"in the target": 1}
    monkeypatch.setattr(BM25, "fit", lambda *_: pytest.fail("the model is not needed"))
    smaller = recut(str(tmp_path / "run"), KeepOptions(keep=6, out=str(tmp_path / "six.jsonl")))
    assert smaller.subset is not None
    assert set(smaller.subset.rows) <= set(done.subset.rows)
    assert smaller.subset.scores.target_rows is not None
    with pytest.warns(UserWarning, match="the budget keeps 2"):
        recut(str(tmp_path / "run"), KeepOptions(keep=2, out=str(tmp_path / "two.jsonl")))
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "run" / "rows.parquet")
    brought = [
        target for target, kept in zip(table["target_row"].to_pylist(), table["kept"].to_pylist(), strict=True) if kept
    ]
    assert sorted(brought) == sorted([0, 1, 2, 3] * 3)


def test_the_targets_content_is_part_of_the_runs_identity(tmp_path: Path) -> None:
    first, second = BM25(target=TARGET), BM25(target=[*TARGET, {"text": "more"}])
    assert first.inputs() != second.inputs()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_each_target_row_brought_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    from siftune.reports.rows_file import read_selection, texts_of
    from siftune.reports.target import target_section

    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    pool, path = write(tmp_path / "pool.jsonl", POOL), tmp_path / "target.jsonl"
    target = write(path, [{**row, "subtask": "ab"[number % 2]} for number, row in enumerate(TARGET_ROWS)])
    select("bm25", SelectOptions(pool=[pool], keep=8, run=str(tmp_path / "run")), {"target": target})

    def section() -> Any:
        selection = read_selection(tmp_path / "run")
        return target_section(selection, texts_of(selection, cache=None), cache=None)

    (table,) = section().blocks
    assert table.caption == "4 target rows; 0 brought in nothing"
    assert [row[:2] for row in table.rows] == [("1", "a"), ("2", "b"), ("3", "a"), ("4", "b")]
    assert [row[3] for row in table.rows] == ["2", "2", "2", "2"]
    assert all(f"topic{number} item" in row[4] for number, row in enumerate(table.rows))
    path.write_text(json.dumps({**TARGET_ROWS[0]}) + "\n")
    (note,) = section().blocks
    assert "has changed since the run" in note.text
