"""The contents of a page: sections of blocks, each plain data that the template (and, for charts, the script) shows.

A block holds no HTML. Its text is shown as text; code that builds a block passes row text and names through
`untrusted.visible` or `untrusted.clip` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number of the headline."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A row of large numbers."""

    kind: ClassVar[str] = "facts"
    items: Sequence[Fact]


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence or two between other blocks."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A cell of two bars: a share of the pool and of the chosen rows, each in 0..1."""

    pool: float
    chosen: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; cells are text or `Pair`. `numbers` are the right-aligned columns."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Pair]]
    numbers: Sequence[int] = ()
    folded: bool = False
    """Collapsed until the reader opens it."""


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A matrix of shares in 0..1 (None: no value), shown as a table whose cells are shaded."""

    kind: ClassVar[str] = "heat"
    caption: str
    corner: str
    """What the rows and the columns are."""
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    titles: Sequence[Sequence[str]] = ()
    """A sentence for each cell, read by screen readers and shown on hover."""
    half: bool = False
    """Placed beside the next half block where there is room."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart that the page's script draws. `data` is JSON; see templates/charts.js for its keys."""

    kind: ClassVar[str] = "chart"
    name: str
    title: str
    label: str
    """A text description, for screen readers."""
    data: Mapping[str, Any]
    half: bool = False
    """Placed beside the next half block where there is room."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """The map of the pool; see templates/map.js for the keys of `data`."""

    kind: ClassVar[str] = "map"
    name: str
    label: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """Rows to read, search and filter; see templates/rows.js for the keys of `data`."""

    kind: ClassVar[str] = "explorer"
    name: str
    data: Mapping[str, Any]


Block = Facts | Note | Table | Heat | Chart | Map | Explorer


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a sentence and blocks."""

    name: str
    """The anchor; letters, digits and dashes."""
    title: str
    blocks: Sequence[Block]
    lede: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One report."""

    title: str
    subtitle: str
    facts: Facts
    sections: Sequence[Section]
    foot: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def payload(self) -> dict[str, Any]:
        """All data that the script needs, by the block's name."""
        blocks = [block for section in self.sections for block in section.blocks]
        return {block.name: {"kind": block.kind, **block.data} for block in blocks if isinstance(block, _DRAWN)}


_DRAWN = (Chart, Map, Explorer)
