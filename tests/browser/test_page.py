"""The page in a real Chromium: it opens without a network and without a complaint, its parts work, and a pool that tries to
run something runs nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from siftune.reports import report

from .conftest import Tab
from .runs import hostile_run, large_run, rows_of, selected, study_run, trained_run, write_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a selection of 300 rows with another one beside it."""
    pytest.importorskip("openTSNE", reason="the map needs openTSNE (the extra report)")
    folder = tmp_path_factory.mktemp("page")
    pool = write_jsonl(folder / "pool.jsonl", rows_of(300))
    selected(pool, folder / "runs" / "random", "random", cache=folder / "cache")
    run = selected(pool, folder / "runs" / "output-length", "output-length", cache=folder / "cache")
    return report.write(run, cache=folder / "cache")


def shown_rows(browser: Tab) -> list[str]:
    return list(browser.run("return [...document.querySelectorAll('article')].map((one) => one.innerText)"))


def set_value(browser: Tab, element: Any, value: str, event: str = "change") -> None:
    browser.run(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event(arguments[2], {bubbles: true}))",
        element,
        value,
        event,
    )


def select_named(browser: Tab, label: str) -> Any:
    return browser.run(
        "return [...document.querySelectorAll('label')].find((one) => one.firstChild.textContent === arguments[0])"
        ".querySelector('select, input')",
        label,
    )


def test_it_opens_without_a_complaint_and_without_a_network(browser: Tab, page: Path) -> None:
    browser.open(page)
    assert browser.complaints() == []
    assert browser.fetched() == []
    assert browser.run("return document.title") == "output-length on pool.jsonl"
    assert browser.run("return document.querySelectorAll('.no-webgl').length") == 0
    assert browser.run("return document.querySelectorAll('.wait').length") == 0
    titles = browser.run("return [...document.querySelectorAll('h2')].map((one) => one.textContent)")
    assert titles == ["Map", "What was chosen", "Score and length", "Other methods", "Rows to read", "How it was made"]


def test_no_button_leaves_the_page(browser: Tab, page: Path) -> None:
    browser.open(page)
    named = browser.run("return [...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title)")
    assert named == ["Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"]
    assert browser.run(
        "return [...document.querySelectorAll('a[href]')].every((one) => one.getAttribute('href')[0] === '#')"
    )


def test_search_narrows_the_rows(browser: Tab, page: Path) -> None:
    browser.open(page)
    before = shown_rows(browser)
    assert len(before) == 20
    set_value(browser, select_named(browser, "Rows"), "*")
    set_value(browser, select_named(browser, "Search"), "GAMBIT  rook", "input")
    found = shown_rows(browser)
    assert found
    assert all("gambit" in text and "rook" in text for text in found)
    set_value(browser, select_named(browser, "Search"), "no such word anywhere", "input")
    assert shown_rows(browser) == []
    assert "No row matches" in browser.run("return document.querySelector('.list').innerText")


def test_filters_and_views(browser: Tab, page: Path) -> None:
    browser.open(page)
    set_value(browser, select_named(browser, "Rows"), "cut")
    set_value(browser, select_named(browser, "Chosen"), "no")
    found = shown_rows(browser)
    assert found
    assert all("not chosen" in text for text in found)
    set_value(browser, select_named(browser, "Chosen"), "yes")
    assert all("not chosen" not in text for text in shown_rows(browser))
    more = browser.run("return [...document.querySelectorAll('.explorer > button')].at(-1)")
    count = len(shown_rows(browser))
    browser.run("arguments[0].click()", more)
    assert len(shown_rows(browser)) > count


def dot_at(browser: Tab, index: int) -> tuple[float, float]:
    """Where a dot of the map is on the screen."""
    x, y = browser.run(
        """
        const place = document.querySelector('.canvas');
        place.scrollIntoView({block: 'center', behavior: 'instant'});
        const {xaxis, yaxis} = place._fullLayout;
        const box = place.getBoundingClientRect();
        const trace = place.data[0];
        return [box.left + xaxis._offset + xaxis.c2p(trace.x[arguments[0]]),
                box.top + yaxis._offset + yaxis.c2p(trace.y[arguments[0]])];
        """,
        index,
    )
    return x, y


def mouse(browser: Tab, kind: str, x: float, y: float) -> None:
    event = {"type": kind, "x": x, "y": y, "button": "none" if kind == "mouseMoved" else "left", "clickCount": 1}
    browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def tip_is_shown(browser: Tab) -> bool:
    return bool(browser.run("return !document.getElementById('tip').hidden"))


def pointed(browser: Tab) -> bool:
    """Move over the first dot, once; is its tip shown? Scrolling to the map may hide it after the movement: move again."""
    x, y = dot_at(browser, 0)
    mouse(browser, "mouseMoved", x + 1, y)
    mouse(browser, "mouseMoved", x, y)
    time.sleep(0.2)
    return tip_is_shown(browser)


def test_the_tip_is_there_after_a_scroll_that_leaves_the_pointer_over_its_dot(browser: Tab, page: Path) -> None:
    browser.open(page)
    browser.wait(lambda: pointed(browser))
    browser.run("scrollBy({top: 3, behavior: 'instant'})")
    time.sleep(0.5)
    browser.wait(lambda: pointed(browser))


def test_pointing_at_a_dot_shows_its_row(browser: Tab, page: Path) -> None:
    browser.open(page)
    browser.wait(lambda: pointed(browser))
    tip = browser.run("return document.getElementById('tip').innerText")
    assert "Question" in tip
    assert "row " in tip
    x, y = dot_at(browser, 0)
    mouse(browser, "mousePressed", x, y)
    mouse(browser, "mouseReleased", x, y)
    card = browser.wait(lambda: browser.run("return document.querySelector('.card .text')?.innerText"))
    assert card in tip


