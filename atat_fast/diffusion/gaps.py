"""Weights of hidden tokens by how much their context can tell: the distances to the nearest visible tokens.

    weight = (expected loss + FLOOR)^-power / its mean,   expected loss: a running mean for each pair of distances

A token between two visible neighbours is easy to tell; the loss of one deep inside a gap is mostly noise. The table has 81
numbers, for 9 distances on each side: 1, 2, up to 4, 8, 16, 32, 64, more, and none visible. Weights depend on the mask only, so
the best model is still p(token | visible tokens); audit/masks.py shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.running import RunningLosses
from atat_fast.errors import UsageError

EDGES = (1, 2, 4, 8, 16, 32, 64)
DISTANCES = len(EDGES) + 2
"""Distances up to each edge, longer ones, and none."""
CELLS = DISTANCES * DISTANCES
FLOOR = 0.1
"""Nats added to an expected loss, which tends to 0 where the context tells all."""
DECAY = 0.98
"""Of the running sums in a step: they hold about the last fifty."""


def cells_of(hidden: Tensor) -> Tensor:
    """The cell of every position, [B, L] int64 in 0 .. CELLS - 1, from hidden [B, L] bool. Visible positions get one too."""
    length = hidden.shape[1]
    position = torch.arange(length, device=hidden.device).expand_as(hidden)
    far = 2 * length + 2 * EDGES[-1]  # beyond every edge, so that it is told from a distance
    before = position - torch.cummax(torch.where(hidden, -far, position), dim=1).values
    after = torch.cummin(torch.where(hidden, position + far, position).flip(1), dim=1).values.flip(1) - position
    edges = (*EDGES, length + EDGES[-1])  # as numbers: a tensor of them would wait for the device
    left, right = (sum(((distance > edge).long() for edge in edges), torch.zeros_like(position)) for distance in (before, after))
    return left * DISTANCES + right


class GapTable(RunningLosses):
    """The running losses by cell, and the weights that follow from them."""

    def __init__(self, power: float, device: torch.device) -> None:
        super().__init__(CELLS, DECAY, device)
        self.power = power

    def weights(self, cells: Tensor) -> Tensor:
        """Relative weights of tokens [R] in these cells, of mean 1 over the tokens that the table has seen; ones before any."""
        raw = (self.means() + FLOOR) ** -self.power
        count = self.sums[1]
        mean = (raw * count).sum() / count.sum().clamp(min=1)
        return torch.where(count.sum() > 0, raw / mean.clamp(min=torch.finfo(raw.dtype).tiny), 1.0)[cells]


def check_blind(config: DiffusionConfig, most_level: float) -> None:
    """Raise UsageError for settings of spread masks and of weights by gaps that do not go together."""
    if not abs(config.spread) * most_level <= 1:
        raise UsageError(
            f"diffusion.spread {config.spread} times the curriculum's level {most_level:g} is no chance; "
            f"use at most {1 / max(most_level, 1e-9):g}"
        )
    for setting, wrong in (
        (f"masking {config.masking}", config.masking != "exact"),
        ("mirror true", config.mirror),
        (f"schedule {config.schedule}", config.schedule != "log_linear"),
    ):
        if config.spread and wrong:
            raise UsageError(
                f"diffusion.spread {config.spread} chooses tokens by where they lie, and diffusion.{setting} in its own way; set "
                "diffusion.spread 0, or masking exact, mirror false and schedule log_linear"
            )
    if not abs(config.gap_power) <= 4:
        raise UsageError(f"diffusion.gap_power must be in [-4, 4], got {config.gap_power}")
    if config.gap_power and config.schedule != "log_linear":
        raise UsageError(
            f"diffusion.gap_power {config.gap_power} weighs tokens, and diffusion.schedule {config.schedule} has weights of its "
            "own; set gap_power 0 or schedule log_linear"
        )
