"""The rows of a study, drawn once and shared by every cell: pool, held-out, seed, validation and reference rows.

Every draw is seeded by `draw_seed` (seed rows by the cell's seed too) and written as JSONL into the study's `data/`. Rows
without a label token under the recipe's text form and length are never drawn, and counted by reason: so every method
chooses among rows that can be trained on. Cost: reading the sources, and tokenising the rows that are drawn.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.formats import BadRow
from ..data.load import load_pool
from ..errors import UserError
from ..files import atomic_path, hash_file, hash_json, json_value, read_json, write_json
from ..models.load import find_folder, quiet, read_tokenizer
from ..records import Pool, Row
from .spec import DEMO, Study

VERSION = 1
FACTS = "data.json"
DEMO_ROWS = 6000
DEMO_HELD_OUT = 800


@dataclass(frozen=True)
class Data:
    """The files that `prepare` wrote."""

    folder: Path
    facts: Mapping[str, Any]
    """data.json: rows and tokens drawn, by domain; unusable rows by reason; hashes of the files."""

    @property
    def pool(self) -> Path:
        """The drawn pool."""
        return self.folder / "pool.jsonl"

    @property
    def held_out(self) -> dict[str, Path]:
        """The measured rows by domain."""
        return {name: self.folder / file for name, file in self.facts["held_out"].items()}

    @property
    def rows(self) -> int:
        """Rows of the drawn pool."""
        return int(self.facts["rows"])

    @property
    def mean_tokens(self) -> float:
        """Mean real tokens of a drawn row after truncation by the recipe."""
        return float(self.facts["tokens"]) / self.rows

    def places(self, study: Study, seed: int) -> dict[str, str]:
        """The path that replaces each `{place}` in a method's settings."""
        return {
            "model": str(model_folder(study)),
            "pool": str(self.pool),
            "rest": str(self.folder / "rest.jsonl"),
            "seeds": str(self.folder / f"seeds-{seed}.jsonl"),
            "validation": str(self.folder / "validation.jsonl"),
            "reference": str(self.folder.parent / "reference" / "reference.parquet"),
        }


def model_folder(study: Study) -> Path:
    """The folder of the study's model. Raises `UserError` where there is none."""
    if study.model == DEMO:
        from ..demo.embedded import model_folder as embedded

        return embedded()
    return find_folder(study.model, None)


def model_key(study: Study) -> str:
    """Content hash of the model's configuration, tokenizer and weights."""
    from ..sft.adapters import model_key as key

    return key(model_folder(study))


def prepare(study: Study, folder: Path) -> Data:
    """Draw and write every row that the study uses, or reuse those of an earlier run. Raises `UserError`.

    >>> prepare(study, Path("run/data")).pool
    """
    folder.mkdir(parents=True, exist_ok=True)
    pool = {name: _load(study, source, "pool") for name, source in _sources(study, "pool", folder).items()}
    held_out = {name: _load(study, source, "held_out") for name, source in _sources(study, "held_out", folder).items()}
    key = _key(study, pool, held_out)
    if (folder / FACTS).is_file():
        facts = read_json(folder / FACTS)
        if facts.get("key") == key and all(_same(folder / name, digest) for name, digest in facts["files"].items()):
            return Data(folder, facts)
        (folder / FACTS).unlink()
    with quiet():  # a row longer than the model's positions is cut, which the tokenizer cannot know
        facts = _Drawing(study, folder).draw(pool, held_out)
    write_json(folder / FACTS, {"key": key, **facts})
    return Data(folder, {"key": key, **facts})


def _same(path: Path, digest: str) -> bool:
    return path.is_file() and hash_file(path) == digest


def _load(study: Study, source: str, key: str) -> Pool:
    try:
        return load_pool(
            source,
            columns=dict(study.columns or {}),
            roles=study.roles,
            on_bad_row=study.on_bad_row,
            format=study.format,
        )
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _sources(study: Study, key: str, folder: Path) -> dict[str, str]:
    """The study's sources, those of the embedded corpus written first."""
    sources: Mapping[str, str] = getattr(study, key)
    if DEMO not in sources.values():
        return dict(sources)
    from ..demo import corpus

    rows = corpus.rows(DEMO_ROWS, 0) if key == "pool" else corpus.held_out(DEMO_HELD_OUT, 0)
    written = {}
    (folder / DEMO).mkdir(exist_ok=True)
    for name in corpus.DOMAINS:
        path = folder / DEMO / f"{key}-{name}.jsonl"
        columns = ("instruction", "input", "output")
        _write(path, [{field: row[field] for field in columns} for row in rows if row["source"] == name])
        written[name] = str(path)
    return written


