"""The quality of a cell's model: held-out loss and token accuracy by domain, and an evaluation suite where one is set.

Values are flat: `loss/DOMAIN` (nats per answer token), `accuracy/DOMAIN` (share of answer tokens), `TASK/METRIC`. The
study adds the means over domains and over tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.load import read_tokenizer
from .data import Data, model_folder
from .spec import Study


def measured(study: Study, data: Data, model: Path, run: Path) -> dict[str, float]:
    """Every value of the model in the folder `model`; a suite leaves its run folder at `run`. Raises `UserError`."""
    values: dict[str, float] = {}
    if study.held_out:
        values |= _held_out(study, data, model)
    if study.suite is not None:
        values |= _suite(study, model, run)
    return values


def check_suite(study: Study) -> None:
    """Refuse a suite, its options or its files, without a weight. Raises `UserError`."""
    if study.suite is not None:
        from ..runs.evaluate import evaluate

        evaluate(str(model_folder(study)), study.suite, dry_run=True, **study.evaluate)


def _held_out(study: Study, data: Data, model: Path) -> dict[str, float]:
    import torch

    from ..evaluation.held_out import held_out
    from ..sft.adapters import load_tuned

    network: Any = load_tuned(model)
    if torch.cuda.is_available():
        network = network.to("cuda")
    results = held_out(
        network.eval(),
        read_tokenizer(model_folder(study), model=study.model, trust_remote_code=False),
        {name: str(path) for name, path in data.held_out.items()},
        text=study.text,
        max_length=study.max_length,
        columns=dict(study.columns) if study.columns else None,
        roles=dict(study.roles) if study.roles else None,
        format=study.format,  # type: ignore[arg-type]
    )
    values = {f"loss/{name}": result.loss for name, result in results.items()}
    return values | {f"accuracy/{name}": result.token_accuracy for name, result in results.items()}


def _suite(study: Study, model: Path, run: Path) -> dict[str, float]:
    """The headline metric of each task, and the suite's own average."""
    from ..runs.evaluate import evaluate

    assert study.suite is not None
    results = evaluate(str(model), study.suite, run=str(run), **study.evaluate)
    values = {f"{task}/{metric}": results.tasks[task][metric]["value"] for task, metric in results.standing.items()}
    return values | ({} if results.average is None else {"tasks/mean": results.average["value"]})
