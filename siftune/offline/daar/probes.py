"""The two probes on h(x), and the entropy between them (DaaR, arXiv 2502.04380, stages 4 to 6).

A probe is the MLP d -> 2d -> d -> d/2 -> 256 -> outputs with ReLU: K logits for psi_dom (which pseudo-domain), one
number for psi_div (predicted entropy of psi_dom, the reward: higher is more ambiguous, hence more diverse).
An affine map is on either side: the standardiser before the MLP; behind it 1/temperature and, for domains that
the probe set does not hold, -inf (psi_dom), or the target's spread and mean (psi_div).
Cost: about 5 D^2 multiply-adds per row and probe.

Axes: `B` rows, `D` width, `K` domains.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

FORWARD_ROWS = 1024
"""Rows of one forward pass through a probe; bounds its memory, whatever the shard's size."""


class Probe(nn.Module):
    """scale * MLP((h - mean) / spread) + offset. All of it is in `state_dict`.

    The weights are drawn from `generator` (uniform, He) and the global random state is unchanged.

    >>> probe = Probe(256, 4, generator=torch.Generator().manual_seed(0))
    >>> probe(torch.zeros(8, 256)).shape
    torch.Size([8, 4])
    """

    input_mean: torch.Tensor
    input_spread: torch.Tensor
    output_scale: torch.Tensor
    output_offset: torch.Tensor

    def __init__(self, width: int, outputs: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        sizes = layer_sizes(width, outputs)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [_linear(fan_in, fan_out, generator), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.register_buffer("input_mean", torch.zeros(width))
        self.register_buffer("input_spread", torch.ones(width))
        self.register_buffer("output_scale", torch.ones(outputs))
        self.register_buffer("output_offset", torch.zeros(outputs))

    @property
    def width(self) -> int:
        return len(self.input_mean)

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Outputs `(B, K)` or `(B, 1)` for features `(B, D)`."""
        inner: torch.Tensor = self.mlp((hidden_BD - self.input_mean) / self.input_spread)
        return inner * self.output_scale + self.output_offset

    def standardise(self, hidden_BD: torch.Tensor) -> None:
        """Take mean and spread of the features from these rows; a feature that never varies keeps spread 1."""
        rows = hidden_BD.double()
        spread = rows.std(dim=0, unbiased=False)
        self.input_mean.copy_(rows.mean(dim=0))
        self.input_spread.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))


def layer_sizes(width: int, outputs: int) -> tuple[int, ...]:
    """Widths from the features to the outputs, as in the paper.

    >>> layer_sizes(3584, 4)
    (3584, 7168, 3584, 1792, 256, 4)
    """
    return (width, 2 * width, width, max(1, width // 2), 256, outputs)


def _linear(fan_in: int, fan_out: int, generator: torch.Generator | None) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    with torch.no_grad():
        if generator is None:  # about to be filled by load_state_dict
            layer.weight.zero_()
        else:
            bound = (6 / fan_in) ** 0.5
            layer.weight.copy_((torch.rand(fan_out, fan_in, generator=generator) * 2 - 1) * bound)
        layer.bias.zero_()
    return layer


@torch.no_grad()
def apply(probe: Probe, hidden_BD: torch.Tensor) -> torch.Tensor:
    """The probe's outputs for many rows on its own device, `FORWARD_ROWS` at a time, without gradients."""
    device = probe.input_mean.device
    blocks = [probe(block.to(device)) for block in hidden_BD.split(FORWARD_ROWS)]
    return torch.cat(blocks) if blocks else torch.empty(0, len(probe.output_scale), device=device)


def entropy(logits_BK: torch.Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """H(x) = -sum_k p_k ln p_k `(B,)` in nats, and p `(B, K)`, p = softmax of the logits; 0 ln 0 = 0.

    In float64: near-certain rows, whose H is far below float32's step at 1, keep their order.

    >>> entropy(torch.zeros(1, 4))[0].round(4).tolist()
    [1.3863]
    """
    log_p = logits_BK.detach().double().cpu().log_softmax(dim=1)
    p = log_p.exp()
    h = -(p * torch.where(p > 0, log_p, torch.zeros_like(log_p))).sum(dim=1)
    return h.numpy(), p.numpy()
