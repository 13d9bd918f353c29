"""A pool as token rows on disk: `input_ids` and `labels` that a trainer memory-maps, written once per content.

Rows are tokenised in the pool's order, in chunks, into the cache folder (`tokens/<key>/`); the key is a hash of the pool's
content, the tokenizer, the text form and the length, so that a second run or the next cell of a study reuses them.
Memory grows only with the number of rows that are left out. Cost: tokenisation; 8 bytes per token on disk.

Shapes: `n` rows that can be trained on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..data.exports import refill
from ..data.formats import BadRow
from ..data.sums import are_intact, read_checked_json, sums_of, write_checked_json
from ..errors import UserError
from ..files import (
    atomic_path,
    cache_folder,
    hash_file,
    hash_json,
    plain_errors,
    read_json,
    remove,
    temporary_beside,
    write_json,
)
from ..models.load import TOKENIZER_FILES, quiet
from ..models.tokenize_rows import VERSION, Encoder, Text
from ..progress import counted
from ..records import Pool
from .row_weights import COLUMN as WEIGHT
from .row_weights import weight_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 512
LINES_AT_ONCE = 65_536
TOKENS, META, REASONS = "tokens.arrow", "meta.json", "reasons.json"
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("row", pa.int64()),
        ("cut", pa.bool_()),
        (WEIGHT, pa.float32()),
    ]
)


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The rows of a pool as a trainer reads them, and the reasons of those that were left out."""

    folder: Path
    meta: Mapping[str, Any]
    """`key`, `rows`, `cut` (rows that were truncated), `tokens`, `label_tokens`, `beyond` (rows of the pool after
    `max_rows`), `weights` (rows with a weight other than 1)."""
    reasons: Mapping[int, str]
    """Why a readable row of the pool was left out, by its row in the pool."""

    @property
    def dataset(self) -> Dataset:
        """A `datasets.Dataset` of `input_ids` and `labels`, memory-mapped from disk."""
        return self._dataset("input_ids", "labels")

    @property
    def weighted(self) -> Any:
        """The same, with the rows' weights as `row_weight`."""
        return self._dataset("input_ids", "labels", WEIGHT)

    @property
    def has_weights(self) -> bool:
        """Whether some row has a weight other than 1."""
        return bool(self.meta["weights"])

    def _dataset(self, *columns: str) -> Any:
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / TOKENS)).select_columns(list(columns))

    @property
    def positions(self) -> NDArray[np.int64]:
        """The row of the pool that each row is. Shape `(n,)`."""
        return self._column("row")

    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens, label tokens, and whether the row was truncated, of every row. Each of shape `(n,)`."""
        tokens, label_tokens, cut = [], [], []
        with pa.memory_map(str(self.folder / TOKENS)) as source:
            for batch in pa.ipc.open_stream(source):
                ids, labels = batch.column("input_ids"), batch.column("labels")
                ends = np.asarray(ids.offsets)
                tokens.append(np.diff(ends))
                is_label = np.asarray(labels.values) != -100
                label_tokens.append(np.add.reduceat(is_label, ends[:-1] - ends[0], dtype=np.int64))
                cut.append(np.asarray(batch.column("cut")))
        return np.concatenate(tokens).astype(np.int64), np.concatenate(label_tokens), np.concatenate(cut)

    def _column(self, name: str) -> NDArray[Any]:
        with pa.memory_map(str(self.folder / TOKENS)) as source:
            parts = [np.asarray(batch.column(name)) for batch in pa.ipc.open_stream(source)]
        return np.concatenate(parts)


def tokenizer_key(folder: Path) -> str:
    """Content hash of a tokenizer's files and of the libraries that read them."""
    import tokenizers
    import transformers

    files = {name: hash_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    return hash_json([files, tokenizers.__version__, transformers.__version__])


def training_rows(
    pool: Pool,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str,
    text: Text,
    max_length: int,
    max_rows: int | None = None,
    cache: str | Path | None = None,
) -> TrainingRows:
    """The pool's usable rows as tokens, from the cache where available. `key` is the tokenizer's (`tokenizer_key`).

    Raises `UserError` where no row has a label token.

    >>> training_rows(pool, tokenizer, key=tokenizer_key(folder), text="auto", max_length=512).meta["rows"]
    4000
    """
    name = hash_json([VERSION, pool.fingerprint, key, text, max_length, max_rows])
    folder = cache_folder(cache) / "tokens" / name
    if not _is_sound(folder):
        _make(folder, pool, Encoder(tokenizer, text, max_length), max_rows, name)
    reasons = {int(row): str(reason) for row, reason in read_json(folder / REASONS).items()}
    meta = read_checked_json(folder / META)
    if meta is None:
        raise UserError(f"{folder / META} is damaged; run the same command again, which writes it anew")
    if not meta["rows"]:
        kinds = Counter(reason.partition(":")[0] for reason in reasons.values()).most_common()
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
        raise UserError(f"no row of {_name(pool)} can be trained on ({counts}); raise sft.max_length, or fix the rows")
    return TrainingRows(folder, meta, reasons)


def _is_sound(folder: Path) -> bool:
    """Whether a finished folder exists with every file as it was written."""
    meta = read_checked_json(folder / META)
    return meta is not None and are_intact(folder, meta["sums"])


def _name(pool: Pool) -> str:
    ((file, _),) = pool.source.locations([0])
    return file


def _make(folder: Path, pool: Pool, encode: Encoder, max_rows: int | None, key: str) -> None:
    """Write the folder under a temporary name and rename it, unless another process was first."""
    with plain_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder)
    reasons: dict[int, str] = {}
    meta = {"key": key, "rows": 0, "cut": 0, "tokens": 0, "label_tokens": 0, "beyond": 0, "weights": 0}
    with plain_errors(folder.parent):
        temporary.mkdir()
        try:
            with pa.OSFile(str(temporary / TOKENS), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
                batches = _batches(pool, encode, max_rows, reasons, meta)
                size = len(pool.eligible)
                for batch in counted("tokenising rows", batches, size, size=lambda batch: int(batch.num_rows)):
                    writer.write_batch(batch)
            write_json(temporary / REASONS, reasons)
            write_checked_json(temporary / META, {**meta, "sums": sums_of(temporary)})
            if folder.exists() and not _is_sound(folder):
                refill(folder, temporary, last=META)
                return
            try:
                os.rename(temporary, folder)
            except OSError:
                if not _is_sound(folder):
                    raise
        finally:
            remove(temporary)


def _batches(
    pool: Pool, encode: Encoder, max_rows: int | None, reasons: dict[int, str], meta: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    eligible = pool.eligible
    for start in range(0, len(eligible), ROWS_AT_ONCE):
        columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        positions = eligible[start : start + ROWS_AT_ONCE].tolist()
        with quiet():
            for at, row in enumerate(pool.read(positions)):
                if max_rows is not None and meta["rows"] == max_rows:
                    meta["beyond"] = len(eligible) - start - at
                    break
                try:
                    weight = weight_of(row.weight)
                    encoded = encode(row)
                except BadRow as bad:
                    reasons[row.row] = str(bad)
                    continue
                for name, value in zip(
                    _SCHEMA.names,
                    (encoded.input_ids, encoded.labels, row.row, encoded.cut, weight),
                    strict=True,
                ):
                    columns[name].append(value)
                meta["rows"] += 1
                meta["weights"] += weight != 1
                meta["cut"] += encoded.cut
                meta["tokens"] += len(encoded.input_ids)
                meta["label_tokens"] += encoded.label_tokens
        if columns["row"]:
            yield pa.record_batch([pa.array(columns[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA)
        if meta["beyond"]:
            return


def write_rows(path: Path, pool: Pool, rows: TrainingRows) -> None:
    """`rows.parquet`: every row of the pool once: position in the training set, tokens, label tokens, cut; or the reason.

    Streamed in chunks, so that memory does not grow with the texts.
    """
    from ..data.checked_parquet import open_writer

    position = np.full(len(pool), -1, dtype=np.int64)
    position[rows.positions] = np.arange(rows.meta["rows"])
    tokens, label_tokens, cut = rows.lengths()
    reasons = {**rows.reasons, **pool.reasons}
    writer = None
    with atomic_path(path) as temporary:
        for start in range(0, len(pool), LINES_AT_ONCE):
            chunk = range(start, min(start + LINES_AT_ONCE, len(pool)))
            chunk_positions = position[chunk.start : chunk.stop]
            absent, places = chunk_positions < 0, pool.source.locations(chunk)
            chunk_reasons = [
                reasons.get(row, "beyond max_rows") if is_absent else None
                for row, is_absent in zip(chunk, absent, strict=True)
            ]
            table = pa.table(
                {
                    "row": pa.array(chunk, pa.int64()),
                    "id": pa.array(pool.source.ids(chunk), pa.string()),
                    "file": pa.array([file for file, _ in places], pa.string()),
                    "line": pa.array([line for _, line in places], pa.int64()),
                    "position": pa.array(chunk_positions, pa.int64(), mask=absent),
                    "tokens": pa.array(tokens[chunk_positions], pa.int64(), mask=absent),
                    "label_tokens": pa.array(label_tokens[chunk_positions], pa.int64(), mask=absent),
                    "cut": pa.array(cut[chunk_positions], pa.bool_(), mask=absent),
                    "reason": pa.array(chunk_reasons, pa.string()),
                }
            )
            writer = writer or open_writer(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None, "load_pool refuses an empty pool"
        writer.close()