def _key(study: Study, pool: Mapping[str, Pool], held_out: Mapping[str, Pool]) -> str:
    keys = [
        "rows",
        "held_out_rows",
        "draw_seed",
        "seed_rows",
        "validation_rows",
        "reference_rows",
        "seeds",
        "label",
        "text",
        "max_length",
    ]
    sources = {
        part: {name: source_pool.fingerprint for name, source_pool in pools.items()}
        for part, pools in (("p", pool), ("h", held_out))
    }
    places = sorted(study.places & {"rest", "seeds", "validation", "reference"})
    return hash_json([VERSION, [getattr(study, name) for name in keys], sources, places, model_key(study)])


class _Drawing:
    """One drawing of all rows."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        model = model_folder(study)
        self.tokenizer = read_tokenizer(model, model=study.model, trust_remote_code=False)
        self.unusable: Counter[str] = Counter()
        self.files: dict[str, str] = {}

    def draw(self, pool: Mapping[str, Pool], held_out: Mapping[str, Pool]) -> dict[str, Any]:
        """Write every file; the facts of data.json."""
        facts, rest, ids = self._pool(pool)
        places = self.study.places
        if places & {"rest", "reference"}:
            self._put("rest.jsonl", rest)
            facts["reference_rows"] = len(rest)
        facts |= self._held_out(held_out, ids)
        return facts | {"unusable": dict(sorted(self.unusable.items())), "files": self.files}

    # --- pool -----------------------------------------------------------------------------------------------------

    def _pool(self, pools: Mapping[str, Pool]) -> tuple[dict[str, Any], list[dict[str, Any]], set[str]]:
        drawn: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        ids: set[str] = set()
        tokens = label_tokens = 0
        domains: dict[str, Any] = {}
        needs_rest = bool(self.study.places & {"rest", "reference"})
        for index, (name, pool) in enumerate(pools.items()):
            size = _part(self.study.rows, index, len(pools))
            usable = self._usable(pool, self._order(pool, index))
            selected = list(_take(usable, size))
            if size is not None and len(selected) < size:
                raise UserError(
                    f"rows={self.study.rows} needs {size} rows of {name}, which holds {len(selected)} that can be "
                    "trained on; lower rows, or remove rows"
                )
            if not selected:
                raise UserError(f"pool {name} holds no row that can be trained on ({self._why()})")
            rows = [row for row, _, _ in selected]
            ids.update(pool.source.ids(rows))
            drawn += self._labelled(pool, rows, name)
            if needs_rest:
                more = [row for row, _, _ in _take(usable, _part(self.study.reference_rows, index, len(pools)))]
                rest += pool.source.originals(more)
            used = sum(count for _, count, _ in selected)
            domains[name] = {"rows": len(rows), "tokens": used, "source_rows": len(pool)}
            tokens, label_tokens = tokens + used, label_tokens + sum(count for _, _, count in selected)
        random.Random(f"siftune study {self.study.draw_seed}").shuffle(drawn)
        self._put("pool.jsonl", drawn)
        if needs_rest and not rest:
            raise UserError("{reference} and {rest} need rows of the pool that are not drawn; lower rows")
        facts = {"rows": len(drawn), "tokens": tokens, "label_tokens": label_tokens, "domains": domains}
        return facts, rest, ids

    def _labelled(self, pool: Pool, rows: Sequence[int], name: str) -> list[dict[str, Any]]:
        label = self.study.label
        originals = pool.source.originals(rows)
        if any(label in row for row in originals):
            raise UserError(
                f"pool {name} already has a column {label!r}; set another column for the domain with label:"
            )
        return [{**row, label: name} for row in originals]

    def _order(self, pool: Pool, index: int) -> list[int]:
        """The eligible rows in the order in which they are drawn."""
        generator = np.random.default_rng([self.study.draw_seed, index])
        return [int(row) for row in generator.permutation(pool.eligible)]

    def _usable(self, pool: Pool, order: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(row, tokens, label tokens) of the rows that can be trained on, in order, tokenised lazily."""
        from ..models.tokenize_rows import Encoder, check_text

        check_text(self.study.text, self.tokenizer, model=self.study.model, format=pool.format)
        encoder = Encoder(self.tokenizer, self.study.text, self.study.max_length)
        for position, encoded in encoder.over(pool, order):
            if isinstance(encoded, BadRow):
                self.unusable[str(encoded).split(":")[0]] += 1
            else:
                yield position, len(encoded.input_ids), encoded.label_tokens

    def _why(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.unusable.items()) or "it is empty"

    # --- held out -------------------------------------------------------------------------------------------------

    def _held_out(self, pools: Mapping[str, Pool], ids: set[str]) -> dict[str, Any]:
        """Measured rows first, then validation rows, then seed rows: no row is used twice, none is in the pool."""
        files: dict[str, str] = {}
        validation: list[dict[str, Any]] = []
        seed_candidates: dict[str, list[Row]] = {}
        overlap = 0
        for index, (name, pool) in enumerate(pools.items()):
            order = self._order(pool, 1000 + index)
            fresh = [row for row, row_id in zip(order, pool.source.ids(order), strict=True) if row_id not in ids]
            overlap += len(order) - len(fresh)
            count = self.study.held_out_rows or len(fresh)
            measured = fresh[:count]
            if not measured:
                raise UserError(f"held_out {name} holds no row that is not in the pool; use other rows")
            files[name] = f"held_out-{_plain(name)}.jsonl"
            self._put(files[name], pool.source.originals(measured))
            usable = self._usable(pool, fresh[count:])
            if self.study.places & {"validation", "seeds"}:  # the same rows whichever of both is used
                share = -(-self.study.validation_rows // len(pools))
                validation += _plain_rows(pool, [row for row, _, _ in _take(usable, share)])
            if "seeds" in self.study.places:
                seed_candidates[name] = pool.read([row for row, _, _ in usable])
        if "validation" in self.study.places:
            if not validation:
                raise UserError("{validation} needs held-out rows beyond those measured; lower held_out_rows")
            random.Random(f"siftune validation {self.study.draw_seed}").shuffle(validation)
            self._put("validation.jsonl", validation)
        if "seeds" in self.study.places:
            self._seeds(seed_candidates)
        return {"held_out": files, "held_out_in_pool": overlap, "validation_rows": len(validation)}

    def _seeds(self, seed_candidates: Mapping[str, Sequence[Row]]) -> None:
        """The seed rows of every seed, in the columns that a seeds file has."""
        count = self.study.seed_rows
        for name, rows in seed_candidates.items():
            if len(rows) < count:
                raise UserError(
                    f"{{seeds}} needs seed_rows={count} rows of {name} beyond those measured and for validation, and "
                    f"there are {len(rows)}; lower held_out_rows or seed_rows"
                )
        for seed in self.study.seeds:
            seed_rows = []
            for name, rows in seed_candidates.items():
                drawn = random.Random(f"{seed} {name}").sample(list(rows), count)
                seed_rows += [{"domain": name, **_columns(row)} for row in drawn]
            self._put(f"seeds-{seed}.jsonl", seed_rows)

    def _put(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        _write(self.folder / name, rows)
        self.files[name] = hash_file(self.folder / name)


def _take(usable: Iterator[tuple[int, int, int]], count: int | None) -> Iterator[tuple[int, int, int]]:
    """The next `count` rows, all for None."""
    if count == 0:
        return
    for number, row in enumerate(usable, 1):
        yield row
        if number == count:
            return


def _part(total: int | None, index: int, parts: int) -> int | None:
    """An equal share of `total`; the first shares have one row more where it does not divide evenly."""
    return None if total is None else total // parts + (index < total % parts)


def _columns(row: Row) -> dict[str, Any]:
    """A row in siftune's own columns, which every method reads without `columns:`."""
    if row.messages:
        messages = [
            {**message, **({} if not row.supervised or row.supervised[number] else {"weight": 0})}
            for number, message in enumerate(row.messages)
        ]
        return {"messages": messages, **({"tools": list(row.tools)} if row.tools else {})}
    return {"instruction": row.instruction, "input": row.input, "output": row.output}


def _plain_rows(pool: Pool, rows: Sequence[int]) -> list[dict[str, Any]]:
    return [_columns(row) for row in pool.read(rows)]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False, default=json_value) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")
