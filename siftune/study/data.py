"""The rows of a study, drawn once and shared by every cell: pool, held-out, seed, validation and reference rows.

Every draw is seeded by `draw_seed` (seed rows by the cell's seed too) and written as JSONL into the study's `data/`. Rows
without a learnt token under the recipe's text form and length are never drawn, and counted by reason: so every method
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
    """What `prepare` wrote."""

    folder: Path
    facts: Mapping[str, Any]
    """data.json: rows and tokens drawn, by domain; what could not be used; hashes of the files."""

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
        """Real tokens of a drawn row, on average, as the recipe cuts it."""
        return float(self.facts["tokens"]) / self.rows

    def places(self, study: Study, seed: int) -> dict[str, str]:
        """What `{place}` stands for in a method's settings."""
        return {
            "model": str(model_folder(study)),
            "pool": str(self.pool),
            "rest": str(self.folder / "rest.jsonl"),
            "seeds": str(self.folder / f"seeds-{seed}.jsonl"),
            "validation": str(self.folder / "validation.jsonl"),
            "reference": str(self.folder.parent / "reference" / "reference.parquet"),
        }


def model_folder(study: Study) -> Path:
    """Where the study's model lies. Raises `UserError` where it does not."""
    if study.model == DEMO:
        from ..demo.embedded import model_folder as embedded

        return embedded()
    return find_folder(study.model, None)


def model_key(study: Study) -> str:
    """Content hash of the model's configuration, tokenizer and weights."""
    from ..sft.adapters import model_key as key

    return key(model_folder(study))


def prepare(study: Study, folder: Path) -> Data:
    """Draw and write every row that the study uses, or find them as an earlier run left them. Raises `UserError`.

    >>> prepare(study, Path("run/data")).pool
    """
    folder.mkdir(parents=True, exist_ok=True)
    pool = {name: _load(study, source, "pool") for name, source in _sources(study, "pool", folder).items()}
    held = {name: _load(study, source, "held_out") for name, source in _sources(study, "held_out", folder).items()}
    key = _key(study, pool, held)
    if (folder / FACTS).is_file():
        facts = read_json(folder / FACTS)
        if facts.get("key") == key and all(_same(folder / name, said) for name, said in facts["files"].items()):
            return Data(folder, facts)
        (folder / FACTS).unlink()
    with quiet():  # a row longer than the model's positions is cut, which the tokenizer cannot know
        facts = _Drawing(study, folder).draw(pool, held)
    write_json(folder / FACTS, {"key": key, **facts})
    return Data(folder, {"key": key, **facts})


def _same(path: Path, said: str) -> bool:
    return path.is_file() and hash_file(path) == said


def _load(study: Study, source: str, what: str) -> Pool:
    try:
        return load_pool(source, columns=dict(study.columns or {}), on_bad_row=study.on_bad_row, format=study.format)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _sources(study: Study, key: str, folder: Path) -> dict[str, str]:
    """The study's sources, those of the embedded corpus written first."""
    sources: Mapping[str, str] = getattr(study, key)
    if DEMO not in sources.values():
        return dict(sources)
    from ..demo import corpus

    made = corpus.rows(DEMO_ROWS, 0) if key == "pool" else corpus.held_out(DEMO_HELD_OUT, 0)
    found = {}
    (folder / DEMO).mkdir(exist_ok=True)
    for name in corpus.DOMAINS:
        path = folder / DEMO / f"{key}-{name}.jsonl"
        wanted = ("instruction", "input", "output")
        _write(path, [{field: row[field] for field in wanted} for row in made if row["source"] == name])
        found[name] = str(path)
    return found


def _key(study: Study, pool: Mapping[str, Pool], held: Mapping[str, Pool]) -> str:
    said = [
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
        part: {name: one.fingerprint for name, one in pools.items()} for part, pools in (("p", pool), ("h", held))
    }
    wanted = sorted(study.asks & {"rest", "seeds", "validation", "reference"})
    return hash_json([VERSION, [getattr(study, name) for name in said], sources, wanted, model_key(study)])


