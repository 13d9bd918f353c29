"""Run by torchrun in test_attach_ranks.py: two processes, each sifting its own candidates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from siftune import UserError, attach
from siftune.online.simple import Random
from tests.trainers import Drifting, ledger, rows, trainer, weights

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Ranks get different shares of the answerless rows and of the short last batch, so their widths and counts differ.
    live = trainer(folder, gradient_accumulation_steps=2, per_device_train_batch_size=4, ddp_backend="gloo",
                   save_strategy="steps", save_steps=2)  # fmt: skip
    assert live.args.world_size == 2
    with pytest.raises(UserError, match='scope="local"'):
        attach(live, Random(keep="1/2"))
    attach(live, Drifting(keep="1/2", scope="local"), quiet=True)
    live.train()
    torch.distributed.barrier()
    gathered: list[object] = [None, None]
    torch.distributed.all_gather_object(gathered, sum(float(value.double().sum()) for value in weights(live).values()))
    assert gathered[0] == gathered[1], gathered
    if live.is_world_process_zero():
        lines = ledger(folder)
        assert {line["rank"] for line in lines} == {0, 1}
        assert sorted(line["row"] for line in lines) == list(range(len(rows())))
        state = folder / "checkpoint-2" / "siftune"
        assert {path.name for path in state.iterdir()} == {
            "COMPLETE", "selector.json", "selector.safetensors", "selector-rank1.json", "selector-rank1.safetensors",
        }  # fmt: skip
        print("two ranks agree")
