"""bm25 against its definition, word by word in Python, and against the library bm25s."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from siftune.offline.bm25 import BM25
from siftune.offline.words import words_of
from siftune.records import Pool, Shard
from tests.pools import make_pool


def naive(pool_words: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    """The definition: no index, no sparse matrix."""
    rows, mean = len(pool_words), sum(map(len, pool_words)) / len(pool_words)
    scores = []
    for words in pool_words:
        total = 0.0
        for word in query:
            rows_with = sum(word in other for other in pool_words)
            idf = math.log(1 + (rows - rows_with + 0.5) / (rows_with + 0.5))
            tf = words.count(word)
            total += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean)) if tf else 0.0
        scores.append(total)
    return scores


def text_pool(count: int, seed: int) -> tuple[Pool, list[str]]:
    drawn = random.Random(seed)
    words = [f"word{number}" for number in range(40)]
    texts = [" ".join(drawn.choices(words, k=drawn.randint(1, 30))) + f" tail{number}" for number in range(count)]
    return make_pool([{"text": text} for text in texts]), texts


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.0, 0.5), (2.0, 0.0), (0.9, 1.0)])
def test_similarities_are_those_of_the_definition(k1: float, b: float) -> None:
    pool, texts = text_pool(60, 0)
    _, queries = text_pool(4, 1)
    method = BM25(target=[{"text": text} for text in queries], k1=k1, b=b).fit(pool)
    found = method.shard_task(pool)(pool, Shard(0, 0, len(pool))).columns["similarity"]
    for index, query in enumerate(queries):
        expected = naive([words_of(text) for text in texts], words_of(query), k1, b)
        np.testing.assert_allclose(found[:, index], np.array(expected, dtype=np.float32), rtol=1e-6)


def test_similarities_are_those_of_the_library() -> None:
    import bm25s

    pool, texts = text_pool(80, 2)
    _, queries = text_pool(3, 3)
    library = bm25s.BM25(method="lucene", k1=1.5, b=0.75, dtype="float64")
    library.index([words_of(text) for text in texts], show_progress=False)
    method = BM25(target=[{"text": text} for text in queries]).fit(pool)
    found = method.shard_task(pool)(pool, Shard(0, 0, len(pool))).columns["similarity"]
    for index, query in enumerate(queries):
        known = [word for word in words_of(query) if word in library.vocab_dict]
        np.testing.assert_allclose(found[:, index], library.get_scores(known), rtol=1e-5)


def test_a_shard_alone_has_the_scores_that_it_has_in_the_pool() -> None:
    pool, _ = text_pool(50, 4)
    method = BM25(target=[{"text": "word1 word2 word2"}, {"text": "word9"}]).fit(pool)
    task = method.shard_task(pool)
    complete = task(pool, Shard(0, 0, 50)).columns["similarity"]
    part = task(pool, Shard(1, 20, 35)).columns["similarity"]
    np.testing.assert_array_equal(part, complete[20:35])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Solve x + 2 = 7, or else!", ["solve", "x", "2", "7", "or", "else"]),
        ("ＦＵＬＬ width", ["full", "width"]),
        ("東京都は首都です", ["東京", "京都", "都は", "は首", "首都", "都で", "です"]),
        ("我", ["我"]),
        ("Python的列表", ["python", "的列", "列表"]),
        ("हिन्दी में।", ["हिन्दी", "में"]),
        ("สวัสดี", ["สว", "วั", "ัส", "สด", "ดี"]),
        ("naïve Straße", ["naïve", "strasse"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("snake_case", ["snake", "case"]),
        ("?!", []),
    ],
)
def test_words_of_any_language(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_a_chinese_row_is_found_by_a_chinese_target() -> None:
    rows = [
        {"text": "天气很好，我们去公园散步。"},
        {"text": "列表推导式可以过滤元素。"},
        {"text": "the weather is fine"},
    ]
    scores = (
        BM25(target=[{"text": "怎样用列表推导式"}, {"text": "列表过滤"}], pick="mean")
        .fit(make_pool(rows))
        .score(make_pool(rows))
    )
    assert scores.values.argmax() == 1
    assert Counter(scores.values.tolist())[0.0] == 2