class _Drawing:
    """One drawing of all rows."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        model = model_folder(study)
        self.tokenizer = read_tokenizer(model, model=study.model, trust_remote_code=False)
        self.unusable: Counter[str] = Counter()
        self.files: dict[str, str] = {}

    def draw(self, pool: Mapping[str, Pool], held: Mapping[str, Pool]) -> dict[str, Any]:
        """Write every file; the facts of data.json."""
        facts, rest, ids = self._pool(pool)
        wanted = self.study.asks
        if wanted & {"rest", "reference"}:
            self._put("rest.jsonl", rest)
            facts["reference_rows"] = len(rest)
        facts |= self._held_out(held, ids)
        return facts | {"unusable": dict(sorted(self.unusable.items())), "files": self.files}

    # --- pool -----------------------------------------------------------------------------------------------------

    def _pool(self, pools: Mapping[str, Pool]) -> tuple[dict[str, Any], list[dict[str, Any]], set[str]]:
        drawn: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        ids: set[str] = set()
        tokens = learnt = 0
        domains: dict[str, Any] = {}
        needs_rest = bool(self.study.asks & {"rest", "reference"})
        for index, (name, pool) in enumerate(pools.items()):
            want = _part(self.study.rows, index, len(pools))
            usable = self._usable(pool, self._order(pool, index))
            taken = list(_take(usable, want))
            if want is not None and len(taken) < want:
                raise UserError(
                    f"rows={self.study.rows} asks for {want} rows of {name}, which holds {len(taken)} that can be "
                    "trained on; lower rows, or leave it out"
                )
            if not taken:
                raise UserError(f"pool {name} holds no row that can be trained on ({self._why()})")
            rows = [row for row, _, _ in taken]
            ids.update(pool.source.ids(rows))
            drawn += self._labelled(pool, rows, name)
            if needs_rest:
                more = [row for row, _, _ in _take(usable, _part(self.study.reference_rows, index, len(pools)))]
                rest += pool.source.originals(more)
            used = sum(count for _, count, _ in taken)
            domains[name] = {"rows": len(rows), "tokens": used, "source_rows": len(pool)}
            tokens, learnt = tokens + used, learnt + sum(count for _, _, count in taken)
        random.Random(f"siftune study {self.study.draw_seed}").shuffle(drawn)
        self._put("pool.jsonl", drawn)
        if needs_rest and not rest:
            raise UserError("{reference} and {rest} need rows of the pool that are not drawn; lower rows")
        facts = {"rows": len(drawn), "tokens": tokens, "label_tokens": learnt, "domains": domains}
        return facts, rest, ids

    def _labelled(self, pool: Pool, rows: Sequence[int], name: str) -> list[dict[str, Any]]:
        label = self.study.label
        originals = pool.source.originals(rows)
        if any(label in row for row in originals):
            raise UserError(f"pool {name} has a column {label!r} of its own; name another for the domain with label:")
        return [{**row, label: name} for row in originals]

    def _order(self, pool: Pool, index: int) -> list[int]:
        """The eligible rows in the order in which they are drawn."""
        generator = np.random.default_rng([self.study.draw_seed, index])
        return [int(row) for row in generator.permutation(pool.eligible)]

    def _usable(self, pool: Pool, order: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(row, tokens, learnt tokens) of the rows that can be trained on, in order, tokenised as they are asked for."""
        from ..models.tokenize_rows import Encoder, check_text

        check_text(self.study.text, self.tokenizer, model=self.study.model, format=pool.format)
        encoder = Encoder(self.tokenizer, self.study.text, self.study.max_length)
        for position, found in encoder.over(pool, order):
            if isinstance(found, BadRow):
                self.unusable[str(found).split(":")[0]] += 1
            else:
                yield position, len(found.input_ids), found.label_tokens

    def _why(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.unusable.items()) or "it is empty"

    # --- held out -------------------------------------------------------------------------------------------------

    def _held_out(self, pools: Mapping[str, Pool], ids: set[str]) -> dict[str, Any]:
        """Measured rows first, then validation rows, then seed rows: no row serves twice, none is in the pool."""
        files: dict[str, str] = {}
        validation: list[dict[str, Any]] = []
        left: dict[str, list[Row]] = {}
        overlap = 0
        for index, (name, pool) in enumerate(pools.items()):
            order = self._order(pool, 1000 + index)
            fresh = [row for row, one in zip(order, pool.source.ids(order), strict=True) if one not in ids]
            overlap += len(order) - len(fresh)
            want = self.study.held_out_rows or len(fresh)
            measured = fresh[:want]
            if not measured:
                raise UserError(f"held_out {name} holds no row that the pool has not; give rows of their own")
            files[name] = f"held_out-{_plain(name)}.jsonl"
            self._put(files[name], pool.source.originals(measured))
            usable = self._usable(pool, fresh[want:])
            if self.study.asks & {"validation", "seeds"}:  # the same rows whichever of both is asked for
                share = -(-self.study.validation_rows // len(pools))
                validation += _plain_rows(pool, [row for row, _, _ in _take(usable, share)])
            if "seeds" in self.study.asks:
                left[name] = pool.read([row for row, _, _ in usable])
        if "validation" in self.study.asks:
            if not validation:
                raise UserError("{validation} needs held-out rows beyond those measured; lower held_out_rows")
            random.Random(f"siftune validation {self.study.draw_seed}").shuffle(validation)
            self._put("validation.jsonl", validation)
        if "seeds" in self.study.asks:
            self._seeds(left)
        return {"held_out": files, "held_out_in_pool": overlap, "validation_rows": len(validation)}

    def _seeds(self, left: Mapping[str, Sequence[Row]]) -> None:
        """The seed rows of every seed, in the columns that a seeds file has."""
        wanted = self.study.seed_rows
        for name, rows in left.items():
            if len(rows) < wanted:
                raise UserError(
                    f"{{seeds}} needs seed_rows={wanted} rows of {name} beyond those measured and for validation, and "
                    f"there are {len(rows)}; lower held_out_rows or seed_rows"
                )
        for seed in self.study.seeds:
            made = []
            for name, rows in left.items():
                drawn = random.Random(f"{seed} {name}").sample(list(rows), wanted)
                made += [{"domain": name, **_columns(row)} for row in drawn]
            self._put(f"seeds-{seed}.jsonl", made)

    def _put(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        _write(self.folder / name, rows)
        self.files[name] = hash_file(self.folder / name)


def _take(usable: Iterator[tuple[int, int, int]], count: int | None) -> Iterator[tuple[int, int, int]]:
    """The next `count` of them, all for None."""
    if count == 0:
        return
    for taken, one in enumerate(usable, 1):
        yield one
        if taken == count:
            return


def _part(total: int | None, index: int, parts: int) -> int | None:
    """An equal share of `total`, the first ones a row more where it does not divide."""
    return None if total is None else total // parts + (index < total % parts)


def _columns(row: Row) -> dict[str, Any]:
    """A row in our own columns, which every method reads without being told the user's."""
    if row.messages:
        return {"messages": [{"role": role, "content": content} for role, content in row.messages]}
    return {"instruction": row.instruction, "input": row.input, "output": row.output}


def _plain_rows(pool: Pool, rows: Sequence[int]) -> list[dict[str, Any]]:
    return [_columns(row) for row in pool.read(rows)]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False, default=json_value) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")
