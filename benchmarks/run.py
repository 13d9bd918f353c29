"""Run benchmarks one after the other and write what they print into docs/benchmarks.md, each under its own command.

Every benchmark is a script of its own, with its bars in its header; this one only knows their order, their arguments
and where their text goes. A section that is not run keeps its last figures. Let nothing else run meanwhile.

What needs a GPU is measured by gpu.py (`make gpu`), whose folder of results `--take` puts on the page.

Run: python benchmarks/run.py                              (all that this machine can run; about half an hour on 2 cores)
     python benchmarks/run.py uds-cost train-step          (some)
     python benchmarks/run.py daar-scoring --pool pool.jsonl.gz --model DIR
     python benchmarks/run.py --take gpu-results
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu import SECTIONS

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Benchmark:
    """One section of the page."""

    title: str
    command: str
    """Arguments after `python benchmarks/`."""
    section: str = ""
    """The section of gpu.py that measures it on a GPU."""


BENCHMARKS = {
    "import-time": Benchmark("Import time", "import_time.py"),
    "daar-scoring": Benchmark("DaaR scoring: features of a pool", "daar_scoring.py --rows 2048 --rounds 3 --memory"),
    "probe-training": Benchmark("DaaR: training both probes", "probe_training.py --widths 256 896 --threads 2"),
    "uds-cost": Benchmark("UDS scores: cost beyond the forward, 0.5 B shape", "uds_cost.py --shape 0.5b"),
    "uds-cost-8-rows": Benchmark(
        "UDS scores: 0.5 B shape, 8 candidates (the refresh of a trained head is once per step, whatever their number)",
        "uds_cost.py --shape 0.5b --only heads --rows 8 --rounds 3",
    ),
    "uds-cost-7b": Benchmark("UDS scores: 7 B shape", "uds_cost.py --shape 7b --only heads --rounds 2"),
    "train-step": Benchmark("One optimiser step, 64 -> 8", "train_step.py --shape small"),
    "train-step-0.5b": Benchmark(
        "One optimiser step at the 0.5 B shape, 16 -> 2",
        "train_step.py --shape 0.5b --columns 128 --candidates 16 --keep 2 --repeats 2 "
        "--settings lora full --checkpointing no",
    ),
    "packing": Benchmark("Packed batches: what padding costs, and what sifting a packed batch costs", "packing.py"),
    "ifd": Benchmark("IFD: batched against row by row", "ifd.py"),
    "deita-walk": Benchmark("Deita-D: the walk", "deita_walk.py"),
    "instag-walk": Benchmark("InsTag-D: the walk", "instag_walk.py"),
    "targets": Benchmark("Choosing for a target: rds and less", "targets.py rds less"),
    "near-copies": Benchmark("Near-copies of a million short rows", "targets.py near-copies --rows 1000000"),
    "ledger-cost": Benchmark("A loss log of every row: cost beyond the step", "ledger_cost.py"),
    "ghost": Benchmark("Ghost gradients against explicit per-row gradients", "ghost.py"),
    **{
        f"gpu-{name}": Benchmark(f"On a GPU: {section.title}", f"gpu.py --only {name}", section=name)
        for name, section in SECTIONS.items()
    },
}
INTRODUCTION = """# Benchmarks

Every section is the output of the command in its first line, run by `python benchmarks/run.py NAME` with nothing else
on the machine, unless the section says otherwise. Comparisons are side by side in one run; figures are medians.

Bars that the sections below show as missed: a soft-capped head costs more than 1.1 x its logits at width 896, because its
exact Gram matrix is N x N x V products in float64 beside the logits' N x V x D in float32; a trained head's refresh is once
per step, so its share is above 20 % with 4 candidates and below it with 8; and at the small shape, where rows are as long as
the model is wide, one optimiser step reaches 85 to 90 % of its limit. What needs a GPU is not measured.

