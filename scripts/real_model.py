"""The commands with a real pretrained chat model, SmolLM2-135M-Instruct, on an ordinary computer -> docs/real-model.md.

DaaR writes its own domain rows with the model (from one sentence per domain), reads the pool with the same model and
chooses; `length` and `ifd` choose from the same rows; a few steps of training with UDS follow. The pool is made of the
four public pools; the true domain of a row stands in a column that no method reads. Every command is a process of its
own with an empty cache, and its user CPU time is taken beside the wall time.

    python scripts/real_model.py --data ../shared/data/pools --model ./smollm2

Cost: under half an hour on two CPU cores. `--reuse` keeps the cache and the runs of an earlier call, so that only what is
missing is computed: its times are those of the earlier call.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_rows import draw, table, write_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOCAL = "./smollm2"
TRUE = {"common_sense": "common_sense", "reasoning": "reasoning", "mathematics": "math", "coding": "code"}
"""The pool file that each of DaaR's domains describes."""
RECIPE = """model: {model}
train: chosen.jsonl
sft: {{max_steps: {steps}, max_length: 256, per_device_train_batch_size: 16, learning_rate: 2e-4, logging_steps: 1,
  gradient_checkpointing: false}}
peft: {{r: 8, lora_alpha: 16, target_modules: all-linear}}
online: {{method: uds, keep: 1/4}}
"""


@dataclass
class Done:
    """A command that ran: its words, what it printed as JSON, and what it cost."""

    words: list[str]
    manifest: dict[str, Any]
    seconds: float
    user_seconds: float

    @property
    def commands(self) -> str:
        """The command as it ran, and the same with the hub's model."""
        local = shlex.join(["siftune", *self.words])
        note = "    # needs the model" if LOCAL in local else ""  # a page's commands run in the tests, but for these
        both = dict.fromkeys([local + note, local.replace(LOCAL, HUB) + note])
        return "```bash\n" + "\n".join(both) + "\n```"

    @property
    def cost(self) -> str:
        return f"{self.seconds:,.0f} s, {self.user_seconds:,.0f} s of user CPU time"


def commands() -> dict[str, list[str]]:
    """Every command, by the name of its run."""
    select = ["select", "{method}", "pool.jsonl"]
    kept = ["--keep", "20%"]
    model = ["--model", LOCAL, "--max-length", "256"]
    words = {
        "daar": [*select, *model, "--generator", LOCAL, "--domains", "domains.yaml", *kept, "--out", "chosen.jsonl"],
        "length": [*select, *kept],
        "ifd": [*select, *model, *kept],
        "train": ["train", "recipe.yaml"],
    }
    return {
        name: [*(word.format(method=name) for word in line), "--run", f"run-{name}"] for name, line in words.items()
    }


