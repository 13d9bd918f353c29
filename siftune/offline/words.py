"""A text as words, in any language: what bm25 and the search for near-copies compare.

A word is a run of letters, digits and the marks that belong to them (vowel signs of Indic scripts, accents), after
compatibility forms are unified and letter case is removed. Scripts that are written without spaces (Chinese, Japanese,
Thai, Lao, Khmer, Burmese) give overlapping pairs of characters, as Lucene's CJK analyser does. Punctuation gives none.
Cost: one regular expression over the text.
"""

from __future__ import annotations

import re
import unicodedata

VERSION = 1
"""Part of the keys of what is computed from words: increased whenever the words of any text change."""

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u3005\u3040-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_MARKS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0df3\u0f18-\u0fbc"
)
_WORD = re.compile(f"[{_UNSPACED}]+|(?:(?![{_UNSPACED}_])[\\w{_MARKS}])+")
_RUN = re.compile(f"[{_UNSPACED}]")


def words_of(text: str) -> list[str]:
    """The words of a text, in order, repeated ones too.

    >>> words_of("Solve x + 2 = 7!"), words_of("東京都"), words_of("हिन्दी")
    (['solve', 'x', '2', '7'], ['東京', '京都'], ['हिन्दी'])
    """
    words: list[str] = []
    for match in _WORD.finditer(unicodedata.normalize("NFKC", text).casefold()):
        run = match[0]
        if len(run) > 1 and _RUN.match(run):
            words += [run[index : index + 2] for index in range(len(run) - 1)]
        else:
            words.append(run)
    return words
