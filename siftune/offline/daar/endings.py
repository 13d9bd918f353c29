"""When a reply that is still being written may end: it holds the requested rows, or cannot contain any.

A small model seldom ends its reply; without an end it writes up to `max_new_tokens` and nothing of the rest is used.
Cost: a pass of the parser over the text for each check.
"""

from __future__ import annotations

from functools import partial

from ...models.generate import Ending, EndRule
from .parsing import complete_length, starts_a_row

REPETITION = "repetition"
"""The finish reason of a reply that was stopped because it repeats itself."""
REPEATED = 800
"""Characters at the end of a reply that have to be one text again and again: about 200 tokens."""
LONGEST_UNIT = 200
"""Characters of the text that is repeated, at most: it is there four times at least."""
WITHOUT_ROW = 4000
"""Characters after which a reply without the beginning of a row (and without an open thought) is ended: about 1,000
tokens."""


def end_after(rows: int) -> EndRule:
    """The rule for a request for so many rows.

    >>> end_after(1)("Instruction: Add.\\nInput: 1, 1\\nOutput: 2\\n\\nInstruction: Sub")
    Ending(length=41, finish_reason='stop')
    """
    return partial(_ending, rows)


def _ending(rows: int, text: str) -> Ending | None:
    if (length := complete_length(text, rows)) is not None:
        return Ending(length, "stop")
    if repeats_itself(text):
        return Ending(len(text), REPETITION)
    rambles = len(text) >= WITHOUT_ROW and not starts_a_row(text)
    return Ending(len(text), "stop") if rambles else None


def repeats_itself(text: str) -> bool:
    """Do the last `REPEATED` characters repeat one text of at most `LONGEST_UNIT` characters, exactly?

    >>> repeats_itself("The answer is 4. " * 60), repeats_itself("The answer is 4. " * 20)
    (True, False)
    """
    tail = text[-REPEATED:]
    return len(tail) == REPEATED and any(tail[unit:] == tail[:-unit] for unit in range(1, LONGEST_UNIT + 1))
