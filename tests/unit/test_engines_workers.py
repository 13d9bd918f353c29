"""Several workers give one worker's results; failures are tried again, then put down to the rows that cause them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftune.engines import check_engine, gpus_for, make_engine
from siftune.engines.local import LocalEngine
from siftune.engines.ray import room_for
from siftune.engines.retry import MAX_FAILING_ROWS, Done, Failed, retry_policy
from siftune.engines.shard import Work, math_threads
from siftune.errors import UserError
from siftune.models.store import Store
from siftune.offline.base import SerialEngine, gather
from siftune.records import SHARD_ROWS, Pool, Shard, ShardResult
from siftune.runs.options import SelectOptions
from tests.failing import Obey, pool_of, same

COUNT = 3 * SHARD_ROWS + 100
REASONS = {3: "unparsable line 4"}


def run(engine: Any, task: Any, pool: Pool) -> tuple[Any, Any]:
    return gather(pool, engine.run(task, pool, pool.shards(), label="obey"))


def fresh(folder: Path) -> Obey:
    folder.mkdir()
    return Obey(folder)


def without(pool: Pool, rows: list[int], folder: Path) -> tuple[Any, Any]:
    """What the serial engine gives where these rows are bad from the start."""
    smaller = Pool(pool.source, pool.format, pool.fingerprint, {**pool.reasons, **dict.fromkeys(rows, "bad")})
    return run(SerialEngine(), fresh(folder), smaller)


@pytest.mark.slow
def test_workers_give_the_serial_result_and_reuse_what_is_finished(tmp_path: Path) -> None:
    pool = pool_of(COUNT, reasons=REASONS)
    serial = run(SerialEngine(), fresh(tmp_path / "serial"), pool)
    task = fresh(tmp_path / "two")
    engine = LocalEngine(Store(tmp_path / "store"), workers=2)
    same(run(engine, task, pool), serial)
    assert (engine.computed, engine.reused) == (4, 0)
    assert sorted(task.ran()) == [0, 1, 2, 3]
    assert 1 <= len(task.pids()) <= 2
    assert str(os.getpid()) not in task.pids()

    again = fresh(tmp_path / "again")
    engine = LocalEngine(Store(tmp_path / "store"), workers=2)
    same(run(engine, again, pool), serial)
    assert (engine.computed, engine.reused, again.lines()) == (0, 4, [])
    one = fresh(tmp_path / "one")
    same(run(LocalEngine(Store(tmp_path / "store")), one, pool), serial)
    assert one.lines() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_raises_gets_a_reason_and_the_others_their_numbers(workers: int, tmp_path: Path) -> None:
    bad = {10: "raise", SHARD_ROWS + 4000: "raise", SHARD_ROWS + 4001: "raise"}
    pool = pool_of(COUNT, bad, REASONS)
    expected = without(pool, list(bad), tmp_path / "serial")
    engine = LocalEngine(Store(tmp_path / "store"), workers=workers)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        columns, reasons = run(engine, fresh(tmp_path / "first"), pool)
    assert columns["score"].tobytes() == expected[0]["score"].tobytes()
    assert reasons == {row: f"could not be scored: ValueError: row {row} is poisoned" for row in bad}
    assert sorted((str(item.message).split(",")[0] for item in told), key=len) == [
        f"row {row} is left out" for row in bad
    ]
    task = fresh(tmp_path / "again")
    same(run(LocalEngine(Store(tmp_path / "store"), workers=workers), task, pool), (columns, reasons))
    assert task.lines() == [], "a shard with failing rows is finished, too"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_panic_or_too_little_memory_over_a_row_is_that_rows(workers: int, tmp_path: Path) -> None:
    bad = {10: "panic", 40: "memory"}
    pool, shards = pool_of(64, bad), [Shard(0, 0, 32), Shard(1, 32, 64)]
    left_out = Pool(pool.source, pool.format, pool.fingerprint, dict.fromkeys(bad, "bad"))
    expected = gather(left_out, SerialEngine().run(fresh(tmp_path / "serial"), left_out, shards, label="obey"))
    engine = LocalEngine(Store(tmp_path / "store"), workers=workers)
    with pytest.warns(UserWarning, match="row 10 is left out"):
        columns, reasons = gather(pool, engine.run(fresh(tmp_path / "first"), pool, shards, label="obey"))
    assert columns["score"].tobytes() == expected[0]["score"].tobytes()
    assert reasons == {
        10: "could not be scored: PanicException: row 10 is too much",
        40: "could not be scored: MemoryError",
    }


def test_an_interruption_passes_through_the_engine(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(LocalEngine(), fresh(tmp_path / "stop"), pool_of(64, {3: "stop"}))


@pytest.mark.parametrize("word", ["MemoryError", "OutOfMemoryError"])
def test_memory_that_no_row_explains_is_one_sentence(word: str) -> None:
    error = MemoryError() if word == "MemoryError" else type(word, (RuntimeError,), {})("CUDA")

    def short(pool: Pool, shard: Shard) -> ShardResult:
        raise error

    with pytest.raises(UserError, match=rf"memory ran out in rows 0-63, .*{word}.*; use fewer workers"):
        run(LocalEngine(), short, pool_of(64))


@pytest.mark.slow
def test_a_row_that_kills_its_worker_gets_a_reason(tmp_path: Path) -> None:
    pool, shards = pool_of(64, {40: "die"}), [Shard(0, 0, 32), Shard(1, 32, 64)]
    left_out = Pool(pool.source, pool.format, pool.fingerprint, {40: "bad"})
    expected = gather(left_out, SerialEngine().run(fresh(tmp_path / "serial"), left_out, shards, label="obey"))
    engine = LocalEngine(Store(tmp_path / "store"), workers=2)
    with pytest.warns(UserWarning, match="row 40 is left out"):
        columns, reasons = gather(pool, engine.run(fresh(tmp_path / "dies"), pool, shards, label="obey"))
    assert reasons == {40: "could not be scored: its worker died"}
    assert columns["score"].tobytes() == expected[0]["score"].tobytes()
    assert np.isnan(columns["score"]).sum() == 1


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    pool = pool_of(COUNT, {5000: "die:once", 9000: "die:another"}, REASONS)
    task = fresh(tmp_path / "killed")
    engine = LocalEngine(Store(tmp_path / "store"), workers=2)
    columns, reasons = run(engine, task, pool)
    (tmp_path / "serial").mkdir()
    for mark in ("once", "another"):
        assert (tmp_path / "killed" / mark).exists(), "no worker was killed"
        (tmp_path / "serial" / mark).touch()
    same((columns, reasons), run(SerialEngine(), Obey(tmp_path / "serial"), pool))
    assert len(task.pids()) >= 3
    assert engine.computed == 4


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("word", ["user", "full"])
def test_what_is_no_rows_fault_is_raised_at_once(workers: int, word: str, tmp_path: Path) -> None:
    task = fresh(tmp_path / "task")
    engine = LocalEngine(Store(tmp_path / "store"), workers=workers)
    with pytest.raises((UserError, OSError), match=r"the model is not here|No space left"):
        run(engine, task, pool_of(COUNT, {0: word}))
    assert task.ran().count(0) == 1


def test_a_task_that_always_fails_raises_and_does_not_blame_rows(tmp_path: Path) -> None:
    calls: list[int] = []

    def broken(pool: Pool, shard: Shard) -> ShardResult:
        calls.append(len(pool.reasons))
        raise ZeroDivisionError("a fault of the program")

    with pytest.raises(ZeroDivisionError, match="a fault of the program"):
        run(LocalEngine(), broken, pool_of(COUNT))
    assert len(calls) == 3, "twice as it is, once without any row"


@pytest.mark.slow
def test_too_many_poisoned_rows_are_no_matter_of_rows(tmp_path: Path) -> None:
    words = dict.fromkeys(range(0, 200, 20), "raise")
    assert len(words) > MAX_FAILING_ROWS
    with pytest.raises(ValueError, match="poisoned"):
        run(LocalEngine(), fresh(tmp_path / "many"), pool_of(400, words))


def test_a_failure_of_rows_together_is_not_put_down_to_one() -> None:
    pool, shard = pool_of(64), Shard(0, 0, 64)

    def drive() -> None:
        way = retry_policy(pool, shard)
        left_out = next(way)
        for _ in range(50):
            few = 64 - len(left_out) <= 20
            left_out = way.send(Done(ShardResult({})) if few else Failed.of(RuntimeError("too much at once")))

    with pytest.raises(RuntimeError, match="too much at once"):
        drive()


def test_shards_come_in_order_whoever_is_first(tmp_path: Path) -> None:
    pool = pool_of(8 * 512, {10: "die:once"})
    shards = [Shard(index, 512 * index, 512 * (index + 1)) for index in range(8)]
    came = [shard for shard, _ in LocalEngine(workers=2).run(fresh(tmp_path / "o"), pool, shards, label="order")]
    assert came == shards


def test_an_attempt_without_some_rows_is_not_kept_as_the_shard(tmp_path: Path) -> None:
    pool, store = pool_of(100), Store(tmp_path / "store")
    work = Work(fresh(tmp_path / "task"), pool, store, threads=1)
    shard = pool.shards()[0]
    work.attempt(shard, {3: "left out"})
    assert work.load(shard) is None
    work.attempt(shard, {})
    assert work.load(shard) is not None


def test_a_task_with_a_journal_stays_in_this_process(tmp_path: Path) -> None:
    class Asks(Obey):
        one_process = True

    task = Asks(tmp_path)
    same(run(LocalEngine(workers=2), task, pool_of(COUNT)), run(SerialEngine(), fresh(tmp_path / "s"), pool_of(COUNT)))
    assert task.pids() == {str(os.getpid())}


def test_what_cannot_be_sent_is_one_sentence(tmp_path: Path) -> None:
    task = Obey(tmp_path)
    task.hook = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"cannot be sent to other processes.*use 1 worker"):
        run(LocalEngine(workers=2), task, pool_of(COUNT))


ORPHANS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from siftune.engines.local import LocalEngine
from tests.failing import Obey, pool_of

class Slow(Obey):
    def obey(self, row):
        time.sleep(0.05)

if __name__ == "__main__":
    pool = pool_of(4 * 4096)
    for _ in LocalEngine(workers=2).run(Slow(Path(sys.argv[1])), pool, pool.shards(), label="slow"):
        pass
"""


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path), root])
    task = Obey(tmp_path)
    _until(lambda: len(task.pids()) == 2, "no workers")
    process.kill()
    process.wait(10)
    _until(lambda: not any(_alive(int(pid)) for pid in task.pids()), "workers outlive their parent")


