"""The plan of each cell before anything runs: optimiser steps, trained rows and tokens, checked to be equal.

Rows are exact (the trainer's own arithmetic), tokens are the drawn pool's mean times rows, so they are estimates for a
method that prefers long or short rows. Equality is checked here by the plan and again on what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..budget import parse_keep
from ..errors import UserError
from .cells import Arm, baseline_of, groups_of
from .spec import Study

BATCH = 8
"""`per_device_train_batch_size` of SFTConfig where the recipe does not set it."""
SLACK = 4
"""With `equal: tokens`, steps at most, as a multiple of those that mean rows would take."""


@dataclass(frozen=True)
class Plan:
    """What one arm trains on, per seed."""

    rows: int
    """Rows that the training set holds."""
    candidates: int
    """Rows of a micro-batch as the trainer fetches it."""
    kept: int
    """Rows of a full optimiser step that are trained on."""
    steps: int
    """Optimiser steps; at most, where a token total ends the run."""
    trained_rows: int
    """Rows that are back-propagated; expected, where a token total ends the run."""
    read_rows: int
    """Rows that go forward at least once."""
    trained_tokens: int
    """Estimated."""
    forward_tokens: int
    """Estimated: of the scoring pass, where there is one, and of the training pass."""


def plan_arm(study: Study, arm: Arm, *, rows: int, mean_tokens: float, stop: int | None = None) -> Plan:
    """The plan of an arm on a pool of `rows`. `stop` ends the run at that many trained tokens. Raises `UserError`."""
    sft: Mapping[str, Any] = study.recipe.get("sft", {})
    selected = _selected(arm, rows)
    batch = arm.online.candidates or int(sft.get("per_device_train_batch_size", BATCH))
    micro = int(sft.get("gradient_accumulation_steps", 1))
    kept = _kept(arm, batch)
    per_epoch = [batch] * (selected // batch) + ([selected % batch] if selected % batch else [])
    steps_an_epoch = math.ceil(len(per_epoch) / micro)
    most = int(sft.get("max_steps") or -1)
    epochs = float(sft.get("num_train_epochs", 3.0))
    steps = most if most > 0 else math.ceil(epochs * steps_an_epoch)
    trained, read = _counted(per_epoch, micro, steps, arm, batch)
    if stop is not None and not arm.plain:
        rows_to_train = stop / mean_tokens
        read = round(read * rows_to_train / max(1, trained))
        trained = round(rows_to_train)
        steps = math.ceil(SLACK * rows_to_train / (kept * micro))
    scored = read if arm.online.scores_with_model else 0
    return Plan(
        rows=selected,
        candidates=batch,
        kept=kept * micro,
        steps=steps,
        trained_rows=trained,
        read_rows=read,
        trained_tokens=round(trained * mean_tokens),
        forward_tokens=round((scored + trained) * mean_tokens),
    )


def _selected(arm: Arm, rows: int) -> int:
    """Rows after the offline method."""
    if arm.budget is None:
        return rows
    amount = parse_keep(arm.budget)
    if amount.count is not None and amount.count > rows:
        raise UserError(f"budget {arm.budget} of {arm.label} exceeds the {rows} rows of the study's pool; lower it")
    if (kept := amount.rows(rows)) < 1:
        raise UserError(f"budget {arm.budget} of {arm.label} is less than one of the {rows} rows; raise it")
    return kept


def _kept(arm: Arm, batch: int) -> int:
    """Rows of a full micro-batch that are trained on."""
    if arm.online.method is None:
        return batch
    amount = parse_keep(arm.online.settings.get("keep", "all"))
    if amount.count is not None and amount.count > batch:
        raise UserError(
            f"online {arm.online.name}: keep={amount.count} exceeds the {batch} candidates of a micro-batch; lower keep, "
            "or raise candidates"
        )
    if (kept := amount.rows(batch)) < 1:
        raise UserError(
            f"online {arm.online.name}: keep={arm.online.settings.get('keep')!r} is less than one of {batch} candidates; "
            "raise keep or candidates"
        )
    return kept


def _counted(per_epoch: Sequence[int], micro: int, steps: int, arm: Arm, batch: int) -> tuple[int, int]:
    """Trained and read rows of `steps` optimiser steps over repeated epochs."""
    keep = None if arm.online.method is None else parse_keep(arm.online.settings.get("keep", "all"))
    by_step = []
    for start in range(0, len(per_epoch), micro):
        window = per_epoch[start : start + micro]
        trained = sum(size if keep is None else min(size, max(1, keep.rows(size))) for size in window)
        by_step.append((trained, sum(window)))
    complete, remaining = divmod(steps, len(by_step))
    first = by_step[:remaining]
    return (
        complete * sum(trained for trained, _ in by_step) + sum(trained for trained, _ in first),
        complete * sum(read for _, read in by_step) + sum(read for _, read in first),
    )


def stop_of(study: Study, arms: Sequence[Arm], *, rows: int, mean_tokens: float) -> int | None:
    """Tokens at which every cell ends, or None: `tokens:` where it is set, else the mean tokens of the baseline's rows."""
    if study.equal == "rows":
        return None
    if study.tokens is not None:
        return study.tokens
    baseline = next(arm for arm in arms if arm.label == study.baseline)
    return plan_arm(study, baseline, rows=rows, mean_tokens=mean_tokens).trained_tokens


def check_equal(study: Study, arms: Sequence[Arm], plans: Mapping[Arm, Plan]) -> None:
    """Refuse a study whose arms would train different numbers of rows (beyond one step). Raises `UserError`."""
    if study.equal != "rows":
        return
    for group in groups_of(arms):
        baseline = baseline_of(study, arms, group)
        if baseline is None or baseline.plain:
            continue
        for arm in arms:
            if arm.group not in (group, None) or arm.plain:
                continue
            plan, baseline_plan = plans[arm], plans[baseline]
            if abs(plan.trained_rows - baseline_plan.trained_rows) > max(plan.kept, baseline_plan.kept):
                raise UserError(
                    f"{arm.label} would train {plan.trained_rows:,} rows and the baseline {baseline.label} "
                    f"{baseline_plan.trained_rows:,}; make them equal (budget, keep, candidates), or set equal: tokens"
                )
