"""What a cell will train on: against a plain walk over a data loader, and the refusals before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from siftune.budget import parse_keep
from siftune.errors import UserError
from siftune.study.cells import arms_of
from siftune.study.plan import check_equal, plan_arm, stop_of
from siftune.study.spec import Study, read_study
from tests.studies import write_study


def study(folder: Path, *, sft: dict[str, Any] | None = None, **changes: Any) -> Study:
    recipe = {"text": "prompt", "sft": {"per_device_train_batch_size": 8, "num_train_epochs": 1} | (sft or {})}
    return read_study(str(write_study(folder, with_model=False, recipe=recipe, **changes)))


def walked(rows: int, batch: int, micro: int, steps: int, keep: Any) -> tuple[int, int]:
    """Trained rows and optimiser steps of a data loader that is walked, epoch after epoch."""
    loader: Any = torch.utils.data.DataLoader(list(range(rows)), batch_size=batch)  # type: ignore[arg-type]
    trained = taken = 0
    while True:
        batches = [len(one) for one in loader]
        while batches:
            window, batches = batches[:micro], batches[micro:]
            for size in window:
                trained += size if keep is None else min(size, max(1, parse_keep(keep).rows(size)))
            taken += 1
            if taken == steps:
                return trained, taken


@pytest.mark.parametrize("rows", [64, 61, 7])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("keep", [None, 2, "1/4"])
@pytest.mark.parametrize("steps", [5, 20])
def test_rows_and_steps_equal_a_walk(tmp_path: Path, rows: int, micro: int, keep: Any, steps: int) -> None:
    online = ["regular"] if keep is None else [{"method": "maxloss", "keep": keep}]
    found = study(tmp_path, sft={"gradient_accumulation_steps": micro, "max_steps": steps}, offline=["full"],
                  online=online, baseline="full" if keep is None else "maxloss")  # fmt: skip
    plan = plan_arm(found, arms_of(found)[0], rows=rows, mean_tokens=10.0)
    assert (plan.trained_rows, plan.steps) == walked(rows, 8, micro, steps, keep)
    assert plan.trained_tokens == 10 * plan.trained_rows
    assert plan.forward_tokens == plan.trained_tokens + (0 if keep is None else 10 * plan.read_rows)


def test_a_method_that_looks_at_no_model_costs_no_scoring_pass(tmp_path: Path) -> None:
    found = study(tmp_path, offline=["full"], online=[{"method": "random", "keep": 2}])
    plan = plan_arm(found, arms_of(found)[0], rows=64, mean_tokens=10.0)
    assert plan.forward_tokens == plan.trained_tokens == 160


def test_epochs_give_the_trainers_number_of_steps(tmp_path: Path) -> None:
    found = study(tmp_path, sft={"num_train_epochs": 2, "gradient_accumulation_steps": 2}, offline=["random"])
    plan = plan_arm(found, arms_of(found)[0], rows=245, mean_tokens=1.0)
    assert plan.rows == 49
    assert plan.steps == 2 * 4
    assert plan.trained_rows == 2 * 49


def test_unequal_rows_are_refused_with_both_numbers(tmp_path: Path) -> None:
    online = ["regular", {"name": "half", "method": "random", "keep": 4}]
    found = study(tmp_path, offline=["random", "length"], online=online, baseline="random + regular")
    arms = arms_of(found)
    plans = {arm: plan_arm(found, arm, rows=400, mean_tokens=1.0) for arm in arms}
    with pytest.raises(UserError, match=r"random \+ half would train 40 rows and the baseline random \+ regular 80"):
        check_equal(found, arms, plans)


def test_all_rows_without_selection_are_outside_of_the_budget(tmp_path: Path) -> None:
    found = study(tmp_path)
    arms = arms_of(found)
    plans = {arm: plan_arm(found, arm, rows=400, mean_tokens=1.0) for arm in arms}
    assert plans[arms[0]].trained_rows == 400
    check_equal(found, arms, plans)


def test_budgets_and_keeps_that_cannot_be_met(tmp_path: Path) -> None:
    found = study(tmp_path, budgets=[61])
    with pytest.raises(UserError, match="budget 61 of random exceeds the 60 rows"):
        plan_arm(found, arms_of(found)[1], rows=60, mean_tokens=1.0)
    found = study(tmp_path, budgets=["0.1%"])
    with pytest.raises(UserError, match="less than one of the 60 rows"):
        plan_arm(found, arms_of(found)[1], rows=60, mean_tokens=1.0)
    for keep, said in ((9, "keep=9 exceeds the 8 candidates"), ("1%", "less than one of 8 candidates")):
        found = study(tmp_path, offline=["full"], online=[{"method": "random", "keep": keep}])
        with pytest.raises(UserError, match=said):
            plan_arm(found, arms_of(found)[0], rows=60, mean_tokens=1.0)


def test_equal_tokens_stop_where_the_baselines_rows_would_on_average(tmp_path: Path) -> None:
    sft = {"lr_scheduler_type": "constant"}
    found = study(tmp_path, sft=sft, equal="tokens")
    arms = arms_of(found)
    assert stop_of(found, arms, rows=400, mean_tokens=12.5) == 1000
    plan = plan_arm(found, arms[1], rows=400, mean_tokens=12.5, stop=1000)
    assert plan.trained_tokens == 1000
    assert plan.steps >= 2 * 10
    assert plan_arm(found, arms[0], rows=400, mean_tokens=12.5, stop=1000).trained_rows == 400
    assert stop_of(study(tmp_path, sft=sft, equal="tokens", tokens=77), arms, rows=9, mean_tokens=1.0) == 77
