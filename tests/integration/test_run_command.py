"""`siftune run -- COMMAND`: every trainer in every process of the command is sifted, and the command keeps its exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from siftune.cli.main import main
from siftune.integrations.launch import STARTUP
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
UDS = ["run", "--online", "uds", "--keep", "1/4"]
SCRIPT = """
import sys
from pathlib import Path
from tests.trainers import trainer

live = trainer(Path(sys.argv[1]), max_steps=2, **({"ddp_backend": "gloo"} if "--gloo" in sys.argv else {}))
live.train()
print("trained", live.state.global_step)
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children import siftune and the tests from the checkout, as the parent does."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def script(folder: Path, text: str = SCRIPT) -> str:
    path = folder / "train.py"
    path.write_text(text)
    return str(path)


def ledger(folder: Path) -> list[dict[str, object]]:
    return pq.read_table(folder / "siftune" / "selection.parquet").to_pylist()


# --- the command: exit codes, signals, what no trainer reached ------------------------------------------------------------


def test_a_command_that_reaches_no_trainer_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*UDS, "--", *python("print('ran')")]) == 2
    printed = capfd.readouterr()
    assert printed.out == "ran\n"
    assert "ended and no trainer was sifted, so nothing was chosen" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("code", [3, 77])
def test_the_commands_own_exit_code_is_passed_on(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*UDS, "--", *python(f"raise SystemExit({code})")]) == code
    assert f"ended with exit code {code}, and no trainer was sifted" in capfd.readouterr().err


def test_a_command_that_a_signal_ended_gives_128_and_its_number() -> None:
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert main([*UDS, "--", *python(killed)]) == 128 + signal.SIGKILL


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_reaches_the_command(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    waits = (
        "import os, signal, sys, time\n"
        f"signal.signal(signal.{name}, lambda *_: sys.exit(9))\n"
        f"os.kill(os.getppid(), signal.{name})\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(getattr(signal, name))
    assert main([*UDS, "--", *python(waits)]) == 9
    assert signal.getsignal(getattr(signal, name)) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--online", "uds", "--kep", "1/4", "--", "true"], "siftune run has no option --kep; did you mean --keep?"),
        (["--online", "usd", "--keep", "1/4", "--", "true"], "did you mean uds"),
        (["--online", "uds", "--", "true"], "uds needs keep"),
        (["--online", "uds", "--keep", "x", "--", "true"], "keep"),
        (
            ["--online", "uds", "--keep", "1/4", "--window", "all", "--", "true"],
            "--window all is not one of micro, step",
        ),
        (["--keep", "1/4", "--", "true"], "siftune run needs --online METHOD"),
        (["--", "true"], "siftune run needs --online METHOD"),
        (["--online", "uds", "--keep", "1/4"], "siftune run needs a command after --"),
        (["--online", "uds", "--keep", "1/4", "--"], "siftune run needs a command after --"),
        (["--online", "uds", "--keep", "1/4", "true"], "no argument 'true'"),
        (["--online", "uds", "--keep", "1/4", "--", "torchrunn", "x.py"], "cannot start 'torchrunn'"),
    ],
)
def test_mistakes_are_refused_before_the_command_starts(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "true").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "true").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["run", *words]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "started").exists()


def test_a_configuration_file_holds_the_same_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sift.yaml").write_text("method: uds\nkeep: 1/4\nsketch: [16, 4]\nonly_class: SFTTrainer\n")
    shown = python("import os; print(os.environ['SIFTUNE_RUN']); raise SystemExit(3)")
    assert main(["run", "--config", str(tmp_path / "sift.yaml"), "--alpha", "0.5", "--", *shown]) == 3
    request = capfd.readouterr().out
    assert '"selector": {"method": "uds", "keep": "1/4", "alpha": 0.5, "sketch": [16, 4]}' in request
    assert '"only_class": "SFTTrainer"' in request


# --- sitecustomize --------------------------------------------------------------------------------------------------------


def test_an_existing_sitecustomize_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("value = 'of the machine'\nprint('the machine starts')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    shown = python(
        "import sitecustomize, sys; print(sitecustomize.value, type(sys.meta_path[0]).__name__); sys.exit(3)"
    )
    assert main([*UDS, "--", *shown]) == 3
    assert capfd.readouterr().out == "the machine starts\nof the machine _TrainerFinder\n"


