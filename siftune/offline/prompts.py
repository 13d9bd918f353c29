"""A user's prompt in place of the default one: a text file with {question}, {answer} and the like where the row goes.

One pass fills the places, so nothing in a row's text is mistaken for a place, and all other braces are unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import refuse_special

PLACES = ("question", "instruction", "input", "answer", "output")
_PLACE = re.compile("{(" + "|".join(PLACES) + ")}")


@dataclass(frozen=True)
class Prompt:
    """A text with places for a row's parts."""

    text: str

    @property
    def places(self) -> set[str]:
        """Names of the places it has."""
        return set(_PLACE.findall(self.text))

    def fill(self, *, instruction: str, input: str = "", output: str = "") -> str:
        """The text with the row's parts in their places; `question` is instruction and input, `answer` the output.

        >>> Prompt("Q: {question}").fill(instruction="Add.", input="{answer}")
        'Q: Add.\\n{answer}'
        """
        question = "\n".join(part for part in (instruction, input) if part)
        parts = {"question": question, "instruction": instruction, "input": input, "answer": output, "output": output}
        return _PLACE.sub(lambda match: parts[match[1]], self.text)


def read_prompt(file: str | Path | None, default: str, *, answer: bool) -> Prompt:
    """The prompt in `file`, less one line break at its end, or `default`.

    Raises `UserError` for a file that cannot be read, that has no place for the question, or, with `answer`,
    none for the answer.
    """
    if file is None:
        return Prompt(default)
    refuse_special(Path(file).expanduser())
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UserError(f"prompt={str(file)!r} cannot be read: {error.strerror}; pass a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt={str(file)!r} is not UTF-8 text; save it as UTF-8") from error
    prompt = Prompt(text)
    if not prompt.places & {"question", "instruction"}:
        raise UserError(f"prompt={str(file)!r} has no {{question}}; write {{question}} where the row's question goes")
    if answer and not prompt.places & {"answer", "output"}:
        raise UserError(f"prompt={str(file)!r} has no {{answer}}; write {{answer}} where the row's answer goes")
    if not answer and prompt.places & {"answer", "output"}:
        raise UserError(f"prompt={str(file)!r} has a place for the answer, which this method must not see; remove it")
    return prompt
