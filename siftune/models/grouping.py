"""Cut a sequence into groups of neighbours that fit a limit: what every batch, chunk and pass over rows is filled by.

Cost: one call of `fits` per item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def consecutive_groups(items: Iterable[Item], fits: Callable[[list[Item], Item], bool]) -> Iterator[list[Item]]:
    """Groups of consecutive items, in order; `fits(group, item)` decides whether an item joins a group that is not
    empty. An item that fits no group is one of its own.

    >>> list(consecutive_groups([5, 2, 1, 4], lambda group, item: sum(group) + item <= 4))
    [[5], [2, 1], [4]]
    """
    group: list[Item] = []
    for item in items:
        if group and not fits(group, item):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
