"""Fitting both probes on stored features (DaaR, arXiv 2502.04380, stages 4 to 6).

psi_dom learns the pseudo-labels by cross-entropy; the entropy of its prediction is the reward; psi_div learns that
reward by mean squared error. Each row's target comes from a fold of psi_dom that never saw the row, because a probe
is surer of the rows it was fitted to, and psi_div would learn that over-fitting.
Cost: about 30 D^2 floating-point operations per row, probe and epoch; psi_dom is trained 1 + repeats * (folds - 1)
times over.

Axes: `B` rows of the probe set, `D` width, `K` domains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ...errors import UserError
from .calibration import calibration_error, temperature
from .probes import Probe, apply, entropy

ROUND_STEPS = 32
"""A small probe set is passed over until this many steps are done before the held-out loss is looked at: after the two
or three steps of its one pass that loss is noise, and training would stop at the first of them."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ProbeTraining:
    """How both probes are trained. The defaults are siftune's; `ProbeTraining.paper()` is the published setting."""

    lr: float = 1e-3
    """Learning rate of AdamW (paper: 1e-5, Adam, which one epoch of single rows needs 5,000 steps to use)."""
    weight_decay: float = 1.0
    """AdamW's decoupled decay; 0 is Adam (paper). Strong, because a steadier reward chooses steadier rows."""
    batch: int = 128
    """Rows of a step (paper: 1)."""
    epochs: int = 24
    """At most this many passes (paper: 1); above 1, a small probe set counts `ROUND_STEPS` steps as one."""
    patience: int = 3
    """Epochs without a better validation loss before training stops; the best epoch's weights are kept."""
    validation: float = 0.1
    """Share of the probe set held out for stopping, accuracy and temperature (paper: 0.03)."""
    standardise: bool = True
    """Bring every feature to mean 0 and spread 1 first (paper: no)."""
    folds: int = 3
    """Folds of the cross-fitted reward targets; 1 takes the targets from psi_dom itself (paper)."""
    repeats: int = 3
    """Times the cross-fit is repeated, on other folds and weights; p is averaged before H is taken. One probe's H is
    noisy near a domain's border, and the chosen rows change with it from seed to seed."""
    calibrate: bool = True
    """Divide psi_dom's logits by a fitted temperature before p and H are taken (paper: no)."""
    threads: int = 1
    """CPU threads while training: fixed, so that a rerun is bit-identical; more pays from a width of about 1,000."""

    def check(self) -> None:
        """Raise `UserError` for a setting that cannot train anything."""
        for name in ("lr", "batch", "epochs", "patience", "folds", "repeats", "threads"):
            if getattr(self, name) <= 0:
                raise UserError(f"training {name}={getattr(self, name)} must be above 0")
        if not 0 < self.validation < 1:
            raise UserError(
                f"training validation={self.validation} is not a share of the probe set; set it to 0.03 to 0.3"
            )

    @classmethod
    def paper(cls) -> ProbeTraining:
        """lr 1e-5, Adam, single rows, one epoch, 97/3 split, features and logits as they are, no cross-fitting."""
        return cls(
            lr=1e-5, weight_decay=0.0, batch=1, epochs=1, validation=0.03, standardise=False, folds=1, calibrate=False
        )


@dataclass(frozen=True, eq=False)
class FittedProbes:
    """psi_dom, psi_div and the facts of their training (JSON-able)."""

    domain: Probe
    reward: Probe
    info: dict[str, Any]


