"""Atomic files, stale temporaries, the folder lock, hashes, the cache folder."""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import subprocess
import sys
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from siftune import files
from siftune.errors import UserError


def test_an_atomic_file_is_whole_readable_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with files.atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert files.is_temporary(temporary)
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert target.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_an_error_keeps_the_old_file_and_removes_the_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_full_disk_and_permissions_are_one_sentence_with_the_path(tmp_path: Path, code: int) -> None:
    def fail() -> None:
        with files.atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=r"a\.txt: .*; ") as told:
        fail()
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_for_real() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with (
        open("/dev/full", "wb", buffering=0) as handle,
        pytest.raises(UserError, match="the disk is full"),
        files.plain_errors("x"),
    ):
        handle.write(b"x")


def test_a_folder_or_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "taken", tmp_path / "file" / "a.txt"):
        with pytest.raises(UserError, match=r"choose|pass"):
            files.write_json(path, {})


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), files.atomic_path(tmp_path / "a"):
        raise ConnectionResetError(errno.ECONNRESET, "gone")


def test_sweep_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import sys, os; from siftune.files import temporary_beside as t; from pathlib import Path;"
        "p = t(Path(sys.argv[1]) / 'x'); p.mkdir(); (p / 'in').write_text('a');"
        "t(Path(sys.argv[1]) / 'y').write_text('b'); os.kill(os.getpid(), 9)"
    )
    mine = files.temporary_beside(tmp_path / "z")
    mine.write_text("in use")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    (tmp_path / "data.siftune-tmp").write_text("the user's")
    assert len(list(tmp_path.iterdir())) == 4
    assert files.sweep_temporaries(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, "data.siftune-tmp"}
    assert files.sweep_temporaries(tmp_path / "absent") == 0


def test_whoever_writes_first_in_a_folder_tidies_up_there(tmp_path: Path) -> None:
    script = (
        "from siftune.files import temporary_beside; from pathlib import Path; temporary_beside(Path('a/x')).touch()"
    )
    (tmp_path / "a").mkdir()
    for left in (1, 2, 2):  # each process removes the file that the one before it left, and leaves its own
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
        with files.atomic_path(tmp_path / "a" / "mine") as temporary:
            temporary.touch()
        assert len(list((tmp_path / "a").iterdir())) == left, "swept at this process's first writing, and not again"


def test_a_number_given_to_a_new_process_does_not_keep_an_old_temporary(tmp_path: Path) -> None:
    name = files.temporary_beside(tmp_path / "x").name
    old = tmp_path / name.replace(files._PROCESS, "0" * 8)
    old.write_text("from an earlier life of this process number")
    assert files.sweep_temporaries(tmp_path) == 1


def test_another_machines_temporary_goes_after_a_week_only(tmp_path: Path) -> None:
    theirs = tmp_path / files.temporary_beside(tmp_path / "x").name.replace(files._HOST, "elsewhere", 1)
    theirs.write_text("")
    assert files.sweep_temporaries(tmp_path) == 0
    os.utime(theirs, (0, 0))
    assert files.sweep_temporaries(tmp_path) == 1


def test_the_lock_is_held_by_one_and_freed_by_death(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = "import sys; from siftune.files import FolderLock\nwith FolderLock(sys.argv[1]): print('held')"
    with files.FolderLock(folder):
        with pytest.raises(UserError, match=f"{folder} is in use"), files.FolderLock(folder):
            pass
        other = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
        assert "is in use" in other.stderr
    killed = "import os, sys; from siftune.files import FolderLock\nFolderLock(sys.argv[1]).__enter__(); os._exit(1)"
    subprocess.run([sys.executable, "-c", killed, str(folder)], check=False)
    with files.FolderLock(folder):
        pass


def test_a_lock_that_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    first = files.lock_file(tmp_path / "lock")
    assert first is not None
    assert files.lock_file(tmp_path / "lock") is None
    script = "import sys; from siftune.files import lock_file; print(lock_file(sys.argv[1], wait=True).is_locked)"
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
        first.release()
        assert other.communicate()[0].strip() == "True"


def test_a_file_system_without_locks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with (
        pytest.raises(UserError, match="this file system has no file locks; choose a folder on another one"),
        warnings.catch_warnings(action="ignore"),
        files.FolderLock(tmp_path / "run"),
    ):
        pass


def test_hashes_are_blake2b_128_of_canonical_json(tmp_path: Path) -> None:
    expected = hashlib.blake2b('{"a":[1,2.5,null],"é":"x\\n"}'.encode(), digest_size=16).hexdigest()
    assert files.hash_json({"é": "x\n", "a": [1, 2.5, None]}) == expected
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert files.hash_file(tmp_path / "f") == files.hash_bytes(b"abc" * 100_000)
    assert files.hash_json({"a": 1}) != files.hash_json({"a": 1.0})
    with pytest.raises(ValueError):
        files.canonical_json(float("nan"))


def test_values_that_json_lacks_have_one_text() -> None:
    moment = datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC)
    value = {
        "t": moment,
        "b": b"\0\xff",
        "d": Decimal("1.10"),
        "n": np.float32(0.5),
        "s": datetime.timedelta(seconds=90),
    }
    assert files.canonical_json(value) == ('{"b":"AP8=","d":"1.10","n":0.5,"s":90.0,"t":"2020-01-02T03:00:00+00:00"}')
    with pytest.raises(TypeError):
        files.canonical_json(object())


def test_json_files_come_back_and_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": float("nan"), "a": [1, float("inf"), "é"], "n": np.float64("nan")})
    assert files.read_json(path) == {"b": None, "a": [1, None, "é"], "n": None}
    assert "NaN" not in path.read_text()
    path.write_text("{")
    with pytest.raises(UserError, match=r"a\.json is not a JSON file"):
        files.read_json(path)
    with pytest.raises(UserError, match=r"b\.json: it does not exist"):
        files.read_json(tmp_path / "b.json")


def test_the_cache_folder_is_the_argument_then_the_variable_then_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "variable"))
    assert files.cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert files.cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("SIFTUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "siftune"