def test_the_map_is_recoloured_and_its_legend_hides_a_group(browser: Tab, page: Path) -> None:
    browser.open(page)
    set_value(browser, select_named(browser, "Colour by"), "kept")
    groups = browser.run("return document.querySelector('.canvas').data.map((one) => [one.name, one.x.length])")
    assert groups == [["not chosen", 240], ["chosen", 60]]
    browser.run("document.querySelector('.legend button').click()")
    browser.wait(lambda: browser.run("return document.querySelector('.canvas').data[0].visible === false"))
    assert browser.run("return document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    set_value(browser, select_named(browser, "Colour by"), "score")
    assert browser.run("return document.querySelector('.canvas').data[0].marker.color.length") == 300


def test_the_theme_follows_the_system_and_the_button(browser: Tab, page: Path) -> None:
    def paper() -> str:
        return str(browser.run("return getComputedStyle(document.body).backgroundColor"))

    browser.open(page)
    light = paper()
    browser.open(page, dark=True)
    dark = paper()
    assert light != dark
    theme = browser.run("return document.getElementById('theme')")
    theme.click()
    assert (paper(), theme.text) == (light, "Theme: light")
    theme.click()
    assert (paper(), theme.text) == (dark, "Theme: dark")
    theme.click()
    assert theme.text == "Theme: auto"


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_its_width(browser: Tab, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    small = browser.run(
        "return [...document.querySelectorAll('p, td, th, dd, label, button')].filter((one) => one.offsetParent"
        " && parseFloat(getComputedStyle(one).fontSize) < 12).map((one) => one.outerHTML.slice(0, 80))"
    )
    assert small == []


def test_the_keyboard_reaches_every_control(browser: Tab, page: Path) -> None:
    browser.open(page)
    wanted = browser.run(
        "return [...document.querySelectorAll('main select, main input, .legend button, #theme, main summary')].length"
    )
    reached = browser.run(
        "return [...document.querySelectorAll('main select, main input, .legend button, #theme, main summary')]"
        ".filter((one) => { one.focus(); return document.activeElement === one && one.tabIndex === 0; }).length"
    )
    assert reached == wanted > 8
    nameless = browser.run(
        "return [...document.querySelectorAll('select, input, button')].filter((one) => !(one.labels?.length"
        " || one.textContent.trim() || one.getAttribute('aria-label'))).length"
    )
    assert nameless == 0


def test_a_training_run(browser: Tab, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_of(60))
    done = report.write(trained_run(tmp_path / "out"), rows=str(rows), cache=tmp_path / "cache")
    browser.open(done)
    assert browser.complaints() == []
    assert browser.fetched() == []
    drawn = browser.run(
        "return [...document.querySelectorAll('.chart')].map((one) => [one.id, !!one.querySelector('svg')])"
    )
    assert drawn
    assert all(has for _, has in drawn), drawn


def test_a_study(browser: Tab, tmp_path: Path) -> None:
    browser.open(report.write(study_run(tmp_path / "study")), width=390)
    assert browser.complaints() == []
    assert browser.fetched() == []
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    names = browser.run(
        "return [...document.querySelectorAll('#measure-0-0-differences .ytick')].map((one) => one.textContent)"
    )
    assert sorted(names) == ["daar", "full"]


def test_a_hostile_pool_runs_nothing_and_is_shown_as_text(browser: Tab, tmp_path: Path) -> None:
    run = hostile_run(tmp_path, cache=tmp_path / "cache")
    done = report.write(run, cache=tmp_path / "cache")
    assert done.stat().st_size < 4_000_000, "a row of a megabyte is cut"
    browser.open(done)
    assert browser.complaints() == []
    assert browser.fetched() == []
    set_value(browser, select_named(browser, "Rows"), "*")
    while browser.run("return !document.querySelector('.explorer > button:last-child').hidden"):
        browser.run("document.querySelector('.explorer > button:last-child').click()")
    for mode in ("label-0", "kept", "score"):
        set_value(browser, select_named(browser, "Colour by"), mode)
    assert browser.run("return window.hacked") is None
    assert (
        browser.run("return document.querySelectorAll('main img, main script, main a[href^=java], article b').length")
        == 0
    )
    text = "\n".join(shown_rows(browser))
    for said in ("<script>window.hacked=1</script>", "</style><svg onload=window.hacked=4>", "{{ 7*7 }}", "&lt;b&gt;"):
        assert said in text
    for shown in ("[U+202E]", "[U+2066]", "[U+200B]", "[U+2028]", "[U+0008]", "[U+001B]"):
        assert shown in text
    assert "998,500 more characters are not on this page" in text
    assert "{<script>window.hacked=9</script>" in text, "a bad row is shown as it stands in its file"
    whole = browser.run("return document.body.textContent + document.title")
    assert "\u202e" not in whole


def test_forty_thousand_rows_open_and_weigh_little(
    browser: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from siftune.reports import maps

    draw = np.random.default_rng(0)
    monkeypatch.setattr(maps, "text_features", lambda texts, rows, seed: np.zeros((len(rows), 2), np.float32))
    monkeypatch.setattr(maps, "embed", lambda features, seed: draw.normal(size=(len(features), 2)))
    run = large_run(tmp_path, 40_000, cache=tmp_path / "cache")
    done = report.write(run, cache=tmp_path / "cache", map_rows=20_000)
    assert 5_000_000 < done.stat().st_size < 10_000_000
    browser.open(done)
    assert browser.complaints() == []
    assert (
        browser.run("return document.querySelector('.canvas').data.reduce((sum, one) => sum + one.x.length, 0)")
        == 20_000
    )
