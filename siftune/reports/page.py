"""One self-contained HTML file: a `Page` through the templates, with its data, its script and the plotting library inside.

No address is fetched: the Content-Security-Policy forbids it, and allows only two scripts, each by its hash: siftune's and
plotly's, which is compressed with gzip and unpacked by the first (2 MB instead of 5). Row text is stored as JSON in a
non-executable script element and shown by `textContent`. Cost: about 0.5 s, most of it compressing plotly.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from ..errors import MissingExtra
from ..files import atomic_path
from .blocks import Page
from .untrusted import embedded_json

SCRIPTS = ("palette.js", "charts.js", "map.js", "rows.js", "page.js")
"""One script, in this order."""
GENERATOR = b'<meta name="generator" content="siftune">'
HEAD_BYTES = 8192
"""The generator is named within the first bytes of a page."""
NEEDED = {"jinja2": "jinja2", "plotly": "plotly"}


def require(*, mapped: bool = True) -> None:
    """Raise `MissingExtra` where a library that the page needs is not installed."""
    packages = NEEDED | ({"openTSNE": "openTSNE"} if mapped else {})
    for module, package in packages.items():
        if find_spec(module) is None:
            raise MissingExtra(package, extra="report", needed_for="siftune report")


def save(page: Page, path: Path) -> Path:
    """Write the page atomically. Raises `UserError` where the path cannot be written."""
    html = render(page)
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def was_written_by_siftune(path: Path) -> bool:
    """Whether `save` wrote this file: its head names the generator."""
    with path.open("rb") as file:
        return GENERATOR in file.read(HEAD_BYTES)


def render(page: Page) -> str:
    """The page as HTML; equal pages give equal text.

    >>> render(Page(title="A run", subtitle="", facts=Facts(items=()), sections=())).startswith("<!doctype html>")
    True
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    script = "\n".join(["'use strict';", *(part(name) for name in SCRIPTS)])
    drawn = page.payload()
    library = _plotly() if any(block["kind"] in ("chart", "map") for block in drawn.values()) else ""
    return environment.from_string(part("page.html")).render(
        page=page,
        policy=_policy(script, library, compiles=any(block["kind"] == "map" for block in drawn.values())),
        style=Markup(part("page.css")),
        script=Markup(script),
        data=Markup(embedded_json(drawn)),
        library=Markup(base64.b64encode(gzip.compress(library.encode(), 9, mtime=0)).decode()) if library else "",
    )


def part(name: str) -> str:
    """A file of the template folder."""
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    return text


def _policy(*scripts: str, compiles: bool) -> str:
    """Only these scripts run, and nothing is fetched; plotly sets styles and draws images of its own canvases.

    `compiles`: plotly's WebGL points compile their drawing functions with eval, which these two scripts may use.
    """
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts if text]
    allowed = " ".join([*(f"'sha256-{digest}'" for digest in hashes), *(["'unsafe-eval'"] if compiles else [])])
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