def _until(done: Any, said: str) -> None:
    limit = time.monotonic() + 60
    while not done():
        assert time.monotonic() < limit, said
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_threads_of_blas_are_set_and_given_back() -> None:
    from threadpoolctl import threadpool_info

    def blas() -> set[int]:
        return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}

    before = blas()
    with math_threads(1):
        assert blas() <= {1}
    assert blas() == before


# --- what the user says of it -----------------------------------------------------------------------------------------


def test_options_make_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    store = Store(tmp_path)
    assert make_engine(SelectOptions(), store).workers == 1
    assert make_engine(SelectOptions(workers=3), store).workers == 3

    class OnGpu:
        torch_device = torch.device("cuda")

    class OnOne:
        torch_device = torch.device("cuda:1")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert make_engine(SelectOptions(), store, backbone=OnGpu()).workers == 4
    assert gpus_for(OnOne()) == gpus_for(None) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus_for(OnGpu()) == 1


def test_gpus_are_dealt_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from siftune.engines.processes import gpu_of

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu_of(worker) for worker in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 5")
    assert [gpu_of(worker) for worker in range(3)] == ["GPU-a", "5", "GPU-a"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_of(0) is None


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"workers": 0}, "--workers must be >= 1, got 0"),
        ({"worker_cpus": -1.0}, "--worker-cpus must be >= 0, got -1"),
        ({"worker_gpus": float("nan")}, "--worker-gpus must be >= 0, got nan"),
        ({"ray_address": "auto"}, "needs --engine ray"),
    ],
)
def test_options_that_make_no_sense(said: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        check_engine(SelectOptions(**said))


def test_a_missing_ray_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siftune.engines.ray.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--engine ray needs ray.*pip install 'siftune\[ray\]'"):
        check_engine(SelectOptions(engine="ray"))


def test_room_on_a_cluster() -> None:
    assert room_for([(2, 0)], 1, 0) == 2
    assert room_for([(2, 0)], 0.5, 0) == 4
    assert room_for([(8, 2), (4, 0)], 1, 0.5) == 4
    assert room_for([(8, 2), (4, 0)], 1, 1) == 2
    assert room_for([(2, 0)], 4, 0) == 0
    assert room_for([(3, 0)], 0.1, 0) == 30
    assert room_for([(2, 0), (2, 0)], 0, 0) == 2
