"""Strict reading of what a judge wrote: one rating, one list of tags, or nothing."""

from __future__ import annotations

import contextlib
import time

import pytest

from siftune.offline.alpagasus import read_rating
from siftune.offline.instag import MOST_TAGS, frequent, normalised, read_tags, tag_number
from siftune.offline.judge_task import Unreadable, strip_reasoning


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Correct.\nScore: 4.5", 4.5),
        ("**Score:** 4", 4),
        ("**Score: 4.5/5**", 4.5),
        ("### Rating: 3 out of 5\nIt is fine, with 2 gaps.", 3),
        ("4.5\nThe answer is right in 9 of 10 points.", 4.5),
        ("Good enough.\n\n4", 4),
        ("4/5", 4),
        ("The score is 2.", 2),
        ("A score of 5 would need a proof.\nScore: 3", 3),
        ("Score: 4\nIn short.\nscore = 4.0", 4),
        ('{"score": 4, "reason": "x"}', 4),
        ('{"reason": "x", "score": 0}', 0),
        ("My final rating is **4**/5", 4),
        ("Score: 5 - to the point", 5),
        ("1. a list\n2. of points\nScore: 1", 1),
        ("Score：4", 4),
        ("Score： ４．５", 4.5),
        ("ｓｃｏｒｅ：３／５", 3),
        ("４", 4),
        ("很好。\n４。", 4),
    ],
)
def test_a_rating(text: str, rating: float) -> None:
    assert read_rating(text) == rating


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("   \n", "empty"),
        ("I cannot rate this.", "no rating"),
        ("There are 3 errors in 5 lines.", "no rating"),
        ("1. first\n2. second", "no rating"),
        ("Score: 3\nScore: 4", "several ratings, 3, 4"),
        ("5\nNo, rather this:\n4", "several ratings, 4, 5"),
        ("Score: 4-5", "not a single number"),
        ("Score: 4 to 5", "not a single number"),
        ("Score: 4 or 5", "not a single number"),
        ("Score: 4,5", "not a single number"),
        ("Score: 4.5.1", "not a single number"),
        ("Score: 90%", "not a single number"),
        ("Score: N/A\nScore 4", "not a single number"),
        ("Score: four", "not a single number"),
        ("Score: 4/10", "another scale"),
        ("8/10", "another scale"),
        ("Score: 6", "outside 0 to 5"),
        ("Score: -1", "outside 0 to 5"),
        ("Score: 45", "outside 0 to 5"),
        ("Score: " + "9" * 400, "a rating of inf, outside 0 to 5"),
        ("Score: NaN", "not a single number"),
        ("Score: 1e999", "not a single number"),
        ("Score：９０％", "not a single number"),
        ("Score：４－５", "not a single number"),
        ("Score：６", "outside 0 to 5"),
        ("Score: 4" + " " * 20_000, "a reply of 20,008 characters, more than 20,000"),
    ],
)
def test_no_rating(text: str, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        read_rating(text)


def test_a_rating_at_the_end_of_a_reply_that_was_cut_off_is_none() -> None:
    assert read_rating("4.5\nThe answer is", cut=True) == 4.5
    for text in ("Fine.\nScore: 4", "4", "The answer is", "Score: 3\nOn second thoughts.\nScore:"):
        if text.startswith("Score: 3"):
            assert read_rating(text, cut=True) == 3
            continue
        with pytest.raises(Unreadable, match="cut off"):
            read_rating(text, cut=True)


@pytest.mark.parametrize(
    "filler", [" ", "_", "*", "1", "\n```", "Score ", "word ", "(", "Score: 3 ", '{"', '["a",', '{"a":']
)
def test_a_hostile_reply_is_read_in_no_time(filler: str) -> None:
    text = ("Score" + filler * 20_000)[:20_000]
    started = time.process_time()
    for read in (read_rating, read_tags):
        with contextlib.suppress(Unreadable):
            read(text)
    assert time.process_time() - started < 3


def test_decoration_of_any_length_changes_no_rating() -> None:
    assert read_rating("**Score:**" + " " * 500 + "4") == 4
    assert read_rating("#" * 500 + " Score: " + "*" * 99 + "4" + "*" * 99) == 4


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ('["Translation", "french"]', ["translation", "french"]),
        ('Sure:\n```json\n["A b", "a-b", "A_B"]\n```\nAnything else?', ["a b"]),
        ('[{"tag": "x", "explanation": "see [1]"}, {"tag": "y"}]', ["x", "y"]),
        ('{"tags": ["x"]}', ["x"]),
        ('{"tags": [{"tag": "x"}]}', ["x"]),
        ('{"tag": "x"}\n{"tag": "y"}', ["x", "y"]),
        ('```json\n{"tag": "x"},\n{"tag": "y"}\n```', ["x", "y"]),
        ('["a"], or again ["A"]', ["a"]),
        ('[1] says: ["a"]', ["a"]),
        ("[]", []),
        ('["", "!"]', []),
    ],
)
def test_tags(text: str, tags: list[str]) -> None:
    assert read_tags(text) == tags


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("translation, french", "no list"),
        ("", "no list"),
        ("[1, 2]", "no list"),
        ('[{"label": "x"}]', "no list"),
        ('["a", "b"', "no list"),
        ('[{"tag": "x"}, {"tag": "y"', "no list"),
        ('Not ["a"] but ["b"]', "several lists"),
        ("[" * 5000, "nested too deeply"),
        ('["a"] ' + "[" * 5000, "nested too deeply"),
        ("[" * 200_000, "a reply of 200,000 characters, more than 20,000"),
        (str([str(n) for n in range(MOST_TAGS + 1)]).replace("'", '"'), "more than 32"),
    ],
)
def test_no_tags(text: str, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        read_tags(text)


def test_tags_that_were_cut_off_are_none() -> None:
    with pytest.raises(Unreadable, match="cut off"):
        read_tags('["a"] and more', cut=True)


def test_normalising_keeps_apart_what_differs() -> None:
    assert normalised("  Data-Analysis ") == normalised("data  analysis") == normalised("DATA_analysis")
    assert len({normalised(tag) for tag in ("C", "C++", "C#")}) == 3
    assert normalised("ﬁction") == "fiction"
    assert normalised("Übersetzung") == "übersetzung"
    assert normalised("...") == ""


def test_rare_tags_are_counted_by_rows() -> None:
    import numpy as np

    a, b, c = (tag_number(tag) for tag in "abc")
    tags = np.array([[a, b, 0], [a, 0, 0], [a, c, b], [0, 0, 0]])
    kept, facts = frequent(tags, 2)
    assert ((kept != 0).sum(axis=1) == [2, 1, 2, 0]).all()
    assert facts == {"tags": 3, "tags_kept": 2}
    assert (frequent(tags, 1)[0] == tags).all()
    assert not frequent(tags, 4)[0].any()


def test_thoughts_are_no_part_of_a_reply() -> None:
    assert strip_reasoning("<think>\nScore: 3?\n</think>\n\nScore: 4").strip() == "Score: 4"
    assert strip_reasoning("Score: 3? No.</think>Score: 4") == "Score: 4", "some templates open the thought themselves"
    assert strip_reasoning("  <think>Score: 3, I think") == ""
    assert strip_reasoning("Score: 4 <think>") == "Score: 4 <think>"
