"""The sections of gpu.py, each run in a process of its own: `python benchmarks/gpu_sections.py NAME --device cuda`.

A section prints Markdown and, in lines that begin with `{"section"`, the same figures as JSON, as soon as it has them.
It exits with `SKIPPED` where a package that it needs is absent. Memory on the GPU is estimated at each section.

Axes: `C` candidates of a step, `K` rows kept, `N` positions of a row, `D` width.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu import SKIPPED
from machine import describe

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/parity/test_devices.py",)
"""Files with tests marked `cuda`."""
ROUTES: dict[str, dict[str, Any]] = {
    "exact, eigenvalues": {"route": "eigenvalues"},
    "exact, polar": {"route": "polar"},
    "fast": {"precision": "fast"},
}


@dataclass(frozen=True)
class Setting:
    """Where and at what size a section runs."""

    name: str
    device: str
    rehearse: bool
    rows: Path | None
    model: Path | None
    seconds: float
    """Time until the section is killed."""

    @property
    def shape(self) -> str:
        return "small" if self.rehearse else "7b"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def step(self) -> dict[str, int]:
        """Candidates, rows kept, tokens of a row."""
        return {"rows": 8, "keep": 2, "columns": 24} if self.rehearse else {"rows": 64, "keep": 8, "columns": 512}

    @property
    def repeats(self) -> int:
        return 1 if self.rehearse else 3

    def built(self) -> Any:
        """A model of the section's shape with LoRA, random weights made on the device."""
        from steps import build, make_trainable

        torch.manual_seed(0)
        model = build(self.shape, device=self.device, dtype=self.dtype, layers=2 if self.rehearse else None)
        make_trainable(model, "lora")
        return model

    def tell(self, what: str, **figures: Any) -> None:
        """One line of results for machines."""
        print(json.dumps({"section": self.name, "what": what, **figures}), flush=True)

    def show(self, *lines: str) -> None:
        """Markdown."""
        print("\n".join(lines), flush=True)

    def row(self, *cells: object) -> None:
        """One line of a table."""
        self.show("| " + " | ".join(str(cell) for cell in cells) + " |")

    def head(self, *cells: str) -> None:
        """A table begins."""
        self.show("", "| " + " | ".join(cells) + " |", "|" + "---|" * len(cells))


