"""Full disks, read-only folders, lost and cut files, changed inputs, two commands at once: one sentence, then the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.inputs import LEARNT, RESULTS, inter, write_inputs, write_pool
from tests.faults.said import add_up, count, no_torn_files, refused, siftune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and what an undisturbed selection gives."""
    folder = write_inputs(tmp_path_factory.mktemp("disk"))
    said = siftune(inter(folder, folder / "sound", folder / "cache"))
    assert said.code == 0, said
    return folder


def as_undisturbed(folder: Path, run: Path) -> None:
    for name in (*RESULTS, *LEARNT):
        assert (run / name).read_bytes() == (folder / "sound" / name).read_bytes(), name
    add_up(run)


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    """A file system of that size; the test skips where none can be made."""
    place.mkdir(exist_ok=True)
    made = shutil.which("mount") and os.geteuid() == 0
    if not made or subprocess.run(mount(place, kilobytes), capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def mount(place: Path, kilobytes: int, *more: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *more]), "none", str(place)]


MORE = [pytest.param(size, marks=pytest.mark.soak) for size in range(24, 120, 4)]


@pytest.mark.parametrize("kilobytes", [16, 60, *MORE])
def test_a_full_disk_is_one_sentence_and_the_rerun_goes_on(folder: Path, tmp_path: Path, kilobytes: int) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, kilobytes):
        words = inter(folder, disk / "run", disk / "cache")
        first = siftune(words)
        full = kilobytes <= 60 or first.code != 0
        if full:
            assert "disk is full" in refused(first)
        no_torn_files(disk)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert siftune(words).code == 0
        as_undisturbed(folder, disk / "run")
        no_torn_files(disk)
        count("full disks (small file systems)", int(full))


