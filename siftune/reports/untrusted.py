"""Makes untrusted text safe to show: cuts it to a length, makes control characters visible, and writes JSON that cannot
end its HTML element.

A row may hold `</script>`, a megabyte on one line, or characters that change the reading direction of the text after
them. Markup needs no treatment here: the page shows row text by `textContent` and the template escapes it. Cost: one
pass over the text that is shown, not over the text that is cut.
"""

from __future__ import annotations

import json
from typing import Any

from ..files import json_value, without_nan
from ..output import visible as visible

_IN_SCRIPT = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def clip(text: str, characters: int) -> tuple[str, int]:
    """The first `characters` of a text, made visible, and how many characters were left out.

    >>> clip("abcdef", 4)
    ('abcd', 2)
    """
    return visible(text[:characters]), max(0, len(text) - characters)


def one_line(text: str, most_bytes: int) -> str:
    """A text on one line of at most `most_bytes` bytes as written in the page, with an ellipsis where it was cut."""
    line = visible(" ".join(text[: 4 * most_bytes].split()))
    cut = len(text) > 4 * most_bytes
    while line and _bytes(line) > most_bytes:
        line, cut = line[: max(1, len(line) * most_bytes // _bytes(line)) - 1], True
    return line.rstrip() + "…" if cut else line


def embedded_json(value: Any) -> str:
    """JSON for `<script type="application/json">`: no `<`, `>`, `&`, U+2028 or U+2029; NaN and infinities are null.

    >>> embedded_json({"a": "</script>"})
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(
        without_nan(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=json_value
    )
    return text.translate(_IN_SCRIPT).encode("utf-8", "replace").decode("utf-8")


def _bytes(text: str) -> int:
    return len(embedded_json(text).encode()) - 2
