"""Programs that a model wrote, at their worst: each costs its own answer, with a reason, and leaves nothing behind.

Every test runs twice: with a PID namespace where the system gives one, and with a subreaper alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import siftune
from siftune.evaluation import grading, harness, programs
from siftune.evaluation.own import build_own
from siftune.evaluation.programs import failure
from siftune.evaluation.tasks import own_tasks, questions

LEFT, REPLACED = "left a process running", "replaced its folder by something else"
NOT_REACHED = "did not reach its last line"
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="what is left is known from /proc")


@pytest.fixture(autouse=True, params=[True, False], ids=["namespace", "subreaper"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the programs' own folders, empty again after each test; no process is left either."""
    monkeypatch.setattr(programs, "NAMESPACES", request.param)
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.glob("siftune-program-*")) == [], "a program's folder was left"
    assert not list(programs._descendants(os.getpid())), "a process was left"


def waits_until_gone(mark: str, seconds: float = 5.0) -> bool:
    """Is no process left whose command line holds the mark?"""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(mark in line for line in command_lines()):
            return True
        time.sleep(0.02)
    return False


def command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return lines


ESCAPE = """\
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(30) # {mark}"])
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(
    "ending", ["", "while True: pass", "raise ValueError", "os._exit(0)", "os.kill(os.getpid(), 9)"]
)
def test_a_double_fork_with_a_session_of_its_own_cannot_leave(ending: str) -> None:
    mark = f"escapes-{os.urandom(6).hex()}"
    reason = failure(ESCAPE.format(mark=mark) + ending, seconds=2)
    assert waits_until_gone(mark, 0.5)
    reasons = {"": LEFT, "os._exit(0)": LEFT, "while True: pass": "took longer than 2 s"}
    assert reason == reasons.get(ending, NOT_REACHED)


def test_a_writer_that_is_left_behind_costs_the_answer_and_writes_no_more(tmp_path: Path) -> None:
    target = tmp_path / "grows"
    writer = f"import os, time\nif os.fork() == 0:\n    while True:\n        open({str(target)!r}, 'ab').write(b'x')\n"
    assert failure(writer + "        time.sleep(0.001)\ntime.sleep(0.1)") == LEFT
    size = target.stat().st_size
    time.sleep(0.2)
    assert target.stat().st_size == size


def test_helpers_that_end_with_the_program_are_no_fault() -> None:
    assert (
        failure("import multiprocessing\nwith multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1]) == [1]")
        is None
    )
    assert failure("import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)") is None


def test_processes_and_threads_are_bounded() -> None:
    started = time.monotonic()
    assert failure("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", seconds=5) is not None
    threads = "import threading, time\nfor _ in range(200): threading.Thread(target=time.sleep, args=(9,)).start()"
    assert failure(threads, seconds=5) is not None
    assert time.monotonic() - started < 15


@pytest.mark.slow
def test_an_ordinary_user_is_bounded_by_the_kernel(tmp_path: Path) -> None:
    """Root has no RLIMIT_NPROC; as root this runs as another user, with a Python that such a user may read."""
    python = sys.executable
    words: list[str] = []
    if os.getuid() == 0:
        python = next((path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path)), "")
        if not python or shutil.which("setpriv") is None:
            pytest.skip("no other user's Python here")
        words = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    above = [
        folder for folder in tmp_path.parents if folder.name.startswith(("pytest-", "popen-"))
    ]  # one more in a worker
    for folder in (tmp_path, *above):
        folder.chmod(0o755)
    readable = tmp_path / "code" / "siftune" / "evaluation"
    readable.mkdir(parents=True)
    for name in ("__init__.py", "programs.py", "program_keeper.py"):
        shutil.copyfile(Path(programs.__file__).with_name(name), readable / name)
    shutil.copyfile(siftune.__file__, readable.parent / "__init__.py")
    own = tmp_path / "own"
    own.mkdir()
    own.chmod(0o777)
    script = f"""
