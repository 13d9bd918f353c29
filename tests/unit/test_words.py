"""tools/words.py: what it finds in names, comments, docstrings, literals and pages, and what it leaves alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "words.py"


@pytest.fixture(scope="module")
def words() -> Any:
    spec = importlib.util.spec_from_file_location("words", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("x = 1\nsaid = 2", "said"),
        ("x = 1\ndef _refuse_strangers(): ...", "_refuse_strangers"),
        ("x = 1\ndef f(told): ...", "told"),
        ("x = 1\nfor found in y: ...", "found"),
        ("x = 1\nself.wanted = 2", "wanted"),
        ("x = 1\nclass Said: ...", "Said"),
        ("x = 1\ny = 2  # Mended later", "Mended"),
        ("x = 1\nraise ValueError('mend the file')", "mend"),
        ("x = 1\nraise ValueError(f'{x} is nobody')", "nobody"),
        ('"""First line.\nA fault of siftune."""', "fault of siftune"),
    ],
)
def test_a_banned_word_is_reported_with_its_line(words: Any, source: str, word: str) -> None:
    ((line, reported, replacement),) = words.in_python(source)
    assert (line, reported) == (2, word)
    assert replacement


@pytest.mark.parametrize(
    "source",
    [
        "value = facts['told']",  # a key of a file
        "value = reply.said",  # defined in another room
        "rows_found = 1",
        "message = 'the rows found in a recommended file'",
    ],
)
def test_keys_uses_and_longer_words_are_allowed(words: Any, source: str) -> None:
    assert list(words.in_python(source)) == []


def test_a_page_is_checked_line_by_line(words: Any) -> None:
    text = "A command resumes.\nNothing is set\nby hand; it LIES in the cache.\n"
    assert [(line, word) for line, word, _ in words.in_text(text, 1)] == [(3, "LIES"), (3, "by hand")]


def test_the_check_covers_pages_and_rooms_without_generated_text(words: Any) -> None:
    names = {str(path.relative_to(words.ROOT)) for path in words.files()}
    assert {"README.md", "docs/cli.md", "siftune/reports/page.py", "siftune/demo/story.py"} <= names
    assert not [name for name in names if name.startswith("docs/results/")]


def test_a_finding_is_printed_and_sets_the_exit_code(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(words, "ROOT", tmp_path)
    monkeypatch.setattr(words, "files", lambda: [tmp_path / "a.py", tmp_path / "b.md"])
    (tmp_path / "a.py").write_text("said = 1\n")
    (tmp_path / "b.md").write_text("Fix the file.\n")
    assert words.main() == 1
    assert capsys.readouterr().out.startswith("a.py:1: said -> name the thing")
    (tmp_path / "a.py").write_text("message = 1\n")
    assert words.main() == 0
    assert capsys.readouterr().out == ""


def test_every_room_that_is_named_exists_and_is_read(words: Any) -> None:
    assert all(list(words.ROOT.glob(room)) for room in words.ROOMS)
    checked = {path.relative_to(words.ROOT).as_posix() for path in words.files()}
    assert {"siftune/records.py", "siftune/hook/attach.py", "siftune/online/per_example/ghost.py"} <= checked
