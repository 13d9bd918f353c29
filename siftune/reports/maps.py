"""The map of a pool: similar rows are near each other (t-SNE by openTSNE, van der Maaten and Hinton 2008).

Similarity is computed from the data available on disk, and the page names it: the model's features h(x) of all rows
(`--keep-features`), those of the probe set (kept by every DaaR run), or the words of the rows' text (any other run).
Distances between clusters and cluster sizes are not meaningful. Positions are cached.
Cost: most of a page's time, slightly more than linear in the rows; only the first time.

Axes: `M` rows of the map, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import hash_json
from ..records import Pool
from .probe import ProbeSet
from .rows_file import Selection, Texts, store_folder

COMPONENTS = 50
"""Principal components that t-SNE starts from."""
TEXT_CHARACTERS = 1000
"""Maximum characters of a question and of an answer, where the map is computed from text."""
VOCABULARY = 30_000
MIN_ROWS = 20
"""With fewer rows there is no map."""
TOKENS = r"(?u)[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]"
"""Words, punctuation, and single characters of scripts without spaces."""
GRID = 10_000


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions of rows on the map."""

    rows: NDArray[np.int64]
    """Shape `(M,)`: rows of the pool."""
    at: NDArray[np.int64]
    """Shape `(M, 2)`: 0 .. `GRID`."""
    of: str
    """A sentence for the reader on what was mapped."""


