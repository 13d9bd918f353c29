"""Near-copies in a pool: rows whose words are almost those of an earlier row, found by MinHash.

Two rows are near-copies where |A & B| / |A | B| >= threshold, A and B their shingles: the distinct words and pairs of
neighbouring words of question and answer (`words`). Rows are read in order; a row that is a near-copy of a row kept
before is dropped, and its reason names that row. Candidates come from MinHash signatures in bands (Broder 1997; LSH), of
which a pair at the threshold is missed with probability 0.001 at most; every candidate is compared exactly.
Cost: 128 products a shingle, one sort a band; memory 512 bytes a row for the signatures.

Axes: `N` eligible rows, `P` permutations, `S` shingles of a block of rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.formats import text_of
from ..errors import UserError
from ..progress import counted
from ..records import Pool
from .draw import blocks
from .words import words_of

PERMUTATIONS = 128
MISSED = 1e-3
"""Probability that a pair at the threshold shares no band, at most."""
SLACK = 0.15
"""Candidates whose signatures agree in less than threshold - SLACK are not compared exactly: 4 standard deviations."""
ROWS_AT_ONCE = 256
KIND = "near-duplicate"
"""The kind of the reason, under which such rows are counted."""

_PAIR = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(words: Sequence[str]) -> NDArray[np.uint64]:
    """A number for each word, the same in every process."""
    return np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))


def shingles(text: str) -> NDArray[np.uint64]:
    """The distinct words and pairs of neighbouring words of a text, as numbers, ascending."""
    single = word_hashes(words_of(text))
    pairs = (single[:-1] * _PAIR + single[1:]) * _PAIR
    return np.unique(np.concatenate([single, pairs]))


def similarity(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Jaccard similarity of two sets of shingles.

    >>> similarity(shingles("a b c"), shingles("a b d"))        # a, b, ab of a, b, c, d, ab, bc, bd
    0.42857142857142855
    """
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)


def near_copies(pool: Pool, threshold: float) -> dict[int, str]:
    """A reason for every eligible row that is a near-copy of a row kept before it. Raises `UserError`.

    >>> near_copies(pool, 0.8)
    {17: 'near-duplicate: of row 4 (similarity 0.92)'}
    """
    if not 0 < threshold <= 1:
        raise UserError(f"near-duplicates {threshold} must be a similarity above 0 and at most 1; 0.8 is common")
    rows = pool.eligible
    signatures_NP = _signatures(pool, rows)
    groups = _Groups.of(signatures_NP, _band_rows(threshold))
    cache: dict[int, NDArray[np.uint64]] = {}

    def shingles_at(place: int) -> NDArray[np.uint64]:
        if place not in cache:
            if len(cache) > 4096:
                cache.clear()
            cache[place] = shingles(text_of(pool.read([int(rows[place])])[0]))
        return cache[place]

    reasons: dict[int, str] = {}
    for place in counted("comparing near-copies", groups.members().tolist()):
        for earlier in groups.kept_before(place, signatures_NP, threshold - SLACK):
            share = similarity(shingles_at(earlier), shingles_at(place))
            if share >= threshold:
                reasons[int(rows[place])] = f"{KIND}: of row {int(rows[earlier])} (similarity {share:.2f})"
                break
        else:
            groups.keep(place)
    return reasons


def _signatures(pool: Pool, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """MinHash signatures `(N, P)`; a row without words has its own number, so that it resembles none."""
    generator = np.random.default_rng(20260101)
    factors = generator.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = generator.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)
    signatures_NP = np.empty((len(rows), PERMUTATIONS), dtype=np.uint32)
    start = 0
    for block in counted("hashing words", list(blocks(rows)), len(rows), size=len):
        for sets in _sets(pool, block):
            lengths = np.array([len(one) for one in sets])
            flat_S = np.concatenate([one if len(one) else np.array([start], dtype=np.uint64) for one in sets])
            begins = np.concatenate([[0], np.cumsum(np.maximum(lengths, 1))[:-1]])
            part = slice(start, start + len(sets))
            for permutation in range(PERMUTATIONS):
                mixed_S = (flat_S * factors[permutation] + shifts[permutation]) >> np.uint64(32)
                signatures_NP[part, permutation] = np.minimum.reduceat(mixed_S, begins)
            for index in np.flatnonzero(lengths == 0).tolist():
                signatures_NP[start + index] = (np.arange(PERMUTATIONS) + (start + index) * PERMUTATIONS) % 2**32
            start += len(sets)
    return signatures_NP


def _sets(pool: Pool, rows: NDArray[np.int64]) -> Iterator[list[NDArray[np.uint64]]]:
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield [shingles(text_of(row)) for row in pool.read(rows[first : first + ROWS_AT_ONCE].tolist())]


def _band_rows(threshold: float) -> int:
    """The most signature rows of a band with which a pair at the threshold is missed rarely enough."""
    for rows in range(16, 1, -1):
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED:
            return rows
    return 1


class _Groups:
    """Rows that share a band of their signatures with another row, and which of them are kept so far."""

    def __init__(self, group_of: NDArray[np.int64], place_of: NDArray[np.int64], rows: int) -> None:
        """`group_of` and `place_of` list every membership of a group that has two rows at least."""
        order = np.argsort(place_of, kind="stable")
        self._groups = group_of[order]
        self._begin = np.searchsorted(place_of[order], np.arange(rows + 1))
        self._kept: dict[int, list[int]] = {}

    @classmethod
    def of(cls, signatures_NP: NDArray[np.uint32], band_rows: int) -> _Groups:
        """The groups of signatures cut into bands."""
        group_parts, place_parts, total = [], [], 0
        for first in range(0, PERMUTATIONS - band_rows + 1, band_rows):
            key = np.zeros(len(signatures_NP), dtype=np.uint64)
            for column in range(first, first + band_rows):
                key = (key ^ signatures_NP[:, column].astype(np.uint64)) * _PAIR
                key ^= key >> np.uint64(29)
            order = np.argsort(key, kind="stable")
            new = np.concatenate([[True], key[order][1:] != key[order][:-1]]) if len(order) else np.empty(0, dtype=bool)
            number = np.cumsum(new) - 1
            shared = np.bincount(number, minlength=1)[number] > 1 if len(order) else np.empty(0, dtype=bool)
            group_parts.append(number[shared] + total)
            place_parts.append(order[shared])
            total += len(order)
        return cls(np.concatenate(group_parts), np.concatenate(place_parts), len(signatures_NP))

    def members(self) -> NDArray[np.int64]:
        """Places of rows that share a band with another, ascending."""
        return np.flatnonzero(np.diff(self._begin))

    def _of(self, place: int) -> list[int]:
        groups: list[int] = self._groups[self._begin[place] : self._begin[place + 1]].tolist()
        return groups

    def keep(self, place: int) -> None:
        """Later rows are compared with this one."""
        for group in self._of(place):
            self._kept.setdefault(group, []).append(place)

    def kept_before(self, place: int, signatures_NP: NDArray[Any], least: float) -> list[int]:
        """Kept rows that share a band and whose signatures agree in `least` of their numbers, the most alike first."""
        places = sorted({other for group in self._of(place) for other in self._kept.get(group, ())})
        if not places:
            return []
        agree = (signatures_NP[places] == signatures_NP[place]).mean(axis=1)
        order = np.argsort(-agree, kind="stable")
        return [places[index] for index in order.tolist() if agree[index] >= least]
