"""A real headless Chromium, as Debian packages it; tests that need it skip where it, its driver or selenium is absent."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 90.0
"""Seconds that a page may take on a busy machine."""


@dataclass
class Tab:
    """One browser, and what the page in it said."""

    driver: Any

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a page and wait until all is drawn."""
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
        scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.resolve().as_uri())
        self.wait(lambda: self.run("return document.documentElement.dataset.drawn"))

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, done: Callable[[], Any]) -> Any:
        """The first true value of `done`."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if found := done():
                return found
            time.sleep(0.05)
        raise AssertionError(f"nothing within {PATIENCE:.0f} s; the page said {self.complaints()}")

    def complaints(self) -> list[str]:
        """What the page wrote to the console, but for the drawing hardware's remarks."""
        lines = [f"{entry['level']} {entry['message']}" for entry in self.driver.get_log("browser")]
        return [line for line in lines if "GL Driver Message" not in line]

    def fetched(self) -> list[str]:
        """Every address that the page asked for since it was opened, other than itself and data inside it."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in asked]
        return [url for url in urls if not url.startswith(("data:", "blob:")) and not url.endswith(".html")]


@pytest.fixture(scope="session")
def browser() -> Iterator[Tab]:
    """A tab of headless Chromium."""
    pytest.importorskip("plotly", reason="the page needs plotly (the extra report)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium to drive a browser with")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium and chromedriver here (Debian packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    tab = Tab(webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)))
    yield tab
    tab.driver.quit()