def test_the_startup_folder_does_nothing_without_a_request(tmp_path: Path) -> None:
    shown = "import sys; print([type(finder).__name__ for finder in sys.meta_path], 'siftune' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "SIFTUNE_RUN"}
    done = subprocess.run(
        [sys.executable, "-c", shown],
        env={**env, "PYTHONPATH": str(STARTUP)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_TrainerFinder" not in done.stdout
    assert "False" in done.stdout


def test_a_python_without_siftune_stops_before_it_trains(tmp_path: Path) -> None:
    """A stub of transformers in a Python that does not have siftune on its path."""
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "trainer.py").write_text("class Trainer: pass\n")
    env = {**os.environ, "SIFTUNE_RUN": "{}", "PYTHONPATH": f"{STARTUP}{os.pathsep}{tmp_path}"}
    code = (
        "import sys; sys.path = [place for place in sys.path if 'site-packages' not in place]; "
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]; "
        "import transformers.trainer; print('trains')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "cannot import siftune" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# --- real trainers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_child_of_the_command_is_sifted_and_a_dry_run_trains_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, {script(tmp_path)!r}, 'OUT']))"
    assert main([*UDS, "--", *python(child.replace("OUT", str(tmp_path / "out")))]) == 0
    printed = capfd.readouterr()
    assert "uds is attached to Trainer" in printed.err
    assert "trained 2" in printed.out
    assert sum(bool(line["kept"]) for line in ledger(tmp_path / "out")) == 4
    assert main([*UDS, "--dry-run", "--", *python(child.replace("OUT", str(tmp_path / "dry")))]) == 0
    printed = capfd.readouterr()
    assert "dry run: uds (keep='1/4') accepts the first batch; nothing was trained" in printed.err
    assert "trained" not in printed.out
    assert not (tmp_path / "dry" / "siftune").exists()


@pytest.mark.slow
def test_torchrun_with_two_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    assert main([*UDS, "--", *torchrun, script(tmp_path), str(tmp_path / "out"), "--gloo"]) == 0
    printed = capfd.readouterr().err
    for rank in (0, 1):
        assert f"(rank {rank} of 2): uds is attached to Trainer" in printed
    lines = ledger(tmp_path / "out")
    assert {line["rank"] for line in lines} == {0, 1}
    assert sum(bool(line["kept"]) for line in lines) == 8


@pytest.mark.slow
def test_what_cannot_be_sifted_is_one_sentence_also_under_a_launcher(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"]
    words = ["run", "--online", "maxloss", "--keep", "1/80", "--", *torchrun, script(tmp_path), str(tmp_path / "out")]
    assert main(words) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("siftune: keep='1/80' is less than one row")


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]
    assert main([*UDS, "--", *accelerate, script(tmp_path), str(tmp_path / "out")]) == 0
    assert "uds is attached to Trainer" in capfd.readouterr().err
    assert sum(bool(line["kept"]) for line in ledger(tmp_path / "out")) == 4


@pytest.mark.slow
def test_trl_sft_by_its_yaml_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trl = shutil.which("trl", path=str(Path(sys.executable).parent)) or shutil.which("trl")
    if trl is None:
        pytest.skip("trl's command is not installed")
    model = save_tiny(tmp_path / "model")
    rows = [{"prompt": f"What is {n} + {n}? ", "completion": f"It is {2 * n}."} for n in range(32)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sft.yaml").write_text(
        f"model_name_or_path: {model}\ndataset_name: {tmp_path}/data\noutput_dir: {tmp_path}/out\nmax_steps: 2\n"
        "per_device_train_batch_size: 8\nlogging_steps: 1\nreport_to: none\nsave_strategy: 'no'\nuse_cpu: true\n"
        "bf16: false\ndtype: float32\n"
    )
    assert main([*UDS, "--", trl, "sft", "--config", str(tmp_path / "sft.yaml")]) == 0
    assert "uds is attached to SFTTrainer" in capfd.readouterr().err
    assert sum(bool(line["kept"]) for line in ledger(tmp_path / "out")) == 4
