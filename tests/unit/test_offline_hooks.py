"""The hooks of an offline method: declared with defaults, so that a method defines only what it needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pytest

import siftune.runs.select as selecting
from siftune import registry
from siftune.errors import UserError
from siftune.offline.base import OfflineMethod
from siftune.records import Pool, Shard, ShardResult
from siftune.runs.options import SelectOptions
from siftune.runs.select import select
from tests.pools import make_pool

ROWS = [{"instruction": f"question {number}", "output": "word " * (number + 1)} for number in range(8)]


@dataclass(frozen=True)
class NearMean:
    """Minus the distance of the answer's length to the fitted mean."""

    mean: float

    @property
    def key(self) -> str:
        return f"near-mean-{self.mean}"

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        lengths = [len(row.output.split()) for row in pool.read(range(shard.start, shard.stop))]
        return ShardResult({"score": -np.abs(np.array(lengths, dtype=np.float32) - np.float32(self.mean))})


@dataclass(kw_only=True, eq=False)
class Learns(OfflineMethod):
    """Learns a number and overrides no other hook."""

    name: ClassVar[str] = "learns"
    fits: ClassVar[list[int]] = []

    def fit(self, pool: Pool) -> Self:
        self.mean = float(np.mean([len(row.output.split()) for row in pool.read(range(len(pool)))]))
        self.fits.append(len(pool))
        return self

    def shard_task(self, pool: Pool) -> NearMean:
        return NearMean(self.mean)


@pytest.fixture
def learns(monkeypatch: pytest.MonkeyPatch) -> type[Learns]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(Learns, "fits", [])
    registry.register("offline", "learns", f"{__name__}:Learns", summary="a test")
    return Learns


def test_a_method_without_load_fits_again_when_its_run_is_resumed(
    learns: type[Learns], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = SelectOptions(pool=[str(path)], keep=3, run=str(tmp_path / "run"), cache=str(tmp_path / "cache"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(selecting, "write_scores", killed)  # after the fit, before the scores are there
        with pytest.raises(KeyboardInterrupt):
            select("learns", options)
    assert learns.fits == [8]
    resumed = select("learns", options)
    assert learns.fits == [8, 8], "the fit was not saved, so it has to be made again"
    assert {stage["name"]: stage["status"] for stage in resumed.manifest["stages"]}["fit"] == "computed"
    plain = select("learns", SelectOptions(pool=[str(path)], keep=3, run=str(tmp_path / "other"), cache=options.cache))
    assert resumed.subset is not None
    assert plain.subset is not None
    assert resumed.subset.rows.tolist() == plain.subset.rows.tolist()
    select("learns", options)
    assert learns.fits == [8, 8, 8], "a finished run reads its stored scores"


def test_a_method_that_overrides_no_hook_can_be_prepared_and_loads_nothing() -> None:
    method, pool = Learns(), make_pool(ROWS)
    assert method.check() is None
    assert (method.labels(pool), method.inputs(), method.preview(pool)) == ((), {}, None)
    assert (method.feature_task(for_fit=True), method.backbone(), method.save("nowhere")) == (None, None, None)
    assert Learns.learns()
    assert not Learns.saves()
    with pytest.raises(UserError, match=r"learns saves no fit, so run holds none; call fit\(pool\)"):
        Learns.load("run")


def test_save_without_load_is_refused_where_the_class_is_defined() -> None:
    with pytest.raises(TypeError, match="Half overrides save and not load"):

        class Half(Learns):
            def save(self, folder: str | Path) -> None: ...

    with pytest.raises(TypeError, match="Other overrides load and not save"):

        class Other(Learns):
            @classmethod
            def load(cls, folder: str | Path, **settings: object) -> Self:
                return cls()