def needs(*packages: str) -> None:
    """Leave with `SKIPPED` where one is absent."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        print(f"Not run: {', '.join(absent)} not installed here (benchmarks/gpu-requirements.txt has the versions).")
        raise SystemExit(SKIPPED)


# --- 1: right on CUDA -------------------------------------------------------------------------------------------------
# Memory: tiny models, below 1 GB.


def right(setting: Setting) -> None:
    """The tests marked `cuda`, a line each."""
    needs("pytest")
    import pytest

    class Lines:
        """Prints each test as it ends."""

        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                if report.when == "teardown" and report.outcome == "passed":
                    return
                name = report.nodeid.split("::")[-1]
                setting.row(name, report.outcome, f"{report.duration:.1f} s")
                setting.tell("test", test=name, outcome=report.outcome, seconds=round(report.duration, 2))

    setting.head("test", "outcome", "time")
    files = [str(ROOT / name) for name in TESTS]
    if setting.device == "cuda":
        chosen = "not cpu"  # the other half is for machines without a GPU
    else:
        chosen = "cpu and (llama or lora)" if setting.rehearse else "cpu"
    words = ["-m", "cuda", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal", "-k", chosen, *files]
    status = pytest.main(words, plugins=[Lines()])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"pytest ended with {pytest.ExitCode(status).name}")


# --- 2: UDS beyond the forward ----------------------------------------------------------------------------------------
# Memory at 7 B: weights 15.2 GB, hidden states of 64 x 512 tokens 0.24 GB, their layer's activations 4 GB, C in float32
# 0.05 GB, Gram matrices of 32 rows and what the polar iteration holds beside them 0.6 GB: 21 GB.


def uds(setting: Setting) -> None:
    """Milliseconds beyond the forward and their share of it, for each exact route and `fast`."""
    from steps import Step, paired, peak_beyond
    from uds_cost import Replayed

    from siftune.online.uds import UDS

    model = setting.built()
    step = Step(model, **setting.step)
    forward = paired({"forward": step.forward}, repeats=setting.repeats, device=setting.device)["forward"]
    setting.tell("forward", seconds=forward, shape=setting.shape, **setting.step)
    sizes = f"{step.rows} candidates of {step.columns} tokens"
    setting.show(
        "", f"{setting.shape} shape, {setting.dtype}, LoRA, {sizes}; forward of the candidates {1000 * forward:.1f} ms"
    )
    setting.head("norms", "beyond the forward", "share", "scoring in all", "peak memory beyond the forward")
    replay = Replayed(model, step.batch)
    for name, options in ROUTES.items():
        selector = UDS(keep=step.keep, score_tokens=step.keep * step.columns, **options)
        selector.score(model, step.batch)

        def alone(selector: UDS = selector) -> None:
            with replay:
                selector.score(model, step.batch)

        def scored(selector: UDS = selector) -> None:
            selector.score(model, step.batch)

        spent = paired({"alone": alone, "in_all": scored}, repeats=setting.repeats, device=setting.device)
        beyond = peak_beyond(step.forward, scored) if setting.device == "cuda" else None
        setting.tell("scores", norms=name, seconds=spent["alone"], share=spent["alone"] / forward,
                     in_all=spent["in_all"], peak_beyond_mb=beyond)  # fmt: skip
        memory = "–" if beyond is None else f"{beyond:.0f} MB"
        share = f"{spent['alone'] / forward:.1%}"
        setting.row(name, f"{1000 * spent['alone']:.1f} ms", share, f"{1000 * spent['in_all']:.1f} ms", memory)
    automatic = UDS(keep=step.keep, score_tokens=step.keep * step.columns)
    automatic.score(model, step.batch)
    setting.show("", f'`route="auto"` chose: {automatic.provenance()["exact_route"]}.')
    setting.tell("auto", route=automatic.provenance()["exact_route"])


# --- 3: one optimiser step --------------------------------------------------------------------------------------------
# Memory at 7 B without checkpointing: weights 15.2 GB, activations of 8 x 512 tokens for the backward pass about 30 GB,
# their logits and gradients 6 GB: 52 GB. With checkpointing 25 GB. The naive row: logits and FFT of 512 x 152,064, 3 GB.


def step(setting: Setting) -> None:
    """C -> K against training on all and against the limit from the measured parts; then the naive way."""
    from steps import Step, checkpointing, measure, naive_scores, seconds, some

    model = setting.built()
    timed = Step(model, **setting.step)
    shown = f"{timed.rows} -> {timed.keep} rows of {timed.columns} tokens"
    setting.show("", f"{setting.shape} shape, {setting.dtype}, LoRA, {shown}; seconds per optimiser step")
    columns = ("on_all", "candidates_forward", "kept_step", "sifted")
    setting.head("checkpointing", *(name.replace("_", " ") for name in columns), "ratio", "limit", "of limit")
    kept_step = 0.0
    for recompute in (False, True):
        checkpointing(model, recompute)
        result = measure(timed, repeats=setting.repeats, device=setting.device)
        kept_step = kept_step or result["kept_step"]
        setting.tell("step", checkpointing=recompute, **result)
        ratios = (f"{result['ratio']:.2f}×", f"{result['limit']:.2f}×", f"{result['of_limit']:.0%}")
        setting.row("yes" if recompute else "no", *(f"{result[name]:.3f}" for name in columns), *ratios)
    checkpointing(model, False)
    signs = (torch.randint(0, 2, (model.config.vocab_size,), device=model.device) * 2 - 1).float()
    row = seconds(lambda: naive_scores(model, some(timed.batch, 0, 1), signs), setting.device)
    extrapolated = row * timed.rows + kept_step
    setting.tell("naive", one_row=row, extrapolated_step=extrapolated)
    setting.show("", f"Naive (logits, SVD, FFT): {row:.2f} s for one row; extrapolated to {timed.rows} rows and the kept "
                 f"rows' training, a step would take {extrapolated:.1f} s.")  # fmt: skip


# --- 4: DaaR scoring --------------------------------------------------------------------------------------------------
# Memory at 7 B: three layers and the embedding 2.5 GB, a batch's activations 2 GB.


def daar(setting: Setting) -> None:
    """The first three layers of a 7 B shape over real rows, and one padded row at a time on a sample of them."""
    from daar_scoring import PADDED, measure, read_texts, show
    from steps import build

    from siftune.demo.corpus import rows as demo_rows
    from siftune.demo.embedded import MODEL
    from siftune.models.backbone import Backbone

    count, layer = (24, 2) if setting.rehearse else (8192, 3)
    if setting.rows is None:
        rows = demo_rows(count, seed=0)
        texts = ["\n".join([row["instruction"], row["input"], row["output"]]) for row in rows]
        source = "rows of the embedded demo corpus"
    else:
        texts, source = read_texts([str(setting.rows)], count, seed=0), f"rows of {setting.rows.name}"
    folder = setting.model or MODEL
    torch.manual_seed(0)
    model = build(setting.shape, device=setting.device, dtype=setting.dtype, layers=layer).eval()
    kind = "bfloat16" if setting.dtype == torch.bfloat16 else "float32"
    backbone = Backbone(str(folder), layer=layer, device=setting.device, dtype=kind, max_length=PADDED)
    backbone._loaded.update(config=model.config, network=model.model)  # random weights in place of a checkpoint's
    tokens = f"the tokenizer of {setting.model.name}" if setting.model else "the demo model's tokenizer"
    setting.show("", f"{setting.shape} shape, random weights; {source}, {tokens}.", "")
    figures = measure(backbone, texts, rounds=setting.repeats, sample=1 if setting.rehearse else 64)
    show(figures, backbone)
    rate = figures["rows"] / figures["seconds"]["ours"]
    setting.tell("daar", rows_per_second=rate, seconds_of_40000=40_000 / rate, source=source, **figures)
    setting.show("", f"{rate:.0f} rows/s; 40,000 such rows take {40_000 / rate:.0f} s.")


# --- 5: exact or fast -------------------------------------------------------------------------------------------------
# Memory: one row of 4,096 x 3,584 in float64 and some ten matrices of its size: 2 GB.


def norms(setting: Setting) -> None:
    """Error and time of every route to a nuclear norm against a float64 SVD, as rows grow longer."""
    from uds_cost import SHAPES, in_turn, random_head

    from siftune.models.head import factorise
    from siftune.models.hidden_states import exact_math
    from siftune.online import nuclear

    width = SHAPES[setting.shape]["hidden_size"]
    lengths = (16, 48) if setting.rehearse else (128, 256, 512, 1024, 2048, 4096)
    routes: tuple[nuclear.NormRoute, ...] = ("eigenvalues", "polar", "fast")
    generator = torch.Generator(setting.device).manual_seed(0)
    with exact_math(torch.device(setting.device)):
        factor, _ = factorise(random_head(width, 4 * width, setting.device))
        setting.show(
            "", f"One row, width {width}, singular values over three decades; error against a float64 SVD on the CPU"
        )
        setting.head("tokens", *routes, "lanczos")
        for length in lengths:
            scale = torch.logspace(0, -3, width, device=setting.device)
            states = torch.randn(1, length, width, device=setting.device, generator=generator) * scale
            image = torch.cat(list(factor.images(states)), dim=2)[0]
            reference = float(torch.linalg.svdvals(image.cpu()).sum())
            ways: dict[str, Callable[[], nuclear.Norms]] = {
                route: lambda route=route, states=states: nuclear.norms(states, [states.shape[1]], factor, route=route)[
                    0
                ]
                for route in routes
            }
            ways["lanczos"] = lambda states=states: nuclear.lanczos_norms(states[0], factor)
            results = {name: way() for name, way in ways.items()}
            spent = in_turn(ways, setting.device, setting.repeats)
            cells = []
            for name, result in results.items():
                error = abs(result.nuclear / reference - 1)
                fell = ", by eigenvalues" if result.fell_back else ""
                cells.append(f"{1000 * spent[name]:.2f} ms, {error:.0e}{fell}")
                setting.tell(
                    "norm", tokens=length, way=name, seconds=spent[name], error=error, fell_back=result.fell_back
                )
            setting.row(length, *cells)


# --- 6: a study -------------------------------------------------------------------------------------------------------
# Memory: the model that was brought along with its optimiser, gradients and activations; one run at a time.


def study(setting: Setting) -> None:
    """`uds` against `random`, the same rows a step and the same steps, three seeds: held-out loss."""
    needs("datasets", "jsonargparse", "rich", "trl", "peft", "plotly", "jinja2", "yaml")
    if setting.model is None and not setting.rehearse:
        print("Not run: no pretrained model was brought along (--model FOLDER).")
        raise SystemExit(SKIPPED)
    with tempfile.TemporaryDirectory(prefix="siftune-gpu-") as made:
        folder = Path(made)
        (folder / "study.yaml").write_text(json.dumps(study_of(setting)), encoding="utf-8")  # JSON is YAML
        words = [sys.executable, "-m", "siftune", "compare", str(folder / "study.yaml")]
        words += ["--run", str(folder / "run"), "--out", str(folder / "page.md"), "--quiet"]
        try:
            paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
            subprocess.run(words, check=True, stdout=sys.stderr, timeout=0.9 * setting.seconds,
                           env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
        finally:
            losses(setting, folder / "run")
        setting.show(*tables((folder / "page.md").read_text(encoding="utf-8")))


def study_of(setting: Setting) -> dict[str, Any]:
    """The study's YAML as a dictionary."""
    steps, rows = (2, 64) if setting.rehearse else (300, 4096)
    sft = {"max_length": 64 if setting.rehearse else 256, "per_device_train_batch_size": 8, "max_steps": steps,
           "learning_rate": 1e-4, "save_strategy": "no", "bf16": setting.device == "cuda",
           "use_cpu": setting.device == "cpu"}  # fmt: skip
    return {
        "name": "gpu",
        "model": str(setting.model) if setting.model else "demo",
        "pool": {"rows": str(setting.rows)} if setting.rows else "demo",
        "held_out": "demo",
        "rows": rows,
        "held_out_rows": 4 if setting.rehearse else 50,
        "recipe": {"text": "prompt", "sft": sft, "peft": {"r": 8, "target_modules": "all-linear"}},
        "offline": ["full"],
        "online": [{"method": "random", "keep": "1/4", "candidates": 32}, {"method": "uds", "keep": "1/4", "candidates": 32}],
        "equal": "rows",
        "seeds": [0] if setting.rehearse else [0, 1, 2],
        "baseline": "random",
        "jobs": 3 if setting.device == "cuda" else 1,
        "threads": 4 if setting.device == "cuda" else 1,
    }  # fmt: skip


def tables(page: str) -> list[str]:
    """The tables of a page, each under its heading in bold."""
    lines, heading = [], ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("|"):
            if heading:
                lines += ["", f"**{heading}**", ""]
            lines.append(line)
            heading = ""
        elif lines and lines[-1].startswith("|"):
            lines.append("")
    return lines


def losses(setting: Setting, run: Path) -> None:
    """Held-out loss of every cell that is complete, also when the study was cut short."""
    from siftune.study.cell import CELL

    setting.head("run", "held-out loss by domain")
    for path in sorted(run.rglob(CELL)):
        values = json.loads(path.read_text(encoding="utf-8"))["values"]
        domains = {name: value for name, value in values.items() if name.startswith("loss/")}
        setting.row(path.parent.name, ", ".join(f"{name[5:]} {value:.3f}" for name, value in domains.items()))
        setting.tell("run", run=path.parent.name, **domains)


SECTIONS: Mapping[str, Callable[[Setting], None]] = {
    "right": right, "uds": uds, "step": step, "daar": daar, "norms": norms, "study": study,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    flags = vars(parser.parse_args())
    setting = Setting(**flags)
    setting.show(describe())
    SECTIONS[setting.name](setting)


if __name__ == "__main__":
    main()
