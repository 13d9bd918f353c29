"""The documentation site: it builds with warnings as errors and fetches nothing, every method has a page that is complete,
Python blocks name what exists, scripts named with options have them, and figures quoted twice are the same.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import siftune
from siftune import registry
from tests.docs.test_readme import ROOT, blocks

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
METHODS = [(entry.side, entry.name) for entry in registry.methods()]


def page_of(side: str, name: str) -> Path:
    """A method's own page; those of daar and uds are older than the folders."""
    own = DOCS / "methods" / side / f"{name}.md"
    return own if own.is_file() else DOCS / "methods" / f"{name}.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet: it silences warnings before --strict counts them.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_with_warnings_as_errors(site: Path) -> None:
    assert "fit(pool" in re.sub(r"<[^>]+>", "", (site / "api" / "offline.html").read_text(encoding="utf-8"))
    examples = (site / "api" / "online.html").read_text(encoding="utf-8")
    assert "&gt;&gt;&gt;" not in examples, "an example of a docstring is no code block"


@pytest.mark.slow
def test_looking_at_the_site_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', html)
        fetched += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"', html)
        assert not [address for address in fetched if "//" in address], page.name


@pytest.mark.parametrize(("side", "name"), METHODS)
def test_every_method_has_a_page(side: Any, name: str) -> None:
    page = page_of(side, name)
    assert page.is_file(), f"{side} {name} has no page under docs/methods; docs/add-a-method.md says what it holds"
    text = page.read_text(encoding="utf-8")
    for heading in ("What it computes", "When not to", "Options") if page.parent.name == side else ():
        assert f"## {heading}\n" in text, f"{page.name} lacks {heading}"
    listed = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    entry = registry.find(side, name)
    assert f"[{name}]({page.relative_to(DOCS / 'methods')}) | {entry.summary} |" in listed


@pytest.mark.parametrize(("side", "name"), METHODS)
def test_a_page_shows_every_option(side: Any, name: str) -> None:
    page = page_of(side, name)
    if page.parent.name != side:
        return  # shown by docs/api
    entry = registry.find(side, name)
    options = [field.name for field in fields(entry.load()) if field.init]
    shown = re.search(r"^::: (\S+)\n(?:.*\n)*?      members: \[(.*)\]$", page.read_text(encoding="utf-8"), re.MULTILINE)
    if not options:
        assert shown is None
        return
    assert shown, f"{page.name} shows no options"
    assert shown[1] == entry.target.replace(":", ".")
    assert shown[2].split(", ") == options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_name_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block, str(page))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("siftune"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "siftune":
                assert hasattr(siftune, node.attr) or (ROOT / "siftune" / node.attr).is_dir(), f"siftune.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_have_the_options_that_pages_give_them(page: Path) -> None:
    commands = re.findall(
        r"python ((?:examples|scripts|benchmarks)/\S+\.py)([^`\n#|]*)", page.read_text(encoding="utf-8")
    )
    for script, words in commands:
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", words):
            own = f'"{option}"' in source or f"{option} " in source or f"--no-{option[2:]}" in source
            field = option[2:].replace("-", "_")
            assert own or re.search(rf"\b{field}\b\s*[:=]", source), f"{script} has no {option}"


def test_the_page_of_the_own_scorer_shows_the_example_itself() -> None:
    source = (ROOT / "examples" / "own_scorer.py").read_text(encoding="utf-8")
    shown = blocks(DOCS / "add-a-method.md", "python")[0]
    assert shown.strip() in source


def test_figures_quoted_from_the_benchmarks_are_there() -> None:
    measured = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    choosing = (DOCS / "choosing.md").read_text(encoding="utf-8")
    quoted = re.findall(r"\d\.\d\d×", choosing)
    assert len(quoted) >= 4
    for figure in quoted:
        assert f"| {figure} |" in measured, f"{figure} of docs/choosing.md is not in docs/benchmarks.md"
