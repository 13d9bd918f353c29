"""The contract of an offline method: `fit(pool) -> self`, `score(pool) -> Scores`, higher is better.

A method describes its work on one shard (`shard_task`) and, where a score depends on the whole pool, how the shards'
columns come together (`finish`). Where the shards run is the engine's business, handed in and never imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..records import Engine, Pool, Scores, Shard, ShardResult, ShardTask

if TYPE_CHECKING:
    from ..models.backbone import Backbone


class ArrayStore(Protocol):
    """What a method may keep arrays in, by content hash: `siftune.models.store.Store`, or anything like it."""

    def get(self, key: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None: ...
    def put(self, key: str, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None: ...


class HasDomains(Protocol):
    """What `check` may return: something that knows the names of the domains before anything is fitted."""

    @property
    def domains(self) -> tuple[str, ...]: ...


class OfflineMethod(ABC):
    """Base of every offline method: subclasses are keyword-only dataclasses whose `__init__` only stores arguments.

    Subclasses define `name` and `shard_task`, and override `fit` or `finish` when they learn or rank globally. The other
    hooks have defaults and are all that the commands call: `check`, `labels`, `inputs`, `preview`, `feature_task` and
    `backbone` before a run, `save` and `load` around a fit. `save` and `load` are overridden together or not at all.
    """

    name: ClassVar[str]
    """The registry's name."""
    side: ClassVar[Literal["offline", "online"]] = "offline"
    """Which registry the method belongs to."""
    summary: ClassVar[str] = ""
    """What it ranks by, for `siftune methods`; empty is the first line of the class's docstring. This and the next two
    are read of a method that another package registers by an entry point."""
    paper: ClassVar[str] = "-"
    """Its source."""
    needs: ClassVar[str] = "-"
    """What it needs to run: a model, labels, a server."""

    fit_grows: ClassVar[bool] = True
    """Whether the cost of `fit` grows with the pool; a method that learns from a target alone says False. For plans."""

    engine: Engine | None = None
    """Where shards run; None is this process, one after the other, nothing cached. The pipeline sets it."""

    store: ArrayStore | None = None
    """Where a method that learns may remember what it learnt; None remembers nothing. The pipeline sets it."""

    cache: str | Path | None = None
    """Cache folder for files that a method reads itself (seeds); None is the default one. The pipeline sets it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.saves() != (cls.load.__func__ is not OfflineMethod.load.__func__):  # type: ignore[attr-defined]
            given, missing = ("save", "load") if cls.saves() else ("load", "save")
            raise TypeError(f"{cls.__name__} overrides {given} and not {missing}; a fit that is saved must be loadable")

    # --- before a run -----------------------------------------------------------------------------------------------

    def check(self) -> HasDomains | None:
        """Refuse settings and files that cannot be used, before any weight is loaded. Raises `UserError`.

        A method that knows its domains at this point returns what holds them. The default accepts everything.
        """
        return None

    def labels(self, pool: Pool) -> tuple[str, ...]:
        """The domains that the pool's own rows name, for a method that reads such labels; `()` for the others.
        Raises `UserError` where the pool holds none."""
        return ()

    def inputs(self) -> dict[str, str]:
        """Content hashes of what the method reads beside the pool, the files named by its fields and the model of
        `feature_task`: a folder of seeds, a generator. The run's identity holds them. The default reads nothing else."""
        return {}

    def preview(self, pool: Pool) -> Mapping[str, Any] | None:
        """What a dry run shows: what would be asked, and its cost. Nothing is asked or loaded; None shows nothing."""
        return None

    def feature_task(self, *, for_fit: bool) -> ShardTask | None:
        """The work that reads a model on one shard, for `fit` or for `score`; its key enters the run's identity as
        `model`. None for a method that reads no model."""
        return None

    def backbone(self) -> Backbone | None:
        """The model that `feature_task` reads, not yet loaded: its configuration and tokenizer are checked before the
        run, and its device decides the number of workers. None for a method without one."""
        return None

    # --- fit and score ----------------------------------------------------------------------------------------------

    def fit(self, pool: Pool) -> Self:
        """Learn what the method needs from the pool. The default learns nothing."""
        return self

    @abstractmethod
    def shard_task(self, pool: Pool) -> ShardTask:
        """The work on one shard of `pool`; its result must hold the column `score` float32 (any columns if `finish`
        makes the score)."""

    def score(self, pool: Pool) -> Scores:
        """One number per row of `pool`, NaN with a reason where there is none; the same for every engine."""
        engine = self.engine or SerialEngine()
        columns, reasons = gather(pool, engine.run(self.shard_task(pool), pool, pool.shards(), label=self.name))
        return self.finish(pool, columns, {**reasons, **pool.reasons})

    def finish(self, pool: Pool, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> Scores:
        """The shards' columns, each of `n` rows, as `Scores`. The default takes the column `score` as it is."""
        return Scores(
            pool=pool,
            method=self.name,
            values=columns["score"],
            reasons=reasons,
            tokens=columns.get("tokens"),
        )

    # --- save and load ----------------------------------------------------------------------------------------------

    @classmethod
    def learns(cls) -> bool:
        """Whether `fit` learns anything, that is, whether the class overrides it."""
        return cls.fit is not OfflineMethod.fit

    @classmethod
    def saves(cls) -> bool:
        """Whether a fit can be saved and loaded, that is, whether the class overrides `save` and `load`. A run that is
        resumed fits again where it cannot."""
        return cls.save is not OfflineMethod.save

    def save(self, folder: str | Path) -> Path | None:
        """Write what `fit` learned into `folder`; the default writes nothing."""
        return None

    @classmethod
    def load(cls, folder: str | Path, **settings: Any) -> Self:
        """A fitted method from a folder that `save` wrote; `settings` are its fields. The default raises `UserError`."""
        raise UserError(f"{cls.name} saves no fit, so {folder} holds none; call fit(pool)")


class SerialEngine:
    """Every shard in this process, in order, nothing kept: the meaning of every other engine."""

    def run(
        self, task: ShardTask, pool: Pool, shards: Sequence[Shard], *, label: str
    ) -> Iterator[tuple[Shard, ShardResult]]:
        for shard in shards:
            yield shard, task(pool, shard)


def gather(pool: Pool, results: Iterator[tuple[Shard, ShardResult]]) -> tuple[dict[str, NDArray[Any]], dict[int, str]]:
    """Shard columns side by side, in the pool's order, whatever order they arrive in; plus every reason.

    Rows of shards that did not run hold NaN (floats) or -1 (integers).
    """
    columns: dict[str, NDArray[Any]] = {}
    reasons: dict[int, str] = {}
    for shard, result in results:
        for name, values in result.columns.items():
            assert len(values) == len(shard), (name, len(values), len(shard))
            if name not in columns:
                fill = np.nan if np.issubdtype(values.dtype, np.floating) else -1
                columns[name] = np.full((len(pool), *values.shape[1:]), fill, dtype=values.dtype)
            columns[name][shard.start : shard.stop] = values
        reasons.update(result.reasons)
    return columns, reasons
