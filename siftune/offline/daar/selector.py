"""DaaR, "diversity as a reward": rank rows by how ambiguous their domain looks to the model's own early layers.

Source: arXiv 2502.04380 (NeurIPS 2025). Seeds -> centroids -> k-means pseudo-labels -> psi_dom -> entropy -> psi_div ->
one score per row, higher is kept. Cost: one truncated forward (embedding and first `layer` layers) over the probe set
for `fit`, and one over the pool for `score`; the probes themselves are small.

Axes: `B` rows of the probe set, `S` seed rows, `n` rows of the pool, `K` domains, `D` width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ...data.formats import TEXT_FORM
from ...errors import UserError
from ...files import hash_json
from ...models.backbone import Backbone, DType
from ...models.features import FeatureTask
from ...records import Pool, Scores, ShardTask
from ..base import OfflineMethod, SerialEngine
from .centroids import centroids
from .clusters import cluster
from .descriptions import DomainSource
from .facts import cluster_facts, counted, rank_correlation, tell_absent
from .fitting import ProbeTraining, fit_probes
from .paper import PaperFeatures
from .probe_set import draw_probe_set, features_of
from .scoring import ScoreTask, StoredFeatures
from .seeds import Seeds, SeedSource, read_seeds
from .stage_one import Planned, StageOne
from .state import Learned
from .written import SEEDS, copy_written, written_facts


@dataclass(kw_only=True, eq=False)
class DaaR(OfflineMethod):
    """Diversity reward of every row, with no domain labels: its only input is seed rows per domain, or, with a
    `generator` that writes them, one sentence per domain.

    `fit` draws a probe set from the pool and fits two probes; `score` streams the pool through them. The scores carry
    `domains`, `probabilities` `(n, K)` and `pseudo_labels` `(n,)`, so that they can be cut by quota or target mix.
    Raises `UserError` for seeds, settings or a model that cannot be used.

    >>> method = siftune.DaaR(model="Qwen/Qwen2.5-7B", seeds="seeds.jsonl")
    >>> method = siftune.DaaR(model="Qwen/Qwen2.5-7B", generator="http://127.0.0.1:8000/v1")
    >>> method.fit(pool).score(pool).keep(fraction=0.2).write("selected.jsonl")
    """

    name: ClassVar[str] = "daar"

    model: str
    """Base model whose first layers are read: a folder or a hub id."""
    seeds: SeedSource | None = None
    """Seed rows: a JSONL file whose rows carry `domain`, or a mapping from domain to rows. At least 2 domains. With a
    `generator`, they join the rows that it writes."""
    generator: str | None = None
    """Chat model that writes the seed rows: a folder, a hub id, or a server http://HOST:PORT/v1#MODEL (key: OPENAI_API_KEY)."""
    request: dict[str, object] | None = None
    """Further parameters of every request to a server as generator: KEY=VALUE, once for each; a value may be JSON."""
    domains: DomainSource | None = None
    """Descriptions for the generator: a YAML file of `name: one sentence`; left out, the paper's four domains."""
    layer: int = 3
    """Decoder layers before h(x) is taken, at least 1 (paper: 3; 1 to 10 are about as good)."""
    probe_rows: int = 5000
    """Rows that the probes are fitted on, drawn from the pool; at most half of it, unless it is tiny (paper: 5,000)."""
    reward: Literal["diversity", "entropy"] = "diversity"
    """`diversity` ranks by psi_div (paper); `entropy` by the entropy of psi_dom itself. Same fit, same shards."""
    training: ProbeTraining | None = None
    """How the probes are trained; None is `ProbeTraining()`, or `ProbeTraining.paper()` under compat="paper"."""
    seed: int = 0
    """Seed of the probe set's draw, the split, the folds and the probes' weights."""
    compat: Literal["paper"] | None = None
    """`paper`: the published constants, and the quirks of the authors' code that change results."""
    pooling: Literal["real", "padded"] | None = None
    """Means over real tokens, or over `max_length` padded positions (the authors' code). None: as `compat` says."""
    probe_text: Literal["plain", "labelled"] | None = None
    """Text of the probe set: as scored, or with `Instruction:` labels (the authors' code). None: as `compat` says."""
    max_length: int = 1024
    """Tokens read of a row; longer rows are truncated for features only (paper: 1,024)."""
    dtype: DType = "auto"
    """`auto`, `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0`, `mps`."""
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""
    keep_features: bool = False
    """Keep h(x) of every row in the store, 4 D bytes each; off, only the probe set's are kept."""

    written: Path | None = field(default=None, init=False, repr=False)
    """The folder of the rows that the generator wrote for the last `fit`, or that `load` read."""
    learned: Learned | None = field(default=None, init=False, repr=False)
    """The result of `fit` or `load`."""
    seconds: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    """Wall time of the stages of the last `fit`; empty when the fit was in the store."""

    # --- fit ------------------------------------------------------------------------------------------------------

    def check(self) -> Seeds | Planned:
        """Check everything that does not need a model; returns an object with the domains' names. Raises `UserError`."""
        for name, value, known in (
            ("reward", self.reward, ("diversity", "entropy")),
            ("compat", self.compat, (None, "paper")),
            ("pooling", self.pooling, (None, "real", "padded")),
            ("probe_text", self.probe_text, (None, "plain", "labelled")),
        ):
            if value not in known:
                raise UserError(f"{name}={value!r} is not known; use {' or '.join(str(k) for k in known if k)}")
        if self.probe_rows < 2:
            raise UserError(f"probe_rows={self.probe_rows} is too few to fit a probe on; set it to at least 2")
        self._training().check()
        if self.generator is not None:
            return self._stage_one().check()
        if self.request is not None:
            raise UserError(
                "request= is for a generator on a server, and none is set; set generator=http://HOST:PORT/v1"
            )
        if self.domains is not None:
            raise UserError("domains= describes domains to a generator, and none is set; set generator=MODEL")
        if self.seeds is None:
            raise UserError(
                'set seeds=FILE, JSONL rows with a "domain" beside their own fields, or generator=MODEL to write them'
            )
        return read_seeds(self.seeds, cache=self.cache)

    def inputs(self) -> dict[str, str]:
        """Content hashes of what is read beside the model and the pool: a run's identity holds them."""
        if self.generator is not None:
            hashes = self._stage_one().inputs()
            return (
                hashes
                if self.seeds is None
                else hashes | {"seeds": read_seeds(self.seeds, cache=self.cache, fewest=1).pool.fingerprint}
            )
        return {} if self.seeds is None else {"seeds": read_seeds(self.seeds, cache=self.cache).pool.fingerprint}

    def write_seeds(self) -> Seeds:
        """The seed rows of `generator`, written now unless the cache holds them; `written` is their folder after it.

        Raises `UserError` when the generator fails, or writes no usable row of a domain.
        """
        self.written = self._stage_one().run(getattr(self.engine, "progress", None))
        for note in written_facts(self.written)["told"]:
            warnings.warn(note, stacklevel=2)
        return read_seeds(self.written / SEEDS, cache=self.cache)

    def _stage_one(self) -> StageOne:
        assert self.generator is not None
        names = ("generator", "request", "domains", "seeds", "seed", "compat", "max_length", "dtype", "device", "cache")
        return StageOne(model=str(self.model), **{name: getattr(self, name) for name in names})

    def fit(self, pool: Pool) -> Self:
        """Learn centroids, pseudo-labels and both probes from the seeds and a probe set of the pool."""
        checked = self.check()
        engine = self.engine or SerialEngine()
        self.seconds = {}
        if isinstance(checked, Seeds):
            seeds = checked
        else:
            with self._timed("write_seeds"):
                seeds = self.write_seeds()
        probe_set = draw_probe_set(pool, self.probe_rows, seed=self.seed)
        task = self.feature_task(for_fit=True)
        key = self._fit_key(task, seeds, probe_set)
        if self.store is not None and (stored := self.store.get(key)):
            self.learned = Learned.from_arrays(*stored)
            return self
        with self._timed("seed_features"):
            seed_columns, _ = features_of(seeds.pool, task, engine, label="seed features")
        with self._timed("probe_features"):
            columns, sound = features_of(probe_set, task, engine, label="probe features")
        self.learned = self._learn(seeds, seed_columns, columns, sound)
        if self.store is not None:
            self.store.put(key, self.learned.arrays(), self.learned.facts)
        return self

    def _learn(
        self,
        seeds: Seeds,
        seed_columns: Mapping[str, NDArray[Any]],
        columns: Mapping[str, NDArray[Any]],
        sound: NDArray[np.int64],
    ) -> Learned:
        """Centroids, clusters and probes from the features of the seeds and of the sound rows of the probe set."""
        if len(sound) < 2:
            raise UserError(f"{len(sound)} of the {len(columns['tokens'])} rows of the probe set have features; need 2")
        embedding_BD, hidden_BD = columns["embedding"][sound], columns["hidden"][sound]
        with self._timed("clusters"):
            centroids_KD = centroids(
                seed_columns["embedding"], seeds.labels[: len(seed_columns["tokens"])], seeds.domains
            )
            clusters = cluster(embedding_BD, centroids_KD, seeds.domains)
        tell_absent(clusters, seeds.domains)
        with self._timed("probes"):
            fitted = fit_probes(
                torch.from_numpy(hidden_BD),
                clusters.labels,
                clusters.present,
                self._training(),
                seed=self.seed,
                device=self._probe_device(),
            )
        info = cluster_facts(seeds, centroids_KD, clusters) | {"probe_rows": len(sound)} | fitted.info
        return Learned(
            domains=seeds.domains,
            domain_probe=fitted.domain,
            reward_probe=fitted.reward,
            seed_centroids=centroids_KD,
            cluster_centers=clusters.centers,
            info=info,
        )

    def _training(self) -> ProbeTraining:
        if self.training is not None:
            return self.training
        return ProbeTraining.paper() if self.compat == "paper" else ProbeTraining()

    def _fit_key(self, task: ShardTask, seeds: Seeds, probe_set: Pool) -> str:
        rows = list(range(len(seeds.labels)))
        seed_content = [seeds.pool.source.ids(rows), seeds.labels.tolist(), list(seeds.domains), probe_set.fingerprint]
        settings = [TEXT_FORM, task.key, asdict(self._training()), self.seed, str(self._probe_device())]
        return hash_json(["daar-fit", 1, *seed_content, *settings])

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[stage] = round(perf_counter() - start, 3)

    # --- features -------------------------------------------------------------------------------------------------

    def feature_task(self, *, for_fit: bool) -> ShardTask:
        """Features of a shard: columns `hidden`, `tokens`, `truncated`, and for `fit` `embedding` too.

        A subclass overrides it to take features from elsewhere.
        """
        backbone = self._backbone()
        paper = self.compat == "paper"
        padded = (self.pooling or ("padded" if paper else "real")) == "padded"
        labelled = for_fit and (self.probe_text or ("labelled" if paper else "plain")) == "labelled"
        if padded or labelled:
            return PaperFeatures(backbone, padded=padded, labelled=labelled, token_budget=self.token_budget)
        return FeatureTask(backbone, embedding=for_fit, token_budget=self.token_budget)

    def backbone(self) -> Backbone | None:
        """The model's first layers; None where a subclass takes its features from elsewhere."""
        task = self.feature_task(for_fit=True)
        return task.backbone if isinstance(task, (FeatureTask, PaperFeatures)) else None

    def _backbone(self) -> Backbone:
        """One backbone per method, so that fit and score load the model once."""
        settings = {"layer": self.layer, "max_length": self.max_length, "dtype": self.dtype, "device": self.device}
        cached: Backbone | None = self.__dict__.get("_made")
        if cached is None or (cached.model, {name: getattr(cached, name) for name in settings}) != (
            self.model,
            settings,
        ):
            cached = Backbone(str(self.model), **settings)  # type: ignore[arg-type]
            self.__dict__["_made"] = cached
        return cached

    def _probe_device(self) -> torch.device:
        """A GPU that the model runs on fits the probes too; else the CPU."""
        device = self._backbone().torch_device
        return device if device.type == "cuda" else torch.device("cpu")

    # --- score ----------------------------------------------------------------------------------------------------

    def shard_task(self, pool: Pool) -> ShardTask:
        if self.learned is None:
            raise UserError("daar is not fitted; call fit(pool) first, or DaaR.load(run folder)")
        task = self.feature_task(for_fit=False)
        if self.keep_features and self.store is not None:
            task = StoredFeatures(task, self.store)
        return ScoreTask(task, self.learned)

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """The chosen reward as the score; pseudo-label = the likeliest domain of every row that has features."""
        assert self.learned is not None
        values, probabilities = columns[self.reward], columns["probabilities"]
        scored = ~np.isnan(values)
        labels = np.full(len(values), -1, dtype=np.int16)
        labels[scored] = probabilities[scored].argmax(axis=1)
        info = dict(self.learned.info) | {
            "reward": self.reward,
            "rows_scored": int(scored.sum()),
            "rows_truncated": int((columns["truncated"] > 0).sum()),
            "pseudo_label_rows": counted(self.learned.domains, labels[scored]),
            "spearman_diversity_entropy": rank_correlation(columns["diversity"][scored], columns["entropy"][scored]),
        }
        if self.written is not None:
            info["written"] = written_facts(self.written)
        if self.seconds:
            info["seconds"] = dict(self.seconds)
        return Scores(
            pool=pool,
            method=self.name,
            values=values,
            reasons=reasons,
            tokens=columns["tokens"],
            domains=self.learned.domains,
            probabilities=probabilities,
            pseudo_labels=labels,
            info=info,
        )

    # --- save and load --------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write probes, centroids and settings (safetensors and JSON, no pickle). Raises `UserError` before `fit`.

        >>> method.save("run"); siftune.DaaR.load("run").score(other_pool)
        """
        if self.learned is None:
            raise UserError("daar is not fitted, there is nothing to save; call fit(pool) first")
        settings = {name: getattr(self, name) for name in _SAVED} | {"model": str(self.model)}
        if self.written is not None:
            copy_written(self.written, folder)
        return self.learned.save(folder, settings)

    @classmethod
    def load(cls, folder: str | Path, **changed: Any) -> Self:
        """A fitted method from a run folder; scores any pool with no refit. `changed` fields override the saved ones.

        `model=` is the current folder of the same model; the probes do not fit another model's features.

        >>> siftune.DaaR.load("run", model="/models/qwen", device="cuda").score(pool)
        """
        learned, settings = Learned.load(folder)
        method = cls(**{**{name: settings[name] for name in (*_SAVED, "model")}, **changed})
        method.learned = learned
        method.written = Path(folder) if (Path(folder) / SEEDS).is_file() else None
        return method


_SAVED = ("layer", "probe_rows", "reward", "seed", "compat", "pooling", "probe_text", "max_length", "dtype")
"""Fields that decide what a loaded method computes, beside the model."""