SMALL_FILES = """
import resource, sys
from siftune.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4_000, pytest.param(30_000, marks=pytest.mark.soak)])
def test_a_file_that_may_not_grow_is_one_sentence(folder: Path, tmp_path: Path, limit: int) -> None:
    words = inter(folder, tmp_path / "run", tmp_path / "cache")
    command = [sys.executable, "-c", SMALL_FILES, str(limit), *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "larger than the file system or a limit allows" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    no_torn_files(tmp_path / "cache")
    assert siftune(words).code == 0
    as_undisturbed(folder, tmp_path / "run")
    count("files that may not grow (RLIMIT_FSIZE)")


@pytest.mark.parametrize("which", ["run", "cache", "out"])
def test_a_read_only_folder_is_one_sentence(folder: Path, tmp_path: Path, which: str) -> None:
    closed = tmp_path / "closed"
    with small_disk(closed, 4096):
        (closed / "inner").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(closed)], check=True)
        places = {"run": tmp_path / "run", "cache": tmp_path / "cache", "out": tmp_path / "out.jsonl"}
        places[which] = closed / "inner" / "out.jsonl" if which == "out" else closed / "inner"
        told = refused(siftune([*inter(folder, places["run"], places["cache"]), "--out", places["out"]]))
        assert "read-only" in told
        count("read-only folders")


def test_a_deleted_cache_costs_time_only(folder: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert siftune(inter(folder, run, cache)).code == 0
    shutil.rmtree(cache)
    assert siftune(inter(folder, run, cache)).code == 0
    as_undisturbed(folder, run)
    shutil.rmtree(cache)
    assert siftune(inter(folder, tmp_path / "other", cache)).code == 0
    as_undisturbed(folder, tmp_path / "other")
    count("deleted caches", 2)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size and path.name != ".lock")


def flip(path: Path, draw: random.Random) -> None:
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


DAMAGES = ("cut", "emptied", "removed", "flipped")


def test_files_of_the_cache_may_be_damaged(folder: Path, tmp_path: Path) -> None:
    for index, damage in enumerate(DAMAGES):
        damage_cache(folder, tmp_path, damage, files_below(folder / "cache")[index :: len(DAMAGES)])


@pytest.mark.soak
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_the_cache_may_be_damaged(folder: Path, tmp_path: Path, damage: str) -> None:
    damage_cache(folder, tmp_path, damage, files_below(folder / "cache"))


def damage_cache(folder: Path, tmp_path: Path, damage: str, damaged: list[Path]) -> None:
    """A selection with each of these files of a finished cache damaged, one at a time."""
    draw = random.Random(damage)
    assert damaged
    for original in damaged:
        index = f"{damage}-{damaged.index(original)}"
        cache = tmp_path / f"cache-{index}"
        shutil.copytree(folder / "cache", cache)
        path = cache / original.relative_to(folder / "cache")
        if damage == "removed":
            path.unlink()
        elif damage == "flipped":
            flip(path, draw)
        else:
            os.truncate(path, 0 if damage == "emptied" else draw.randrange(path.stat().st_size))
        run = tmp_path / f"run-{index}"
        said = siftune(inter(folder, run, cache))
        assert said.code == 0, (original, said)
        as_undisturbed(folder, run)
        shutil.rmtree(cache)
        count(f"cache files {damage}")


def test_a_flipped_bit_in_a_stored_shard_is_noticed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    draw = random.Random(3)
    entries = [path for path in files_below(tmp_path / "cache") if path.suffix == ".safetensors"]
    for path in entries:
        flip(path, draw)
    assert siftune(inter(folder, tmp_path / "run", tmp_path / "cache")).code == 0
    as_undisturbed(folder, tmp_path / "run")
    count("stored entries with a flipped bit", len(entries))


EVERY = [(name, damage) for name in (*RESULTS, *LEARNT) for damage in ("cut", "flipped", "removed")]


@pytest.mark.parametrize(
    ("name", "damage"), EVERY[-6:] + [pytest.param(*case, marks=pytest.mark.soak) for case in EVERY[:-6]]
)
def test_a_damaged_result_is_made_again(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "sound", run)
    data = bytearray((run / name).read_bytes())
    if damage == "removed":
        (run / name).unlink()
    elif damage == "cut":
        (run / name).write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        (run / name).write_bytes(data)
    if name == "scores.safetensors":
        again = siftune(["keep", run, "--keep", "10%", "--out", tmp_path / "ten.jsonl", "--cache", folder / "cache"])
        assert "scores.safetensors" in refused(again)
    assert siftune(inter(folder, run, folder / "cache")).code == 0
    as_undisturbed(folder, run)
    count(f"results {damage}")


def test_a_damaged_manifest_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    for index, content in enumerate(["", "{", "[]", "null", '{"stages": 3}', '{"stages": [{}]}', '{"config": []}']):
        run = tmp_path / f"run-{index}"
        shutil.copytree(folder / "sound", run)
        (run / "manifest.json").write_text(content)
        assert "manifest.json" in refused(siftune(inter(folder, run, folder / "cache")))
        count("damaged manifests")


def test_a_cut_model_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.999):
        weights.write_bytes(whole[: int(len(whole) * share)])
        words = inter(folder, tmp_path / "run", tmp_path / "cache")
        words[words.index("--model") + 1] = str(tmp_path / "model")
        assert "model" in refused(siftune(words))
        count("cut model files")
    for name in ("config.json", "tokenizer.json"):
        shutil.copytree(folder / "model", tmp_path / "model", dirs_exist_ok=True)
        os.truncate(tmp_path / "model" / name, 40)
        assert "model" in refused(siftune(words))
        count("cut model files")


def test_inputs_that_changed_between_runs_are_named(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("cache"))
    before = {name: (own / "sound" / name).read_bytes() for name in (*RESULTS, *LEARNT, "manifest.json")}
    words = inter(own, own / "sound", tmp_path / "cache")
    words[2:5:2] = [f"{folder}/pool.jsonl", f"{folder}/model"]
    changed = write_pool(own / "pool.jsonl", 401)
    for place, value, named in ((2, str(changed), "pool"), (8, "1", "layer")):
        asked = [*words]
        asked[place] = value
        assert named in refused(siftune(asked))
    content = (folder / "pool.jsonl").read_text()
    try:
        (folder / "pool.jsonl").write_text(content.replace("wren", "Wren", 1))
        assert "input pool" in refused(siftune(words))
    finally:
        (folder / "pool.jsonl").write_text(content)
    for name, data in before.items():
        assert (own / "sound" / name).read_bytes() == data, "a refused command changes nothing"
    count("changed inputs", 3)


@pytest.mark.slow
def test_a_second_command_on_a_run_folder_is_refused_while_the_first_works(folder: Path, tmp_path: Path) -> None:
    words = inter(folder, tmp_path / "run", tmp_path / "cache")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as the tests' own process has it
    first = subprocess.Popen(
        [sys.executable, "-m", "siftune", *words], stderr=subprocess.PIPE, text=True, env=one_thread
    )
    limit = time.monotonic() + 120
    while not (tmp_path / "run" / "manifest.json").exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)
    told = refused(siftune(words))
    assert first.wait(120) == 0
    assert "is in use by another siftune process" in told
    as_undisturbed(folder, tmp_path / "run")
    count("second commands on a run folder")
