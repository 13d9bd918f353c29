"""Examples of docstrings on the documentation site: runs of `>>>` lines become code blocks.

An extension of griffe, which mkdocstrings reads the package with (`mkdocs.yml` names this file). Docstrings are plain
text with a two-line example and, at times, formulas or tables set off by four spaces; Markdown takes the latter as code
already and would take `>>>` for a quotation. Cost: one pass over each docstring; nothing of siftune is imported.
"""

from __future__ import annotations

from typing import Any

import griffe


def fenced(text: str) -> str:
    """The text with every run of `>>>`, `...` lines as a Python block.

    >>> fenced("Adds.\\n\\n>>> add(1, 2)")
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        example = line.startswith((">>> ", "... "))
        if example and not inside:
            lines += ["", "```python"]
        elif inside and not example:
            lines += ["```", ""]
        inside = example
        lines.append(line[4:] if example else line)
    return "\n".join([*lines, "```"] if inside else lines)


class DocstringExamples(griffe.Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
