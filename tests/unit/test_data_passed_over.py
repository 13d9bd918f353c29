"""Nothing is passed over uncounted: swallowed lines, text after an array, rows that are of another kind than they look."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftune.data import parse
from siftune.data.load import counts, load_pool
from siftune.data.parse_csv import csv_rows
from siftune.errors import UserError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reasons(path: Path) -> dict[int, str]:
    return dict(load_pool(path, on_bad_row="skip").reasons)


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_every_line_that_an_open_quote_takes_in_is_a_bad_row(tmp_path: Path) -> None:
    lines = ["instruction,output", *(f"question {index},answer {index}" for index in range(1000))]
    lines[3] = 'question 2,"answer 2'
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    pool = load_pool(tmp_path / "a.csv", on_bad_row="skip")
    assert (len(pool), len(pool.eligible)) == (1000, 2)
    assert counts(pool.reasons) == {"unparsable line": 998}
    assert pool.reasons[2] == "unparsable line: unexpected end of data; its quotes take in 998 lines, to line 1001"
    assert pool.reasons[999] == "unparsable line: inside the quotes of the row in line 4"
    assert pool.source.locations([2, 999]) == [(str(tmp_path / "a.csv"), 4), (str(tmp_path / "a.csv"), 1001)]
    with pytest.raises(UserError, match="998 of 1000 rows are bad"):
        load_pool(tmp_path / "a.csv")


def test_a_quote_that_a_later_line_closes_is_counted_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('instruction,output\na,"b\nc,d\ne,f\ng,"h"\ni,j\nk,"l\nm"\n')
    assert reasons(tmp_path / "a.csv") == {
        0: "unparsable line: ',' expected after '\"'; its quotes take in 4 lines, to line 5",
        1: "unparsable line: inside the quotes of the row in line 2",
        2: "unparsable line: inside the quotes of the row in line 2",
        3: "unparsable line: inside the quotes of the row in line 2",
    }
    pool = load_pool(tmp_path / "a.csv", on_bad_row="skip")
    assert [row.output for row in pool.read(pool.eligible.tolist())] == ["j", "l\nm"]


def test_a_wrong_number_of_values_over_several_lines_counts_each(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('instruction,output\n"a\nb,c\nd",e,f\ng,h\n')
    found = reasons(tmp_path / "a.csv")
    assert found[0] == "unparsable line: 3 values for 2 columns; its quotes take in 3 lines, to line 4"
    assert len(found) == 3


def test_a_csv_row_beyond_the_limit_is_bad_and_the_next_one_is_read() -> None:
    import io

    text = b'a,b\n1,"' + b"x" * 50 + b"\n" + b"y" * 60 + b"\n3,4\n" + b"z" * 300 + b",5\n6,7\n"
    entries = [(line, row or reason) for line, _, (row, reason) in csv_rows(io.BytesIO(text), "a.csv", longest=100)]
    assert entries == [
        (2, "unparsable line: the row has more than 100 characters; its quotes take in 2 lines, to line 3"),
        (3, "unparsable line: inside the quotes of the row in line 2"),
        (4, {"a": "3", "b": "4"}),
        (5, "unparsable line: the row has more than 100 characters"),
        (6, {"a": "6", "b": "7"}),
    ]


def test_a_first_line_that_is_no_csv_names_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('instruction,"out"put\na,b\n')
    with pytest.raises(UserError, match=r"a\.csv, line 1, which names the columns, is not CSV"):
        load_pool(tmp_path / "a.csv", on_bad_row="skip")


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_text_after_an_array_is_counted(tmp_path: Path) -> None:
    more = "\n".join(json.dumps({"text": f"row {index}"}) for index in range(998))
    (tmp_path / "a.json").write_text('[{"text": "a"}]\n\n' + more + "\n\n")
    expected = f"text after the end of the array; {len(more):,} characters in 998 lines are passed over"
    assert reasons(tmp_path / "a.json") == {1: f"unparsable line: {expected}"}
    assert load_pool(tmp_path / "a.json", on_bad_row="skip").source.locations([1])[0][1] == 3


def test_text_after_an_array_is_counted_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "CHUNK_BYTES", 7)
    (tmp_path / "a.json").write_text('[{"text": "a"}]  \n  tail \n\n of\n text  \n \n')
    expected = "text after the end of the array; 16 characters in 4 lines are passed over"
    assert reasons(tmp_path / "a.json") == {1: f"unparsable line: {expected}"}


def test_an_array_that_is_not_closed_says_what_it_took_in(tmp_path: Path) -> None:
    rows = ",\n".join(json.dumps({"text": f"row {index}"}) for index in range(5))
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{"text": "b},\n' + rows + "]\n")
    (reason,) = reasons(tmp_path / "a.json").values()
    assert reason == (
        f"unparsable line: the array is not closed; {len(rows) + 15:,} characters in 6 lines are passed over"
    )


def test_an_element_beyond_the_limit_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "CHUNK_BYTES", 100)
    monkeypatch.setattr(parse, "LONGEST_ROW", 1000)
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "' + "x" * 5000 + '"}, {"text": "c"}]')
    (reason,) = reasons(tmp_path / "a.json").values()
    assert reason.startswith(
        "unparsable line: an element of the array has more than 1,000 characters, or is not closed; "
    )
    assert "characters in 1 line are passed over" in reason


# --- rows of another kind ---------------------------------------------------------------------------------------------


def test_kto_rows_with_a_false_label_are_not_imitated_and_the_true_ones_are_noted(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index}", "completion": "c", "label": index % 3 != 0} for index in range(9)]
    path = write(tmp_path / "kto.jsonl", rows)
    with pytest.warns(UserWarning, match=r"kto\.jsonl: 6 rows with label: true \(KTO\), kept as rows to imitate"):
        assert reasons(path) == dict.fromkeys((0, 3, 6), "not to imitate: label is false (KTO)")
    with pytest.warns(UserWarning, match="6 rows with label: true"):  # also when the rows come from the cache
        load_pool(path, on_bad_row="skip")
    chats = [
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "c"}],
            "label": label,
        }
        for label in (True, False)
    ]
    with pytest.warns(UserWarning, match="1 row with label: true"):
        assert list(reasons(write(tmp_path / "chat.jsonl", chats))) == [1]
    (tmp_path / "kto.csv").write_text("prompt,completion,label\na,b,True\nc,d,False\n")
    with pytest.warns(UserWarning, match="1 row with label: true"):
        assert list(reasons(tmp_path / "kto.csv")) == [1]


def test_a_label_that_is_no_mark_of_kto_is_the_users_own(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": str(value), "label": value} for value in (0, 1, "sports", None, 2.5)]
    rows += [{"prompt": "p", "completion": "x"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reasons(write(tmp_path / "a.jsonl", rows)) == {}
        alpaca = [{"instruction": "p", "output": "c", "label": False}]
        assert reasons(write(tmp_path / "b.jsonl", alpaca)) == {}


TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio", "audios"])
def test_rows_that_are_about_more_than_text_have_a_reason(tmp_path: Path, column: str) -> None:
    held: list[Any] = ["cat.jpg", ["a.jpg"], [{"path": "a.jpg", "bytes": None}], {"bytes": "abc"}, 3]
    empty: list[Any] = [None, "", " ", [], [None], [""], {"bytes": None, "path": None}, {}]
    for name, row in (("a", {"messages": TURNS}), ("b", {"instruction": "i", "output": "o"}), ("c", {"text": "t"})):
        path = write(
            tmp_path / f"{name}.jsonl", [{**row, "n": n, column: value} for n, value in enumerate(held + empty)]
        )
        reason = f"not text alone: the column {column} is not empty"
        assert reasons(path) == dict.fromkeys(range(len(held)), reason)


def test_a_null_image_of_a_table_is_no_image_and_a_mapped_column_no_medium(tmp_path: Path) -> None:
    table = pa.table(
        {"text": ["a", "b"], "images": pa.array([None, [b"x"]], pa.list_(pa.binary())), "audio": ["x", "y"]}
    )
    pq.write_table(table.drop_columns("audio"), tmp_path / "a.parquet")
    assert list(reasons(tmp_path / "a.parquet")) == [1]
    pq.write_table(table.drop_columns("images"), tmp_path / "b.parquet")
    assert dict(load_pool(tmp_path / "b.parquet", columns={"text": "audio"}).reasons) == {}
    pq.write_table(pa.table({"text": ["a"], "image": [float("nan")]}), tmp_path / "c.parquet")
    assert reasons(tmp_path / "c.parquet") == {}


def test_the_placeholder_of_an_image_is_noted(tmp_path: Path) -> None:
    rows = [{"instruction": "<image>\nWhat?", "output": "o"}, {"instruction": "i", "output": "o"}]
    with pytest.warns(UserWarning, match="1 row with the placeholder <image> and no image, kept as text"):
        assert reasons(write(tmp_path / "a.jsonl", rows)) == {}


def test_the_flat_rows_of_a_conversation_tree_are_no_answers(tmp_path: Path) -> None:
    rows = [
        {"message_id": "m1", "parent_id": None, "role": "prompter", "text": "What?"},
        {"message_id": "m2", "parent_id": "m1", "role": "assistant", "text": "That."},
        {"message_id": "m3", "parent_id": "m2", "role": "prompter", "text": "And?"},
    ]
    with pytest.warns(UserWarning, match="1 row with role: assistant .* kept as texts without their questions"):
        found = reasons(write(tmp_path / "oasst.jsonl", rows))
    assert found == dict.fromkeys((0, 2), "no answer: role is prompter, a question of a conversation tree")
