"""Everything that waits for a GPU, in one run of less than nine minutes: `make gpu`, on a machine with one of 80 GB.

The sections come in order of worth, each in a process of its own that is ended when its time is up; the next one then
starts, and what the earlier printed counts. Results appear as they come: as Markdown in `OUT/SECTION.md`, as JSON lines
in `OUT/results.jsonl`, messages of the libraries in `OUT/SECTION.log`. `python benchmarks/run.py --take OUT` puts them
on the page docs/benchmarks.md.

It needs torch, transformers, accelerate, peft, numpy, scipy, scikit-learn, safetensors and pyarrow. What else there is to
bring along for a machine without network is in gpu-requirements.txt; a section that misses a package is skipped:
    pip download --dest wheels -c constraints.txt -r benchmarks/gpu-requirements.txt

Run: python benchmarks/gpu.py [--rows pool.jsonl.gz] [--model FOLDER] [--out gpu-results] [--only uds step]
     python benchmarks/gpu.py --device cpu --rehearse        (every section at a tiny size, under two minutes)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent
SKIPPED = 77
"""Exit status of a section that misses a package or a file."""
TOTAL = 525
"""Seconds of all sections together."""


@dataclass(frozen=True)
class Section:
    """One part of the run."""

    title: str
    box: float
    """Seconds until it is ended."""


SECTIONS = {
    "right": Section("Tests marked cuda", 80),
    "uds": Section("UDS beyond the forward, 7 B shape", 90),
    "step": Section("One optimiser step, 64 -> 8, 7 B shape", 110),
    "daar": Section("DaaR scoring, first three layers of a 7 B shape", 70),
    "norms": Section("Nuclear norms: error and time of every route", 60),
    "study": Section("A study: uds against random on a pretrained model", TOTAL),
}


class Results:
    """The folder of results, written line by line."""

    def __init__(self, out: Path, *, anew: bool) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self._lines = (out / "results.jsonl").open("w" if anew else "a", encoding="utf-8")
        self._page: TextIO | None = None

    def begin(self, name: str) -> None:
        """A section's page, empty."""
        if self._page is not None:
            self._page.close()
        self._page = (self.out / f"{name}.md").open("w", encoding="utf-8")
        print(f"\n## {SECTIONS[name].title}\n", flush=True)

    def line(self, text: str) -> None:
        """One line of a section's output: JSON to the one file, Markdown to the other."""
        target = self._lines if text.startswith('{"section"') else self._page
        assert target is not None
        target.write(text.rstrip("\n") + "\n")
        target.flush()
        print(text.rstrip("\n"), flush=True)

    def end(self, name: str, status: str, seconds: float, note: str) -> None:
        """How the section went, as its last lines."""
        if note:
            self.line("")
            self.line(note)
        self.line(json.dumps({"section": name, "what": "section", "status": status, "seconds": round(seconds, 1)}))


def run_section(name: str, box: float, words: list[str], results: Results) -> str:
    """Run one section for `box` seconds at most; its status: `ok`, `skipped`, `out of time` or `failed`."""
    results.begin(name)
    start = time.monotonic()
    command = [sys.executable, str(HERE / "gpu_sections.py"), name, *words, "--seconds", str(box)]
    log = results.out / f"{name}.log"
    expired = threading.Event()
    with log.open("w", encoding="utf-8") as messages:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=messages, text=True, start_new_session=True, cwd=HERE.parent,
            env=_environment(),
        )  # fmt: skip

        def expire() -> None:
            expired.set()
            _end(child)

        timer = threading.Timer(box, expire)
        timer.start()
        assert child.stdout is not None
        for line in child.stdout:
            results.line(line)
        child.wait()
        timer.cancel()
    status, note = _verdict(child.returncode, expired.is_set(), box, log)
    results.end(name, status, time.monotonic() - start, note)
    return status


def _verdict(code: int, expired: bool, box: float, log: Path) -> tuple[str, str]:
    if expired:
        return "out of time", f"Out of time after {box:.0f} s; the lines above were measured before."
    if code == SKIPPED:
        return "skipped", ""
    if code == 0:
        return "ok", ""
    last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "failed", f"Failed with exit status {code}: {last[-1] if last else 'no message'}"


def _end(child: subprocess.Popen[str]) -> None:
    """End the section and what it started: a process group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """The checkout first on the path, no network."""
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes: does every section run?")
    parser.add_argument("--rows", type=Path, help="JSONL rows to score (.gz allowed); the embedded corpus without")
    parser.add_argument("--model", type=Path, help="folder of a pretrained model, for the study and its tokenizer")
    parser.add_argument("--out", type=Path, default=HERE.parent / "gpu-results", help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="some sections")
    flags = parser.parse_args(words)
    if flags.device == "cpu" and not flags.rehearse:
        parser.error("--device cpu is for --rehearse; a 7 B shape takes hours there")
    for name in ("rows", "model"):
        path = getattr(flags, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path} does not exist")
    if flags.device == "cuda" and not _has_gpu():
        parser.error("torch sees no CUDA GPU here; rehearse with --device cpu --rehearse")

    run, record = {"device": flags.device, "rehearsal": flags.rehearse}, flags.out / "run.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != run:
        parser.error(f"{flags.out} holds results of another device or size; give another --out, or delete it")
    results = Results(flags.out, anew=flags.only is None)
    record.write_text(json.dumps(run) + "\n", encoding="utf-8")
    shared = ["--device", flags.device, *(["--rehearse"] if flags.rehearse else [])]
    for name in ("rows", "model"):
        if getattr(flags, name) is not None:
            shared += [f"--{name}", str(getattr(flags, name).resolve())]
    slack = 3 if flags.rehearse else 1  # a rehearsal is no measurement, and its machine may be busy
    started, failed = time.monotonic(), []
    for name, section in SECTIONS.items():
        if flags.only and name not in flags.only:
            continue
        box = min(slack * section.box, slack * TOTAL - (time.monotonic() - started))
        if box < 5:
            results.begin(name)
            results.end(name, "out of time", 0.0, "Not run: the earlier sections took all the time.")
        elif run_section(name, box, shared, results) == "failed":
            failed.append(name)
    return 1 if failed else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    raise SystemExit(main())