Two sections show little or no gain on two CPU cores. Row gradients take 1.1 to 1.2 times as long in factors as explicit ones (0.9 x
and 0.8 x in the table's last column): a processor does the same products either way, and here forms most gradients, too. GREATS is
level with its explicit form with LoRA and a little faster with all weights. What factors save is memory where a weight is large
against the row's tokens. IFD in batches is 2 x as fast as row by row with the embedded 1.8 M model; ours costs what its two forwards
and the head on the answers' tokens cost (1.01 x), and that head alone is 0.4 of the forwards.

The sections from IFD to InsTag-D's walk ran beside a documentation build, which had a lower priority, and the section on packed
batches beside several other jobs, at the highest priority; its ratios are medians over rounds of both ways in turn.

## What needs a GPU

`make gpu` runs `python benchmarks/gpu.py` in less than nine minutes on one GPU of 80 GB: six sections in order of worth, each ended
when its time is up, with what it printed until then in the folder `gpu-results`. `python benchmarks/run.py --take gpu-results` puts
that folder on this page; until then those sections read "Not measured". On a machine without network, bring along the checkout,
rows as JSONL (`--rows FILE`), a pretrained model (`--model FOLDER`) and the packages of `benchmarks/gpu-requirements.txt`
(`pip download --dest wheels -c constraints.txt -r benchmarks/gpu-requirements.txt`); a section that misses one of them is skipped and
names it. `python benchmarks/gpu.py --device cpu --rehearse` runs every section at a tiny size on a processor.
"""


def sections(text: str) -> dict[str, str]:
    """The page's sections by name, marked by HTML comments so that one can be replaced alone."""
    found = re.findall(r"<!-- (\S+) -->\n(.*?)(?=\n<!-- \S+ -->|\Z)", text, flags=re.DOTALL)
    return {name: body.strip() for name, body in found if "Not measured" not in body}


def write(known: dict[str, str]) -> None:
    """The page, sections in the table's order; what was never run says so."""
    parts = [INTRODUCTION]
    for name, benchmark in BENCHMARKS.items():
        if not (HERE / benchmark.command.split()[0]).is_file():
            continue
        told = known.get(
            name,
            f"## {benchmark.title}\n\n`python benchmarks/{benchmark.command}`\n\nNot measured{' (needs a CUDA GPU)' if benchmark.section else ''}.",
        )
        parts.append(f"<!-- {name} -->\n{told}\n")
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def run(benchmark: Benchmark, shown: str, words: list[str]) -> str:
    """One section: the command, what it printed (its JSON left out), how long it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], check=False, cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shown} failed:\n{done.stderr[-2000:]}")
    text = without_json(done.stdout)
    minutes = (time.perf_counter() - start) / 60
    return f"## {benchmark.title}\n\n`python benchmarks/{shown}` ({minutes:.1f} minutes)\n\n{text}"


def without_json(text: str) -> str:
    """A benchmark's output as the page shows it."""
    return re.sub(r"```json.*?```|^[\[{].*[\]}]$", "", text, flags=re.DOTALL | re.MULTILINE).strip()


def take(folder: Path) -> dict[str, str]:
    """The page's sections from a folder of gpu.py's results: those that measured something."""
    if not (folder / "run.json").is_file():
        raise SystemExit(f"{folder} holds no run.json, so it is no folder of results of gpu.py; run make gpu first")
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if facts["rehearsal"] or facts["device"] != "cuda":
        raise SystemExit(f"{folder} is a rehearsal on {facts['device']}; the page takes figures of a GPU alone")
    lines = map(json.loads, (folder / "results.jsonl").read_text(encoding="utf-8").splitlines())
    measured = {line["section"] for line in lines if line["what"] != "section"}
    taken = {}
    for name, benchmark in BENCHMARKS.items():
        page = folder / f"{benchmark.section}.md"
        if benchmark.section in measured and page.is_file():
            text = without_json(page.read_text(encoding="utf-8"))
            taken[name] = f"## {benchmark.title}\n\n`python benchmarks/{benchmark.command}`\n\n{text}"
    if not taken:
        raise SystemExit(f"{folder} holds no figure; its *.log files say what went wrong")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which; all without")
    parser.add_argument(
        "--pool", nargs="*", default=[], help="JSONL files for daar-scoring and packing; made-up rows without"
    )
    parser.add_argument("--model", default=str(HERE.parent / "siftune" / "demo" / "assets" / "model"))
    parser.add_argument(
        "--take", type=Path, help="put the results of gpu.py in this folder on the page, and run nothing"
    )
    flags = parser.parse_args()

    known = sections(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    if flags.take is not None:
        write(known | take(flags.take))
        return
    if unknown := set(flags.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {sorted(unknown)[0]!r}; known: {', '.join(BENCHMARKS)}")
    for name in flags.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        script, *arguments = benchmark.command.split()
        if not (HERE / script).is_file() or benchmark.section:
            continue
        words, shown = [str(HERE / script), *arguments], benchmark.command
        if name in ("daar-scoring", "packing"):
            words += ["--model", flags.model, *(["--pool", *flags.pool] if flags.pool else [])]
            pools = " ".join(Path(pool).name for pool in flags.pool)
            shown += f" --model {Path(flags.model).name}" + (f" --pool {pools}" if pools else "")
        print(f"{name} …", flush=True)
        known[name] = run(benchmark, shown, words)
        write(known)
    write(known)


if __name__ == "__main__":
    main()
