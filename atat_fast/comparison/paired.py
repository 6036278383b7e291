"""Differences between models evaluated on the same masks of the same sequences, over several training seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atat_fast.diffusion.bound import standard_error


@dataclass(frozen=True)
class Mean:
    """A mean over sequences and seeds, in nats a token.

    seeds: each seed's mean. se_data: the standard error from sequences and masks, of the values averaged over seeds. se_seeds:
    that from seeds, NaN for one seed. se: both together, or se_data for one seed. Interactions of seeds and sequences are in both
    parts, so se is slightly generous.
    """

    mean: float
    se: float
    se_data: float
    se_seeds: float
    seeds: list[float]


def mean_over_seeds(values: Tensor, strata: Tensor) -> Mean:
    """The mean of values [seeds, sequences]. strata [sequences, draws]: of the masks, the same for every seed.

    For the differences of two models' values this is a paired comparison: what makes a sequence or a mask easy for both cancels,
    so the error is far smaller than either's.
    """
    own = values.mean(1)
    data = standard_error(values.mean(0), strata)
    spread = float(own.std() / math.sqrt(len(own))) if len(own) > 1 else math.nan
    return Mean(float(own.mean()), math.hypot(data, spread) if len(own) > 1 else data, data, spread, own.tolist())


def share_to_match(x: Tensor, curve: Tensor, level: float) -> float:
    """The x at which a curve [points] reaches `level` for good, as a share of the last x; NaN if it ends above.

    Linear between points. The first point is the least answer, since nothing is known before it.
    """
    above = torch.nonzero(curve > level)
    i = int(above[-1]) + 1 if len(above) else 0
    if i == len(curve):
        return math.nan
    if i == 0:
        return float(x[0] / x[-1])
    before, after = float(curve[i - 1]), float(curve[i])
    at = float(x[i - 1]) + float(x[i] - x[i - 1]) * (before - level) / (before - after)
    return at / float(x[-1])
