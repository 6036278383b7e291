"""A law of the counts that is learned: more of the counts at which context begins to matter.

Let m(r) be the mean loss of a hidden token if a share r of its sequence is hidden. It rises from almost nothing to the entropy of
a token alone. Where it rises steeply, what is visible decides what can be said. The law is proportional to that slope, as in the
time warping of Dieleman et al. (arXiv 2211.15089), mixed with uniform counts, so that every loss stays known. m is a running mean
in BINS bins of the share; the law follows it every PERIOD steps, which is when the host waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atat_fast.diffusion.running import RunningLosses

BINS = 16
DECAY = 0.99
"""Of the running sums in a step: they hold about the last hundred."""
PERIOD = 25
"""Steps between two looks at them."""
UNIFORM = 0.2
"""The share of uniform counts in the law."""


class CountLaw:
    """The learned law of a run. It begins as `start`, chances [L + 1] of counts, and is the same on every rank."""

    def __init__(self, start: Tensor, device: torch.device) -> None:
        self.length = len(start) - 1
        self.losses = RunningLosses(BINS, DECAY, device)
        self.bins = (torch.zeros(BINS, dtype=torch.float64).index_add_(0, self._bin_of_counts(), start[1:])).to(
            device, torch.float32
        )
        """Chance of each bin."""
        self._chances: Tensor | None = None

    def chances(self) -> Tensor:
        """Chances [L + 1] fp64 of the counts, on the host; 0 at k = 0, which has nothing to learn from."""
        if self._chances is None:
            self._chances = spread_out(self.bins.cpu().double(), self._bin_of_counts())
        return self._chances

    def observe(self, hidden_share: Tensor, rows: Tensor, nll: Tensor) -> None:
        """Add the losses nll [R] of a batch's hidden tokens at rows [R]; hidden_share [B] of their sequences."""
        bins = bins_of(hidden_share)
        self.losses.observe(bins[torch.div(rows, self.length, rounding_mode="floor")], nll)

    def step(self, step: int, ranks: int) -> None:
        """Take in what all ranks observed in step `step`; every PERIOD steps, follow it."""
        self.losses.step(ranks)
        if (step + 1) % PERIOD == 0:
            self.bins.copy_(law_of(self.losses.means()))
            self._chances = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        self._chances = None  # it may be about to be loaded
        return {"count_losses": self.losses.sums, "count_law": self.bins}

    def _bin_of_counts(self) -> Tensor:
        return bins_of(torch.arange(1, self.length + 1) / max(1, self.length))


def bins_of(share: Tensor) -> Tensor:
    """The bin of each hidden share in (0, 1]: int64."""
    return (share * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)


def law_of(means: Tensor) -> Tensor:
    """Chances [BINS] from the mean loss in each bin: its slope, smoothed and at least 0, mixed with uniform counts."""
    padded = torch.cat((2 * means[:1] - means[1:2], means, 2 * means[-1:] - means[-2:-1]))
    slope = ((padded[2:] - padded[:-2]) / 2).clamp(min=0)
    smooth = torch.nn.functional.avg_pool1d(slope[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    total = smooth.sum()
    share = torch.where(total > 0, smooth / total.clamp(min=torch.finfo(smooth.dtype).tiny), 1 / BINS)
    return (1 - UNIFORM) * share + UNIFORM / BINS


def spread_out(bins: Tensor, of_counts: Tensor) -> Tensor:
    """Chances [L + 1] of counts from those of bins; of_counts [L] is the bin of each count from 1 on."""
    each = torch.zeros_like(bins).index_add_(0, of_counts, torch.ones(len(of_counts), dtype=bins.dtype))
    chances = torch.cat((bins.new_zeros(1), bins[of_counts] / each[of_counts]))
    return chances / chances.sum() if len(of_counts) else torch.ones(1, dtype=bins.dtype)
