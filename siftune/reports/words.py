"""Number formats for readers: thousands separators, percentages, durations, sizes."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """An integer with thousands separators.

    >>> count(38969)
    '38,969'
    """
    return f"{round(number):,}"


def times(number: float) -> str:
    """A number of times, in words.

    >>> times(1), times(1200)
    ('once', '1,200 times')
    """
    return {0: "never", 1: "once", 2: "twice"}.get(round(number), f"{count(number)} times")


def share(part: float, total: float) -> str:
    """A share in percent; a dash where the total is 0.

    >>> share(1, 3)
    '33.3 %'
    """
    return f"{100 * part / total:.1f} %" if total else "–"


def duration(seconds: float) -> str:
    """A duration in suitable units.

    >>> duration(81.2), duration(0.25), duration(7400)
    ('1 min 21 s', '0.2 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def megabytes(number: float) -> str:
    """Megabytes (10**6 bytes), gigabytes from a thousand on.

    >>> megabytes(653), megabytes(2400)
    ('653 MB', '2.4 GB')
    """
    return f"{number:,.0f} MB" if number < 1000 else f"{number / 1000:,.1f} GB"


def decimal(number: float | None, digits: int = 4) -> str:
    """A number to a few significant digits; a dash where there is none.

    >>> decimal(0.740061, 3), decimal(None)
    ('0.740', '–')
    """
    if number is None or not math.isfinite(number):
        return "–"
    if number == 0:
        return "0"
    size = math.floor(math.log10(abs(number)))
    if size >= digits:
        return f"{number:,.0f}"
    return f"{number:.{digits - 1 - size}f}" if size >= -4 else f"{number:.{digits - 1}g}"
