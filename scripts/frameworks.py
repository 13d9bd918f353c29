"""Run every framework for real on a CPU, plain and sifted, and write what was seen into docs/frameworks.md.

    make frameworks                                   all of them: environments under .venv-frameworks/, then the runs
    python scripts/frameworks.py --only ms-swift      one of them; the page keeps the others' last results
    python scripts/frameworks.py --page               write the page from the stored results

For each framework, on the embedded model and two-turn chats: 20 plain steps; 20 sifted steps by `siftune run` (kept = 1/8, the
kept rows are the best ones, the logged loss is the model's own loss on the kept rows); the same by the framework's own hook; a
resumed run against the uninterrupted one, bit for bit; packed lines; two processes. Needs a package index for the first run.
Cost: 2 to 3 GB of disk and a few minutes per framework.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from siftune.output import say

sys.path.insert(0, str(Path(__file__).parent))
from frameworks_list import BATCH, FRAMEWORKS, MODEL, ROOT, SECTION, Framework, Run

ENVIRONMENTS = ROOT / ".venv-frameworks"
PAGE = ROOT / "docs" / "frameworks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
KEPT = BATCH // 8
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
CHECKS = {
    "plain": "20 steps without siftune",
    "sifted": "20 steps by `siftune run`: rows kept in each step",
    "best": "kept rows are those with the highest scores",
    "loss": "logged loss, and the model's own on the kept rows",
    "hook": "by the framework's own hook: kept rows",
    "resume": "resumed at step 10: kept rows and weights",
    "packed": "packed lines: segments kept in the first step, logged and own loss",
    "processes": "two processes: rows kept in each step",
}


class Failed(Exception):
    """A check that did not hold, or a command that failed."""


# --- environments -------------------------------------------------------------------------------------------------------


def environment(framework: Framework) -> Path:
    """The framework's environment, built from its pins where it is missing or the pins have changed."""
    folder, pins = ENVIRONMENTS / framework.name, ROOT / "constraints-frameworks" / f"{framework.name}.txt"
    digest = hashlib.blake2b(pins.read_bytes(), digest_size=8).hexdigest()
    stamp = folder / ".ready"
    if not stamp.is_file() or stamp.read_text() != digest:
        if not (folder / "bin" / "python").exists():
            subprocess.run([find_python(framework), "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))], check=True
        )
        subprocess.run([*pip, "--no-deps", "-r", str(pins)], check=True)
        subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
        (site,) = (folder / "lib").glob("python*/site-packages")
        for name in framework.empty_packages:
            (site / name).mkdir(exist_ok=True)
            (site / name / "__init__.py").write_text('"""An empty stand-in: imported, and not used here."""\n')
        stamp.write_text(digest)
    return folder


def find_python(framework: Framework) -> str:
    """A Python of a version that the framework runs on."""
    for version in framework.python:
        name = f"python{version}"
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    raise Failed(f"not run: needs Python {' or '.join(framework.python)}, and none is on PATH")


def versions(folder: Path, framework: Framework) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform, sys; "
        "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in sys.argv[1:]}}))"
    )
    words = [str(folder / "bin" / "python"), "-c", code, framework.package, *PACKAGES]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


# --- runs ---------------------------------------------------------------------------------------------------------------