def fit_probes(
    hidden_BD: torch.Tensor,
    labels_B: NDArray[np.int64],
    present_K: NDArray[np.bool_],
    training: ProbeTraining,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> FittedProbes:
    """Both probes from features `(B, D)` float32 and pseudo-labels `(B,)`; deterministic in `seed`.

    `present_K` marks the domains that the probe set holds; the others get probability 0.

    >>> fit_probes(torch.randn(64, 8), np.arange(64) % 2, np.array([True, True]), ProbeTraining(), seed=0).info
    """
    labels = torch.from_numpy(labels_B.astype(np.int64))
    fit = _Fit(hidden_BD.float().contiguous().to(device), training, seed, torch.device(device))
    train_rows, held_rows = split(len(labels_B), training.validation, seed)
    with fixed_threads(training.threads):
        domain, epochs = fit.domain(labels, present_K, train_rows, held_rows, name="domain")
        info = _quality(domain, fit.hidden_BD, labels, train_rows, held_rows, training.calibrate) | {"epochs": epochs}
        target_B, info["folds"] = _targets(fit, domain, labels, present_K, epochs)
        reward, info["reward_epochs"] = fit.reward(target_B, train_rows, held_rows)
        predicted = apply(reward, fit.hidden_BD[held_rows]).double().cpu().squeeze(1)
    info["reward_r2"] = _explained(predicted, target_B[held_rows])
    info["target_mean"], info["target_max"] = float(target_B.mean()), float(target_B.max())
    return FittedProbes(domain.cpu(), reward.cpu(), info)


def split(rows: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on and rows held out, each ascending; at least one of either where there are two rows."""
    held_out_rows = min(max(1, round(share * rows)), rows - 1) if rows > 1 else 0
    order = torch.randperm(rows, generator=seeded(seed, "split"))
    return order[held_out_rows:].sort().values, order[:held_out_rows].sort().values


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A separate CPU generator for every purpose, so that no step's draws depend on another's."""
    digest = blake2b(f"{seed}\0{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """`count` CPU threads inside; the caller's number is restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Shared by every fit of a probe: the features, the settings, the seed."""

    hidden_BD: torch.Tensor
    training: ProbeTraining
    seed: int
    device: torch.device

    def domain(
        self,
        labels_B: torch.Tensor,
        present_K: NDArray[np.bool_],
        rows: torch.Tensor,
        held: torch.Tensor,
        *,
        name: str,
        epochs: int | None = None,
    ) -> tuple[Probe, int]:
        """psi_dom on `rows`, and the epochs it took; `epochs` set trains exactly so many."""
        probe = self._fresh(len(present_K), rows, name)
        probe.output_offset[torch.from_numpy(~present_K).to(self.device)] = -torch.inf
        epochs_trained = self._train(
            probe, labels_B.to(self.device), rows, held, functional.cross_entropy, name, epochs
        )
        return probe, epochs_trained

    def reward(self, target_B: torch.Tensor, rows: torch.Tensor, held: torch.Tensor) -> tuple[Probe, int]:
        """psi_div on `rows`. The MLP learns the target in units of its own spread; the loss is in the same units."""
        probe = self._fresh(1, rows, "reward")
        spread = 1.0
        if self.training.standardise:
            deviation = float(target_B[rows].std(unbiased=False))
            spread = deviation if deviation > 0 else 1.0
            probe.output_scale.fill_(spread)
            probe.output_offset.fill_(float(target_B[rows].mean()))

        def squared_error(predicted_B1: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
            return (((predicted_B1.squeeze(1) - target_B) / spread) ** 2).mean()

        epochs_trained = self._train(probe, target_B.float().to(self.device), rows, held, squared_error, "reward", None)
        return probe, epochs_trained

    def _fresh(self, outputs: int, rows: torch.Tensor, name: str) -> Probe:
        probe = Probe(self.hidden_BD.shape[1], outputs, generator=seeded(self.seed, f"{name} weights"))
        probe.to(self.device)
        if self.training.standardise:
            probe.standardise(self.hidden_BD[rows])
        return probe

    def _train(
        self,
        probe: Probe,
        target_B: torch.Tensor,
        rows: torch.Tensor,
        held: torch.Tensor,
        loss: Loss,
        name: str,
        epochs: int | None,
    ) -> int:
        """Gradient descent in place; returns the epoch kept (the last, or the best on the held-out rows)."""
        settings = self.training
        optimizer = torch.optim.AdamW(
            probe.mlp.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, foreach=True
        )
        shuffle = seeded(self.seed, f"{name} order")
        best, best_epoch, kept = float("inf"), 0, probe.state_dict()
        for epoch in range(1, (epochs or settings.epochs) + 1):
            for batch in self._round(rows, shuffle):
                optimizer.zero_grad(set_to_none=True)
                loss(probe(self.hidden_BD[batch]), target_B[batch]).backward()
                optimizer.step()
            if epochs is not None or settings.epochs == 1 or not len(held):
                best_epoch, kept = epoch, probe.state_dict()
                continue
            now = float(loss(apply(probe, self.hidden_BD[held]), target_B[held]))
            if now < best:
                best, best_epoch, kept = now, epoch, copy.deepcopy(probe.state_dict())
            elif epoch - best_epoch >= settings.patience:
                break
        probe.load_state_dict(kept)
        return best_epoch

    def _round(self, rows: torch.Tensor, shuffle: torch.Generator) -> Iterator[torch.Tensor]:
        """Batches of one epoch: one pass in random order, or several where the probe set is small."""
        steps = -(-len(rows) // self.training.batch)
        passes = -(-ROUND_STEPS // steps) if self.training.epochs > 1 else 1
        for _ in range(passes):
            yield from rows[torch.randperm(len(rows), generator=shuffle)].split(self.training.batch)


def _quality(
    probe: Probe, hidden_BD: torch.Tensor, labels_B: torch.Tensor, rows: torch.Tensor, held: torch.Tensor, scale: bool
) -> dict[str, Any]:
    """Accuracy and calibration on the held-out rows; sets the probe's temperature when `scale`."""
    logits, labels = apply(probe, hidden_BD[held]).double().cpu().numpy(), labels_B[held].numpy()
    fitted = temperature(logits, labels)
    if scale:
        probe.output_scale.fill_(1 / fitted)
    trained = apply(probe, hidden_BD[rows]).argmax(dim=1).cpu() == labels_B[rows]
    return {
        "validation_rows": len(labels),
        "validation_accuracy": float((logits.argmax(axis=1) == labels).mean()) if len(labels) else None,
        "training_accuracy": float(trained.double().mean()),
        "temperature": fitted if scale else 1.0,
        "calibration_error_before": calibration_error(logits, labels),
        "calibration_error_after": calibration_error(logits / (fitted if scale else 1.0), labels),
    }


def _targets(
    fit: _Fit, domain: Probe, labels_B: torch.Tensor, present_K: NDArray[np.bool_], epochs: int
) -> tuple[torch.Tensor, int]:
    """Reward targets H `(B,)` float64, cross-fitted, and the number of folds.

    Every fold is trained for as many epochs as psi_dom took; one temperature serves all logits of a repeat.
    """
    rows, folds = len(labels_B), min(fit.training.folds, len(labels_B))
    if folds < 2:
        return torch.from_numpy(entropy(apply(domain, fit.hidden_BD))[0]), 1
    mean_BK = torch.zeros(rows, len(present_K), dtype=torch.float64)
    for repeat in range(fit.training.repeats):
        logits_BK = torch.empty_like(mean_BK)
        for index, fold in enumerate(cut_folds(rows, folds, fit.seed, repeat)):
            seen = torch.ones(rows, dtype=torch.bool)
            seen[fold] = False
            inside = seen.nonzero().squeeze(1)
            probe, _ = fit.domain(labels_B, present_K, inside, fold, name=f"fold {repeat} {index}", epochs=epochs)
            logits_BK[fold] = apply(probe, fit.hidden_BD[fold]).double().cpu()
        if fit.training.calibrate:
            logits_BK /= temperature(logits_BK.numpy(), labels_B.numpy())
        mean_BK += torch.from_numpy(entropy(logits_BK)[1]) / fit.training.repeats
    return torch.from_numpy(entropy(mean_BK.log())[0]), folds


def cut_folds(rows: int, folds: int, seed: int, repeat: int = 0) -> Sequence[torch.Tensor]:
    """A random cut of the rows into `folds` parts of nearly equal size."""
    return torch.randperm(rows, generator=seeded(seed, f"folds {repeat}")).tensor_split(folds)


def _explained(predicted_B: torch.Tensor, target_B: torch.Tensor) -> float | None:
    """Share of the target's variance on the held-out rows that psi_div explains; None where it does not vary."""
    spread = float(((target_B - target_B.mean()) ** 2).sum()) if len(target_B) else 0.0
    return 1 - float(((predicted_B - target_B) ** 2).sum()) / spread if spread > 0 else None