def run(name: str, words: list[str], folder: Path, reuse: bool) -> Done:
    """One command in a process of its own."""
    path = folder / f"done-{name}.json"
    if reuse and path.is_file():
        return Done(**json.loads(path.read_text(encoding="utf-8")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SIFTUNE_CACHE": str(folder / "cache")}
    environment.setdefault("HF_HUB_OFFLINE", "1")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.perf_counter()
    command = [sys.executable, "-m", "siftune", *words, "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    user = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    result = Done(words, json.loads(done.stdout), seconds, user)
    path.write_text(json.dumps(vars(result)), encoding="utf-8")
    sys.stderr.write(f"{name}: {result.cost}\n")
    return result


# --- the page ---------------------------------------------------------------------------------------------------------


def labels(folder: Path, run_name: str) -> tuple[list[str], list[str], list[bool]]:
    """True domain (as DaaR names it), pseudo-label and choice of every row of the pool."""
    import pyarrow.parquet as pq

    columns = pq.read_table(folder / run_name / "rows.parquet", columns=["pseudo_label", "kept"]).to_pydict()
    ours = {name: domain for domain, name in TRUE.items()}
    with open(folder / "pool.jsonl", encoding="utf-8") as pool:
        true = [ours[json.loads(line)["true_domain"]] for line in pool]
    return true, [label or "" for label in columns["pseudo_label"]], columns["kept"]


def agreement(folder: Path) -> str:
    """Pseudo-labels against the hidden domains, and what was chosen."""
    true, predicted, kept = labels(folder, "run-daar")
    agree = sum(one == other for one, other in zip(true, predicted, strict=True)) / len(true)
    lines = []
    for name in TRUE:
        of_domain = [label for label, domain in zip(predicted, true, strict=True) if domain == name]
        chosen = sum(1 for domain, keep in zip(true, kept, strict=True) if keep and domain == name)
        shares = [f"{of_domain.count(label) / len(of_domain):.1%}" for label in TRUE]
        lines.append([name, f"{len(of_domain):,}", *shares, f"{chosen:,}"])
    head = ["hidden domain", "rows", *(f"labelled {name}" for name in TRUE), "chosen"]
    return (
        f"{agree:.1%} of the {len(true):,} pseudo-labels are the hidden domain; {1 / len(TRUE):.0%} would be chance.\n\n"
        + table(head, lines)
    )


def written(folder: Path, manifest: dict[str, Any], shown: int = 3) -> str:
    """How the generator fared, and its first rows of each domain, verbatim."""
    facts = manifest["info"]["written"]
    lines = []
    for name, domain in facts["domains"].items():
        reasons = ", ".join(f"{count} {kind}" for kind, count in domain["rejected"].items())
        numbers = [domain["rows"], domain["requests"], domain["plain_requests"], domain["relaxed"]]
        lines.append([name, *map(str, numbers), f"{domain['threshold_used']:.3f}", reasons or "-"])
    head = ["domain", "rows", "requests", "with the simpler prompt", "relaxed", "similarity up to", "not used"]
    parts = [table(head, lines), "\n".join(f"- {sentence}" for sentence in facts["told"])]
    for name in facts["domains"]:
        with open(folder / "run-daar" / "domains" / f"{name}.jsonl", encoding="utf-8") as handle:
            rows = [json.loads(line) for line in handle]
        short = sorted(rows, key=lambda row: len(row["instruction"]) + len(row["input"]) + len(row["output"]))[:shown]
        texts = "\n\n".join(
            f"{row['instruction']}\n{row['input']}\n-> {row['output']}".replace("\n\n", "\n") for row in short
        )
        parts.append(f"The {len(short)} shortest rows of {name}, as written:\n\n```text\n{texts}\n```")
    return "\n\n".join(parts)


def stages(done: Done) -> str:
    """Seconds of each stage of a run."""
    lines = [[stage["name"], f"{stage['seconds']:.1f} s"] for stage in done.manifest["stages"]]
    return table(["stage", "time"], lines)


def training(done: Done) -> str:
    """Steps, rows and loss of the few steps."""
    tokens, manifest = done.manifest["tokens"], done.manifest
    loss = "-" if manifest["train_loss"] is None else f"{manifest['train_loss']:.3f}"
    return (
        f"{manifest['steps']} steps, mean loss {loss}: {tokens['trained_rows']:,} rows trained of "
        f"{tokens['candidates']:,} candidates, {tokens['trained_tokens']:,} tokens ({done.cost})."
    )


def shared_rows(folder: Path, one: str, other: str) -> str:
    """Rows that two runs both chose."""
    import pyarrow.parquet as pq

    first, second = (
        pq.read_table(folder / name / "rows.parquet", columns=["kept"])["kept"].to_pylist() for name in (one, other)
    )
    both = sum(1 for a, b in zip(first, second, strict=True) if a and b)
    return f"{both} of {sum(map(bool, first))}"


def page(folder: Path, done: dict[str, Done], settings: str, recipe: str, options: argparse.Namespace) -> str:
    """The complete page."""
    from benchmarks import machine

    rows = done["daar"].manifest["rows"]
    command = f"--data POOLS --model {LOCAL} --per-domain {options.per_domain} --rows {options.rows}"
    command += f" --attempts {options.attempts} --steps {options.steps}"
    return f"""# With a real pretrained model

Written by `python scripts/real_model.py {command}`. All figures are measured by the script.

{machine.describe()}{chr(10) + chr(10) + options.note if options.note else ""}

Model: [SmolLM2-135M-Instruct](https://huggingface.co/{HUB}), 135 M weights (here dequantised from 4 bit, so a little worse
than the original), as base model and as generator. Pool: {rows["read"]:,} rows, {options.per_domain} of each of four public pools,
shuffled; their domains are hidden from the methods. Of each pair of commands, the first was run, the second uses the
same model from the hub. Every command started from an empty cache, except that `ifd` and the training ran after DaaR.

## DaaR, from one sentence per domain

`domains.yaml` holds one line, `{settings}`, so the four shipped sentences are used; a domain with too few
rows after its requests accepts the least similar of the rows that were too similar.

{done["daar"].commands}

{done["daar"].cost}; peak memory {done["daar"].manifest["peak_memory_mb"]:,} MB.

{stages(done["daar"])}

{agreement(folder)}

## Rows written by the model

{written(folder, done["daar"].manifest)}

A model this small follows the form more reliably than the facts: read the rows before you rely on them, and use a larger
generator where possible. DaaR needs them only to locate the domains.
{others(folder, done)}{few_steps(done, recipe)}"""


def others(folder: Path, done: dict[str, Done]) -> str:
    """What the other offline methods cost, and what they share with DaaR."""
    parts = [
        f"{done[name].commands}\n\n{done[name].cost}. Rows that DaaR also chose: "
        f"{shared_rows(folder, f'run-{name}', 'run-daar')}.\n"
        for name in ("length", "ifd")
        if name in done
    ]
    return "\n## Other methods on the same rows\n\n" + "\n".join(parts) if parts else ""


def few_steps(done: dict[str, Done], recipe: str) -> str:
    """The recipe, its command, and what came of it."""
    if "train" not in done:
        return ""
    return f"""
## A few steps of training, UDS choosing in every batch

`recipe.yaml` (with the hub's model, its first line is `model: {HUB}`):

```yaml
{recipe.strip()}
```

```bash
siftune train recipe.yaml --run run-train    # needs the model
```

{training(done["train"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four pools")
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=Path("siftune-runs/real-model"), help="folder for pool and runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "real-model.md")
    parser.add_argument("--per-domain", type=int, default=250, help="rows of each pool")
    parser.add_argument("--rows", type=int, default=10, help="rows that the model writes of each domain")
    parser.add_argument("--attempts", type=int, default=32, help="requests for further rows of a domain at most")
    parser.add_argument("--steps", type=int, default=4, help="steps of training")
    parser.add_argument("--only", nargs="+", choices=list(commands()), help="run these commands alone; daar is needed")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what ran beside it")
    parser.add_argument("--reuse", action="store_true", help="keep what an earlier call computed")
    options = parser.parse_args()
    folder = options.work.resolve()
    if not options.reuse:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / LOCAL
    if not link.exists():
        link.symlink_to(options.model.resolve(), target_is_directory=True)
    rows = draw(options.data, options.per_domain, 0)
    random.Random(0).shuffle(rows)
    write_rows(folder / "pool.jsonl", rows)
    settings = f"settings: {{rows: {options.rows}, attempts: {options.attempts}}}"
    (folder / "domains.yaml").write_text(settings + "\n", encoding="utf-8")
    recipe = RECIPE.format(model=LOCAL, steps=options.steps)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    chosen = {name: words for name, words in commands().items() if name in (options.only or commands())}
    done = {name: run(name, words, folder, options.reuse) for name, words in chosen.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(folder, done, settings, recipe, options), encoding="utf-8")


if __name__ == "__main__":
    main()