def chats(folder: Path) -> Path:
    """400 two-turn chats of several lengths."""
    generator = random.Random(0)
    path = folder / "chat.jsonl"
    with path.open("w") as file:
        for _ in range(400):
            a, b = generator.randrange(100), generator.randrange(100)
            first = f"The sum is {a + b}." + " It is a number." * generator.randrange(6)
            turns = [f"What is {a} plus {b}?", first, "And one more?", f"That is {a + b + 1}."]
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def train(framework: Framework, venv: Path, run: Run, *, sifted: bool = True) -> None:
    """One run; its output is in `run.folder`. Raises `Failed` with the end of its log."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = framework.command(run)
    words = [str(venv / "bin" / command.words[0]), *command.words[1:]]
    if sifted and not run.hook:
        options = [f"--{'online' if name == 'method' else name}={value}" for name, value in SECTION.items()]
        words = [str(venv / "bin" / "python"), "-m", "siftune", "run", *options, "--", *words]
    env = {
        **os.environ,
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(__file__).parent / 'frameworks_recorder'}{os.pathsep}{ROOT}",
        "FRAMEWORKS_RECORD": str(run.folder / "record"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(run.folder / "datasets"),
        "DO_NOT_TRACK": "1",
        "WANDB_MODE": "disabled",
        **command.env,
    }
    env.pop("VIRTUAL_ENV", None)
    log = run.folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(words, env=env, cwd=run.folder, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "Error" in line or line.startswith("siftune:")] or lines
        raise Failed(f"exit code {done.returncode}: {errors[-1][:300]} (log: {log.relative_to(ROOT)})")


def ledger(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.output / "siftune" / "selection.parquet").to_pylist()


def kept_by_step(run: Run) -> dict[int, list[str]]:
    """Token ids of the kept rows of each step."""
    steps: dict[int, list[str]] = {}
    for line in ledger(run):
        if line["kept"]:
            steps.setdefault(line["step"], []).append(line["token_id"])
    return steps


def logged_losses(run: Run) -> list[float]:
    states = sorted(run.output.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(states[-1].read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def own_loss(run: Run) -> float:
    """The embedded model's own loss on the rows of the first step's micro-batches: each row alone, in float64."""
    from transformers import AutoModelForCausalLM

    from siftune.hook.batching import real_spans
    from siftune.models.layout import with_layout

    model = AutoModelForCausalLM.from_pretrained(MODEL).double().eval()
    total, count = 0.0, 0
    for path in sorted((run.folder / "record").glob("*.pt")):
        batch = with_layout(torch.load(path), packed=run.packed)
        for line, start, stop in real_spans(batch):
            ids, labels = batch["input_ids"][line, start:stop], batch["labels"][line, start:stop]
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            total, count = total + float(losses), count + int((labels[1:] != -100).sum())
    return total / count


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.output / f"checkpoint-{step}" / "model.safetensors")


# --- checks -------------------------------------------------------------------------------------------------------------


def check_kept(run: Run, expected: int, steps: int) -> str:
    counts = {step: len(rows) for step, rows in kept_by_step(run).items()}
    if counts != dict.fromkeys(range(1, steps + 1), expected):
        raise Failed(f"kept {counts}, expected {expected} in each of {steps} steps")
    return f"{expected} of {len(ledger(run)) // steps}"


def check_best(run: Run) -> str:
    """Every kept row's score is at least that of every row that was not kept in the same step."""
    lines = ledger(run)
    for step in {line["step"] for line in lines}:
        kept = [line["total"] for line in lines if line["step"] == step and line["kept"]]
        skipped = [line["total"] for line in lines if line["step"] == step and not line["kept"]]
        if min(kept) < max(skipped):
            raise Failed(f"step {step}: a kept row scores {min(kept)}, a skipped one {max(skipped)}")
    return "yes"


def check_loss(run: Run) -> str:
    logged, own = logged_losses(run)[0], own_loss(run)
    if abs(logged - own) > max(5e-5, 1e-4 * own):
        raise Failed(f"logged {logged:.5f}, the model's own {own:.5f}")
    return f"{logged:.4f}, {own:.4f}"


def check_packed(run: Run, steps: int) -> str:
    lines = ledger(run)
    if len({line["step"] for line in lines}) != steps or all(line["segment"] is None for line in lines):
        raise Failed("the ledger has no segments")
    first = [line for line in lines if line["step"] == 1]
    return f"{sum(line['kept'] for line in first)} of {len(first)}; {check_loss(run)}"


def check_resume(whole: Run, resumed: Run) -> str:
    if kept_by_step(whole) != kept_by_step(resumed):
        raise Failed("other rows were kept")
    expected, result = weights(whole, 20), weights(resumed, 20)
    if any(not torch.equal(expected[name], result[name]) for name in expected):
        raise Failed("equal rows, other weights")
    return "equal, bit for bit"


def check_processes(run: Run, steps: int) -> str:
    if {line["rank"] for line in ledger(run)} != {0, 1}:
        raise Failed("the ledger does not have two ranks")
    return check_kept(run, 2 * KEPT, steps)


