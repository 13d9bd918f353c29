"""The program of test_ranks_deepspeed.py: the trainer with ZeRO-2 and ZeRO-3 on the CPU, over gloo."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

from tests.laws.ranks_runs import made
from tests.trainers import losses


def run(folder: Path, stage: int) -> list[float]:
    """Losses of the scenario `uds` under one stage."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # shard the smallest weights, too
    config = {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    live = made(folder / f"zero-{stage}", "uds", 2, deepspeed=config)
    live.train()
    assert isinstance(live.model_wrapped, deepspeed.DeepSpeedEngine)
    assert live.model_wrapped.zero_optimization_stage() == stage
    return losses(live)


if __name__ == "__main__":
    # Its extension for shared memory would be compiled here; gloo does as well.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    found = {stage: run(base, stage) for stage in (2, 3)}
    if torch.distributed.get_rank() == 0:
        (base / "deepspeed.json").write_text(json.dumps(found))
