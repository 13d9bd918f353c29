"""DaaR's first stage as the method runs it: descriptions, generator, journal and features put together, once.

The written rows are stored in the cache folder (`written/<key>/`) under a hash of everything that determines them, the
replies beside them (`replies/<key>.jsonl`), so that a run that was stopped, or is repeated in another run folder,
sends no request twice. Cost: `siftune.offline.daar.synthesis`'s, or reading a small file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...files import cache_folder, hash_json
from ...models.address import is_server
from ...models.backbone import Backbone, DType
from ...models.chat import content_key
from ...models.generate import Generator, check_generator, open_generator
from ...models.journal import Journal, Journaled
from ...models.parameters import check_request
from .acceptance import Embed, embedder
from .descriptions import Descriptions, DomainSource, read_descriptions
from .seeds import SeedSource, read_seeds
from .synthesis import Synthesis, Writing
from .written import SEEDS, write_rejected

VERSION = 2
"""Increased whenever the same replies would produce other rows."""


@dataclass(frozen=True)
class Planned:
    """Known before a row is written: the domains' names, as in `Seeds`."""

    domains: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StageOne:
    """The stage with everything that determines its result; fields as those of `DaaR`.

    >>> StageOne(generator="./chat", domains=None, seeds=None, model="./base", seed=0).run()
    """

    generator: str
    domains: DomainSource | None
    seeds: SeedSource | None
    """Real rows that join the written ones (stage 1c)."""
    model: str
    seed: int
    compat: Literal["paper"] | None = None
    max_length: int = 1024
    dtype: DType = "auto"
    device: str = "auto"
    cache: str | Path | None = None
    request: Mapping[str, object] | None = None
    """Further parameters of requests to a server."""

    # --- checks -------------------------------------------------------------------------------------------------------

    def check(self) -> Planned:
        """Check everything that needs neither a model nor a server. Raises `UserError`."""
        check_generator(self.generator)
        if self.request is not None:
            check_request(self.request)
            if not is_server(self.generator):
                raise UserError(
                    "request= is for a generator on a server; set generator=http://HOST:PORT/v1, or leave it out"
                )
        descriptions, _ = self.settings()
        self.real(descriptions)
        return Planned(descriptions.names)

    def settings(self) -> tuple[Descriptions, Synthesis]:
        """The descriptions of the domains, and how rows are written."""
        descriptions = read_descriptions(self.domains)
        synthesis = Synthesis.of(descriptions.settings)
        return descriptions, replace(synthesis, at_once=1) if self.compat == "paper" else synthesis

    def real(self, descriptions: Descriptions) -> dict[str, list[dict[str, str]]]:
        """The rows of `seeds` by domain, in the three fields that written rows have."""
        if self.seeds is None:
            return {}
        seeds = read_seeds(self.seeds, cache=self.cache, fewest=1)
        if unknown := [name for name in seeds.domains if name not in descriptions.names]:
            raise UserError(
                f"seeds name the domain {unknown[0]!r}, which the generator has no description of; describe it in "
                "domains=FILE, or leave generator out to use the seeds alone"
            )
        result: dict[str, list[dict[str, str]]] = {name: [] for name in seeds.domains}
        for label, row in zip(seeds.labels, seeds.pool.read(seeds.pool.eligible.tolist()), strict=True):
            fields = {"instruction": row.instruction, "input": row.input, "output": row.output}
            result[seeds.domains[label]].append(fields)
        return result

    def inputs(self) -> dict[str, str]:
        """Content hashes of what the stage reads, for a run's identity; a server is identified by its address alone."""
        descriptions, synthesis = self.settings()
        result = {"domains": hash_json([asdict(descriptions), asdict(synthesis)])}
        if not is_server(self.generator):
            result["generator"] = open_generator(self.generator, device=self.device, dtype=self.dtype).key
        return result

    # --- run ----------------------------------------------------------------------------------------------------------

    def run(self, progress: Any = None, *, generator: Generator | None = None, embed: Embed | None = None) -> Path:
        """The folder of the written rows, written now unless it exists. Raises `UserError`.

        `generator` and `embed` take the place of the ones that are opened by name.
        """
        descriptions, synthesis = self.settings()
        settings: dict[str, Any] = {} if self.request is None else {"request": self.request}
        opened = generator or open_generator(self.generator, device=self.device, dtype=self.dtype, **settings)
        real = self.real(descriptions)
        cache = cache_folder(self.cache)
        words = [opened.key, asdict(replace(descriptions, settings={})), self.seed]  # other settings share the replies
        folder = cache / "written" / hash_json([VERSION, *words, asdict(synthesis), real, self._features_key(embed)])
        replies = cache / "replies" / f"{hash_json(words)}.jsonl"
        if (folder / SEEDS).is_file():
            return folder
        with Journal(replies) as journal:
            if not (folder / SEEDS).is_file():
                self._write(folder, descriptions, synthesis, Journaled(opened, journal), embed, real, progress)
        return folder

    def _write(
        self,
        folder: Path,
        descriptions: Descriptions,
        synthesis: Synthesis,
        generator: Journaled,
        embed: Embed | None,
        real: Mapping[str, Sequence[Mapping[str, str]]],
        progress: Any,
    ) -> None:
        features = embed or embedder(
            self.model, synthesis.space, max_length=self.max_length, dtype=self.dtype, device=self.device
        )
        writing = Writing(descriptions, generator, features, synthesis, seed=self.seed, real=real, progress=progress)
        try:
            written = writing.run()
        except UserError as error:
            if not writing.rejected:
                raise
            path = write_rejected(folder, writing.rejected)
            raise UserError(f"{error} (what was not used is in {path})") from error
        finally:
            if release := getattr(generator.generator, "release", None):
                release()
        left_out = getattr(generator.generator, "left_out", {})
        notes = [f"the server refuses {name}, left out: {why}" for name, why in left_out.items()]
        written.write(folder, counts=asdict(generator.counts), notes=notes)

    def _features_key(self, embed: Embed | None) -> str:
        """Content hash of what the acceptance features depend on: the base model's files, and how they are read."""
        if embed is not None:
            return "given"
        files = Backbone(self.model, layer=1, dtype=self.dtype, device=self.device)
        return hash_json([content_key(files), self.max_length])
