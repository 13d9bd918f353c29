"""The journeys of docs/design.md: every file they name is there, and the page counts them right."""

from __future__ import annotations

import re

import pytest

from tests.docs.test_readme import ROOT

PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
JOURNEYS = {
    title: text
    for title, text in re.findall(r"^### (.+?)\n(.+?)(?=^##)", PAGE, flags=re.M | re.S)
    if re.search(r"\d+ files", title)
}
OUTSIDE = ("tests/", "benchmarks/", "tools/", "docs/")


def files_of(text: str) -> list[str]:
    """Files below siftune/ that a text names, each once; a name without a folder is in that of the name before it."""
    files: dict[str, None] = {}
    folder = ""
    for name in re.findall(r"`([\w/]+\.py)`", text):
        if name.startswith(OUTSIDE):
            assert (ROOT / name).is_file(), name
            continue
        path = (
            name if "/" in name or not (ROOT / "siftune" / folder / name).is_file() else f"{folder}/{name}".lstrip("/")
        )
        assert (ROOT / "siftune" / path).is_file(), f"{name} after {folder}"
        folder = path.rpartition("/")[0] or folder
        files[path] = None
    return list(files)


def test_there_are_four() -> None:
    assert len(JOURNEYS) == 4


@pytest.mark.parametrize("title", JOURNEYS)
def test_the_files_of_a_journey_are_counted(title: str) -> None:
    files = files_of(JOURNEYS[title])
    if "select daar" in title:
        first, every = map(int, re.findall(r"\d+", title))
        assert (files.index("data/load.py") + 1, len(files)) == (first, every)
    elif "contributor" in title:
        one_side = [name for name in files if not name.startswith("online/")]
        assert len(one_side) == int(re.findall(r"\d+", title)[0])
    else:
        assert len(files) == int(re.findall(r"\d+", title)[0])
