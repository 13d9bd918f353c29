"""Ray gives the local engine's results, with a killed actor and a poisoned row; one cluster for the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from siftune.engines.local import LocalEngine
from siftune.engines.ray import RayEngine, connect
from siftune.errors import UserError
from siftune.models.store import Store
from siftune.offline.base import SerialEngine, gather
from siftune.records import SHARD_ROWS, Pool
from siftune.runs.options import SelectOptions
from siftune.runs.select import select
from tests.failing import Obey, pool_of, same
from tests.tiny import save_tiny

ray: Any = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

COUNT = 3 * SHARD_ROWS + 100
REASONS = {3: "unparsable line 4"}
SAME = ("selected.jsonl", "rows.parquet", "scores.safetensors", "domain_probe.safetensors", "reward_probe.safetensors")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster on this machine, and its address."""
    connect(None)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def run(engine: Any, task: Any, pool: Pool) -> tuple[Any, Any]:
    return gather(pool, engine.run(task, pool, pool.shards(), label="obey"))


def fresh(folder: Path) -> Obey:
    folder.mkdir()
    return Obey(folder)


@pytest.mark.usefixtures("cluster")
def test_a_killed_actor_and_a_poisoned_row_change_no_other_number(tmp_path: Path) -> None:
    pool = pool_of(COUNT, {5000: "die:once", 10: "raise", 9000: "panic"}, REASONS)
    task = fresh(tmp_path / "ray")
    engine = RayEngine(Store(tmp_path / "store"), workers=2, worker_cpus=0.5)
    with pytest.warns(UserWarning, match="row 10 is left out"):
        found = run(engine, task, pool)
    assert (tmp_path / "ray" / "once").exists(), "no actor was killed"
    local = fresh(tmp_path / "local")
    (tmp_path / "local" / "once").touch()
    with pytest.warns(UserWarning, match="row 10 is left out"):
        same(found, run(LocalEngine(), local, pool))
    smaller = Pool(pool.source, pool.format, pool.fingerprint, {**pool.reasons, 10: "bad", 9000: "bad"})
    assert found[0]["score"].tobytes() == run(SerialEngine(), local, smaller)[0]["score"].tobytes()
    assert found[1] == {
        10: "could not be scored: ValueError: row 10 is poisoned",
        9000: "could not be scored: PanicException: row 9000 is too much",
    }

    again = fresh(tmp_path / "again")
    engine = RayEngine(Store(tmp_path / "store"), workers=1)
    same(run(engine, again, pool), found)
    assert (engine.computed, engine.reused, again.lines()) == (0, 4, [])
    same(run(LocalEngine(Store(tmp_path / "store")), again, pool), found)
    assert again.lines() == [], "what Ray finished, the local engine reuses"


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_fits_nowhere_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no node of the Ray cluster has 4096 CPUs"):
        run(RayEngine(worker_cpus=4096), fresh(tmp_path / "big"), pool_of(COUNT))


@pytest.mark.usefixtures("cluster")
def test_select_on_ray_writes_the_bytes_of_the_local_engine(tmp_path: Path) -> None:
    words = ["add", "seven", "wren", "egg", "minus", "nest"]
    rows = [{"instruction": f"{i} {words[i * 7 % 6]}", "output": words[i * i % 5]} for i in range(SHARD_ROWS + 300)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seeds = [{"domain": "sums" if i % 2 else "birds", "instruction": f"seed {i}", "output": words[i]} for i in range(6)]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds))
    settings = {"model": str(save_tiny(tmp_path / "model")), "seeds": str(tmp_path / "seeds.jsonl"), "probe_rows": 1100}
    done = {}
    for engine in ("local", "ray"):
        options = SelectOptions(
            pool=[str(tmp_path / "pool.jsonl")],
            keep="20%",
            engine=engine,  # type: ignore[arg-type]
            workers=1,
            run=str(tmp_path / engine),
            cache=str(tmp_path / f"{engine}-cache"),
        )
        done[engine] = select("daar", options, {**settings, "max_length": 16})
    for name in SAME:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
    stages = {engine: {s["name"]: s["counts"] for s in run.manifest["stages"]} for engine, run in done.items()}
    assert stages["ray"] == stages["local"]
    assert stages["ray"]["score"]["shards_computed"] == 2