def measure(framework: Framework, work: Path, *, only: list[str]) -> dict[str, str]:
    """Every check's result in words; what failed says why."""
    venv = environment(framework)
    base = Run(folder=work, data=chats(work))
    runs = {
        "plain": replace(base, folder=work / "plain"),
        "sifted": replace(base, folder=work / "sifted", save_steps=10),
        "hook": replace(base, folder=work / "hook", hook=True, steps=5),
        "resumed": replace(
            base, folder=work / "resumed", save_steps=10, resume=work / "resumed" / "output" / "checkpoint-10"
        ),
        "packed": replace(base, folder=work / "packed", packed=True, steps=3, save_steps=3),
        "processes": replace(base, folder=work / "processes", processes=2, steps=5),
    }

    def plain() -> str:
        train(framework, venv, runs["plain"], sifted=False)
        return "ran"

    def sifted() -> str:
        train(framework, venv, runs["sifted"])
        return check_kept(runs["sifted"], KEPT, 20)

    def hook() -> str:
        train(framework, venv, runs["hook"])
        expected = {step: rows for step, rows in kept_by_step(runs["sifted"]).items() if step <= 5}
        if kept_by_step(runs["hook"]) != expected:
            raise Failed("other rows than by siftune run")
        return "those of `siftune run`"

    def resume() -> str:
        runs["resumed"].folder.mkdir(parents=True)
        shutil.copytree(runs["sifted"].output, runs["resumed"].output)
        shutil.rmtree(runs["resumed"].output / "checkpoint-20")
        train(framework, venv, runs["resumed"])
        return check_resume(runs["sifted"], runs["resumed"])

    def packed() -> str:
        if framework.packing_needs:
            return f"not run: needs {framework.packing_needs}"
        train(framework, venv, runs["packed"])
        return check_packed(runs["packed"], 3)

    def processes() -> str:
        if framework.processes_need:
            return f"not run: needs {framework.processes_need}"
        train(framework, venv, runs["processes"])
        return check_processes(runs["processes"], 5)

    steps: dict[str, Callable[[], str]] = {
        "plain": plain,
        "sifted": sifted,
        "best": lambda: check_best(runs["sifted"]),
        "loss": lambda: check_loss(runs["sifted"]),
        "hook": hook,
        "resume": resume,
        "packed": packed,
        "processes": processes,
    }
    results = {}
    for name, step in steps.items():
        if only and name not in only:
            continue
        started = time.monotonic()
        try:
            results[name] = step()
        except (Failed, OSError, KeyError, IndexError) as error:
            results[name] = f"**failed**: {type(error).__name__}: {error}"
        say(f"{framework.name} {name}: {results[name]} ({time.monotonic() - started:.0f} s)")
    return results


# --- the page -----------------------------------------------------------------------------------------------------------


def stored(framework: Framework) -> dict[str, Any]:
    path = ENVIRONMENTS / "results" / f"{framework.name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def store(framework: Framework, values: dict[str, Any]) -> None:
    path = ENVIRONMENTS / "results" / f"{framework.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1))


def write_page() -> None:
    """Replace the measured part of the page by the stored results."""
    results = {framework: stored(framework) for framework in FRAMEWORKS}
    titles = [framework.title for framework in FRAMEWORKS]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    rows: dict[str, Callable[[Framework, dict[str, Any]], str]] = {
        "run on": lambda framework, values: values.get("date", "not run"),
        "versions": lambda framework, values: ", ".join(
            f"{name} {number.partition('+')[0]}" for name, number in values.get("versions", {}).items()
        ),
    }
    for name, text in CHECKS.items():
        rows[text] = lambda framework, values, name=name: values.get("checks", {}).get(name, "not run")
    rows["on a CPU"] = lambda framework, values: framework.note
    for text, cell in rows.items():
        lines.append(
            f"| {text} | " + " | ".join(cell(framework, values) for framework, values in results.items()) + " |"
        )
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[framework.name for framework in FRAMEWORKS], action="append")
    parser.add_argument("--check", choices=list(CHECKS), action="append", default=[])
    parser.add_argument("--page", action="store_true", help="write the page from the stored results")
    options = parser.parse_args()
    failed = False
    for framework in [] if options.page else FRAMEWORKS:
        if options.only and framework.name not in options.only:
            continue
        work = ENVIRONMENTS / "runs" / framework.name
        if not options.check:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        try:
            measured = measure(framework, work, only=options.check)
            facts = {"versions": versions(environment(framework), framework)}
        except Failed as error:
            say(f"{framework.name}: {error}")
            measured, facts = {}, {"date": str(error)}
        # Read now, so that two commands may measure different checks at the same time.
        checks = {**stored(framework).get("checks", {}), **measured} if options.check else measured
        date = datetime.date.today().isoformat()
        store(framework, {"date": date, "machine": platform.machine(), **facts, "checks": checks})
        failed |= any("failed" in result for result in checks.values()) or not checks
    write_page()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