def positions(
    selection: Selection,
    texts: Texts,
    probe_set: ProbeSet | None,
    *,
    most: int,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Positions | None:
    """A map of at most `most` rows of the pool; None where neither features nor texts are available, or there are too few rows."""
    if texts.pool is None or most < MIN_ROWS:
        return None
    pool = texts.pool
    if (kept := _kept_features(selection, pool, most, seed, cache)) is not None:
        rows, features = kept
        of = f"Rows with similar features h(x) are close together; {_of_all(rows, pool)}, features kept by the run."
        return _placed(rows, features, of, seed, cache)
    if probe_set is not None and len(probe_set.rows) >= MIN_ROWS:
        rows, features = probe_set.rows[:most], probe_set.hidden[:most]  # the draw's own order is random
        of = (
            f"Rows with similar features h(x) are close together; {_of_all(rows, pool)}: the probe set, drawn at random, whose "
            "features the run kept."
        )
        return _placed(rows, features, of, seed, cache)
    rows = drawn(pool, most, seed)
    if len(rows) < MIN_ROWS:
        return None
    of = f"Rows with shared words are close together; {_of_all(rows, pool)}. No model features of this run are on disk."
    return _placed(rows, None, of, seed, cache, texts=texts)


def drawn(pool: Pool, most: int, seed: int) -> NDArray[np.int64]:
    """At most `most` usable rows, ascending, drawn without replacement."""
    rows = pool.eligible
    if len(rows) <= most:
        return rows
    return np.sort(np.random.Generator(np.random.PCG64(seed)).choice(rows, most, replace=False))


def _of_all(rows: NDArray[np.int64], pool: Pool) -> str:
    usable = len(pool) - len(pool.reasons)
    return f"all {usable:,} usable rows" if len(rows) == usable else f"{len(rows):,} of {usable:,} usable rows"


def _kept_features(
    selection: Selection, pool: Pool, most: int, seed: int, cache: str | Path | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Features of a sample of rows, where the run kept the features of all rows and they are still in the store."""
    if selection.method != "daar" or not selection.config.get("keep_features"):
        return None
    from ..models.store import Store
    from ..offline.daar.scoring import StoredFeatures
    from ..offline.daar.selector import DaaR

    try:
        task = DaaR.load(selection.folder).feature_task(for_fit=False)
        stored = StoredFeatures(_StoreOnly(task.key), Store(store_folder("features", cache)))
        rows = drawn(pool, most, seed)
        drawn_rows, parts, row_parts = set(rows.tolist()), [], []
        for shard in pool.shards():
            hidden = stored(pool, shard).columns["hidden"]
            inside = [row for row in range(shard.start, shard.stop) if row in drawn_rows]
            part = hidden[[row - shard.start for row in inside]]
            finite = np.isfinite(part).all(axis=1)
            parts.append(part[finite])
            row_parts.append(np.array(inside, dtype=np.int64)[finite])
    except (UserError, OSError, LookupError, TypeError):
        return None
    rows_with_features = np.concatenate(row_parts)
    return (rows_with_features, np.concatenate(parts)) if len(rows_with_features) >= MIN_ROWS else None


@dataclass(frozen=True)
class _StoreOnly:
    """A task with a key that computes nothing: features that are not in the store are not computed for a page."""

    key: str

    def __call__(self, pool: Pool, shard: Any) -> Any:
        raise LookupError("not in the store")


# --- from features to positions -------------------------------------------------------------------------------------


def _placed(
    rows: NDArray[np.int64],
    features: NDArray[Any] | None,
    of: str,
    seed: int,
    cache: str | Path | None,
    *,
    texts: Texts | None = None,
) -> Positions | None:
    from ..models.store import Store

    store = Store(store_folder("maps", cache))
    assert texts is None or texts.pool is not None
    content = texts.pool.fingerprint if texts is not None and texts.pool is not None else _digest(features)
    key = hash_json(["map", 1, content, hash_json(rows.tolist()), seed])
    if stored := store.get(key):
        return Positions(rows, stored[0]["at"].astype(np.int64), of)
    if features is None:
        assert texts is not None
        features = text_features(texts, rows.tolist(), seed)
        if features is None:
            return None
    at = _on_grid(embed(features, seed))
    store.put(key, {"at": at.astype(np.int32)}, {})
    return Positions(rows, at, of)


def _digest(features: NDArray[Any] | None) -> str:
    from ..files import hash_bytes

    assert features is not None
    return hash_bytes(np.ascontiguousarray(features).tobytes())


def text_features(texts: Texts, rows: Sequence[int], seed: int) -> NDArray[np.float32] | None:
    """Word statistics of each row, `(M, D)`: TF-IDF, its leading components; None where no word occurs in two rows."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    read = [text or ("", "") for text in texts.read(rows)]
    texts_of_rows = [f"{question[:TEXT_CHARACTERS]}\n{answer[:TEXT_CHARACTERS]}" for question, answer in read]
    vectorizer = TfidfVectorizer(
        token_pattern=TOKENS, min_df=2, max_df=0.5, max_features=VOCABULARY, sublinear_tf=True, dtype=np.float32
    )
    try:
        counts = vectorizer.fit_transform(texts_of_rows)
    except ValueError:  # no word in two rows
        return None
    if counts.shape[1] < 3:
        return None
    components = TruncatedSVD(min(COMPONENTS, counts.shape[1] - 1), random_state=seed)
    features: NDArray[np.float32] = components.fit_transform(counts)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.where(length > 0, length, 1), dtype=np.float32)


def embed(features: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """Two numbers per row by t-SNE, `(M, 2)`, from the leading principal components."""
    from openTSNE import TSNE
    from sklearn.decomposition import PCA

    rows = np.asarray(features, dtype=np.float64)
    if rows.shape[1] > COMPONENTS:
        rows = PCA(min(COMPONENTS, len(rows) - 1), random_state=seed, svd_solver="randomized").fit_transform(rows)
    embedding = TSNE(perplexity=min(30, max(2, (len(rows) - 1) // 4)), random_state=seed, n_jobs=1, n_iter=400).fit(
        rows
    )
    return np.asarray(embedding, dtype=np.float64)


def _on_grid(at: NDArray[np.float64]) -> NDArray[np.int64]:
    low, span = at.min(axis=0), max(float(np.ptp(at, axis=0).max()), 1e-9)
    return np.asarray(np.rint((at - low) / span * GRID), dtype=np.int64)
