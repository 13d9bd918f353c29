"""Selection with sharded models, over gloo: a training loop of its own, because the library's trainer does not shard on a
CPU. Also the program that torchrun starts; see test_ranks_sharded.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from siftune.hook.batching import Padding
from siftune.hook.exchange import Ranks
from siftune.hook.selection_step import select_step
from siftune.models.sharded import is_sharded
from siftune.online.base import OnlineMethod
from siftune.online.maxloss import MaxLoss
from siftune.online.uds import UDS
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model

STEPS, GLOBAL = 4, 8


class Doubling(nn.Linear):
    """A head whose logits are not its weight times the states: no formula holds, the model's own logits are taken."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


def batches() -> list[dict[str, torch.Tensor]]:
    """Global micro-batches; the ranks' shares differ in length, and so in forward passes."""
    lengths = [[30, 28, 29, 31, 5, 6, 4, 7], [3, 4, 5, 3, 22, 25, 20, 30], [9, 30, 4, 4, 8, 3, 5, 6], [12] * 8]
    made = []
    for index in range(2 * STEPS):
        one = tiny_batch(lengths[index % 4], seed=index)
        labels = one["input_ids"].masked_fill(one["attention_mask"] == 0, -100)
        labels[5:7] = -100  # rows without a label want no pass where logits are taken row by row
        made.append({**one, "labels": labels})
    return made


SCENARIOS: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": 2},
    "fsdp2-frozen-head": {"kind": 2, "frozen": True},
    "fsdp2-bias-cap": {"kind": 2, "family": "gemma2"},
    "fsdp2-own-logits": {"kind": 2, "head": Doubling, "method": MaxLoss},
    "fsdp2-maxloss": {"kind": 2, "method": MaxLoss},
    "fsdp1": {"kind": 1},
    "fsdp1-head-unit": {"kind": 1, "flat": True, "frozen": True},
}


def model_of(family: str = "llama", head: type[nn.Linear] | None = None, frozen: bool = False) -> Any:
    """A tiny model; `frozen` freezes its head, which is then no embedding either."""
    model = tiny_model(family, layers=2, width=16)
    if head is not None:
        model.lm_head.__class__ = head
    if frozen:
        model.lm_head.requires_grad_(False)
    return model


def spread(model: Any, kind: int, flat: bool) -> Any:
    """The model sharded over the processes: its layers are units, the rest is one (or two, where `flat`)."""
    layers = list(model.model.layers)
    if kind == 2:
        for layer in layers:
            fully_shard(layer)
        fully_shard(model, mp_policy=MixedPrecisionPolicy())
        assert isinstance(next(iter(model.model.layers[0].parameters())), DTensor)
        return model
    how: dict[str, Any] = {"use_orig_params": not flat, "device_id": torch.device("cpu")}
    for index, layer in enumerate(layers):
        model.model.layers[index] = FullyShardedDataParallel(layer, **how)
    if flat:
        model.lm_head = FullyShardedDataParallel(model.lm_head, **how)
    return FullyShardedDataParallel(model, **how)


def run(
    ranks: Ranks,
    kind: int,
    *,
    family: str = "llama",
    head: type[nn.Linear] | None = None,
    frozen: bool = False,
    flat: bool = False,
    method: type[OnlineMethod] = UDS,
) -> dict[str, Any]:
    """Two micro-batches a step; every step's kept candidates, totals and loss."""
    model = model_of(family, head, frozen)
    if ranks.world > 1:
        model = spread(model, kind, flat)
        assert is_sharded(model)
    selector = method(keep="1/4", score_tokens=40)  # type: ignore[call-arg]
    optimiser = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.3)
    share = GLOBAL // ranks.world
    kept: list[list[int]] = []
    totals: list[list[float]] = []
    losses: list[float] = []
    for step in range(STEPS):
        mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
        held = [{name: value[mine] for name, value in one.items()} for one in batches()[2 * step : 2 * step + 2]]
        done = select_step(selector, model, held, ranks=ranks, padding=Padding(left=True), allow_dummies=True)
        told = [int((one["labels"][:, 1:] != -100).sum()) for one in done.batches]
        tokens = sum(ranks.gather_ints(sum(told)))
        model.train()
        sums = torch.zeros(1)
        for one in done.batches:
            logits = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), one["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss * ranks.world / tokens).backward()
            sums += loss.detach()
        optimiser.step()
        optimiser.zero_grad()
        if ranks.world > 1:
            torch.distributed.all_reduce(sums)
        losses.append(float(sums) / tokens)
        kept.append(done.kept.nonzero().flatten().tolist())
        totals.append(done.total.tolist())
    return {"kept": kept, "totals": totals, "losses": losses}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    here = Ranks.current()
    found = {name: run(here, **options) for name, options in SCENARIOS.items()}
    if here.rank == 0:
        (Path(sys.argv[1]) / "sharded.json").write_text(json.dumps(found))
