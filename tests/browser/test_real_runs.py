"""Runs as the commands leave them, opened in a browser: real rows of four domains, a sifted fine-tuning, a study."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest

from siftune.cli.main import main

from .conftest import Tab

ROOT = Path(__file__).resolve().parents[2]
POOLS = ("common_sense", "reasoning", "math", "code")
ROWS = 250
"""Of every pool."""


def opens(browser: Tab, page: Path, pictures: Path) -> str:
    """The page opens wide and narrow, light and dark, with nothing to complain of; its text. Leaves pictures."""
    for width, dark in ((1280, False), (390, True)):
        browser.open(page, width=width, dark=dark)
        assert browser.complaints() == []
        assert browser.fetched() == []
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.run("return document.querySelectorAll('.no-webgl, .wait').length") == 0
        picture = pictures / f"{width}.png"
        assert browser.driver.save_screenshot(str(picture))
        assert picture.stat().st_size > 10_000, "an empty page"
    return str(browser.run("return document.body.innerText"))


def drawn(browser: Tab) -> list[bool]:
    """Of every chart of the page, whether it was drawn."""
    return list(browser.run("return [...document.querySelectorAll('.chart')].map((one) => !!one.querySelector('svg'))"))


@pytest.mark.slow
def test_a_selection_of_real_rows_of_four_domains(
    browser: Tab, shared: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open("pool.jsonl", "w", encoding="utf-8") as pool, open("seeds.jsonl", "w", encoding="utf-8") as seeds:
        for name in POOLS:
            with gzip.open(shared / "data" / "pools" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
                pool.writelines(itertools.islice(lines, ROWS))
            with gzip.open(shared / "data" / "pools" / f"{name}_heldout.jsonl.gz", "rt", encoding="utf-8") as lines:
                seeds.writelines(
                    json.dumps({"domain": name, **json.loads(line)}) + "\n" for line in itertools.islice(lines, 5)
                )
    words = ["select", "daar", "pool.jsonl", "--model", str(tiny_base), "--seeds", "seeds.jsonl", "--keep", "20%"]
    assert main([*words, "--max-length", "96", "--run", "run", "--cache", "cache"]) == 0
    text = opens(browser, tmp_path / "run" / "report.html", tmp_path)
    assert all(name in text for name in POOLS)
    assert "200" in text, "rows kept"
    sections = browser.run("return [...document.querySelectorAll('h2')].map((one) => one.textContent)")
    assert {"Map", "What was chosen", "Score and length", "Rows to read"} <= set(sections)
    assert all(found := drawn(browser))
    assert found


@pytest.mark.slow
def test_a_fine_tuning_that_uds_sifts(browser: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "siftune").symlink_to(ROOT / "siftune")
    assert main(["demo", "--rows", "300", "--steps", "0", "--run", "demo", "--cache", "cache"]) == 0
    assert "demo" in opens(browser, tmp_path / "demo" / "report.html", tmp_path).lower()
    words = ["train", "examples/recipe-demo.yaml", "--set", "sft.max_steps=12", "--run", "run", "--cache", "cache"]
    assert main(words) == 0
    text = opens(browser, tmp_path / "run" / "report.html", tmp_path)
    assert "uds" in text.lower()
    found = drawn(browser)
    assert len(found) >= 3
    assert all(found)


@pytest.mark.slow
def test_a_study(browser: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["compare", str(ROOT / "examples" / "study-demo.yaml"), "--run", "run", "--cache", "cache", "--jobs", "1"]
    smaller = {"rows": "160", "seeds": "[0, 1]", "held_out_rows": "20", "offline": "[random, output-length]"}
    assert main([*words, *(word for key, value in smaller.items() for word in ("--set", f"{key}={value}"))]) == 0
    text = opens(browser, tmp_path / "run" / "report.html", tmp_path)
    assert "output-length" in text
    assert all(found := drawn(browser))
    assert found
