"""Running means of the loss of hidden tokens by some trait of theirs, from all ranks, without waiting for a device."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

PRIOR = 10.0
"""Tokens of the mean loss that a cell begins with."""


class RunningLosses:
    """Decayed sums of losses and numbers of tokens by cell, the same on every rank.

    cells: their number.   decay: of the sums in a step.
    """

    def __init__(self, cells: int, decay: float, device: torch.device) -> None:
        self.decay = decay
        self.sums = torch.zeros(2, cells, device=device)
        """Losses, and numbers of tokens."""
        self.fresh = torch.zeros_like(self.sums)
        """This rank's sums of the step so far."""

    def means(self) -> Tensor:
        """The running mean of each cell in nats; that of all tokens where a cell has seen none."""
        total, count = self.sums
        mean = total.sum() / count.sum().clamp(min=1)
        means: Tensor = (total + PRIOR * mean) / (count + PRIOR)
        return means

    def observe(self, cells: Tensor, nll: Tensor) -> None:
        """Add the losses nll [R] of hidden tokens in these cells. No atomics: the same bits every time."""
        member = F.one_hot(cells, self.sums.shape[1]).to(self.fresh.dtype)
        self.fresh += torch.stack((nll.detach().to(self.fresh.dtype), torch.ones_like(nll))) @ member

    def step(self, ranks: int) -> None:
        """Take in what all ranks observed in this step. Every rank calls it."""
        if ranks > 1:
            dist.all_reduce(self.fresh)
        self.sums.mul_(self.decay).add_(self.fresh)
        self.fresh.zero_()