import os, sys
if sys.version_info < (3, 11): sys.exit(9)
from siftune.evaluation import programs
programs.NAMESPACES, programs.PROCESSES = {programs.NAMESPACES}, 8
limit = programs.failure("import resource; assert resource.getrlimit(resource.RLIMIT_NPROC)[0] == 8")
if programs.NAMESPACES and limit is not None: sys.exit(9)
bomb = "import os, time\\nnumber = 0\\ntry:\\n    while True:\\n        number += 1\\n        if os.fork() == 0: time.sleep(30)\\n"
print(programs.failure(bomb + "except OSError:\\n    assert number < 12"), programs.failure("assert True"))
print(programs.failure("import os\\nos.mkdir('a')\\nopen('a/b', 'w')\\nos.chmod('a', 0)"))
"""
    environment = {"PATH": os.defpath, "PYTHONPATH": str(tmp_path / "code"), "TMPDIR": str(own), "HOME": str(own)}
    ran = subprocess.run(
        [*words, python, "-c", script],
        env=environment,
        cwd=own,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if ran.returncode == 9:
        pytest.skip("this Python is too old, or no user namespace is given to an ordinary user")
    first, last = ran.stdout.splitlines()
    assert first == f"{LEFT if programs.NAMESPACES else 'ran more than 8 processes and threads'} None", ran.stderr
    assert "unreadable" in last
    assert list(own.iterdir()) == []


def test_the_folder_is_bounded_in_size_in_files_and_in_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "FOLDER_MB", 8)
    for program in (
        "for index in range(40): open(str(index), 'wb').write(bytes(1 << 20))",
        "for index in range(4000): open(str(index), 'wb')",
        "import os\nfor _ in range(2500):\n    os.mkdir('a')\n    os.chdir('a')",
        "import os\nfor index in range(40):\n    os.makedirs(f'a/b{index}')\n    open(f'a/b{index}/c', 'wb').write(bytes(1 << 20))",
        "import tempfile\nkept = [tempfile.NamedTemporaryFile(delete=False) for _ in range(40)]\n"
        "for one in kept: one.write(bytes(1 << 20))",
    ):
        assert "into its folder" in str(failure(program)), program


def test_memory_of_all_processes_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MEMORY_MB", 300)
    children = "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (80 << 20)\n"
    assert failure(children + "        time.sleep(9)\ntime.sleep(9)") == "held more than 300 MB of memory"


SWAP = "import os\nhere = os.getcwd()\nos.rename(here, here + '-moved')\n"


def test_a_folder_that_became_a_link_is_neither_read_nor_emptied_through(tmp_path: Path, place: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for ending in ("", "while True: pass", "raise ValueError"):
        assert failure(f"{SWAP}os.symlink({str(precious)!r}, here)\n{ending}", seconds=1) == REPLACED
        assert (precious / "thesis.txt").read_text() == "years of work"
    inner = f"import os\nos.symlink({str(precious)!r}, 'link')\nos.mkdir('a')\nos.symlink({str(precious)!r}, 'a/link')"
    assert failure(inner) is None
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_a_folder_in_the_place_of_its_own_is_left_as_it_is(tmp_path: Path, place: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert failure(f"{SWAP}os.rename({str(other)!r}, here)") == REPLACED
    (kept,) = place.iterdir()
    assert (kept / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(kept)


@pytest.mark.parametrize(
    "program",
    [
        "open('bytes', 'wb').write(bytes(range(256)))",
        "import os\nopen(os.fsencode('x') + bytes([255]), 'w')",
        "import os\nos.mkdir('a')\nopen('a/b', 'w')\nos.chmod('a', 0o500)",
        "import os\nos.mkfifo('program.py.fifo')",
        "import os\nos.remove('program.py')\nos.mkfifo('program.py')",
        "import sys\nsys.stdout.buffer.write(bytes([255]))",
    ],
)
def test_what_a_program_leaves_in_its_folder_is_removed_and_never_read(program: str) -> None:
    assert failure(program) is None


def test_bytes_of_its_own_in_our_pipe_cost_the_answer() -> None:
    junk = "import os\nfor number in range(3, 64):\n    try: os.set_blocking(number, False); os.write(number, bytes([255]) * {})\n"
    for size in (1, 100_000):
        assert failure(junk.format(size) + "    except OSError: pass") == NOT_REACHED


@pytest.mark.parametrize("program", ["\ud800", "x = '\udcff'", "é(", "\0", "assert 0", ""])
def test_any_text_is_a_program(program: str) -> None:
    assert failure(program) == (None if program in ("", "x = '\udcff'") else NOT_REACHED)


@pytest.mark.slow
def test_a_program_does_not_outlive_a_killed_evaluation(place: Path) -> None:
    mark = f"outlives-{os.urandom(6).hex()}"
    child = f"import sys, subprocess; subprocess.run([sys.executable, '-c', 'import time; time.sleep(20) # {mark}'])"
    code = f"from siftune.evaluation import programs\nprograms.NAMESPACES = {programs.NAMESPACES}\nprograms.failure({child!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(place)})
    until = time.monotonic() + 20
    while not any(f"# {mark}" in line and "programs.failure" not in line for line in command_lines()):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if programs.NAMESPACES and has_namespaces():
        assert waits_until_gone(mark)
    else:  # what a killed evaluation's program started is not promised to end without a namespace
        assert any(mark in line for line in command_lines())
        kill_marked(mark)
    (folder,) = place.glob("siftune-program-*")  # its folder is what a killed evaluation leaves
    shutil.rmtree(folder)


def has_namespaces() -> bool:
    return failure("import os; assert os.getpid() < 10") is None


def kill_marked(mark: str) -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes().decode(errors="replace"):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            continue


def test_the_reason_is_in_the_questions_sample_and_the_others_are_graded(tmp_path: Path) -> None:
    from tests import evaluation_data
    from tests.integration.test_evaluate import oracle

    folder = tmp_path / "data"
    evaluation_data.write(folder)
    spec = own_tasks()["humaneval"]
    rows = questions(spec, folder, shots=0, limit=None, seed=0)
    model = oracle(rows, right=True)
    right = model.generate_until

    def generate_until(requests: list[object], disable_tqdm: bool = False) -> list[str]:
        return ["    import os; os.rename(os.getcwd(), os.getcwd() + '-moved')\n", *right(requests)[1:]]

    model.generate_until = generate_until
    result = harness.run_task(model, build_own(rows, length=4096), chat=False, allow_code=True, bars=False)
    reasons = [sample.get("reason") for sample in result.samples]
    assert reasons[0] in (REPLACED, NOT_REACHED)
    assert reasons[1:] == [None] * (len(rows.rows) - 1)
    assert result.metrics["pass@1"].value == pytest.approx(1 - 1 / len(rows.rows))
    assert grading.Failed("why") == 0.0
