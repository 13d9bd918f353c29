"""Numbers as people read them: thousands apart, shares in percent, seconds as minutes, megabytes as such."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """A whole number, thousands apart.

    >>> count(38969)
    '38,969'
    """
    return f"{round(number):,}"


def times(number: float) -> str:
    """How often.

    >>> times(1), times(1200)
    ('once', '1,200 times')
    """
    return {0: "never", 1: "once", 2: "twice"}.get(round(number), f"{count(number)} times")


def share(part: float, whole: float) -> str:
    """A part of a whole in percent; a dash where there is no whole.

    >>> share(1, 3)
    '33.3 %'
    """
    return f"{100 * part / whole:.1f} %" if whole else "–"


def duration(seconds: float) -> str:
    """A time in the units one would say it in.

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
    """A measured number to a few significant digits; a dash where there is none.

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
